"""Critically damped Langevin diffusion: its kernel, what a state tells of the data, hybrid score matching, its samplers."""

import itertools
import math

import numpy as np
import pytest
import torch

from scoresde_cli import divergence
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel, GivenPosition
from scoresde_cli.identity import randomise
from scoresde_cli.losses.base import draw_times
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.metrics.score_error import squared_gap
from scoresde_cli.networks.flow_model import gaussian_model
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, fit_gaussian
from scoresde_cli.networks.parameterisation import Eps, Residual
from scoresde_cli.networks.phase_model import PhaseModel
from scoresde_cli.rng import generator, normal
from scoresde_cli.runs import load_run
from scoresde_cli.samplers.base import Walk
from scoresde_cli.samplers.dopri5 import Dopri5
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.sscs import SSCS
from scoresde_cli.sdes.base import GaussianKernel
from scoresde_cli.sdes.kinetic import Kinetic
from scoresde_cli.sdes.phase import join, split
from scoresde_cli.sdes.vp import VP
from scoresde_cli.training.state import checkpoints
from tests.conftest import NO_FIGURES, SMALL
from tests.laws import correlated_gaussian, three_modes
from tests.test_losses import MAKERS, z
from tests.test_samplers import z_scores

F64 = torch.float64
LAW, SDE = three_modes(), Kinetic()
PROCESSES = {
    "defaults": SDE,
    "heavy, slow": Kinetic(beta=3.0, mass=1.5, gamma=0.3),
    "light": Kinetic(mass=0.1, gamma=1.0),
}
each = pytest.mark.parametrize("sde", PROCESSES.values(), ids=PROCESSES)
SERVED = {name: make for name, make in MAKERS.items() if not name.startswith("dsm_cv")}
every = pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)


def rows(operator):
    """The blocks (B, 2, 2) of an operator."""
    return torch.stack([operator.xx, operator.xv, operator.vx, operator.vv], 1).reshape(-1, 2, 2)


def generator_of(sde):
    """The drift's matrix (2, 2), and the noise's covariance per unit of time."""
    A = sde.beta * torch.tensor([[0.0, 1.0 / sde.mass], [-1.0, -2.0 / sde.mass**0.5]], dtype=F64)
    return A, torch.diag(torch.tensor([0.0, 4.0 * sde.mass**0.5 * sde.beta], dtype=F64))


def states(n, sde=SDE, law=LAW):
    """States of n samples and their times, as training has them."""
    t = 1e-3 + (sde.T - 1e-3) * torch.rand(n, generator=generator(0, "t"), dtype=F64)
    return sde.perturb(law.sample(n, generator(1, "x0")), t, generator(2, "noise")).x_t, t


def model_of(sde=SDE, parameterisation=None, covariance="full"):
    gaussian = fit_gaussian(LAW.sample(2000, generator(0, "fit")), covariance)
    return PhaseModel(randomise(MLP((2,), 16, 2), 0), sde, parameterisation or Residual(), gaussian).double()


@each
def test_the_kernel_agrees_with_the_matrix_exponential_and_with_quadrature_at_all_times(sde):
    """Mean and covariance to 1e-10 of its standard deviations, at small times as well: the integrand is positive."""
    A, noise = generator_of(sde)
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(80))
    start = torch.diag(torch.tensor([0.0, sde.gamma * sde.mass], dtype=F64))
    for t in (1e-6, 1e-3, 0.03, 0.2, 0.5, 1.0):
        at = torch.tensor([t], dtype=F64)
        E, L = rows(sde.flow(at))[0], rows(sde.factor(at))[0]
        exact = torch.matrix_exp(A * t)
        assert torch.allclose(E, exact, rtol=1e-10, atol=1e-13)
        by_time = torch.matrix_exp(A * (0.5 * t * (nodes + 1.0)).reshape(-1, 1, 1))
        given_both = (0.5 * t * weights.reshape(-1, 1, 1) * (by_time @ noise @ by_time.mT)).sum(0)
        M = rows(sde.between(at)[1])[0]
        for found, wanted in ((L, given_both + exact @ start @ exact.T), (M, given_both)):
            scale = wanted.diagonal().sqrt()
            assert ((found @ found.T - wanted) / torch.outer(scale, scale)).abs().max() < 1e-10


@each
def test_the_kernel_agrees_with_van_loan(sde):
    """His block exponential over t / 1024, doubled ten times (sdes/whitened.py has why), to 1e-8."""
    A, noise = generator_of(sde)
    whole = torch.matrix_exp(torch.cat([torch.cat([A, noise], 1), torch.cat([0 * A, -A.T], 1)]) * sde.T / 1024)
    M = whole[:2, :2]
    C = whole[:2, 2:] @ M.T
    for _ in range(10):
        M, C = M @ M, C + M @ C @ M.T
    found = rows(sde.between(torch.tensor([sde.T], dtype=F64))[1])[0]
    assert (found @ found.T - C).abs().max() < 1e-8


@each
def test_the_kernel_is_accurate_at_small_times_in_single_precision(sde):
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    for name in ("xx", "vx", "vv"):
        assert torch.allclose(getattr(sde.factor(t), name).double(), getattr(sde.factor(t.double()), name), rtol=1e-5)
    assert torch.allclose(sde.level(t).double(), sde.level(t.double()), rtol=1e-5)


def test_simulation_agrees_with_the_kernel():
    """Means and second moments of Euler-Maruyama: z-scores, with its bias of 8 t / steps of each."""
    n, t = 8000, torch.full((8000,), 0.1, dtype=F64)
    x0 = torch.tensor([[1.0, -0.5]], dtype=F64).expand(n, 2)
    found = SDE.simulate(x0, t, 200, generator(0, "simulate"))
    noised = SDE.kernel().sample(x0, t, generator(1, "kernel"))
    (x, v), (a, b) = split(found - noised.mean), split(noised.x_t - noised.mean)
    for mine, exact in ((x, a), (v, b), (x * x, a * a), (v * v, b * b), (x * v, a * b)):
        error = (mine.std(0).square() + exact.std(0).square()).sqrt() / math.sqrt(n)
        bias = 8 * 0.1 / 200 * exact.std(0)
        assert ((mine.mean(0) - exact.mean(0)).abs() < 4 * error + 2 * bias).all()


@each
def test_the_prior_is_the_law_that_the_process_tends_to(sde):
    """C = diag(1, M) - E diag(1, M) E^T, so the stationary law is N(0, I) x N(0, M I); and its draws have these variances."""
    A, noise = generator_of(sde)
    law = torch.diag(torch.tensor([1.0, sde.mass], dtype=F64))
    assert (A @ law + law @ A.T + noise).abs().max() < 1e-12
    x, v = split(sde.sample_prior((50_000, 2), generator(0, "prior"), F64))
    assert (x.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 50_000)
    assert (v.var(0) / sde.mass - 1).abs().max() < 4 * math.sqrt(2 / 50_000)


@pytest.mark.parametrize("law", [correlated_gaussian, three_modes])
@each
def test_the_flow_carries_the_density_of_states(sde, law):
    """Liouville's equation d log p/dt + velocity . score + div velocity = 0 in (x, v), for the exact score."""
    oracle, (z, t) = Oracle(law(), sde), states(16, sde, law())
    z, t = z.requires_grad_(), t.clamp(0.05, 0.95).requires_grad_()
    (dlog,) = torch.autograd.grad(oracle.log_prob(z, t).sum(), t)
    v = oracle.fields(z, t, {"velocity"})["velocity"]
    div = sum(torch.autograd.grad(v[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(4))
    residual = dlog + (v * oracle.score(z, t)).sum(1) + div
    assert residual.abs().max() < 1e-8 * (1 + dlog.abs().max())


class Exact(FieldModel):
    """The exact score in v as it is computed from that of w = x_0 + tau eps, which is cheaper than the law of states."""

    def __init__(self, sde):
        self.sde, self.plain = sde, Oracle(LAW, sde)
        self.plain.kernel, self.plain.plain = GaussianKernel(torch.ones_like, sde.level), True

    def score(self, x, t):
        position, velocity = split(x)
        at_x, at_v, pull_x, pull_v = (c.unsqueeze(1) for c in self.sde.told(t))
        s = self.plain.score(at_x * position + at_v * velocity, t)
        return join(torch.zeros_like(s), pull_x * position + pull_v * velocity + at_v * s)


@each
def test_a_state_tells_of_the_data_what_one_noised_copy_tells(sde):
    """The exact score in v is a linear part and the exact score of w = x_0 + tau eps: what the model stands on."""
    z, t = states(200, sde)
    assert torch.allclose(
        split(Exact(sde).score(z, t))[1], split(Oracle(LAW, sde).score(z, t))[1], rtol=1e-8, atol=1e-8
    )


@each
def test_a_network_that_returns_zero_is_the_exact_score_of_gaussian_data(sde):
    law = correlated_gaussian()
    (z, t), model = states(200, sde, law), gaussian_model(sde, Gaussian(law.means[0], law.lam[0], law.bases[0]))
    found = model.score(z, t)
    exact = Oracle(law, sde).score(z, t)
    assert torch.allclose(split(found)[1], split(exact)[1], rtol=1e-8, atol=1e-8)
    assert (split(found)[0] == 0).all()
    single = model.float().score(z.float(), t.float()).double()
    assert torch.allclose(split(single)[1], split(exact)[1], rtol=1e-3, atol=1e-3)


def test_the_score_in_the_velocity_is_enough_for_the_mean_of_the_data():
    """E[x_0 | x_t, v_t] from s_v alone is Tweedie's from both parts of the score, by position and by velocity."""
    oracle, (z, t) = Oracle(LAW, SDE), states(200)
    found = oracle.fields(z, t, {"x0"})["x0"]
    x, v = split(z + SDE.factor(t).cov(oracle.score(z, t)))
    E = SDE.flow(t)
    early = t < 0.5  # where it is known at all: later, E is small
    for mean, by in ((x, E.xx), (v, E.vx)):
        assert torch.allclose(found[early], (mean / by.unsqueeze(1))[early], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameterisation", [Residual(), Eps()], ids=lambda p: type(p).__name__)
def test_directions_and_traces_of_the_model_are_those_of_its_velocity(parameterisation):
    """Every fast path against the Jacobian of the score in v, by reverse mode."""
    model, (z, t) = model_of(parameterisation=parameterisation), states(6)
    x, v = split(z)
    field, w = GivenPosition(model, x), normal((3, 6, 2), generator(3, "w"), F64)
    J = torch.stack([
        torch.autograd.functional.jacobian(lambda y, i=i: model.score(join(x[i : i + 1], y[None]), t[i : i + 1])[0, 2:], v[i])
        for i in range(6)
    ])  # fmt: skip
    score, jvp = divergence.dual(field, v, t, w)
    assert torch.allclose(score, model.score(z, t)[:, 2:])
    assert torch.allclose(jvp, torch.einsum("bij,kbj->kbi", J, w))
    few = divergence.dual(field, v, t, w[:, :2])[1]
    assert torch.allclose(few, jvp[:, :2])
    products = divergence.score_and_projections(field, v, t, w)[1]
    assert torch.allclose(products, (w * jvp).sum(2))
    trace = J.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(divergence.score_and_trace(field, v, t)[1], trace)
    assert torch.allclose(divergence.score_and_trace(model, z, t)[1], trace)
    units = math.sqrt(2) * torch.eye(2, dtype=F64).unsqueeze(1).expand(2, 6, 2)  # whose mean is the trace
    assert torch.allclose(divergence.score_and_projections(field, v, t, units, exact=True)[1].mean(0), trace)


@torch.no_grad()
@every
def test_every_loss_is_the_same_up_to_a_constant(make):
    """In excess of the exact score's, each is ism's, which is E|s_v - s*_v|^2 weighted: integration by parts in v."""
    model, exact, x0 = model_of(), Exact(SDE), LAW.sample(8000, generator(1, "data"))
    excess = make()(model, SDE, x0, generator(2, "l")) - make()(exact, SDE, x0, generator(2, "l"))
    source = generator(2, "l")
    t = draw_times("mixed", len(x0), 1e-3, 1.0, source).double()
    gap = squared_gap(model, exact, SDE, SDE.perturb(x0, t, source).x_t, t)
    assert abs(z(excess - gap)) < 4
    assert float(gap.mean()) > 0


def test_the_gradient_of_hybrid_score_matching_is_that_of_regression_on_the_exact_score():
    """Along a random direction in weight space, over forty batches."""
    model, exact, x0 = model_of(), Exact(SDE), LAW.sample(4000, generator(1, "data"))
    weights = list(model.network.parameters())
    along = [torch.randn(w.shape, generator=generator(3, "a", i), dtype=w.dtype) for i, w in enumerate(weights)]

    def slope(loss):
        return sum((g * a).sum() for g, a in zip(torch.autograd.grad(loss.mean(), weights), along, strict=True))

    found = []
    for i in range(40):
        batch, source = x0[100 * i : 100 * i + 100], generator(i, "g")
        hybrid = slope(DSM()(model, SDE, batch, generator(i, "g")))
        t = draw_times("mixed", 100, 1e-3, 1.0, source).double()
        found.append(hybrid - slope(squared_gap(model, exact, SDE, SDE.perturb(batch, t, source).x_t, t)))
    assert abs(z(torch.stack(found))) < 4


@torch.no_grad()
def test_hybrid_score_matching_is_denoising_score_matching_of_what_the_state_tells():
    """Sample by sample: sigma^2 |s_v - s*_v|^2 = sigma^2 g^2 |s_w + (w - x_0) / tau^2|^2."""
    model, x0 = model_of(), LAW.sample(500, generator(1, "data"))
    found = DSM()(model, SDE, x0, generator(2, "l"))
    source = generator(2, "l")
    t = draw_times("mixed", 500, 1e-3, 1.0, source).double()
    x, v = split(SDE.perturb(x0, t, source).x_t)
    told, tau = SDE.told(t), SDE.level(t).unsqueeze(1)
    w = told.at_x.unsqueeze(1) * x + told.at_v.unsqueeze(1) * v
    gap = model.gaussian_denoiser(w, tau.squeeze(1)) - x0  # tau^2 times that of the scores
    assert torch.allclose(
        found, SDE.factor(t).vv.square() * (told.at_v.unsqueeze(1) / tau.square() * gap).square().sum(1)
    )


SAMPLERS = {
    SSCS: {"steps": 100}, EulerMaruyama: {"steps": 400}, HeunODE: {"steps": 60}, EulerODE: {"steps": 800},
    Dopri5: {"rtol": 1e-3, "atol": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("make", SAMPLERS, ids=lambda m: m.__name__)
def test_every_sampler_that_serves_it_reaches_the_law_with_the_exact_score(make):
    """Mean and second moments of 1024 positions against the mixture's: z-scores below 4.5 (5 of them)."""
    x = make(**SAMPLERS[make]).sample(Exact(SDE), SDE, (2,), 1024, 1, dtype=F64).x
    assert x.shape == (1024, 2)
    assert z_scores(x, LAW).abs().max() < 4.5


class Scripted(Walk):
    """A walk whose noise is given."""

    def noise(self, x):
        return self.memory.pop(0)


def covariance_after(sampler, sde, lam):
    """Of the state, in one coordinate, for data N(0, lam): each step is linear in the state and in its noises."""
    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, 1), torch.tensor([[lam]])), sde)
    P = torch.diag(torch.tensor([1.0, sde.mass], dtype=F64))
    for t, s in itertools.pairwise(sampler.times(sde)):
        walk, script = Scripted(oracle, sde, generator(0, "unused")), torch.eye(6, dtype=F64)
        walk.memory = [script[:, 2:4], script[:, 4:]]
        linear = sampler.step(walk, script[:, :2], t.expand(6), s.expand(6)).T
        P = linear[:, :2] @ P @ linear[:, :2].T + linear[:, 2:] @ linear[:, 2:].T
    return P


def test_the_weak_order_of_sscs_is_one():
    """From three numbers of steps, as for the other samplers of the reverse SDE; the limit is the law at t_min."""
    found = [covariance_after(SSCS(steps=n, grid="uniform", t_min=0.1), SDE, 0.25) for n in (40, 80, 160, 320)]
    rate = torch.log2((found[1] - found[2]).norm() / (found[2] - found[3]).norm())
    assert float(rate) == pytest.approx(1.0, abs=0.2)
    t = torch.tensor([0.1], dtype=F64)
    E, L = rows(SDE.flow(t))[0], rows(SDE.factor(t))[0]
    exact = 0.25 * torch.outer(E[:, 0], E[:, 0]) + L @ L.T
    limit = 2 * found[3] - found[2]  # Richardson's
    assert torch.allclose(limit, exact, atol=2e-3)  # and of the prior, which is not p_T: E(T)^2 = 1e-5


def test_sscs_is_exact_where_the_data_is_stationary_with_its_velocity():
    sde = Kinetic(gamma=1.0)
    P = covariance_after(SSCS(steps=3), sde, 1.0)
    assert torch.allclose(P, torch.diag(torch.tensor([1.0, sde.mass], dtype=F64)), atol=1e-12)


def test_sscs_is_for_a_velocity():
    sde = VP()
    with pytest.raises(ScoreSDEError, match="sde=kinetic"):
        SSCS().check(Oracle(LAW, sde), sde)


def test_a_run_is_resumed_bit_for_bit_and_gives_samples_of_the_data(cli, tmp_path):
    small = [key for key in SMALL if not key.startswith(("steps", "eval.n"))]
    keys = [
        "sde=kinetic",
        "sampler.steps=5",
        "optimizer.schedule=constant",
        "eval.n=50",
        "eval.metrics=[loss]",
        *small,
        *NO_FIGURES,
    ]
    for name, steps in (("whole", 60), ("cut", 40)):
        code, _, err = cli("train", *keys, f"steps={steps}", f"dir={name}")
        assert code == 0, err
    code, _, err = cli("train", "resume=cut", "steps=60")
    assert code == 0, err
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert (whole / "ema.safetensors").read_bytes() == (cut / "ema.safetensors").read_bytes()
    run = load_run(tmp_path / "whole")
    assert run.sample(5).shape == (5, 2)
    with pytest.raises(ScoreSDEError, match="x alone has none"):
        run.score(np.zeros((1, 2)), 0.5)
    with pytest.raises(ScoreSDEError, match="an integral over v"):
        run.log_prob(np.zeros((1, 2)))
