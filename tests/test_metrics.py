"""The metrics against independent computations, and the honesty of their floors and intervals."""

import math

import numpy as np
import ot
import pytest
import torch

from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.metrics.distances import (
    RESAMPLES,
    compare,
    energy_copies,
    energy_distance,
    interval,
    resample,
    sliced_wasserstein,
)
from scoresde_cli.metrics.score_error import bootstrap_mean, score_error
from scoresde_cli.networks.model import ScoreModel, Zero, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.vp import VP
from tests.laws import three_modes


def gauss(n, seed, d=2):
    return normal((n, d), generator(seed, "m"), torch.float64)


def test_sliced_wasserstein_agrees_with_pot():
    x, y = gauss(300, 0, 3), 1.5 * gauss(300, 1, 3) + 0.3
    theta = normal((3, 64), generator(0, "slices"), torch.float64)
    theta = theta / theta.norm(dim=0)
    theirs = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy(), p=2)
    assert sliced_wasserstein(x, y) == pytest.approx(float(theirs), rel=1e-10)


def test_sliced_wasserstein_of_a_shift_is_the_shift_over_root_d():
    """W2 of a shift by s along theta is |s . theta|; the mean of its square over the sphere is |s|^2 / d."""
    x, shift = gauss(100, 0, 4), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, slices=20_000) == pytest.approx(float(shift.norm()) / 2, rel=0.02)


def test_energy_distance_is_unbiased_and_agrees_with_one_dimension():
    """In one dimension 2 int (F - G)^2: for N(0,1) and N(1,1) it is known by quadrature."""
    from scipy.integrate import quad
    from scipy.stats import norm

    exact = 2 * quad(lambda u: (norm.cdf(u) - norm.cdf(u - 1)) ** 2, -12, 12)[0]
    values = [energy_distance(gauss(200, 2 * i, 1), gauss(200, 2 * i + 1, 1) + 1) for i in range(200)]
    assert abs(np.mean(values) - exact) / (np.std(values) / math.sqrt(200)) < 4
    null = [energy_distance(gauss(200, 2 * i, 1), gauss(200, 2 * i + 1, 1)) for i in range(200)]
    assert abs(np.mean(null)) / (np.std(null) / math.sqrt(200)) < 4


def test_energy_of_bootstrap_copies_by_weights_is_that_of_the_copies():
    x, y = gauss(60, 0), gauss(60, 1) + 0.2
    by_weights = energy_copies(x, y, 5)
    by_hand = []
    for i in range(RESAMPLES):
        source = generator(5, "bootstrap", i)
        a, b = (torch.randint(60, (60,), generator=source) for _ in range(2))
        by_hand.append(energy_distance(x[a], y[b]))
    assert by_weights == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


def test_fresh_data_falls_below_floor_high_as_often_as_it_should():
    """Of 400 repeats, 95 percent; the same quantile as in `compare`."""
    below = 0
    for i in range(400):
        source = generator(i, "floor")
        pairs = [(normal((60, 2), source), normal((60, 2), source)) for _ in range(21)]
        values = [sliced_wasserstein(a, b, slices=8) for a, b in pairs]
        below += values[0] <= np.quantile(values[1:], 0.95, method="weibull")
    assert abs(below - 380) <= 4 * math.sqrt(400 * 0.95 * 0.05)  # four binomial standard deviations


def test_interval_covers_the_expected_distance():
    """Off the floor, the interval holds the mean distance at that sample size in about 95 of 100 repeats."""
    m = 150
    values, intervals = [], []
    for i in range(100):
        x, y = gauss(m, 2 * i), gauss(m, 2 * i + 1) * 1.3 + 0.5
        value = sliced_wasserstein(x, y, slices=16)
        values.append(value)
        intervals.append(interval(value, [sliced_wasserstein(a, b, slices=16) for a, b in resample(x, y, i)]))
    covered = sum(low <= np.mean(values) <= high for low, high in intervals)
    assert covered >= 86  # 95 less 4 binomial standard deviations


def test_compare_names_value_interval_floor_and_protocol():
    x, y = gauss(400, 0).float(), gauss(400, 1).float()

    def pair(i):
        return gauss(400, 100 + 2 * i).float(), gauss(400, 101 + 2 * i).float()

    found = compare(x, y, pair, 0)
    for entry in found.values():
        assert entry["ci"][0] <= entry["value"] <= entry["ci"][1]
        assert entry["floor"] <= entry["floor_high"]
        assert entry["protocol"]["n"] == 400
    # Fresh data against fresh data: below 1.5 times the 95 percent quantile but for about one seed in a thousand.
    assert found["sliced_wasserstein"]["value"] < 1.5 * found["sliced_wasserstein"]["floor_high"]
    far = compare(x + 1, y, pair, 0)
    assert all(far[name]["value"] > 3 * abs(far[name]["floor_high"]) for name in far)


def test_score_error_of_the_exact_score_is_zero_and_of_the_gaussian_is_right():
    sde, law = VP(), three_modes()
    oracle, x0 = Oracle(law, sde), law.sample(20_000, generator(0, "x"))
    assert score_error(oracle, oracle, sde, x0, 1e-3, 0)["value"] == 0
    gaussian = ScoreModel(Zero(), sde, Residual("isotropic"), fit_gaussian(x0, "isotropic")).double()
    found = score_error(gaussian, oracle, sde, x0, 1e-3, 0)
    # Independently: plain Monte Carlo over uniform times.
    source = generator(7, "independent")
    t = 1e-3 + 0.999 * torch.rand(20_000, generator=source, dtype=torch.float64)
    x = sde.kernel().sample(x0, t, source).x_t
    errors = (gaussian(x, t) - oracle.score(x, t)).square().sum(1) * sde.sigma(t) ** 2
    se = float(errors.std()) / math.sqrt(20_000)
    assert abs(found["value"] - float(errors.mean())) < 4 * math.sqrt(2) * se
    assert found["ci"][0] < found["value"] < found["ci"][1]
    assert found["ci"][1] - found["ci"][0] == pytest.approx(2 * 1.96 * se, rel=0.25)


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).exponential(1, 5000)
    low, high = bootstrap_mean(values, 0)
    half = 1.96 * values.std() / math.sqrt(5000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)  # 1000 resamples: a quantile's own noise
    assert low < values.mean() < high
