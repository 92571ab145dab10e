"""The contract of every forward process  dx = f(x, t) dt + G(t, x) dW (+ jumps),  t from 0 (data) to T (noise).

A process states its coefficients; the model returns fields of x and t (the score and its kin); samplers and losses
state which fields they need. Nobody asks a process for its class. With Sigma = G G^T:

    reverse SDE                 dx = [f - Sigma score - div Sigma] dt + G dW,  t running backwards
    probability flow (an ODE)   dx = [f - 1/2 Sigma score - 1/2 div Sigma + flux] dt

Sources: Anderson, "Reverse-time diffusion equation models", Stoch. Proc. Appl. 12, 1982; Song et al., "Score-Based
Generative Modeling through Stochastic Differential Equations", ICLR 2021, eqs. 6 and 13.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scoresde_cli.divergence import weighted_trace
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import normal
from scoresde_cli.sdes.operators import LinearOperator, Product, Scalar, expand

if TYPE_CHECKING:
    from scoresde_cli.sdes.scale_table import ScaleTable


@dataclass(frozen=True)
class Noised:
    """x_t = mean + factor(eps), and what else a kernel wants to hand to its targets (`aux`)."""

    x_t: Tensor
    mean: Tensor | None = None
    factor: LinearOperator | None = None
    eps: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Jumps:
    """The Poisson part of a process: jumps at rate `rate(t)` (B,), with amplitudes `sample(n, shape, t, generator)`.

    `without` is the process that is left without them, where it is one of its own; `joint`: all coordinates jump together;
    `table(d, lam)`, where it is tractable: the law of x_t given an x_0 that is normal with variance lam, in d dimensions;
    `often(x0, t, generator)`: draws of x_t given x_0 of which at least half have jumped, however early it is, weighted for it.
    """

    rate: Callable[[Tensor], Tensor]
    sample: Callable[[int, tuple[int, ...], Tensor, torch.Generator], Tensor]
    without: "SDE | None" = None
    joint: bool = True
    table: "Callable[[int, float], ScaleTable] | None" = None
    often: Callable[[Tensor, Tensor, torch.Generator], Noised] | None = None


class Moments(NamedTuple):
    """Of a field u given x_0, at times (B,) and by coordinate: power E|u|^2 / d, and push E[u . (x_t - E x_t)] / d."""

    power: Tensor
    push: Tensor


class Levels(ABC):
    """How much of x_0 is in x_t, and how much noise: what a model scales its inputs and outputs by.

    `scalar` where both are one number for all directions; `gaussian` where x_t is a Gaussian once x_0 is forgotten.
    """

    scalar: bool = True
    gaussian: bool = True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor of x_0 in the mean of x_t, shape (B,); |det M|^(1/d) where that is a matrix."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The noise scale: root of the mean variance per coordinate of x_t given x_0, shape (B,)."""

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        """The mean of x_t given x_0, M(t) x_0, shape (B, *D)."""
        return expand(self.alpha(t), x0) * x0


class Kernel(Levels):
    """The law of x_t given x_0, where it is tractable: mean M(t) x_0 and covariance L L^T.

    `scalar` where M = alpha I and L = sigma I; else alpha and sigma are the level of the whole, and M and L come by `mean`,
    `origin` and `factor`. `diagonal` where both are so, which the samplers in closed steps stand on.
    """

    diagonal: bool = True

    @abstractmethod
    def factor(self, t: Tensor) -> LinearOperator:
        """L with L L^T = Cov(x_t | x_0)."""

    def unit(self, t: Tensor, d: int) -> Tensor:
        """d / E|grad log p(x_t | x_0)|^2, (B,): the square of the scale of the score; sigma^2 where that law is Gaussian."""
        return self.sigma(t).square()

    def shape(self, t: Tensor) -> LinearOperator:
        """R = L / sigma: coordinates u = R^{-1} x in which the noise is sigma I at the time t."""
        return Product(self.factor(t), Scalar(1.0 / self.sigma(t)))

    def origin(self, mean: Tensor, t: Tensor) -> Tensor:
        """The x_0 (B, *D) that has this mean."""
        return mean / expand(self.alpha(t), mean)

    def with_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Noised:
        """x_t from x0 and standard normal eps, (B, *D) each."""
        mean, factor = self.mean(x0, t), self.factor(t)
        return Noised(mean + factor.mul(eps), mean, factor, eps)

    def denoised(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """E[x_0 | x_t] (B, *D) from the score at x_t: that of the mean is x_t + L L^T score (Tweedie's formula)."""
        return self.origin(x + self.factor(t).cov(score), t)

    @abstractmethod
    def sample(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """A draw of x_t for each x0 (B, *D) and t (B,)."""

    @abstractmethod
    def targets(self, x0: Tensor, noised: Noised, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        """Regression targets (B, *D) whose conditional mean given x_t is the field of that name."""


class GaussianKernel(Kernel):
    """x_t = alpha(t) x_0 + sigma(t) eps, eps standard normal.

    Args:
        alpha: t (B,) -> (B,).
        sigma: t (B,) -> (B,), positive for t > 0.
    """

    def __init__(self, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> None:
        self._alpha, self._sigma = alpha, sigma

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._sigma(t)

    def factor(self, t: Tensor) -> LinearOperator:
        return Scalar(self._sigma(t))

    def sample(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        return self.with_noise(x0, t, normal(tuple(x0.shape), generator, x0.dtype))

    def targets(self, x0: Tensor, noised: Noised, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        assert noised.factor is not None
        assert noised.eps is not None
        known = {
            "eps": lambda: noised.eps,
            "score": lambda: -noised.factor.solve_t(noised.eps),
            "x0": lambda: x0,
        }
        return {name: known[name]() for name in names}


@dataclass(frozen=True)
class Whitening:
    """x = W z: coordinates z in which a process has Sigma = g(t)^2 I, and the process `sde` that z follows there.

    Scores change by grad_z = W^T grad_x, densities by log p_z = log p_x + log |det W|.
    """

    sde: "SDE"
    factor: LinearOperator

    def into(self, x: Tensor) -> Tensor:
        """z (B, *D) of x (B, *D)."""
        return self.factor.solve(x)

    def out(self, z: Tensor) -> Tensor:
        """x (B, *D) of z (B, *D)."""
        return self.factor.mul(z)

    def noised(self, x0: Tensor, t: Tensor, noised: Noised) -> Noised:
        """The same draw in z; where its eps is known, without the rounding of W^{-1} W eps."""
        kernel = self.sde.kernel()
        if noised.eps is None or kernel is None:
            return Noised(self.into(noised.x_t))
        return kernel.with_noise(self.into(x0), t, noised.eps)


class SDE(ABC):
    """A forward process on [0, T]; see the module's head for the equations.

    Attributes:
        kept: matrices that it took from files or from the data, by name: what a run remembers, and gives back as `kept`.
        still: x_t = x_0 at all times, so that there is no way back to follow.
        phase: the state x_t is a position, which is the data, and a velocity (phase.py); noise acts on the velocity alone, and the
            score is in it alone.
        remedy: what works where a closed-form kernel is needed and there is none.
    """

    T: float = 1.0
    still: bool = False
    phase: bool = False
    remedy: str = "euler_maruyama, euler_ode and heun_ode work"
    jumps: Jumps | None = None
    kept: Mapping[str, Tensor] = {}

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), shape (B, *D), for x (B, *D) and t (B,)."""

    @abstractmethod
    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        """G(t, x) as an operator on (B, *D)."""

    @abstractmethod
    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws from the law that generation starts from, states for data of `shape` = (n, *D)."""

    def state(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of x_t for data of shape D: the same, but for a process that moves more than the data."""
        return shape

    def data(self, z: Tensor) -> Tensor:
        """The data's part (B, *D) of states."""
        return z

    def kernel(self) -> Kernel | None:
        """The law of x_t given x_0, or None where it is not tractable."""
        return None

    def levels(self) -> Levels | None:
        """The kernel's levels, or others that stand in for them; None where nothing is known."""
        return self.kernel()

    def whitening(self) -> Whitening | None:
        """Coordinates in which the noise is isotropic, where x itself is not; losses, samplers and likelihoods work in them."""
        return None

    def div_sigma(self, x: Tensor, t: Tensor) -> Tensor:
        """The divergence of Sigma by rows, shape (B, *D); zero unless G depends on x."""
        return torch.zeros_like(x)

    def scales(self, t: Tensor, d: int) -> dict[str, Moments]:
        """Of the score, the transport (velocity - f) and the flux given x_0, in d dimensions. Raises where they are not known."""
        raise ScoreSDEError(
            f"sde {type(self).__name__}: the scale of its fields is not known; vp, subvp, ve and jump_diffusion have it"
        )

    def known_divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """The divergence of f - 1/2 div Sigma, shape (B,): the part of the flow's that holds no score."""
        return weighted_trace(lambda y, s: self.drift(y, s) - 0.5 * self.div_sigma(y, s), x, t, None)[1]

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """The log-density of `sample_prior` at x (B, *D), nats, shape (B,)."""
        raise NotImplementedError(f"{type(self).__name__} does not know the density of its prior")

    def within(self, x: Tensor) -> Tensor:
        """The nearest point to x (B, *D) where the process has been seen: where samplers keep to after a step."""
        return x

    def reverse_drift(self, x: Tensor, t: Tensor, score: Tensor, flux: Tensor | None = None) -> Tensor:
        """Drift of the time reversal, f - Sigma score - div Sigma, shape (B, *D) (Anderson 1982); with jumps and their flux, of
        the SDE without jumps that has the same marginals."""
        v = self.drift(x, t) - self.diffusion(t, x).cov(score) - self.div_sigma(x, t)
        return v if flux is None else v + flux

    def velocity(self, x: Tensor, t: Tensor, score: Tensor, flux: Tensor | None = None) -> Tensor:
        """Velocity of the probability flow, shape (B, *D) (Song et al. 2021, eq. 13; with jumps, plus the flux)."""
        v = self.drift(x, t) - 0.5 * self.diffusion(t, x).cov(score) - 0.5 * self.div_sigma(x, t)
        return v if flux is None else v + flux

    def perturb(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Samples of x_t given x_0: by the kernel where there is one, else by simulation."""
        kernel = self.kernel()
        if kernel is not None:
            return kernel.sample(x0, t, generator)
        return Noised(self.simulate(x0, t, 100, generator))

    def simulate(self, x0: Tensor, t: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """x_t (B, *D) from x0 by Euler-Maruyama with Poisson jumps: `steps` equal steps from 0 to each sample's t (B,)."""
        x, dt = x0, t / steps
        for i in range(steps):
            now = dt * i
            noise = self.diffusion(now, x).mul(normal(tuple(x.shape), generator, x.dtype))
            step = expand(dt, x) * self.drift(x, now) + expand(dt.sqrt(), x) * noise
            x = x + step + self.leap(x, now, dt, generator)
        return x

    def leap(self, x: Tensor, t: Tensor, h: Tensor, generator: torch.Generator, first: Tensor | None = None) -> Tensor:
        """The sum of the jumps of a step of h (B,) from t (B,), like x (B, *D); nothing where the process has none.

        `first` (B,): when the first of joint jumps comes, where that is settled; those after it are as ever.
        """
        if self.jumps is None:
            return torch.zeros_like(x)
        if not self.jumps.joint:  # each coordinate by itself
            t, h = (each.repeat_interleave(x[0].numel()) for each in (t, h))
        moved = torch.zeros_like(x if self.jumps.joint else x.reshape(-1, 1))
        counts = torch.poisson(self.jumps.rate(t) * h, generator=generator)
        if first is not None:
            left = (t + h - first).clamp_min(0.0)  # of the step in which it comes, for those that follow it
            later = torch.poisson(self.jumps.rate(t) * left, generator=generator)
            counts = torch.where(t >= first, counts, torch.where(left > 0.0, 1.0 + later, 0.0))
        for k in range(int(counts.max())):
            amplitude = self.jumps.sample(len(moved), tuple(moved.shape[1:]), t, generator)
            moved += expand((counts > k).to(x), moved) * amplitude
        return moved.view_as(x)


class LinearSDE(SDE):
    """dx = -a(t) x dt + g(t) dW, so x_t = alpha(t) x_0 + sigma(t) eps with alpha = exp(-int a).

    A subclass gives a, g, alpha and sigma in closed form; the rest follows.
    """

    @abstractmethod
    def a(self, t: Tensor) -> Tensor:
        """Rate of the drift, shape (B,)."""

    @abstractmethod
    def g(self, t: Tensor) -> Tensor:
        """Scale of the noise, shape (B,)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """exp(-int_0^t a), shape (B,)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t given x_0, shape (B,)."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return expand(-self.a(t), x) * x

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        return Scalar(self.g(t))

    def kernel(self) -> Kernel:
        return GaussianKernel(self.alpha, self.sigma)

    def scales(self, t: Tensor, d: int) -> dict[str, Moments]:
        precision, half = self.sigma(t).square().reciprocal(), 0.5 * self.g(t).square()
        none = torch.zeros_like(t)
        return {"score": Moments(precision, none - 1.0), "transport": Moments(half.square() * precision, half),
                "flux": Moments(none, none)}  # fmt: skip

    def known_divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return -x[0].numel() * self.a(t)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        sigma = self.sigma(torch.full((len(x),), self.T, device=x.device, dtype=x.dtype))
        z = x.flatten(1) / sigma.unsqueeze(1)
        return -0.5 * z.square().sum(1) - z.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        t = torch.full(shape[:1], self.T, device=generator.device, dtype=dtype)
        return self.kernel().factor(t).mul(normal(shape, generator, dtype))
