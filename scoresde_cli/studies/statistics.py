"""What a handful of seeds can tell: a mean with its interval, and all settings of a panel against each other.

Of one setting, `mean`: the expanded percentile bootstrap (Hesterberg, What Teachers Should Know About the Bootstrap, Am. Stat. 69,
2015; the function ExpandProbs of his R package resample). The percentile interval is too narrow by sqrt((n-1)/n) and has the
normal quantile for that of t, so it is taken at the level

    alpha'/2 = Phi(-sqrt(n/(n-1)) t_{alpha/2, n-1})

Of several settings, `compare`: every setting is run with the same seeds, a randomized complete block design (Montgomery, Design and
Analysis of Experiments, chapter 4). With y_ij of setting i = 1..k and seed j = 1..n

    r_ij = y_ij - mean_i - mean_j + mean,   s^2 = sum r_ij^2 / nu,   nu = (k-1)(n-1)
    |mean_a - mean_b| <= q_{0.95; k, nu} max(s, s_ab) / sqrt(n)   for all pairs at once

q is Tukey's studentized range. What a seed does to all settings alike drops out of r. One s for all settings is what Tukey assumes;
s_ab^2, half the variance of the pair's own differences over the seeds, guards a pair that varies more than that. With 8 equal
settings and 5 seeds some pair is told apart in 4 percent of cases, and in 5 to 6 where settings vary two or four times as much as
others (8 and 15 without the guard, whose price is intervals 10 percent wider). No interval is narrower than that of the pair's own
t-test: with 2 or 3 seeds and one setting that varies 20 times as much as the others, some pair is told apart in 8 to 10 percent of
cases (17 without it), and no method knows better from so few. With k = 2 it is the paired t-test.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from scoresde_cli.errors import ScoreSDEError

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 2000  # resamples in memory at a time
BOOTSTRAP_FROM = (
    6  # values; of 5 the expanded interval covers in 92 percent of cases, and none of 5 can in more than 94
)


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and its 95 percent interval; nan where there are none. n: (least) number of replicates."""

    value: float
    se: float
    low: float
    high: float
    n: int


def expanded(n: int) -> float:
    """The confidence level whose percentile bootstrap interval of n values stands for LEVEL."""
    t = stats.t.ppf(0.5 + LEVEL / 2, n - 1)
    return float(1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * t))


def resolved(n: int) -> bool:
    """Whether resampling n values gives an interval that covers as it should."""
    return n >= BOOTSTRAP_FROM


def of(statistic: Callable[..., Any], *columns: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """statistic(*columns, axis) of independent samples, each resampled by itself; the expansion is that of the shortest.

    The samples may be of unlike length. se is that of the bootstrap times sqrt(n/(n-1)). With fewer than 6 values the interval is
    Student's, value -+ t_{n-1} se, as resampling cannot reach its level; with one there is none. Raises ScoreSDEError where a
    value is not finite.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    n = min(map(len, arrays), default=0)
    if n == 0 or not all(np.isfinite(array).all() for array in arrays):
        raise ScoreSDEError("an interval needs finite numbers, one at least in every sample")
    value = float(statistic(*arrays, axis=-1))
    if n == 1:
        return Estimate(value, math.nan, math.nan, math.nan, 1)
    found = stats.bootstrap(
        arrays, statistic, n_resamples=RESAMPLES, batch=BATCH, axis=-1, vectorized=True, method="percentile",
        confidence_level=expanded(n), rng=np.random.default_rng(seed),
    )  # fmt: skip
    se = float(found.standard_error) * math.sqrt(n / (n - 1))
    low, high = map(float, found.confidence_interval)
    return Estimate(value, se, low, high, n) if resolved(n) else student(value, se, n)


def student(value: float, se: float, n: int) -> Estimate:
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * se
    return Estimate(value, se, value - half, value + half, n)


def of_logs(value: float, se: float, n: int, comparisons: int = 1) -> Estimate:
    """A positive number from n values, `se` the standard error of its logarithm: Student's interval on that scale.

    It holds for so many comparisons at once (Bonferroni), and ends where it says nothing (e^300): the next are no numbers.
    """
    half = min(float(stats.t.isf((1.0 - LEVEL) / 2 / comparisons, n - 1)) * se, 300.0)
    return Estimate(value, value * se, value * math.exp(-half), value * math.exp(half), n)


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean with s / sqrt(n) and its interval (see `of`).

    It covers in 94 to 95 percent of cases (normal values, and lognormal ones that vary by a third).
    """
    found, n = of(np.mean, values, seed=seed), len(values)
    if n == 1:
        return found
    se = float(np.std(values, ddof=1)) / math.sqrt(n)
    return replace(found, se=se) if resolved(n) else student(found.value, se, n)


def ratio_of_means(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """mean(a) / mean(b) of two independent samples; its bias is of order 1/n, mean(b) has to be clear of 0."""
    return of(lambda x, y, axis: np.mean(x, axis) / np.mean(y, axis), a, b, seed=seed)


@dataclass(frozen=True)
class Difference:
    """a against b: a - b, or a / b on the log scale, with its simultaneous 95 percent interval."""

    a: str
    b: str
    value: float
    low: float
    high: float
    apart: bool


@dataclass(frozen=True)
class Comparison:
    """All settings against each other; see the module.

    Attributes:
        means: by setting, over the seeds, on the scale of the analysis (logarithms where log).
        residuals: by setting, r_ij over the seeds.
        se: s / sqrt(n), nan with one seed. df: nu. n: seeds.
        higher: whether more is better.
    """

    means: dict[str, float]
    residuals: dict[str, list[float]]
    se: float
    df: int
    n: int
    log: bool
    higher: bool

    def own(self, a: str, b: str) -> float:
        """The standard error of the pair's difference, over sqrt(2), from the pair alone."""
        return float(np.std(np.subtract(self.residuals[a], self.residuals[b]), ddof=1)) / math.sqrt(2 * self.n)

    def spread(self, a: str, b: str) -> float:
        """The same of all settings together, or the pair's own where that is more."""
        return max(self.se, self.own(a, b))

    def half_width(self, a: str, b: str) -> float:
        """Of the simultaneous interval of a difference, on the scale of the analysis; at least that of the pair's own t-test."""
        if self.df <= 0:
            return math.nan
        paired = math.sqrt(2) * float(stats.t.ppf(0.5 + LEVEL / 2, self.n - 1)) * self.own(a, b)
        return max(quantile(len(self.means), self.df) * self.spread(a, b), paired)

    def against(self, a: str, b: str) -> Difference:
        gap, half = self.means[a] - self.means[b], self.half_width(a, b)
        value, low, high = (
            float(np.exp(np.clip(end, -700, 700))) if self.log else end for end in (gap, gap - half, gap + half)
        )
        return Difference(a, b, value, low, high, abs(gap) > half)

    def p_value(self, a: str, b: str) -> float:
        """Of a difference, adjusted for the number of pairs."""
        gap = abs(self.means[a] - self.means[b])
        if self.df == 0:
            return math.nan
        if self.spread(a, b) == 0:
            return 1.0 if gap == 0 else 0.0
        found = float(np.clip(stats.studentized_range.sf(gap / self.spread(a, b), len(self.means), self.df), 0, 1))
        own = math.sqrt(2) * self.own(a, b)
        return max(found, 2 * float(stats.t.sf(gap / own, self.n - 1))) if own > 0 else found

    def best(self) -> str:
        """The setting with the least mean (the greatest where more is better), on the scale of the analysis."""
        return (max if self.higher else min)(self.means, key=lambda name: self.means[name])

    def ties(self) -> list[str]:
        """The settings that are not told apart from the best."""
        best = self.best()
        return [name for name in self.means if name != best and not self.against(name, best).apart]


@cache
def quantile(k: int, df: int) -> float:
    return float(stats.studentized_range.ppf(LEVEL, k, df))


def common(seeds: Sequence[Set[int]]) -> list[int]:
    """Over which seeds to compare settings that have these: those that all share, or two of them, by which most is learnt of most
    pairs. A setting that lacks some of them is left aside, so that one run does not take the others' seeds away."""

    def worth(chosen: tuple[int, ...]) -> tuple[int, int]:
        count = sum(set(chosen) <= each for each in seeds)
        pairs = count * (count - 1)
        return pairs * (len(chosen) - 1), pairs * len(chosen)

    choices = {tuple(sorted(a & b)) for a in seeds for b in seeds}
    choices |= {tuple(sorted(set(seeds[0]).intersection(*seeds)))} if seeds else {()}
    best: tuple[int, ...] = max(sorted(choices), key=worth)
    return list(best)


def compare(values: Mapping[str, Sequence[float]], log: bool, higher: bool = False) -> Comparison:
    """All pairwise differences of settings over seeds: values[setting][j] is with the j-th seed, the same seeds for all.

    Args:
        log: compare logarithms; differences are then ratios of geometric means.
        higher: whether more is better.

    Raises ScoreSDEError where the seeds are not as many in each, or a value is not finite, or not positive with log.
    """
    if len({len(row) for row in values.values()}) != 1:
        raise ScoreSDEError("settings are compared over the same seeds, at least one")
    y = np.array([list(row) for row in values.values()], dtype=float)
    if y.size == 0 or not np.isfinite(y).all() or (log and (y <= 0).any()):
        raise ScoreSDEError(f"a comparison{' of ratios' if log else ''} needs finite{', positive' * log} numbers")
    y = np.log(y) if log else y
    (k, n), means = y.shape, y.mean(1)
    residuals = y - means[:, None] - y.mean(0) + y.mean()
    df = (k - 1) * (n - 1)
    se = math.sqrt(np.square(residuals).sum() / df / n) if df > 0 else math.nan
    by_mean = dict(zip(values, means.tolist(), strict=True))
    return Comparison(by_mean, dict(zip(values, residuals.tolist(), strict=True)), se, df, n, log, higher)
