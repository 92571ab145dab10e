"""log p by the probability-flow ODE against closed forms, and what the random directions do to it."""

import math

import pytest
import torch
from scipy.stats import t as student

from scoresde_cli import likelihood
from scoresde_cli.datasets.mixtures import GMM, Gaussian
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.identity import randomise
from scoresde_cli.likelihood import ROWS, Flow, log_prob, weighted_traces
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import ScoreModel, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.projections import Gaussian as GaussianLaw
from scoresde_cli.projections import Orthogonal, Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import LinearSDE
from scoresde_cli.sdes.operators import LinearOperator
from scoresde_cli.sdes.subvp import SubVP
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import MIXTURES, PROJECTIONS, name, three_modes

F64 = torch.float64


def centred(law: Mixture) -> Mixture:
    """A mean of the data shifts p_T off the prior by alpha(T) of it: that error is the process's, not the solver's."""
    law.means = law.means - law.weights @ law.means
    return law


LAWS = MIXTURES | {
    "gaussian, d=8": lambda: Gaussian(d=8, n=10).law, "gmm, d=2": lambda: GMM(n=10).law, "gmm, d=8": lambda: GMM(d=8, n=10).law,
}  # fmt: skip


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 50.0)], ids=name)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_log_density_of_the_exact_score_is_the_exact_one(sde: LinearSDE, law):
    """At most 1e-3 nats a dimension off at t_min, with the prior in place of p_T: by 60 steps, and by an adaptive solver."""
    law, t_min = centred(law()), 1e-3
    oracle = Oracle(law, sde)
    x = law.sample(60, torch.Generator().manual_seed(0))
    exact = oracle.log_prob(x, torch.full((60,), t_min))
    for flow in (Flow(steps=60), Flow(method="dopri5")):
        found = log_prob(oracle, sde, x, t_min, flow).value
        assert float((found - exact).abs().max()) < 1e-3 * x.shape[1], flow.method


def test_the_fixed_step_method_is_of_order_four():
    sde, law, t_min = VP(1.0, 6.0), three_modes(), 0.05
    oracle = Oracle(law, sde)
    x = law.sample(20, torch.Generator().manual_seed(0))
    truth = log_prob(oracle, sde, x, t_min, Flow(method="dopri5", rtol=1e-11, atol=1e-11)).value
    errors = [float((log_prob(oracle, sde, x, t_min, Flow(steps=n)).value - truth).abs().mean()) for n in (10, 20, 40)]
    # Two-sided; at 10 steps the next term is still felt, at 20 to 40 it is within 0.5.
    assert math.log2(errors[1] / errors[2]) == pytest.approx(4.0, abs=0.5)


def test_the_density_of_a_zero_step_flow_is_the_prior():
    """With data that is the prior of a stationary process the flow stands still: log N(x; 0, I)."""
    sde = VP()
    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3)), sde)
    x = torch.randn(10, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    assert torch.allclose(log_prob(oracle, sde, x, 1e-3, Flow(steps=10)).value, exact, atol=1e-3)


def random_model(d=2, dtype=F64) -> ScoreModel:
    """An untrained network of unit scale: its flow is a flow like any other."""
    x = normal((500, d), generator(0, "data"), F64)
    return ScoreModel(randomise(MLP((d,), 16, 2), 0), VP(), Residual(), fit_gaussian(x, "isotropic")).to(dtype)


@pytest.mark.parametrize("make", [lambda: Oracle(three_modes(), VP()), random_model], ids=["exact", "network"])
def test_the_density_integrates_to_one(make):
    model, side = make(), 100
    axis = torch.linspace(-7, 7, side, dtype=F64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    t_min = 0.01  # a density as narrow as at 1e-3 would need a finer grid
    total = log_prob(model, VP(), grid, t_min, Flow(steps=25)).value.exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_the_interval_of_the_estimated_trace_holds_the_exact_one(law, monkeypatch):
    """100 repeats of the mean log p of 4 rows in 4 dimensions: the 95 percent t-interval holds the exact value in 90 to 99."""
    sde, model, repeats, steps = VP(), random_model(4), 6, 8
    if law.adapted:  # aimed anew at every time, of as many rows as a chunk has
        monkeypatch.setattr(likelihood, "ROWS", 4)
        steps = 3
    x = normal((4, 4), generator(1, "x"), F64)
    exact = log_prob(model, sde, x, 0.01, Flow(steps=steps)).value.mean()
    flow, held = Flow(steps=steps, projection=law, repeats=repeats, n_proj=3 if law.adapted else 1), 0
    for seed in range(100):
        means = log_prob(model, sde, x, 0.01, flow, seed).estimates.mean(1)
        half = student.ppf(0.975, repeats - 1) * float(means.std()) / math.sqrt(repeats)
        held += abs(float(means.mean() - exact)) <= half
    assert 90 <= held <= 99


def test_the_standard_error_is_the_spread_of_the_repeats():
    sde, model = VP(), random_model(4)
    x = normal((3, 4), generator(1, "x"), F64)
    found = log_prob(model, sde, x, 0.01, Flow(steps=8, projection=Rademacher(), repeats=200))
    assert torch.allclose(found.standard_error, found.estimates.std(0) / math.sqrt(200))
    halved = log_prob(model, sde, x, 0.01, Flow(steps=8, projection=Rademacher(), repeats=200, n_proj=4))
    # Four directions instead of one halve the standard deviation; 200 repeats know it within 5 percent each.
    assert torch.allclose(found.estimates.std(0) / halved.estimates.std(0), torch.full((3,), 2.0, dtype=F64), rtol=0.2)
    assert log_prob(model, sde, x, 0.01, Flow(steps=8)).standard_error.isnan().all()


def test_an_orthogonal_frame_of_d_directions_is_exact():
    sde, model = VP(), random_model(4)
    x = normal((5, 4), generator(1, "x"), F64)
    exact = log_prob(model, sde, x, 0.01, Flow(steps=8)).value
    framed = log_prob(model, sde, x, 0.01, Flow(steps=8, projection=Orthogonal(), n_proj=4, repeats=2))
    assert torch.allclose(framed.estimates, exact.expand(2, 5), atol=1e-10)


def test_a_row_keeps_its_directions_however_many_rows_there_are():
    sde, model, flow = VP(), random_model(2), Flow(steps=2, projection=GaussianLaw(), repeats=2)
    x = normal((ROWS + 3, 2), generator(1, "x"), F64)
    everything = log_prob(model, sde, x, 0.01, flow).value
    assert torch.allclose(log_prob(model, sde, x[:5], 0.01, flow).value, everything[:5], atol=1e-12)


class Sheared(LinearOperator):
    """A dense G, the same for all samples."""

    matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]], dtype=F64)

    def mul(self, z):
        return z @ self.matrix.T

    def mul_t(self, v):
        return v @ self.matrix

    def trace_cov(self, d):
        return self.matrix.square().sum()


def test_a_matrix_valued_diffusion_weighs_the_trace():
    """tr(Sigma J) for a dense G: exactly by the directions G e_i, and in expectation by G v."""

    class Correlated(VP):
        def diffusion(self, t, x=None):
            return Sheared()

    sde, model = Correlated(), random_model(3)
    x, t = normal((4, 3), generator(2, "x"), F64), torch.full((4,), 0.4, dtype=F64)
    jacobians = torch.stack([torch.func.jacfwd(lambda y, i=i: model(y[None], t[i : i + 1])[0])(x[i]) for i in range(4)])
    sigma = Sheared.matrix @ Sheared.matrix.T
    expected = torch.einsum("ij,bji->b", sigma, jacobians)
    score, exact = weighted_traces(model, sde, x, t, None, 1)
    assert torch.allclose(exact[0], expected, atol=1e-10)
    assert torch.allclose(score, model.score(x, t))
    frames = Orthogonal().sample((4, 3), 3, generator(3, "v"), F64)
    assert torch.allclose(weighted_traces(model, sde, x, t, frames, 1)[1][0], expected, atol=1e-10)


def test_the_divergence_that_holds_no_score_is_that_of_the_drift():
    from scoresde_cli.sdes.base import SDE

    sde, x, t = VP(), normal((4, 3), generator(2, "x"), F64), torch.full((4,), 0.4, dtype=F64)
    assert torch.allclose(SDE.known_divergence(sde, x, t), sde.known_divergence(x, t))
    assert torch.allclose(sde.known_divergence(x, t), -3 * sde.a(t))


def test_single_precision_is_good_to_four_digits():
    model = random_model(2)
    x = normal((50, 2), generator(1, "x"), F64)
    double = log_prob(model, VP(), x, 1e-3).value
    single = log_prob(random_model(2, torch.float32), VP(), x.float(), 1e-3).value
    assert (double - single).abs().max() < 1e-3
