"""What a step costs, and cost times variance: over a fixed time the noise of what the steps add up to goes with it.

A step with n directions takes a(1 + c n) seconds, by least squares of relative errors, law by law. Of each setting it is the least
of several turns, as what else the machine does can only add to it. With the parts of the gradient's variance (gradients.py),
r = r_1 / n where the directions are independent,

    work = seconds times (data part + projection part) = a(1 + c n) (data part) (1 + r)          least at n = sqrt(r_1 / c)

All settings share their batches; the interval of a ratio of two works (`gradients.ratio`) counts in the residuals of the lines.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from scoresde_cli.studies.closed_forms import Setting
from scoresde_cli.studies.gradients import Gradients, ratio
from scoresde_cli.studies.statistics import LEVEL, Estimate, of_logs
from scoresde_cli.training import variance
from scoresde_cli.training.loop import Plan

UNKNOWN = 0.15  # what two timings of one step differ by on a busy machine


@dataclass(frozen=True)
class Line:
    """Seconds of a step a(1 + c n), by least squares of relative errors.

    Attributes:
        rest: a. c: a tangent over it. shape: the inverse of X^T X, for a and a c. squares, df: of the residuals.
    """

    rest: float
    c: float
    shape: np.ndarray
    squares: float
    df: int

    @classmethod
    def fit(cls, counts: Sequence[int], seconds: Sequence[float]) -> "Line":
        y = np.array(seconds)
        X = np.stack([np.ones(len(y)), np.array(counts, dtype=float)], axis=1) / y[:, None]
        shape = np.linalg.inv(X.T @ X)
        a, b = shape @ X.sum(0)
        return cls(float(a), float(b / a), shape, float(np.square(1.0 - X @ (a, b)).sum()), len(y) - 2)

    def seconds(self, n: int) -> float:
        return self.rest * (1.0 + self.c * n)

    def noise(self, n: int, s2: float) -> float:
        """The variance of log seconds(n), where s2 is that of a relative residual."""
        return s2 * float(np.array([1, n]) @ self.shape @ (1, n)) / self.seconds(n) ** 2

    def c_interval(self, s2: float, df: int) -> Estimate:
        slope = np.array([-self.c, 1.0]) / self.rest
        se = math.sqrt(s2 * float(slope @ self.shape @ slope))
        half = float(stats.t.isf((1.0 - LEVEL) / 2, df)) * se
        return Estimate(self.c, se, self.c - half, self.c + half, df + 2)


@dataclass(frozen=True)
class Costs:
    """Of each setting the seconds of a step, what the line of its law says of them, and the variance of its logarithm.

    A law with fewer than three counts has no line: the seconds stand, with the residual variance s2 of the others, and where no law
    has one, with that of relative errors of UNKNOWN.
    """

    seconds: list[float]
    cost: list[float]
    noise: list[float]
    lines: dict[tuple[str, str], Line]
    s2: float
    df: int

    @classmethod
    def measure(cls, plan: Plan, chosen: Sequence[Setting], turns: int) -> "Costs":
        return cls.of(chosen, variance.step_seconds(plan, [setting.value for setting in chosen], turns))

    @classmethod
    def of(cls, chosen: Sequence[Setting], seconds: list[float]) -> "Costs":
        groups: dict[tuple[str, str], list[int]] = {}
        for i, setting in enumerate(chosen):
            groups.setdefault(setting.group, []).append(i)
        lines = {
            key: Line.fit([chosen[i].n for i in group], [seconds[i] for i in group])
            for key, group in groups.items()
            if len(group) > 2
        }
        df = sum(line.df for line in lines.values())
        s2 = sum(line.squares for line in lines.values()) / df if df else UNKNOWN**2
        found = [lines.get(setting.group) for setting in chosen]
        cost = [s if line is None else line.seconds(x.n) for s, line, x in zip(seconds, found, chosen, strict=True)]
        noise = [s2 if line is None else line.noise(x.n, s2) for line, x in zip(found, chosen, strict=True)]
        return cls(seconds, cost, noise, lines, s2, df)


@dataclass(frozen=True)
class Work:
    """Cost times variance, of settings by their index."""

    grads: Gradients
    costs: Costs

    def of(self, i: int) -> float:
        return self.costs.cost[i] * float((self.grads.data[i] + self.grads.projection[i]).mean())

    def best(self, among: Sequence[int]) -> int:
        return min(among, key=self.of)

    def against(self, i: int, j: int, comparisons: int) -> Estimate:
        """That of i over that of j, with an interval that holds for so many comparisons at once."""
        a, b = (self.grads.data[k] + self.grads.projection[k] for k in (i, j))
        noise = 0.0 if i == j else self.costs.noise[i] + self.costs.noise[j]
        return ratio(a, b, self.costs.cost[i] / self.costs.cost[j], noise, max(1, comparisons))

    def variance(self, i: int, among: Sequence[int]) -> Estimate:
        """The gradient's variance of i, both parts, over the least among these."""
        total = {k: self.grads.data[k] + self.grads.projection[k] for k in among}
        least = min(among, key=lambda k: float(total[k].mean()))
        return ratio(total[i], total[least], comparisons=max(1, len(among) - 1))

    def ties(self, among: Sequence[int]) -> list[int]:
        """The best, and those not told apart from it."""
        best = self.best(among)
        return [i for i in among if i == best or not self.against(i, best, len(among) - 1).low > 1.0]

    def optimum(self, i: int, n: int, c: Estimate) -> Estimate | None:
        """sqrt(r_1 / c), r_1 = n r of setting i, which has n directions; None where c is not above 0."""
        r = ratio(self.grads.projection[i], self.grads.data[i], n)
        if not (c.value > 0.0 and r.value > 0.0):
            return None
        value, se = math.sqrt(r.value / c.value), 0.5 * math.hypot(r.se / r.value, c.se / c.value)
        return of_logs(value, se, r.n)
