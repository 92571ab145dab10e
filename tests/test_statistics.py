"""What few seeds can tell: intervals that cover, and comparisons that call equals different in 5 percent of cases, not more."""

import math

import numpy as np
import pytest
from scipy import stats

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.studies.statistics import compare, expanded, mean, of, of_logs, ratio_of_means, resolved

REPEATS = 1000


def coverage(draw, truth, n):
    """The share of intervals of `mean` that hold the truth, over REPEATS samples of n (standard error 0.9 percent)."""
    rng = np.random.default_rng(n)
    found = [mean(draw(rng, n)) for _ in range(REPEATS)]
    return np.mean([each.low < truth < each.high for each in found])


NORMAL = (lambda rng, n: rng.normal(size=n), 0.0)
LOGNORMAL = (lambda rng, n: np.exp(0.3 * rng.normal(size=n)), math.exp(0.045))


@pytest.mark.parametrize(("draw", "truth"), [NORMAL, LOGNORMAL], ids=["normal", "lognormal"])
@pytest.mark.parametrize(("n", "least"), [(5, 0.94), (20, 0.94)])
def test_the_interval_of_a_mean_covers(draw, truth, n, least):
    """`least` is what 3000 to 4000 other samples gave (the lesser of both laws); 3 standard errors below it fail."""
    assert coverage(draw, truth, n) > least - 3 * math.sqrt(least * (1 - least) / REPEATS)


def test_six_seeds_need_the_expansion():
    """The plain percentile interval of 6 normal values covers in 84 to 86 percent of cases; the expanded one clearly more."""
    rng = np.random.default_rng(5)
    plain = stats.bootstrap(
        (rng.normal(size=(REPEATS, 6)),), np.mean, axis=-1, method="percentile", n_resamples=999, batch=100, rng=rng
    ).confidence_interval
    assert np.mean((plain.low < 0) & (plain.high > 0)) < coverage(*NORMAL, 6) - 0.05


@pytest.mark.parametrize("n", [5, 10, 40])
def test_where_resampled_means_are_normal_the_expanded_interval_is_students(n):
    """Means of resamples vary by sqrt((n-1)/n) s / sqrt(n): that times the normal quantile of the level is t s / sqrt(n)."""
    half = stats.norm.ppf((1 + expanded(n)) / 2) * math.sqrt((n - 1) / n)
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1), rel=1e-9)


def test_below_six_values_the_interval_is_students():
    """-+ t s / sqrt(n), as scipy has it; from 6 on the resamples reach the level."""
    values = [1.0, 1.2, 1.7, 1.4, 1.3]
    found = mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert [n for n in range(2, 40) if not resolved(n)] == [2, 3, 4, 5]


def test_one_seed_has_no_interval_and_equal_ones_no_width():
    one, equal = mean([0.3]), mean([0.3] * 5)
    assert one.value == 0.3
    assert all(math.isnan(number) for number in (one.se, one.low, one.high))
    assert (equal.low, equal.value, equal.high) == pytest.approx((0.3, 0.3, 0.3))


def test_an_interval_is_the_same_each_time_and_moves_with_the_seed():
    values = np.random.default_rng(0).normal(size=20)
    assert mean(values) == mean(values)
    assert mean(values, seed=1).low != mean(values).low
    assert mean(values).se == pytest.approx(values.std(ddof=1) / math.sqrt(20), rel=1e-12)


def test_the_bootstraps_error_of_a_mean_is_that_of_the_mean():
    """9999 resamples know it within 0.7 percent; without sqrt(n/(n-1)) it would be 11 percent too small at n = 5."""
    values = np.random.default_rng(0).normal(size=5)
    assert of(np.mean, values).se == pytest.approx(mean(values).se, rel=0.03)


def test_what_is_not_finite_has_no_interval():
    with pytest.raises(ScoreSDEError, match="finite"):
        mean([1.0, math.nan])
    with pytest.raises(ScoreSDEError, match="one at least"):
        mean([])


def test_a_ratio_of_means_covers_and_has_the_error_of_the_delta_method():
    """Means 2 and 5, standard deviations 1 and 1, 40 and 60 values: se^2 = r^2 (1 / (40 * 4) + 1 / (60 * 25))."""
    rng = np.random.default_rng(1)
    found = [ratio_of_means(rng.normal(2, 1, 40), rng.normal(5, 1, 60)) for _ in range(200)]
    assert np.mean([each.low < 0.4 < each.high for each in found]) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 200)
    # The mean se of 200 samples: each varies by about a tenth of itself; the expansion by sqrt(40 / 39) is 1.3 percent.
    assert np.mean([each.se for each in found]) == pytest.approx(0.4 * math.sqrt(1 / 160 + 1 / 1500), rel=0.03)
    assert found[0].n == 40


def test_any_statistic_of_columns_has_an_interval():
    """The log of a variance ratio of equals: 0 in it, and the value is the statistic itself."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=100), rng.normal(size=150)
    found = of(lambda x, y, axis: np.log(np.var(x, axis) / np.var(y, axis)), a, b)
    assert found.low < 0 < found.high
    assert found.value == pytest.approx(math.log(a.var() / b.var()))


def test_a_ratio_that_hardly_any_number_stands_behind_has_a_wide_interval_and_no_overflow():
    found = of_logs(2.0, 0.1, 12)
    half = stats.t.ppf(0.975, 11) * 0.1
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    wide = of_logs(2.0, 1e6, 3)
    assert 0 < wide.low < 1e-100 < 1e100 < wide.high < math.inf


@pytest.mark.parametrize("log", [False, True])
def test_two_settings_are_a_paired_t_test(log):
    rng = np.random.default_rng(3)
    seeds = rng.normal(size=6)
    a, b = (np.exp(seeds + 0.2 * rng.normal(size=6) + shift) for shift in (0.0, 0.25))
    comparison = compare({"a": a, "b": b}, log)
    found, p = comparison.against("b", "a"), comparison.p_value("b", "a")
    expected = stats.ttest_rel(np.log(b), np.log(a)) if log else stats.ttest_rel(b, a)
    ends = expected.confidence_interval(0.95)
    assert p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(ends) if log else ends), rel=1e-6)
    assert found.apart == (p < 0.05)


def blocks(rng, k, n, effect=0.0):
    """k settings x n seeds of unit noise, with a seed effect 5 times as large; the first setting is better by `effect`."""
    y = 5 * rng.normal(size=n) + rng.normal(size=(k, n))
    y[0] -= effect
    return {str(i): row for i, row in enumerate(y)}


@pytest.mark.parametrize("n", [2, 3])
def test_few_seeds_do_not_tell_a_wild_setting_apart_by_luck(n):
    """8 equal settings, one with 20 times the noise: 0.097 and 0.077 of 600 studies, 0.18 and 0.10 without the pair's own t-test.

    0.03 is 2.5 standard errors of 600 studies more.
    """
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(600):
        values = blocks(rng, 8, n)
        values["7"] = values["7"] + 20 * rng.normal(size=n)
        found = compare(values, False)
        wrong += any(found.against("7", b).apart for b in values if b != "7")
    assert wrong / 600 < {2: 0.097, 3: 0.077}[n] + 0.03


@pytest.mark.parametrize("wild", [1.0, 2.0, 4.0])
def test_equal_settings_are_told_apart_in_no_more_than_five_percent_of_cases(wild):
    """8 settings, 28 pairs, 5 seeds, one of them with so many times the noise: any pair, in 1000 studies.

    3 standard errors are 0.021 (and 0.063 is what 3000 other studies gave at 4 times); without the guard 2 and 4 times give
    0.08 and 0.15.
    """
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(1000):
        values = blocks(rng, 8, 5)
        values["7"] = values["7"] + math.sqrt(wild**2 - 1) * rng.normal(size=5)
        found = compare(values, False)
        wrong += any(found.against(a, b).apart for i, a in enumerate(values) for b in list(values)[:i])
    assert wrong / 1000 < 0.063 + 0.01


def test_pairing_tells_apart_what_unpaired_tukey_does_not():
    """A difference of 4 noises under a seed effect of 5: seen in nearly all of 30 studies paired, in few unpaired."""
    rng = np.random.default_rng(5)
    studies = [blocks(rng, 4, 5, effect=4.0) for _ in range(30)]
    paired = np.mean([compare(study, False).against("1", "0").apart for study in studies])
    unpaired = np.mean([stats.tukey_hsd(*study.values()).pvalue[1, 0] < 0.05 for study in studies])
    assert paired > 0.9
    assert unpaired < 0.2


def test_the_interval_of_every_difference_holds_the_truth_at_once():
    """Settings at 0, 1, 2 and 3: all six intervals hold in 95 percent of 2000 studies (3 standard errors, 0.015)."""
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(2000):
        truth = dict(zip("abcd", range(4), strict=True))
        seeds = 5 * rng.normal(size=5)
        found = compare({name: seeds + rng.normal(size=5) + shift for name, shift in truth.items()}, False)
        pairs = [(a, b, found.against(a, b)) for a in truth for b in truth if a != b]
        held += all(gap.low <= truth[a] - truth[b] <= gap.high for a, b, gap in pairs)
    assert held / 2000 == pytest.approx(0.96, abs=0.016)


def test_the_best_is_the_least_or_the_greatest_and_ties_are_with_it():
    rng = np.random.default_rng(7)
    seeds = rng.normal(size=5)
    values = {
        name: np.exp(seeds + 0.01 * rng.normal(size=5) + at) for name, at in {"a": 0.0, "b": 0.002, "c": 1.0}.items()
    }
    lower, higher = compare(values, log=True), compare(values, log=True, higher=True)
    assert {lower.best(), *lower.ties()} == {"a", "b"}
    assert (higher.best(), higher.ties()) == ("c", [])
    ratio = lower.against("c", "a")
    assert ratio.low < math.e < ratio.high
    assert ratio.value * lower.against("a", "c").value == pytest.approx(1.0)


def test_one_seed_tells_nothing_apart():
    found = compare({"a": [1.0], "b": [100.0]}, log=True)
    gap = found.against("b", "a")
    assert gap.value == pytest.approx(100.0)
    assert math.isnan(gap.low)
    assert math.isnan(found.p_value("b", "a"))
    assert not gap.apart
    assert found.ties() == ["b"]


def test_equal_runs_are_not_told_apart_and_a_constant_gap_is():
    """Two losses that are one and the same bit for bit, and one that is off by the same amount at each seed."""
    values = [0.25, 0.5, 0.75]
    assert compare({"a": values, "b": values}, False).p_value("b", "a") == 1.0
    assert compare({"a": values, "b": [v + 1.0 for v in values]}, False).against("b", "a").apart


@pytest.mark.parametrize(
    ("values", "log", "says"),
    [
        ({"a": [1.0, 2.0], "b": [1.0]}, False, "same seeds"),
        ({"a": [1.0, -2.0], "b": [1.0, 2.0]}, True, "positive"),
        ({"a": [1.0, math.inf], "b": [1.0, 2.0]}, False, "finite"),
        ({}, False, "same seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, log, says):
    with pytest.raises(ScoreSDEError, match=says):
        compare(values, log)
