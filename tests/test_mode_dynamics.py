"""The closed forms of study=correlation: the tables that PROCESSES.md measured by a prototype, and what they stand on."""

import math

import numpy as np
import pytest
import torch

from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.datasets.two_modes import TwoModes
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.studies import mode_dynamics as modes
from scoresde_cli.studies.correlation import in_words

DIMS = (2, 8, 32, 128, 512)


@pytest.mark.parametrize(("kind", "rho"), [("equi", 0.5), ("ar1", 0.9), ("ar1", 0.99)])
def test_eigenvalues_are_those_of_the_matrix(kind, rho):
    i = np.arange(40)
    C = rho ** np.abs(i[:, None] - i) if kind == "ar1" else (1 - rho) * np.eye(40) + rho
    assert np.allclose(np.sort(modes.eigenvalues(kind, rho, 40)), np.linalg.eigvalsh(C), rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "rho", "condition", "dimension"),
    [
        ("equi", 0.5, (3, 9, 33, 129, 513), (1.6, 2.9, 3.7, 3.9, 4.0)),
        ("equi", 0.9, (19, 73, 289, 1153, 4609), (1.1, 1.2, 1.2, 1.2, 1.2)),
        ("ar1", 0.5, (3, 7.5, 8.8, 9, 9), (1.6, 5.1, 20, 77, 308)), ("ar1", 0.9, (19, 113, 263, 347, 360), (1.1, 1.6, 3.9, 14, 54)),
        ("ar1", 0.99, (199, 1492, 5727, 17430, 33000), (1.0, 1.05, 1.2, 2.0, 5.7)),
    ],
)  # fmt: skip
def test_the_table_of_spectra(kind, rho, condition, dimension):
    found = [modes.eigenvalues(kind, rho, d) for d in DIMS]
    assert [modes.condition(lam) for lam in found] == pytest.approx(
        condition, rel=0.01
    )  # two to three digits were printed
    assert [modes.effective_dimension(lam) for lam in found] == pytest.approx(dimension, rel=0.04)


def test_the_table_of_times_to_forget():
    for kind, rho, isotropic, reversible in (
        ("none", 0.0, (1.7, 3.1, 4.4), (1.7, 3.1, 4.4)), ("equi", 0.9, (2.1, 3.7, 5.1), (13.9, 30.5, 44.4)),
        ("equi", 0.99, (4.7, 6.5, 7.9), (139, 305, 444)), ("ar1", 0.9, (2.1, 4.1, 5.5), (13.9, 44, 69)),
        ("ar1", 0.99, (4.7, 6.7, 8.1), (139, 463, 723)),
    ):  # fmt: skip
        for d, slow, slowest in zip((2, 32, 512), isotropic, reversible, strict=True):
            lam = modes.eigenvalues(kind, rho, d)
            assert modes.time_to_forget(0.25 / lam, np.ones(d)) == pytest.approx(slow, abs=0.051)
            assert modes.time_to_forget(np.full(d, 0.25), lam) == pytest.approx(slowest, rel=0.006, abs=0.051)


def test_the_table_of_steps_by_mean():
    for kind, rho, d, *expected in (
        ("equi", 0.9, 2, (71, 61), (82, 46)), ("equi", 0.9, 32, (95, 82), (110, 53)), ("equi", 0.5, 8, (34, 40), (34, 21)),
        ("ar1", 0.9, 128, (95, 82), (110, 53)), ("equi", 0.99, 32, (226, 196), (456, 170)),
        ("ar1", 0.99, 512, (226, 196), (604, 170)),
    ):  # fmt: skip
        lam = modes.eigenvalues(kind, rho, d)
        for kappa, pair in zip((lam, 1 / lam), expected, strict=True):
            assert tuple(modes.steps_to(kappa, way, "mean", 1e-3) for way in (False, True)) == pair
    for kappa, pair in ((np.ones(2), (1, 21)), (np.full(2, 0.25), (53, 53))):
        assert tuple(modes.steps_to(kappa, way, "mean", 1e-3) for way in (False, True)) == pair


def test_the_table_of_steps_by_the_worst_mode():
    never = None
    for kind, data, noise in (
        ("equi", [(34, 127, 299), (82, 127, 299), (170, 260, 299), (456, 1217, 1610), (never,) * 3],
         [(34, 147, 800), (82, 147, 800), (170, 196, 800), (260, 299, 800), (344, 396, 800)]),
        ("ar1", [(34, 127, 299), (53, 170, 344), (61, 170, 344), (61, 196, 695), (61, 196, never)],
         [(34, 147, 800), (53, 196, never), (61, 196, never), (61, 196, never), (61, 196, never)]),
    ):  # fmt: skip
        for d, *rows in zip(DIMS, data, noise, strict=True):
            found = [modes.eigenvalues(kind, rho, d) for rho in (0.5, 0.9, 0.99)]
            assert tuple(modes.steps_to(lam, False, "worst", 0.05) for lam in found) == rows[0]
            assert tuple(modes.steps_to(1 / lam, False, "worst", 0.05) for lam in found) == rows[1]


def test_the_table_of_forgotten_matrices():
    for kind, d, pairs in (
        ("equi", 2, ((0.22, 0.0025), (7.3, 0.090))), ("equi", 32, ((50, 5.4), (983, 514))),
        ("ar1", 32, ((0.46, 0.0053), (50, 2.1))), ("ar1", 512, ((0.48, 0.0055), (54, 2.4))),
    ):  # fmt: skip
        for rho, pair in zip((0.1, 0.5), pairs, strict=True):
            lam = modes.eigenvalues(kind, rho, d)
            found = [modes.cost_of_forgetting(lam, way)[0] for way in (False, True)]
            assert found == pytest.approx(pair, rel=0.025)
    right = modes.end_ratio(np.full(2, 0.25), 4000, False, modes.eigenvalues("equi", 0.9, 2))
    assert modes.divergence(right) / 2 < 1e-6


def test_the_closed_form_is_what_the_sampler_does():
    """Euler's method with the exact score on sde=correlated: the variances of its samples by mode, within 4 standard errors."""
    d, n, steps = 4, 8192, 12
    sde = Correlated("ar1", 0.8, beta_min=modes.B, beta_max=modes.B, shape=(d,))
    C = sde.L.cov(torch.eye(d, dtype=torch.float64))
    kappa, basis = torch.linalg.eigh(
        torch.linalg.inv(torch.linalg.cholesky(C)) @ torch.linalg.inv(torch.linalg.cholesky(C)).T
    )
    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, d), torch.ones(1, d)), sde)
    sampler = EulerODE(steps=steps, grid="power", rho=modes.POWER, denoise=False, t_min=modes.T_MIN)
    z = sde.white.into(sampler.sample(oracle, sde, (d,), n, 0, dtype=torch.float64).x) @ basis
    m2 = math.exp(-modes.B * modes.T_MIN)
    expected = modes.end_ratio(kappa.numpy(), steps, False) * (kappa.numpy() * m2 + 1 - m2)
    # The sampler's prior is that of T, with the variance 1 - exp(-b) of stationarity.
    assert np.allclose(z.var(0).numpy() / expected, 1 - math.exp(-modes.B), rtol=4 * math.sqrt(2 / n))


def test_two_modes_have_the_condition_number_that_is_asked_for():
    data = TwoModes(n=20_000)
    law = data.law
    K = law.covariances()[0] + law.means[0][:, None] * law.means[0]
    lam = torch.linalg.eigvalsh(K)
    assert float(lam.mean()) == pytest.approx(1.0)
    assert float(lam[-1] / lam[0]) == pytest.approx(
        779.4 * (1 + 1.75**2), rel=1e-3
    )  # 779.4: of AR(1) with 0.95 in 32 dimensions
    found = torch.linalg.eigvalsh(torch.cov(data.splits["train"].double().T))
    assert torch.allclose(found, lam, rtol=0.05)


def test_what_the_report_says_is_of_its_own_grid():
    """The sentences hold the tables' numbers: another correlation, another dimension, other numbers."""
    said = "\n".join(in_words([0.5, 0.9], [2, 8]))
    for d, kind in ((2, "equi"), (8, "equi"), (8, "ar1")):
        assert f"{modes.condition(modes.eigenvalues(kind, 0.9, d)):.3g}" in said
    assert "at rho = 0.9, d = 8" in said
    assert "361" in said
    assert "512" not in said
    assert "0.99," not in said


def test_a_reversal_that_leaves_floating_point_is_infinitely_far_off():
    far, worst = modes.cost_of_forgetting(modes.eigenvalues("equi", 0.999, 1024), True)
    assert far == math.inf
    assert worst > 1e300
