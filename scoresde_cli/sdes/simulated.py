"""Processes that are known by drift and noise alone: any dx = f(x, t) dt + G(x, t) dW + dJ (Ito), without a law of x_t given x_0.

All that is needed besides is simulated. Euler-Maruyama in `steps` steps over [0, T], the drift's part of a step tamed,

    x + h f / sqrt(1 + |h f|^2) + sqrt(h) G z        by coordinate

(cf. Hutzenthaler, Jentzen and Kloeden, Ann. Appl. Probab. 22, 2012), so that a drift that grows faster than x does not throw
paths out; the change is of order h^3.

    levels      alpha and sigma from the best linear prediction of x_t from x_0 on simulated paths: they scale the network
    prior       the law at T: training rows that the process keeps, simulated anew for each draw
    its density mean of the last step's Gaussian over simulated paths (Pedersen, Scand. J. Stat. 22, 1995), for d <= 3

With noise that depends on x, div Sigma enters the reversal by automatic differentiation. On the way back, coefficients are those of
the nearest point in the box that the simulated paths stayed in, and samplers do not leave it: nothing is known of the score beyond,
and a nonlinear drift that is followed backwards there, without the score that goes with it, leaves for infinity in finite time.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.checks import check_call
from scoresde_cli.divergence import weighted_trace
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import SDE, Levels, Moments, Noised
from scoresde_cli.sdes.operators import LinearOperator, expand
from scoresde_cli.sdes.poisson import NONE, PoissonKeys

ROWS = 10_000  # of the training data that a process keeps
PATHS = 4096  # for levels and densities
NODES = 64  # of time, at which levels are measured: even in sqrt(t)
LAST = 25  # the last step of a density is the LAST-th part of T


class MeasuredLevels(Levels):
    """Linear between nodes even in sqrt(t): sigma grows like it at first.

    Args:
        table: (NODES + 1, 2 + d): alpha, sigma, and what the mean of x_t is beyond alpha times that of x_0.
    """

    gaussian = False

    def __init__(self, table: Tensor, T: float) -> None:
        self.table, self.T = table, T

    def _read(self, t: Tensor, columns: slice) -> Tensor:
        table = self.table[:, columns].to(t)
        u = (t / self.T).clamp(0, 1).sqrt() * (len(table) - 1)
        left = u.floor().long().clamp_max(len(table) - 2)
        return torch.lerp(table[left], table[left + 1], (u - left).unsqueeze(1))

    def alpha(self, t: Tensor) -> Tensor:
        return self._read(t, slice(0, 1)).squeeze(1)

    def sigma(self, t: Tensor) -> Tensor:
        return self._read(t, slice(1, 2)).squeeze(1)

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        return super().mean(x0, t) + self._read(t, slice(2, None)).reshape(x0.shape)


class Simulated(SDE):
    """A subclass gives `drift` and `diffusion`, and sets what these need before it calls this constructor.

    Args:
        T: time horizon. steps: of a simulation over [0, T].
        paths, refresh: a pool of so many simulated paths feeds training, simulated anew every `refresh` training steps.
        jumps: of the Poisson part J (poisson.PoissonKeys); none at rate 0.
        shape: D of the data. train: the training data. kept: what a run remembers of it (rows, levels).
    """

    remedy = "heun_ode, euler_ode, dopri5 and euler_maruyama work"

    def __init__(
        self, T: PositiveFloat = 1.0, steps: PositiveInt = 200, paths: PositiveInt = 2048, refresh: PositiveInt = 100,
        jumps: Mapping[str, Any] = NONE, *, shape: tuple[int, ...], train: Tensor | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.T, self.steps, self.paths, self.refresh = T, steps, paths, refresh
        check_call(PoissonKeys, jumps, "sde.jumps")
        self.poisson = PoissonKeys(**jumps)
        self.jumps = self.poisson.jumps()
        if self.jumps is not None:
            vars(self).update({f"jumps.{name}": value for name, value in vars(self.poisson).items()})  # for protocols
        self.kept = dict(kept or {})
        d = int(torch.Size(shape).numel())
        self.varies = self._noise_varies(shape)
        self.shape = tuple(shape)
        if "levels" not in self.kept:
            rows = torch.zeros(1, d) if train is None else train.flatten(1)[:ROWS].float()
            levels, box = self._measure(rows.reshape(-1, *shape))
            self.kept |= {"rows": rows.contiguous(), "levels": levels, "box": box}
            if self.jumps is not None:  # what the noise alone does
                self.jumps = None
                self.kept["quiet"] = self._measure(rows.reshape(-1, *shape))[0]
                self.jumps = self.poisson.jumps()

    @abstractmethod
    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        """G(t, x) as an operator on (B, *D); x is always given where G depends on it."""

    def _noise_varies(self, shape: tuple[int, ...]) -> bool:
        """Whether G depends on x."""
        x = torch.zeros(2, *shape).requires_grad_()
        with torch.enable_grad():
            return bool(self.diffusion(torch.full((2,), 0.5 * self.T), x).mul(torch.ones(2, *shape)).requires_grad)

    def advance(self, x: Tensor, t: Tensor, h: Tensor, source: torch.Generator, first: Tensor | None = None) -> Tensor:
        """x at t + h from x (B, *D) at t (B,), by one tamed Euler-Maruyama step of h (B,); `first` as for `leap`."""
        pull = expand(h, x) * self.drift(x, t)
        noise = self.diffusion(t, x).mul(normal(tuple(x.shape), source, x.dtype))
        return x + pull / (1.0 + pull.square()).sqrt() + expand(h.sqrt(), x) * noise + self.leap(x, t, h, source, first)

    @torch.no_grad()
    def visit(
        self, x0: Tensor, times: Tensor, source: torch.Generator, first: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Paths from x0 (P, *D) at ascending times (m,), one (P, *D) after the other; steps of at most T / steps."""
        x, now = x0, 0.0
        for then in times.tolist():
            count = max(1, math.ceil((then - now) * self.steps / self.T - 1e-6)) if then > now else 0
            h = torch.full((len(x0),), (then - now) / max(count, 1), dtype=x0.dtype, device=x0.device)
            for i in range(count):
                x = self.advance(x, torch.full_like(h, now + i * (then - now) / count), h, source, first)
            now = then
            yield x

    def simulate(self, x0: Tensor, t: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        x, h = x0, t / steps
        for i in range(steps):
            x = self.advance(x, h * i, h, generator)
        return x

    def perturb(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        return Noised(self.simulate(x0, t, self.steps, generator))

    def levels(self) -> MeasuredLevels:
        return MeasuredLevels(self.kept["levels"], self.T)

    def scales(self, t: Tensor, d: int) -> dict[str, Moments]:
        if self.jumps is None:
            return super().scales(t, d)
        quiet = MeasuredLevels(self.kept["quiet"], self.T)
        return self.poisson.moments(t, self.levels().sigma(t), quiet.sigma(t))

    def _measure(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The table of levels, and the box (2, d) of all paths with a tenth of its width added.

        x_t = A x_0 + b + rest, alpha^2 = |A x_0|^2 / |x_0|^2 and sigma^2 the rest's variance, in the mean; A by least squares, or a
        multiple of the identity where the rows are too few for a matrix.
        """
        source, d = generator(0, "levels"), rows[0].numel()
        x0 = rows[torch.randint(len(rows), (PATHS,), generator=source)]
        times = self.T * torch.linspace(0, 1, NODES + 1, dtype=torch.float64).square()
        mean = x0.double().flatten(1).mean(0)
        y0 = x0.double().flatten(1) - mean
        power = float(y0.square().sum()) or 1.0
        table, low, high = [], x0.flatten(1).amin(0), x0.flatten(1).amax(0)
        for x in self.visit(x0, times, source):
            y = x.double().flatten(1)
            if not y.isfinite().all():
                raise ScoreSDEError(
                    f"sde {type(self).__name__}: simulated paths are not finite; more sde.steps (now {self.steps}), or a drift "
                    "and noise that are finite everywhere and do not grow without bounds"
                )
            low, high = torch.minimum(low, x.flatten(1).amin(0)), torch.maximum(high, x.flatten(1).amax(0))
            centre = y.mean(0)
            y = y - centre
            told = y0 @ torch.linalg.lstsq(y0, y).solution if 20 * d <= PATHS else y0 * float((y0 * y).sum()) / power
            alpha = max((float(told.square().sum()) / power) ** 0.5, 1e-2)
            sigma = max(float((y - told).square().mean()) ** 0.5, 1e-6)
            table.append(torch.cat([torch.tensor([alpha, sigma], dtype=torch.float64), centre - alpha * mean]))
        margin = 0.05 * (high - low)
        # The last digits of a matrix product depend on where its operands lie in memory, and are not those of the run.
        return torch.stack(table).round(decimals=9).float(), torch.stack([low - margin, high + margin])

    def within(self, x: Tensor) -> Tensor:
        """The nearest point to x (B, *D) in the box of the simulated paths."""
        low, high = self.kept["box"].to(x).reshape(2, *x.shape[1:])
        return torch.minimum(torch.maximum(x, low), high)

    def reverse_drift(self, x: Tensor, t: Tensor, score: Tensor, flux: Tensor | None = None) -> Tensor:
        return super().reverse_drift(self.within(x), t, score, flux)

    def velocity(self, x: Tensor, t: Tensor, score: Tensor, flux: Tensor | None = None) -> Tensor:
        return super().velocity(self.within(x), t, score, flux)

    def known_divergence(self, x: Tensor, t: Tensor) -> Tensor:
        def field(y: Tensor, s: Tensor) -> Tensor:
            y = self.within(y)
            return self.drift(y, s) - 0.5 * self.div_sigma(y, s)

        return weighted_trace(field, x, t, None)[1]

    def _rows(self, n: int, source: torch.Generator, dtype: torch.dtype) -> Tensor:
        rows = self.kept["rows"].to(device=source.device, dtype=dtype)
        return rows[torch.randint(len(rows), (n,), generator=source, device=source.device)].reshape(n, *self.shape)

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        x0 = self._rows(shape[0], generator, dtype)
        return self.simulate(x0, torch.full(shape[:1], self.T).to(x0), self.steps, generator)

    @torch.no_grad()
    def prior_log_prob(self, x: Tensor) -> Tensor:
        d = x[0].numel()
        if d > 3:
            raise ScoreSDEError(
                f"the density of {type(self).__name__} at T is taken of simulated paths, which are too few in d = {d} dimensions "
                "(3 at most): leave out nll, or give the process a prior_log_prob"
            )
        source = generator(0, "density", device=x.device)
        start = self._rows(PATHS, source, torch.float64)
        h = self.T / LAST
        (y,) = self.visit(start, torch.tensor([self.T - h]), source)
        t = torch.full((PATHS,), self.T - h, dtype=torch.float64, device=x.device)
        y = y + self.leap(y, t, torch.full_like(t, h), source)
        mean, G = y + h * self.drift(y, t), self.diffusion(t, y)
        scale = G.logdet(d) + 0.5 * d * math.log(2 * math.pi * h) + math.log(PATHS)

        def one(point: Tensor) -> Tensor:
            gap = G.solve(point.double().expand_as(mean) - mean).flatten(1)
            return torch.logsumexp(-0.5 * gap.square().sum(1) / h - scale, 0)

        return torch.stack([one(point) for point in x]).to(x.dtype)

    def div_sigma(self, x: Tensor, t: Tensor) -> Tensor:
        """sum_j d Sigma_ij / d x_j, (B, *D), by d products with the derivative."""
        if not self.varies:
            return torch.zeros_like(x)
        total = torch.zeros_like(x)
        for j in range(x[0].numel()):
            unit = torch.zeros_like(x)
            unit.flatten(1)[:, j] = 1.0
            total = total + torch.func.jvp(lambda y, e=unit: self.diffusion(t, y).cov(e), (x,), (unit,))[1]
        return total
