"""A linear SDE with a compound Poisson process, dx = -a(t) x dt + g(t) dW + dJ: rate lambda(t), amplitudes A of law nu.

    x_t = alpha x_0 + sigma eps + sum_{i <= N} r(t, tau_i) A_i,   r(t, u) = alpha(t) / alpha(u),   N ~ Poisson(int_0^t lambda)
    dp/dt = -div(f p) + g^2/2 Laplace(p) + lambda (nu*p - p) = -div(v p),   v = f - g^2/2 score + flux

With A = sqrt(w) N(0, I) the law of x_t given x_0 is a table (scale_table.py). Where coordinates jump each by itself it is the
product of d tables of one dimension. The prior is not Gaussian: it is drawn by simulating the jumps from x_0 = 0.
"""

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import normal, uniform
from scoresde_cli.sdes.base import Jumps, Kernel, LinearSDE, Moments, Noised
from scoresde_cli.sdes.operators import LinearOperator, Scalar, expand
from scoresde_cli.sdes.scale_mixture import Amplitude, Law, amplitude_of
from scoresde_cli.sdes.scale_table import Coefficients, Read, ScaleTable
from scoresde_cli.sdes.subvp import SubVP
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP

BASES: dict[str, type[LinearSDE]] = {"vp": VP, "subvp": SubVP, "ve": VE}
MOST_JUMPS = 500.0  # exp(-rate T) must be a number, and beyond this the process is a diffusion to 1e-3
INSTANTS = 32  # quadrature points of the variance


class JumpDiffusion(LinearSDE):
    """Any linear SDE plus Poisson jumps, constant or linear in rate.

    Args:
        base: vp, subvp or ve with their defaults, or a `_target_` with settings of its own.
        rate: jumps in a unit of time at t = 0; 0 is the base itself.
        rate_end: the rate at t = T, linear in between; None for a constant one.
        amplitude: gaussian, laplace or student_t, or a `_target_` of one's own law (scale_mixture.Amplitude).
        scale: s; a Gaussian or Laplace jump has variance s^2 along each coordinate, Student's s^2 nu / (nu - 2).
        nu: degrees of freedom of student_t, above 2.
        joint: all coordinates jump together, in a direction that is uniform; otherwise each by itself, at `rate` each.
    """

    def __init__(
        self, base: Literal["vp", "subvp", "ve"] | LinearSDE = "vp", rate: NonNegativeFloat = 8.0,
        rate_end: NonNegativeFloat | None = None, amplitude: Law | Amplitude = "gaussian", scale: PositiveFloat = 1.0,
        nu: PositiveFloat = 5.0, joint: bool = True,
    ) -> None:  # fmt: skip
        self.base = BASES[base]() if isinstance(base, str) else base
        self.T, self.joint = self.base.T, joint
        self.rates = (rate, rate if rate_end is None else rate_end)
        if sum(self.rates) / 2 * self.T > MOST_JUMPS:
            raise ScoreSDEError(
                f"sde.rate={rate}: expected at most {MOST_JUMPS:g} jumps on the way; so many small ones are a diffusion, "
                "take the base with more noise"
            )
        self.amplitude = amplitude_of(amplitude, scale, nu)
        self.coefficients = Coefficients(
            self.base.alpha, self.base.sigma, self.rate, self.expected, self.amplitude, self.T
        )
        often = JumpKernel(self).often if joint and any(self.rates) else None
        self.jumps = Jumps(self.rate, self.amplitude.sample, self.base, joint, self.table, often)
        self._tables: dict[tuple[int, float], ScaleTable] = {}
        self._last: dict[str, tuple[Tensor, int, Any]] = {}

    def rate(self, t: Tensor) -> Tensor:
        """lambda(t), (B,)."""
        first, last = self.rates
        return first + (last - first) / self.T * t

    def expected(self, t: Tensor) -> Tensor:
        """int_0^t lambda: the mean number of jumps, (B,)."""
        first, last = self.rates
        return first * t + 0.5 * (last - first) / self.T * t.square()

    def instant(self, u: Tensor, t: Tensor) -> Tensor:
        """The time by which a share u of the jumps expected on [0, t] has come (the root of a quadratic), shaped like u."""
        first, last = self.rates
        if first == last:
            return u * t
        slope, half = (last - first) / self.T, u * self.expected(t)
        return 2 * half / (first + (first**2 + 2 * slope * half).clamp_min(0).sqrt()).clamp_min(1e-30)

    def a(self, t: Tensor) -> Tensor:
        return self.base.a(t)

    def g(self, t: Tensor) -> Tensor:
        return self.base.g(t)

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Root of the variance of x_t given x_0 with that of the jumps, sigma^2 + E w int_0^t lambda r^2 (Campbell), (B,)."""
        if not any(self.rates):
            return self.base.sigma(t)

        def root() -> Tensor:
            decay, mass = self.coefficients.instants(t, INSTANTS)
            return (self.base.sigma(t).square() + self.amplitude.mean * (decay * mass).sum(1)).sqrt()

        return self._once("sigma", t, root)

    def _once(self, name: str, t: Tensor, found: Callable[[], Any]) -> Any:
        """What is asked for several times in a step, found once: for the same tensor of times, unchanged."""
        last = self._last.get(name)
        if last is None or last[0] is not t or last[1] != t._version:
            last = self._last[name] = (t, t._version, found())
        return last[2]

    def table(self, d: int, lam: float = 0.0) -> ScaleTable:
        """The conditional law for samples of d elements and x_0 of variance lam, built once."""
        key = (d if self.joint else 1, lam)
        if key not in self._tables:
            self._tables[key] = ScaleTable(self.coefficients, *key)
        return self._tables[key]

    def kernel(self) -> Kernel:
        return JumpKernel(self)

    def scales(self, t: Tensor, d: int) -> dict[str, Moments]:
        if not any(self.rates):
            return super().scales(t, d)
        return self._once(f"moments {d}", t, lambda: self._moments(t, d))

    def _moments(self, t: Tensor, d: int) -> dict[str, Moments]:
        precision, both, square = self.table(d).moments(t)
        half, rate = 0.5 * self.g(t).square(), self.rate(t)
        push = 0.5 * rate * self.amplitude.mean
        transport = half.square() * precision + 2 * half * rate * both + rate.square() * square
        return {"score": Moments(precision, torch.full_like(t, -1.0)), "transport": Moments(transport, half + push),
                "flux": Moments(rate.square() * square, push)}  # fmt: skip

    def conditional(self, y: Tensor, t: Tensor) -> Read:
        """The fields at y = x_t - alpha x_0 (B, *D): each (B, 1, ..) for joint jumps, (B, *D) by coordinate otherwise."""
        rho2 = expand(y.flatten(1).square().sum(1), y) if self.joint else y.square()
        return self.table(y[0].numel())(rho2, t)

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        zero = torch.zeros(shape, device=generator.device, dtype=dtype)
        return self.kernel().sample(zero, torch.full(shape[:1], self.T).to(zero), generator).x_t

    def prior_log_prob(self, x: Tensor) -> Tensor:
        t = torch.full((1,), self.T, device=x.device, dtype=x.dtype).expand(len(x))
        return self.conditional(x, t).log_p.flatten(1).sum(1)


class JumpKernel(Kernel):
    """The law of x_t given x_0 of a jump diffusion: drawn exactly, with targets from its table.

    The conditional mean of each target is the field of that name: score, flux, velocity (of the probability flow), eps
    (-sigma score), ratio (nu*p / p, (B,) for joint jumps, (B, *D) by coordinate), x0.
    """

    def __init__(self, sde: JumpDiffusion) -> None:
        self.sde = sde

    def alpha(self, t: Tensor) -> Tensor:
        return self.sde.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sde.sigma(t)

    def factor(self, t: Tensor) -> LinearOperator:
        return Scalar(self.sigma(t))

    def unit(self, t: Tensor, d: int) -> Tensor:
        return self.sde.scales(t, d)["score"].power.reciprocal()

    def jumped(self, shape: tuple[int, ...], t: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of V = sum_i r(t, tau_i)^2 w_i, (B, 1, ..) for joint jumps, else (B, *D), for `shape` = (B, *D)."""
        sde = self.sde
        shape = (shape[0],) + (1,) * (len(shape) - 1) if sde.joint else shape
        t = t.reshape((-1,) + (1,) * (len(shape) - 1)).expand(shape)
        if not any(sde.rates):
            return torch.zeros(shape, device=t.device, dtype=t.dtype)
        return self.decayed(torch.poisson(sde.expected(t), generator=generator), t, generator)

    def decayed(self, counts: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of V with so many jumps, shaped like `counts` and `t`."""
        sde, shape, most = self.sde, counts.shape, int(counts.max())
        tau = sde.instant(uniform((*shape, most), generator, t.dtype), t[..., None])
        w = sde.amplitude.draw((*shape, most), generator, t.dtype)
        decay = (sde.alpha(t)[..., None] / sde.alpha(tau)).square()
        return torch.where(torch.arange(most, device=t.device) < counts[..., None], decay * w, 0.0).sum(-1)

    def sample(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """x_t = alpha x_0 + sqrt(S) eps, S = sigma^2 + V; `aux` holds S."""
        eps = normal(tuple(x0.shape), generator, x0.dtype)
        return self._noised(x0, t, self.jumped(tuple(x0.shape), t, generator), eps)

    def often(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """The same of joint jumps, but at least half the samples have jumped; `aux` holds what that counts for, `weight` (B,).

        Early on few samples jump, and all of the flux is theirs: here they are many and weigh little.
        """
        mean = self.sde.expected(t)
        share = -torch.expm1(-mean)
        drawn = share.clamp_min(0.5)
        chosen = uniform((len(t),), generator, t.dtype) < drawn
        # The first of the jumps, in units of the mean's, given that there is one; the rest are Poisson again.
        first = -torch.log1p(-share * uniform((len(t),), generator, t.dtype))
        more = torch.poisson((mean - first).clamp_min(0.0), generator=generator)
        counts = expand(torch.where(chosen, 1 + more, 0.0), x0)
        v = self.decayed(counts, expand(t, x0), generator)
        noised = self._noised(x0, t, v, normal(tuple(x0.shape), generator, x0.dtype))
        weight = torch.where(chosen, share / drawn, (1 - share) / (1 - drawn))
        return replace(noised, aux={**noised.aux, "weight": weight})

    def _noised(self, x0: Tensor, t: Tensor, v: Tensor, eps: Tensor) -> Noised:
        sigma = expand(self.sde.base.sigma(t), x0)
        root = torch.where(v > 0, (sigma.square() + v).sqrt(), sigma)
        mean = expand(self.alpha(t), x0) * x0
        return Noised(mean + root * eps, mean, Scalar(root), eps, {"S": root.square()})

    def targets(self, x0: Tensor, noised: Noised, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        sde, x = self.sde, noised.x_t
        y = x - expand(self.alpha(t), x0) * x0
        read, rate = sde.conditional(y, t), expand(sde.rate(t), y)
        score, flux = -read.c_score * y, rate * read.c_flux * y
        ratio = read.log_ratio.exp()
        known: dict[str, Callable[[], Tensor]] = {
            "score": lambda: score,
            "flux": lambda: flux,
            "velocity": lambda: sde.velocity(x, t, score, flux),
            "eps": lambda: -expand(self.sigma(t), y) * score,
            "ratio": lambda: ratio.flatten() if sde.joint else ratio,
            "x0": lambda: x0,
        }
        return {name: known[name]() for name in names}
