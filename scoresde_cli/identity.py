"""The identity L_ISM = E L_SSM as numbers, for a network, a dimension and a law: what `scoresde verify` prints.

Everything is in float64 at one batch of points. A z-score is (measured - exact) / standard error; with a right law all
of them are standard normal, so |z| < 4 fails by chance once in 16,000.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde_cli import divergence
from scoresde_cli.projections import Projection, moments
from scoresde_cli.rng import generator, normal

LIMIT = 4.0
POINTS = 4  # points at which the loss and its gradient are taken


@dataclass(frozen=True)
class Check:
    """One line of the table: what was measured, what was expected, and whether they agree."""

    name: str
    measured: float
    expected: float | None
    z: float | None
    good: bool


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """The network in float64 with every weight drawn anew, so that no layer is zero."""
    network = network.double()
    source = generator(seed, "verify", "weights")
    with torch.no_grad():
        for p in network.parameters():
            fan = p.shape[1] if p.ndim > 1 else 1
            p.copy_(normal(tuple(p.shape), source, torch.float64) / math.sqrt(fan))
    return network


def z_score(values: Tensor, expected: Tensor | float) -> Tensor:
    """(mean - expected) / standard error over the first axis; 0 where both agree to rounding."""
    mean = values.mean(0)
    error = values.std(0) / math.sqrt(len(values))
    off = mean - expected
    scale = 1e-9 * (1.0 + mean.abs())
    return torch.where(off.abs() < scale, torch.zeros_like(off), off / error.clamp_min(1e-300))


class Point:
    """A field at a batch of points: score, Jacobian, exact loss and exact gradient."""

    def __init__(self, network: nn.Module, d: int, seed: int) -> None:
        self.network = network
        self.x = normal((POINTS, d), generator(seed, "verify", "points"), torch.float64)
        self.t = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
        eye = torch.eye(d, dtype=torch.float64).unsqueeze(1).expand(d, POINTS, d).contiguous()
        with torch.no_grad():
            self.score, columns = divergence.dual(network, self.x, self.t, eye)
        self.jacobian = columns.permute(1, 2, 0)  # (POINTS, d, d): dS_i / dx_j
        self.exact, self.gradient = self.loss_and_gradient(None)
        self.by_autograd = torch.stack(
            [torch.autograd.functional.jacobian(lambda y, c=c: network(y[None], c[None])[0], y).diagonal().sum()
             for y, c in zip(self.x, self.t, strict=True)]
        )  # fmt: skip

    def loss_and_gradient(self, v: Tensor | None) -> tuple[float, Tensor]:
        """The mean loss over the points and its gradient in the weights: ISM, or SSM with directions v (K, POINTS, d)."""
        weights = list(self.network.parameters())
        if v is None:
            score, trace = divergence.score_and_trace(self.network, self.x, self.t)
            loss = (score.square().sum(1) + 2.0 * trace).mean()
        else:
            score, projected = divergence.score_and_projections(self.network, self.x, self.t, v)
            loss = (divergence.inner(v, score, 2).square() + 2.0 * projected).mean()
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        flat = [
            torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, grads, strict=True)
        ]
        return float(loss.detach()), torch.cat(flat)

    def push(self, w: Tensor) -> Tensor:
        """J w for w (K, draws * POINTS, d), the points of a draw side by side."""
        many = w.unflatten(1, (-1, POINTS))
        return torch.einsum("pij,kmpj->kmpi", self.jacobian, many).reshape(w.shape)

    def losses(self, v: Tensor) -> Tensor:
        """SSM for directions v (draws, n, POINTS, d), from the Jacobians: (draws,)."""
        quadratic = (v * self.score).sum(-1).square()
        projected = torch.einsum("mkpi,pij,mkpj->mkp", v, self.jacobian, v)
        return (quadratic + 2.0 * projected).mean((1, 2))


def draw(law: Projection, point: Point, n: int, draws: int, source: torch.Generator) -> Tensor:
    """`draws` independent sets of n directions for each point: (draws, n, POINTS, d)."""
    d = point.x.shape[1]
    v = law.directions(point.push, (draws * POINTS, d), n, source, torch.float64)
    return v.reshape(n, draws, POINTS, d).transpose(0, 1)


def checks(network: nn.Module, law: Projection, d: int, n: int, draws: int, seed: int) -> list[Check]:
    """Every line of the table for one law."""
    point = Point(network, d, seed)
    found = moments(law, d, draws, seed, n)
    # The largest of d z-scores (or d^2) of a right law: Bonferroni at the level of LIMIT.
    wide_mean, wide_second = bonferroni(d), bonferroni(d * d)
    lines = [
        Check("E[v], largest |z|", found["mean_z"], None, None, found["mean_z"] < wide_mean),
        Check("E[v v^T] - I, largest |z|", found["second_z"], None, None, found["second_z"] < wide_second),
    ]
    v = draw(law, point, n, draws, generator(seed, "verify", "loss"))
    losses = point.losses(v)
    z = float(z_score(losses, point.exact))
    lines.append(Check("E L_SSM against L_ISM", float(losses.mean()), point.exact, z, abs(z) < LIMIT))
    traces = torch.einsum("mki,ij,mkj->mk", v[:, :, 0], point.jacobian[0], v[:, :, 0]).mean(1)
    exact_trace = float(point.jacobian[0].diagonal().sum())
    z = float(z_score(traces, exact_trace))
    lines.append(Check("E v^T J v against tr J", float(traces.mean()), exact_trace, z, abs(z) < LIMIT))
    predicted = law.variance(point.jacobian[0], n)
    if predicted is not None:
        lines.append(variance_check(traces, exact_trace, float(predicted), draws))
    lines.append(gradient_check(point, law, n, seed))
    by_autograd = float((point.by_autograd - point.jacobian.diagonal(dim1=1, dim2=2).sum(1)).abs().max())
    lines.append(Check("tr J against reverse mode, largest error", by_autograd, 0.0, None, by_autograd < 1e-10))
    return [*lines, scale_check(law, d, n, draws, seed)]


def bonferroni(count: int) -> float:
    """The limit for the largest of `count` |z|, with the chance of LIMIT for one."""
    from scipy.stats import norm

    return float(norm.isf(norm.sf(LIMIT) / count))


def variance_check(traces: Tensor, mean: float, predicted: float, draws: int) -> Check:
    """The measured variance of the trace estimate against the closed form; its standard error from the fourth moment."""
    squares = (traces - mean).square()
    measured = float(squares.mean())
    if predicted < 1e-20:
        return Check("Var v^T J v, exact", measured, predicted, None, measured < 1e-18 * (1 + mean**2))
    z = float((squares.mean() - predicted) / (squares.std() / math.sqrt(draws)))
    return Check("Var v^T J v against the closed form", measured, predicted, z, abs(z) < LIMIT)


def gradient_check(point: Point, law: Projection, n: int, seed: int, draws: int = 400) -> Check:
    """The gradient of SSM against that of ISM along eight fixed random directions in weight space; the largest |z|."""
    along = normal((8, len(point.gradient)), generator(seed, "verify", "along"), torch.float64)
    v = draw(law, point, n, draws, generator(seed, "verify", "gradient"))
    gradients = torch.stack([along @ point.loss_and_gradient(one)[1] for one in v])
    z = float(z_score(gradients, along @ point.gradient).abs().max())
    measured, exact = float(gradients.mean(0).norm()), float((along @ point.gradient).norm())
    return Check("E grad L_SSM against grad L_ISM (8 ways)", measured, exact, z, z < bonferroni(8))


def scale_check(law: Projection, d: int, n: int, draws: int, seed: int) -> Check:
    """Sign and scale: with the exact score S = -x of N(0, I), the least L_SSM is -E|S|^2 = -d (convention |S|^2 + 2 tr J)."""
    x = normal((draws, d), generator(seed, "verify", "scale"), torch.float64)
    v = law.directions(torch.neg, (draws, d), n, generator(seed, "verify", "scale", 1), torch.float64)
    values = ((v * -x).sum(2).square() - 2.0 * v.square().sum(2)).mean(0)
    z = float(z_score(values, -float(d)))
    return Check("L_SSM of the exact score of N(0, I): -d", float(values.mean()), -float(d), z, abs(z) < LIMIT)
