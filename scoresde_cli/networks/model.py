"""The score model: one network, its parameterisation, and the data's Gaussian part.

Where a process has white coordinates (SDE.whitening), the model is one of z, x = W z: there the network's input is white and its
output stands for white noise. score(x) = W^{-T} score(z); `whitened()` is the model in z, which needs no W at all.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde_cli import divergence
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel, Within
from scoresde_cli.networks.parameterisation import Coefficients, Parameterisation
from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE, GaussianKernel, Whitening
from scoresde_cli.sdes.operators import Inverse, expand
from scoresde_cli.sdes.whitened import MatrixKernel


@dataclass(frozen=True)
class Gaussian:
    """The data's mean m (d,), variances lam (d,) in the basis (d, d) of principal directions (None: the axes)."""

    mean: Tensor
    lam: Tensor
    basis: Tensor | None

    def sample(self, n: int, source: torch.Generator) -> Tensor:
        """n draws (n, d), float64."""
        y = normal((n, len(self.mean)), source, torch.float64) * self.lam.sqrt()
        return self.mean + (y if self.basis is None else y @ self.basis.T)

    def variances(self) -> Tensor:
        """Of each coordinate, (d,)."""
        return self.lam if self.basis is None else self.basis.square() @ self.lam

    def seen(self, view: Callable[[Tensor], Tensor]) -> "Gaussian":
        """The law of view(x), linear in x (n, d)."""
        root = self.lam.sqrt().diag() if self.basis is None else self.lam.sqrt().unsqueeze(1) * self.basis.T
        rows = view(root)  # sum of r r^T over the rows r is the covariance
        lam, basis = torch.linalg.eigh(rows.T @ rows)
        return Gaussian(view(self.mean.unsqueeze(0))[0], lam.clamp_min(0.0), basis)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density at x (n, *D), nats, (n,), float64; infinite off the support of a degenerate one."""
        y = x.double().flatten(1) - self.mean
        y = y if self.basis is None else y @ self.basis
        return -0.5 * (y.square() / self.lam + self.lam.log() + math.log(2 * math.pi)).sum(1)


def fit_gaussian(x: Tensor, covariance: str) -> Gaussian:
    """Moments of the data x (n, *D), in float64; covariance as in `Residual`, or "image": one mean for all pixels of a channel,
    and one variance for all, which shifts of an image leave as they are."""
    flat = x.flatten(1).double()
    n, d = flat.shape
    mean = flat.mean(0)
    if covariance == "image":
        axes = tuple(range(max(-2, 1 - x.ndim), 0))
        mean = mean.reshape(x.shape[1:]).mean(axes, keepdim=True).expand(x.shape[1:]).flatten()
    centred = flat - mean
    if covariance == "full" or (covariance == "auto" and d >= 16 and n > 10 * d):
        lam, basis = torch.linalg.eigh(centred.T @ centred / n)
        # Rounding can leave a constant direction with a tiny negative variance.
        return Gaussian(mean, lam.clamp_min(0.0), basis)
    lam = centred.square().mean().expand(d).clone()
    return Gaussian(mean, lam, None)


def fit_white(sde: SDE, x: Tensor, covariance: str) -> Gaussian:
    """`fit_gaussian` in the process's white coordinates, where it has such; in full where each is noised at its own level."""
    white = sde.whitening()
    if white is None:
        return fit_gaussian(x, covariance)
    kernel = white.sde.kernel()
    return fit_gaussian(white.into(x.double()), covariance if kernel is None or kernel.scalar else "full")


class Zero(nn.Module):
    """The network that returns zero: with the residual parameterisation, the Gaussian model of the data."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(v)

    def energy(self, x: Tensor, c: Tensor) -> Tensor:
        return x.new_zeros(len(x))


class ScoreModel(nn.Module, FieldModel):
    """score(x, t) of p_t from a network (x, c) -> (B, *D); see parameterisation.py for the equation.

    Args:
        network: any module that does not mix the samples of a batch.
        sde: a process whose noise levels, alpha and sigma, are known (SDE.levels).
        parameterisation: the coefficients.
        gaussian: moments of the training data, in white coordinates where the process has such.
    """

    white: Whitening | None
    mean: Tensor
    lam: Tensor
    basis: Tensor | None
    partial = True  # takes directions of the first samples alone (divergence.py)
    chunk: int | None = None  # directions that are pushed through the network at a time
    labels: Tensor | None = None  # (B,) or (1,) of a view made by `labelled`; -1 for none
    low: bool = False  # the network's matrix products in bfloat16; the linear part and the weights keep their precision

    def __init__(self, network: nn.Module, sde: SDE, parameterisation: Parameterisation, gaussian: Gaussian) -> None:
        super().__init__()
        self.white = sde.whitening()
        kernel = (sde if self.white is None else self.white.sde).levels()
        if kernel is None:
            raise ScoreSDEError(
                f"sde {type(sde).__name__} has neither a closed-form kernel nor levels: derive it from "
                "scoresde_cli.sdes.simulated.Simulated, which measures them"
            )
        self.network, self.sde, self.kernel = network, sde, kernel
        self.parameterisation, self.gaussian = parameterisation, gaussian
        self.classes = int(getattr(network, "classes", 0))
        if hasattr(network, "energy"):
            self.provides = self.provides | {"log_density"}
        # In float64 here; `.to(dtype)` on the whole model brings them to the network's precision.
        self.register_buffer("mean", gaussian.mean)
        if not kernel.scalar:  # coordinates are what is noised at its own level; only their variances are of use
            gaussian = Gaussian(gaussian.mean, gaussian.variances(), None)
        self.register_buffer("lam", gaussian.lam)
        self.register_buffer("basis", gaussian.basis if parameterisation.centred else None)

    def labelled(self, labels: Tensor | None) -> "ScoreModel":
        """The same model, same weights, given labels (B,) or (1,), -1 for none: the score of p_t(x | label)."""
        view = copy.copy(self)
        view.labels = labels
        return view

    def whitened(self) -> "ScoreModel":
        """The same model, same weights, of white coordinates."""
        if self.white is None:
            return self
        view = copy.copy(self)
        view.white, view.sde = None, self.white.sde
        return view

    @property
    def moments(self) -> Gaussian:
        """The Gaussian part in the data's own coordinates."""
        return self.gaussian if self.white is None else self.gaussian.seen(self.white.out)

    @property
    def variance(self) -> float:  # type: ignore[override]
        return float(self.lam.mean())

    def _turn(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis

    def _turn_back(self, y: Tensor) -> Tensor:
        return y if self.basis is None else y @ self.basis.T

    def _lowered(self, x: Tensor) -> AbstractContextManager[None]:
        return torch.autocast(x.device.type, torch.bfloat16) if self.low else nullcontext()

    def _coefficients(self, levels: tuple[Tensor, Tensor], t: Tensor, name: str) -> Coefficients:
        """skip, out, inp (B, d) of the score, at alpha and sigma of each coordinate."""
        skip, out, inp = self.parameterisation.coefficients(*levels, self.lam)
        if not self.kernel.gaussian and self.parameterisation.centred:
            out = torch.hypot(out, inp)  # there is something to correct at late times as well
        return skip, out, inp

    def _prepare(self, x: Tensor, t: Tensor, name: str = "score") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y (B, d), the noise level c (B,), and the coefficients skip, out, inp (B, d) of the field of that name."""
        alpha, sigma = self.kernel.alpha(t), self.kernel.sigma(t)
        y = x.flatten(1)
        if isinstance(self.kernel, MatrixKernel):
            levels = self.kernel.levels(t, self.lam)
            if self.parameterisation.centred:
                y = y - self.kernel.mean(self.mean.expand_as(y), t)
        else:
            levels = alpha.unsqueeze(1), sigma.unsqueeze(1)
            if self.parameterisation.centred:
                y = self._turn(y - self.kernel.mean(self.mean.expand_as(y), t))
        skip, out, inp = self._coefficients(levels, t, name)
        if getattr(self.network, "conservative", False):
            # diag(out) H diag(inp) is symmetric, so the score is still a gradient, where out is a multiple of inp.
            out = inp * (out / inp).mean(1, keepdim=True)
        c = 0.5 * torch.log(sigma / alpha)
        if self.classes:
            labels = torch.full_like(c, -1) if self.labels is None else self.labels.to(c)
            c = torch.stack([c, labels.repeat(len(c) // len(labels))], dim=1)
        return y, c, skip, out, inp

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.white is not None:
            return self.white.factor.solve_t(self.whitened()(self.white.into(x), t))
        y, c, skip, out, inp = self._prepare(x, t)
        with self._lowered(x):
            net = self.network((inp * y).reshape(x.shape), c).flatten(1)
        return self._turn_back(skip * y + out * net).reshape(x.shape)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)

    def gaussian_denoiser(self, y: Tensor, noise: Tensor) -> Tensor:
        """E[x_0 | x_0 + noise eps = y], shaped like y (B, *D): the same score, of the process with alpha = 1 and sigma = t."""
        view = copy.copy(self)
        view.kernel = GaussianKernel(torch.ones_like, torch.clone)
        return y + expand(noise.square(), y) * ScoreModel.forward(view, y, noise)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """1/2 sum skip y^2 + k e(inp y, c), whose gradient the score is where the network is the gradient of e and out = k inp."""
        if self.white is not None:
            return self.whitened().log_density(self.white.into(x), t)
        y, c, skip, out, inp = self._prepare(x, t)
        energy = self.network.energy((inp * y).reshape(x.shape), c)  # type: ignore[operator]
        return 0.5 * (skip * y.square()).sum(1) + (out / inp).mean(1) * energy

    def _coloured(self) -> Within:
        assert self.white is not None
        inverse = Inverse(self.white.factor)
        return Within(self.whitened(), self.sde, lambda t: inverse)

    def _push(self, x: Tensor, z: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with self._lowered(x):
            return divergence.dual(self.network, z.reshape(x.shape), c, v, self.chunk)

    def forward_dual(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), J v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        if self.white is not None:
            return self._coloured().forward_dual(x, t, v)
        y, c, skip, out, inp = self._prepare(x, t)
        w, m = self._turn(v.flatten(2)), v.shape[1]
        net, jvp = self._push(x, inp * y, c, (inp[:m] * w).reshape(v.shape))
        score = self._turn_back(skip * y + out * net.flatten(1))
        return score.reshape(x.shape), self._turn_back(skip[:m] * w + out[:m] * jvp.flatten(2)).reshape(v.shape)

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(score (B, *D), v_k^T J v_k (K, m)), in the network's own coordinates; with `exact`, the linear part's trace."""
        if self.white is not None:
            return self._coloured().forward_projections(x, t, v)
        y, c, skip, out, inp = self._prepare(x, t)
        w, m = self._turn(v.flatten(2)), v.shape[1]
        net, jvp = self._push(x, inp * y, c, (inp[:m] * w).reshape(v.shape))
        score = self._turn_back(skip * y + out * net.flatten(1))
        linear = skip[:m].sum(1) if exact else (skip[:m] * w.square()).sum(2)
        return score.reshape(x.shape), linear + (out[:m] * w * jvp.flatten(2)).sum(2)

    def forward_trace(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), tr J (B,)), exact; the trace is taken in the network's own coordinates."""
        if self.white is not None:
            return divergence.weighted_trace(self._coloured(), x, t, None)
        y, c, skip, out, inp = self._prepare(x, t)
        with self._lowered(x):
            net, trace = divergence.weighted_trace(self.network, (inp * y).reshape(x.shape), c, out * inp, self.chunk)
        score = self._turn_back(skip * y + out * net.flatten(1))
        return score.reshape(x.shape), skip.sum(1) + trace
