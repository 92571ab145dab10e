"""No process: score matching on clean data, and Langevin dynamics back to it."""

import pytest
import torch

from scoresde_cli.datasets.mixtures import EightGaussians
from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.identity import randomise
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.metrics.score_error import score_error, squared_errors
from scoresde_cli.networks.energy_mlp import EnergyMLP
from scoresde_cli.networks.flow_model import gaussian_model
from scoresde_cli.networks.model import ScoreModel, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.langevin import Langevin
from scoresde_cli.sdes.static import Static
from tests.laws import correlated_gaussian, three_modes

F64 = torch.float64
LAW = three_modes()
ROWS = LAW.sample(20_000, generator(0, "rows"))
SDE = Static(shape=(2,), train=ROWS)


def test_the_exact_score_is_that_of_the_data():
    """Against autograd of the mixture's own density, at any time."""
    x = normal((6, 2), generator(0, "x"), F64).requires_grad_()
    parts = [
        torch.distributions.MultivariateNormal(mu, K).log_prob(x) + w.log()
        for w, mu, K in zip(LAW.weights, LAW.means, LAW.covariances(), strict=True)
    ]
    (expected,) = torch.autograd.grad(torch.logsumexp(torch.stack(parts), 0).sum(), x)
    for t in (1e-3, 1.0):
        assert torch.allclose(Oracle(LAW, SDE).score(x, torch.full((6,), t, dtype=F64)), expected, atol=1e-10)


def test_a_network_that_returns_zero_is_the_gaussian_of_the_data():
    gaussian = fit_gaussian(ROWS, "isotropic")
    x, t = normal((5, 2), generator(1, "x"), F64), torch.rand(5, dtype=F64)
    assert torch.allclose(gaussian_model(SDE, gaussian)(x, t), (gaussian.mean - x) / gaussian.lam, atol=1e-9)


def test_a_model_has_no_time():
    network = randomise(EnergyMLP((2,), 16, 2), 0)
    model = ScoreModel(network, SDE, Residual(), fit_gaussian(ROWS, "isotropic")).double()
    x = normal((5, 2), generator(1, "x"), F64)
    assert torch.equal(model(x, torch.full((5,), 1e-3, dtype=F64)), model(x, torch.ones(5, dtype=F64)))


@torch.no_grad()
@pytest.mark.parametrize("loss", [ISM("one"), SSM(Rademacher(), 2, "one"), SSMVR(Rademacher(), 1, "one")], ids=lambda v: v.name)
def test_the_loss_is_the_fisher_divergence_up_to_a_constant(loss):
    """E[|S|^2 + 2 tr J] = E|S - s|^2 - E|s|^2 with the exact s on the clean data (Hyvarinen 2005, theorem 1)."""
    network = randomise(EnergyMLP((2,), 16, 2), 0)
    model = ScoreModel(network, SDE, Residual(), fit_gaussian(ROWS, "isotropic")).double()
    t = torch.ones(len(ROWS), dtype=F64)
    s = Oracle(LAW, SDE).score(ROWS, t)
    gap = (model(ROWS, t) - s).square().sum(1) - s.square().sum(1)
    excess = loss(model, SDE, ROWS, generator(2, "l")) - gap
    assert abs(float(excess.mean() / (excess.std() / len(excess) ** 0.5))) < 4  # one in 16,000


@torch.no_grad()
def test_score_error_is_the_squared_gap_on_clean_data():
    """Of the Gaussian of the data on eight Gaussians far apart, each of the variance v: E|s|^2 = d / v there, the rest is small."""
    data = EightGaussians(2.83, 0.354, n=20_000)
    sde = Static(shape=(2,), train=data.splits["train"])
    exact, x = data.oracle(sde), data.splits["test"].double()
    model = gaussian_model(sde, fit_gaussian(x, "isotropic"))
    found = score_error(model, exact, sde, x, 1e-3, 0)
    t, gaps = squared_errors(model, exact, sde, x, 1e-3, 0)
    assert torch.allclose(gaps, (model(x, t) - exact.score(x, t)).square().sum(1))
    assert found["unit"] == "|s - s*|^2"
    power = exact.score(x, t).square().sum(1)
    # E|s - g|^2 = E|s|^2 - 2 E s.g + E|g|^2 and E s.g = -E div g = d / lam, E|g|^2 = d / lam: less by d / lam = 0.49.
    assert found["value"] == pytest.approx(float(power.mean()) - 2.0 / (2.83**2 / 2 + 0.354**2), abs=0.3)
    assert 15.0 < float(power.mean()) < 16.0  # the "15.5" that others have found


def test_adjusted_langevin_draws_the_law():
    """From the data's Gaussian, with the exact density: mean and covariance of a correlated Gaussian, four standard errors."""
    law = correlated_gaussian()
    sde = Static(shape=(2,), train=law.sample(5000, generator(0, "r")))
    x = Langevin(steps=400, step_size=0.1, adjusted=True).sample(Oracle(law, sde), sde, (2,), 4096, 0, dtype=F64).x
    y = (x - law.means[0]) @ law.bases[0] / law.lam[0].sqrt()
    assert float(y.mean(0).abs().max()) < 4 / 64
    assert float((y.T @ y / 4096 - torch.eye(2, dtype=F64)).abs().max()) < 4 * (2 / 4096) ** 0.5


def test_training_learns_sampling_and_reading_back_work(cli, tmp_path):
    """250 steps bring the error on clean data well below that of the Gaussian; a run knows where its sampling starts."""
    from scoresde_cli import load_run

    keys = ["data.radius=2.83", "data.std=0.7", "network=energy_mlp", "network.width=16", "optimizer.lr=2e-2", "sampler.steps=20"]
    small = ["data.n=4000", "eval.n=300", "tracker.mode=disabled", "device=cpu", "eval.metrics=[score_error]", "steps=250"]
    code, _, err = cli("train", "sde=static", "sampler=langevin", *keys, *small, "dir=run")
    assert code == 0, err
    run = load_run(tmp_path / "run")
    assert run.summary["score_error"]["value"] < 0.5 * run.summary["score_error_baseline"]["value"]
    assert run.summary["loss"]["protocol"]["loss"].endswith("weighted by 1")
    assert run.parts.sde.variance == pytest.approx(2.83**2 / 2 + 0.49, rel=0.05)
    assert (tmp_path / "run/figures/field.png").exists()
    code, _, err = cli("evaluate", "run=run", "n=200", "device=cpu", "metrics=[score_error,loss]")
    assert code == 0, err
