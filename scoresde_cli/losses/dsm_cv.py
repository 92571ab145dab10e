"""Denoising score matching with sliced score matching as its control variate.

Given t, the gradients of SSM and of DSM in the weights have one mean (Stein's identity), so with their difference as a control
variate  g = g_DSM + w(t) (g_SSM - g_DSM)  is unbiased for every function w of t alone. As a loss, with DSM's constant left out:

    w (|S|^2 + 2 v^T J v) + (1 - w)(|S - target|^2 - |target|^2) = |S|^2 + 2 w v^T J v - 2 (1 - w) <S, target>

DSM is noisy at small t, where its target hardly depends on the data, SSM at large t. The variance at t is least at

    w* = -E<g_DSM, g_SSM - g_DSM> / E|g_SSM - g_DSM|^2                                            (section 9 of docs/theory.md)

which `training/mixing.py` estimates while training. Directions are pushed for the samples with w > 0 alone. Control variates of
the same two estimators where the data's energy is known: De Bortoli et al., arXiv 2402.08667.
"""

import copy
import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from scoresde_cli import divergence
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import MinTime, Times, Weighting
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.projections import Projection
from scoresde_cli.rng import uniform
from scoresde_cli.sdes.base import SDE, Noised

START = 0.25  # the threshold until w has been estimated
MOST = 0.9  # greater weights gain less than a tenth of the variance of SSM, and are taken as one, which no error of w can worsen
CELLS = 512  # of time
THIN = 4  # no time is drawn less often than one in so many of the loss's own law
LEAST = (
    0.4  # smaller weights save less than so great a part of the noise of DSM, cost a direction, and are taken as zero
)


def sigmoid(ratio: Tensor, threshold: float) -> Tensor:
    """1 / (1 + (r / r0)^4) of r = sigma / alpha."""
    return 1.0 / (1.0 + (ratio / threshold) ** 4)


def sparse(w: Tensor) -> Tensor:
    """w, zero where it is small, and one where it is near one."""
    return torch.where(w < LEAST, 0.0, torch.where(w > MOST, 1.0, w))


def ratio_of(sde: SDE, t: Tensor) -> Tensor:
    """sigma / alpha, (B,)."""
    kernel = sde.kernel()
    assert kernel is not None
    return kernel.sigma(t) / kernel.alpha(t)


class ByLevel:
    """A function of log(sigma / alpha): linear between nodes, constant beyond them.

    Args:
        nodes: ascending. values: there; as many.
    """

    def __init__(self, nodes: Tensor, values: Tensor) -> None:
        self.nodes, self.values = nodes, values

    def __call__(self, ratio: Tensor) -> Tensor:
        nodes, values = self.nodes.to(ratio), self.values.to(ratio)
        at = ratio.log().clamp(nodes[0], nodes[-1])
        right = torch.searchsorted(nodes, at.contiguous()).clamp(1, len(nodes) - 1)
        part = (at - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
        return torch.lerp(values[right - 1], values[right], part)


class Table:
    """w by time, and the law that times are drawn by: CELLS cells of about the same share of the loss's own law p each.

    In cell k times are uniform, and it has the probability q_k ~ p_k times `often`. A time t brings the weight
    p(t) |cell| / q_k, so that the weighted mean over a batch has the expectation of the plain one under p.
    """

    def __init__(self, loss: "DSMCV", sde: SDE, like: Tensor) -> None:
        low, high = loss.t_min, sde.T
        part = {"uniform": 1.0, "log_uniform": 0.0, "mixed": 0.5}[loss.times]
        self.even, self.log = part / (high - low), (1.0 - part) / math.log(high / low)
        fine = torch.cat(
            [torch.linspace(low, high, 4 * CELLS), torch.logspace(math.log10(low), math.log10(high), 4 * CELLS)]
        )
        fine = fine.double().clamp(low, high).unique()
        below = self.even * (fine - low) + self.log * (fine / low).log()
        edges = fine[torch.searchsorted(below, torch.arange(1, CELLS) / CELLS)].unique()
        ends = torch.cat([fine[:1], edges, fine[-1:]])
        own = (self.even * (ends - low) + self.log * (ends / low).log()).diff()
        middle = ((ends[1:] + ends[:-1]) / 2).to(like.device)
        w, often = loss.weight_of(sde, middle).cpu(), loss.often(sde, middle).cpu()
        q = own * often
        q = q / q.sum()
        after = q.cumsum(0)
        slope = ends.diff() / q
        found = (edges, w, after[:-1], ends[:-1] - slope * (after - q), slope)
        self.edges, self.w, self.after, self.base, self.slope = (each.to(like) for each in found)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n times in ascending order, stratified, and their weights, (n,) each."""
        u = (torch.arange(n, device=self.w.device) + uniform((n,), generator, self.w.dtype)) / n
        cell = torch.searchsorted(self.after, u, right=True)
        slope = self.slope[cell]
        t = torch.addcmul(self.base[cell], slope, u)
        return t, (self.even + self.log / t) * slope

    def __call__(self, t: Tensor) -> Tensor:
        """w, (B,)."""
        return self.w[torch.searchsorted(self.edges, t, right=True)]


class DSMCV(SSM):
    """w (|S|^2 + 2 v^T J v) + (1 - w)(|S - grad log p(x_t | x_0)|^2 - |grad log p(x_t | x_0)|^2); its value is that of ISM.

    Args:
        projection, n_proj: as for SSM, of the samples with w > 0; the trace is exact with n_proj >= d.
        threshold: auto for the w of least variance, estimated while training; a number r0 for 1 / (1 + (r/r0)^4), r = sigma/alpha.
        weighting, half, times, t_min: as for every loss (base.py).
    """

    name = "dsm_cv"
    formula = "w (|S|^2 + 2 v^T J v) + (1 - w)(|S - grad log p(x_t | x_0)|^2 - const)"
    needs_kernel = varying = True
    weights: ByLevel | None = None  # the estimated ones
    density: ByLevel | None = None  # of the times, relative to the loss's own law

    def __init__(
        self, projection: Projection, n_proj: PositiveInt = 1, threshold: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto",
        weighting: Weighting = "sigma2", half: bool = False, times: Times = "mixed", t_min: MinTime = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(projection, n_proj, weighting, half, times, t_min)
        self.threshold = threshold
        self.tables: dict[tuple[int, torch.dtype, torch.device], tuple[SDE, Table]] = {}

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        if sde.phase:
            raise ScoreSDEError(
                f"loss=dsm_cv has no weights for {type(sde).__name__}, whose noise acts on a velocity; dsm and ssm_vr work"
            )
        white = sde.whitening()
        kernel = (sde if white is None else white.sde).kernel()
        if kernel is not None and not kernel.scalar:
            raise ScoreSDEError(
                "loss=dsm_cv needs one noise level for all directions: sde.drift=isotropic; ssm_vr and dsm work"
            )

    def weight_of(self, sde: SDE, t: Tensor) -> Tensor:
        """w, (B,), exactly zero where it is small, and one where it is near one."""
        ratio = ratio_of(sde, t)
        if self.weights is not None:
            w = self.weights(ratio)
        else:
            w = sigmoid(ratio, START if self.threshold == "auto" else self.threshold)
        return sparse(w)

    def often(self, sde: SDE, t: Tensor) -> Tensor:
        """How often a time is drawn, relative to the loss's own law, (B,); before any estimate, least where w = 1."""
        if self.density is not None:
            return self.density(ratio_of(sde, t))
        return torch.where(self.weight_of(sde, t) == 1.0, 1.0 / THIN, 1.0)

    def table(self, sde: SDE, like: Tensor) -> Table:
        """The weights by time, made once."""
        key = (id(sde), like.dtype, like.device)
        if key not in self.tables:
            self.tables[key] = sde, Table(self, sde, like)  # with the process, so that its id stays its own
        return self.tables[key][1]

    def weighing(self, weights: ByLevel, density: ByLevel | None = None) -> "DSMCV":
        """The same loss with these weights and times."""
        found = copy.copy(self)
        found.weights, found.density, found.tables = weights, density, {}
        return found

    def noise(self, sde: SDE, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Noised]:
        """As for every loss, but by the table's law: ascending times, those with w > 0 before the others, with their weights."""
        table = self.table(sde, x0)
        t, weight = table.draw(len(x0), generator)
        order = (table(t) == 0.0).to(torch.uint8).argsort(stable=True)  # an estimated w need not fall all along
        t, weight = t[order].clamp(self.t_min, sde.T), weight[order]
        noised = sde.perturb(x0, t, generator)
        return t, replace(noised, aux={**noised.aux, "weight": weight})

    def frame(self, model: FieldModel, x: Tensor, t: Tensor, m: int, generator: torch.Generator) -> Tensor:
        """(K, m, *D), directions of the first m samples; with n_proj >= d those along the axes, whose mean is the exact trace."""
        d = x[0].numel()
        if self.n_proj < d:
            return self.directions(model, x, t, generator, m)
        axes = d**0.5 * torch.eye(d, device=x.device, dtype=x.dtype)
        return axes.unsqueeze(1).expand(d, m, d).reshape(d, m, *x.shape[1:])

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        x, w, kernel = noised.x_t, self.table(sde, t)(t), sde.kernel()
        assert kernel is not None
        target = kernel.targets(x0, noised, t, {"score"})["score"]
        some = w.nonzero()
        m = int(some[-1]) + 1 if len(some) else 0
        if m == 0:
            score, trace = model.score(x, t), torch.zeros_like(t)
        else:
            score, projected = divergence.score_and_projections(
                model, x, t, self.frame(model, x, t, m, generator), True
            )
            trace = F.pad(projected.mean(0), (0, len(x) - m))
        return score.square().flatten(1).sum(1) + 2.0 * (w * trace - (1.0 - w) * divergence.inner(score, target, 1))
