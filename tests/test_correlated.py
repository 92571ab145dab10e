"""Correlated noise: kernels against closed forms, and everything built on them against isotropic noise."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from scipy.integrate import quad_vec
from scipy.linalg import expm, solve_continuous_lyapunov

from scoresde_cli import configs, divergence, load_run
from scoresde_cli.advice import advice, remembered
from scoresde_cli.compose import compose
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.identity import randomise
from scoresde_cli.likelihood import Flow, log_prob
from scoresde_cli.losses.base import draw_times
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.dsm_cv import DSMCV
from scoresde_cli.losses.fd_ssm import FDSSM
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.metrics.score_error import squared_errors
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, ScoreModel, Zero, fit_white
from scoresde_cli.networks.parameterisation import X0, Eps, Residual
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.base import Walk
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.edm_stochastic import EDMStochastic
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.langevin import Langevin
from scoresde_cli.samplers.predictor_corrector import PredictorCorrector
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.sdes.covariances import KINDS, Equi, Periodic
from scoresde_cli.sdes.operators import Scalar
from scoresde_cli.sdes.structured import Dense
from scoresde_cli.sdes.vp import VP
from scoresde_cli.sdes.whitened import General, Modes
from scoresde_cli.training.mixing import moments
from scoresde_cli.training.variance import Batch
from tests import laws
from tests.conftest import NO_FIGURES, SMALL
from tests.laws import correlated_sdes, spd

F64 = torch.float64
D = 6
SPD = spd(D)


def columns(act):
    return laws.columns(act, D)


SDES = correlated_sdes(D)
each = pytest.mark.parametrize("name", SDES)
WIDE = ["ar1", "low_rank", "reversible dense", "matrix ar1"]  # one of each way
LINEAR = {name: sde for name, sde in SDES.items() if isinstance(sde.white.sde, VP)}


def covariance(operator) -> torch.Tensor:
    return columns(operator.cov)[0]


@each
def test_sigma_has_the_trace_of_isotropic_noise(name):
    sde = SDES[name]
    assert float(covariance(sde.L).trace()) == pytest.approx(D, rel=1e-12)
    assert torch.allclose(columns(sde.L.mul) @ columns(sde.L.mul).mT, covariance(sde.L).expand(2, D, D), atol=1e-12)


def matrices(sde: Correlated) -> tuple[np.ndarray, np.ndarray]:
    """A and Sigma of an SDE."""
    sigma = covariance(sde.L).numpy()
    if sde.rule == "isotropic":
        return np.eye(D), sigma
    return (sigma, sigma) if sde.rule == "reversible" else (sde.A.numpy(), sigma)


@each
@pytest.mark.parametrize("t", [1e-3, 0.5])
def test_the_kernel_is_that_of_van_loan_lyapunov_and_quadrature(name, t):
    """Of the SDE's own A and Sigma in x, by three routes that know nothing of whitening."""
    sde = SDES[name]
    A, sigma = matrices(sde)
    times = torch.full((2,), t, dtype=F64)
    s = 0.5 * float(sde.schedule.integral(times[:1]))
    kernel = sde.kernel()
    M, C = columns(lambda v: kernel.mean(v, times))[0].numpy(), covariance(kernel.factor(times)).numpy()
    assert np.abs(M - expm(-A * s)).max() < 1e-10
    quadrature = quad_vec(lambda u: 2.0 * expm(-A * u) @ sigma @ expm(-A.T * u), 0, s, epsabs=1e-9, epsrel=1e-9)[0]
    assert np.abs(C - quadrature).max() < 1e-8 * max(1.0, np.abs(C).max())
    P = solve_continuous_lyapunov(A, 2.0 * sigma)
    assert np.abs(C - (P - expm(-A * s) @ P @ expm(-A * s).T)).max() < 1e-8
    if s < 2:  # beyond, exp(A^T s) of the block loses the digits that doubling keeps
        block = expm(s * np.block([[-A, 2.0 * sigma], [np.zeros_like(A), A.T]]))
        assert np.abs(C - block[:D, D:] @ block[:D, :D].T).max() < 1e-8
    assert torch.allclose(
        kernel.origin(kernel.mean(torch.eye(2, D, dtype=F64), times), times), torch.eye(2, D, dtype=F64), atol=1e-6
    )


def test_a_drift_whose_exponential_overflows_has_a_finite_kernel():
    process = General(VP(), torch.diag(torch.tensor([400.0, 1.0], dtype=F64)) + 1.0)
    M, C = process.moments(torch.tensor([1.0], dtype=F64))
    assert M.isfinite().all()
    P = solve_continuous_lyapunov(process.A.numpy(), 2 * np.eye(2))
    assert np.abs(C[0].numpy() - P + M[0].numpy() @ P @ M[0].numpy().T).max() < 1e-12


def test_at_time_zero_nothing_has_moved_even_beside_later_times():
    kernel, t = General(VP(), laws.stable(3)).kernel(), torch.tensor([0.0, 0.5, 0.0], dtype=F64)
    x = normal((3, 3), generator(0, "x"), F64)
    noised = kernel.sample(x, t, generator(1, "x"))
    assert torch.equal(noised.x_t[::2], x[::2])
    assert torch.allclose(noised.x_t[1:2], kernel.with_noise(x[1:2], t[1:2], noised.eps[1:2]).x_t, atol=1e-12)


def test_an_unstable_drift_starts_from_the_law_that_it_has_reached():
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)  # a rotation: variances grow without end
    process = General(VP(), A)
    var = process.sample_prior((40_000, 2), generator(0, "p"), F64).var(0)
    assert torch.allclose(
        var, process.schedule.integral(torch.ones(1, dtype=F64)).expand(2), rtol=4 * math.sqrt(2 / 40_000)
    )


@each
def test_simulation_agrees_with_the_kernel(name):
    """Euler-Maruyama in x with the SDE's own drift and noise: mean and covariance within Monte-Carlo error and its bias."""
    sde, n, steps = SDES[name], 10_000, 100
    t = torch.full((n,), 0.3, dtype=F64)
    x0 = torch.linspace(-1, 1, D, dtype=F64).expand(n, D)
    x = sde.simulate(x0, t, steps, generator(0, "simulate"))
    kernel = sde.kernel()
    z = kernel.factor(t).solve(x - kernel.mean(x0, t))  # white, if all is right
    worst = max(
        1.0, float(torch.linalg.eigvalsh(torch.from_numpy(sum(matrices(sde)[:1]) + matrices(sde)[0].T) / 2).max())
    )
    bias = worst * float(sde.schedule.beta(t[0])) * 0.3 / steps  # a step's share of a mode's decay
    assert float(z.mean(0).abs().max()) < 4.5 / math.sqrt(n) + bias
    assert float((z.T @ z / n - torch.eye(D, dtype=F64)).abs().max()) < 5 * math.sqrt(2 / n) + bias


@each
def test_the_prior_is_the_stationary_law(name):
    """Of isotropic drift that of the kernel at T; else dP/dt = 0 in Lyapunov's equation. Its density is that of the draws."""
    sde = SDES[name]
    A, sigma = matrices(sde)
    P = torch.from_numpy(solve_continuous_lyapunov(A, 2.0 * sigma))
    x = sde.sample_prior((50_000, D), generator(0, "prior"), F64)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(P), x.T, upper=False).T
    assert float((white.T @ white / len(x) - torch.eye(D, dtype=F64)).abs().max()) < 5 * math.sqrt(2 / 50_000)
    law = torch.distributions.MultivariateNormal(torch.zeros(D, dtype=F64), P)
    assert torch.allclose(sde.prior_log_prob(x[:50]), law.log_prob(x[:50]), atol=1e-3)  # of VP, sigma(T)^2 = 1 - 4e-5


@each
def test_targets_are_consistent(name):
    sde = SDES[name]
    x0, t = normal((8, D), generator(0, "x0"), F64), torch.linspace(0.05, 0.4, 8, dtype=F64)
    kernel = sde.kernel()
    noised = kernel.sample(x0, t, generator(1, "x0"))
    found = kernel.targets(x0, noised, t, {"eps", "score", "x0"})
    assert torch.allclose(-kernel.factor(t).mul_t(found["score"]), found["eps"], atol=1e-9)
    assert torch.allclose(kernel.origin(noised.x_t + kernel.factor(t).cov(found["score"]), t), x0, atol=1e-7)
    z = sde.white.noised(x0, t, noised)
    assert torch.allclose(sde.white.out(z.x_t), noised.x_t, atol=1e-10)


def mixture(d=D) -> Mixture:
    """Three modes with covariances of their own."""
    source = generator(0, "mixture", d)
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]), normal((3, d), source, F64), torch.rand(3, d, generator=source, dtype=F64) + 0.05,
        torch.linalg.qr(normal((3, d, d), source, F64))[0],
    )  # fmt: skip


def centred(law: Mixture) -> Mixture:
    law.means = law.means - law.weights @ law.means
    return law


@each
def test_the_oracle_is_the_law_of_the_kernel(name):
    """log p_t against torch's densities of the components N(M mu, M K M^T + C), its score against autograd."""
    sde, law = SDES[name], mixture()
    oracle, kernel = Oracle(law, sde), sde.kernel()
    for t in (0.01, 0.4):
        times = torch.full((2,), t, dtype=F64)
        M, C = columns(lambda v, times=times: kernel.mean(v, times))[0], covariance(kernel.factor(times))
        x = normal((5, D), generator(1, "x"), F64).requires_grad_()
        parts = [
            torch.distributions.MultivariateNormal(M @ mu, M @ K @ M.T + C).log_prob(x) + w.log()
            for w, mu, K in zip(law.weights, law.means, law.covariances(), strict=True)
        ]
        expected = torch.logsumexp(torch.stack(parts), 0)
        now = torch.full((5,), t, dtype=F64)
        assert torch.allclose(oracle.log_prob(x, now), expected, atol=1e-8)
        (score,) = torch.autograd.grad(expected.sum(), x)
        assert torch.allclose(oracle.score(x, now), score, atol=1e-7)
        z = sde.white.into(x)
        assert torch.allclose(oracle.whitened().score(z, now), sde.L.mul_t(score), atol=1e-7)


@each
def test_probability_flow_carries_the_density(name):
    """Liouville's equation d log p/dt + velocity . score + div velocity = 0 in x for the exact score, at random points."""
    sde = SDES[name]
    oracle = Oracle(mixture(), sde)
    x = normal((6, D), generator(0, "liouville"), F64).requires_grad_()
    t = torch.linspace(0.05, 0.5, 6, dtype=F64).requires_grad_()
    (dlog,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), t)
    v = oracle.fields(x, t, {"velocity"})["velocity"]
    div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(D))
    residual = dlog + (v * oracle.score(x, t)).sum(1) + div
    assert residual.abs().max() < 1e-7 * (1 + dlog.abs().max())
    assert torch.allclose(sde.known_divergence(x, t), SDE.known_divergence(sde, x, t), atol=1e-9)


def test_the_identity_is_vp_and_modes_of_equal_rate_are():
    x, t = normal((4, D), generator(0, "x"), F64), torch.linspace(0.1, 0.9, 4, dtype=F64)
    vp, s = VP(), Oracle(mixture(), VP()).score
    for sde in (Correlated("identity", shape=(D,)), Correlated("identity", drift="reversible", shape=(D,))):
        assert torch.allclose(sde.drift(x, t), vp.drift(x, t), atol=1e-12)
        assert torch.allclose(sde.diffusion(t).cov(x), vp.diffusion(t).cov(x), atol=1e-12)
        assert torch.allclose(Oracle(mixture(), sde).score(x, t), s(x, t), atol=1e-9)
    modes = Modes(VP(), torch.ones(D, dtype=F64)).kernel()
    assert torch.allclose(modes.alpha(t), vp.alpha(t))
    assert torch.allclose(modes.sigma(t), vp.sigma(t))


def test_the_modes_of_a_covariance_are_its_covariance():
    for covariance_, shape in (
        (Equi(0.4), (D,)),
        (Periodic(1.5), (2, 3)),
        (KINDS["ar1"](0.7), (D,)),
        (KINDS["low_rank"](0.7, 2), (D,)),
    ):
        plain, (modes, lam) = covariance_.factor(shape), covariance_.modes(shape)
        assert torch.allclose(columns(plain.cov), columns(modes.cov), atol=1e-12)
        V = columns(modes.mul)[0] / lam.sqrt()
        assert torch.allclose(V.T @ V, torch.eye(D, dtype=F64), atol=1e-12)


WRONG = [
    ({"sigma": "equi", "rho": -0.5}, r"more than -1/\(d - 1\)"), ({"sigma": "ar1", "rho": 1.0}, "less than 1"),
    ({"sigma": "ar1", "length": 2.0}, "unknown key sde.length"), ({"sigma": "dense"}, "sde.file is missing"),
    ({"sigma": "dense", "file": "none.npy"}, "does not exist"), ({"sigma": "dense", "file": "wide.npy"}, r"expected \(6, 6\)"),
    ({"sigma": "dense", "file": "lower.npy"}, "not symmetric"), ({"sigma": "dense", "file": "minus.npy"}, "not positive"),
    ({"sigma": "dense", "file": "flat.npy"}, "add a diagonal"), ({"drift": "reversibel"}, "did you mean 'reversible'"),
    ({"sigma": "dense", "file": "words.csv"}, "not readable"), ({"drift": "wide.npy"}, r"expected \(6, 6\)"),
    ({"sigma": "low_rank", "file": "tall.npy"}, r"expected \(6, r\)"), ({"sigma": "data"}, "not here"),
]  # fmt: skip


def test_a_covariance_of_one_s_own_is_checked():
    class Half(Equi):
        def factor(self, shape):
            return Dense(0.5 * torch.eye(*shape, *shape, dtype=F64))

    with pytest.raises(ScoreSDEError, match="trace 6, found 3"):
        Correlated(Half(), shape=(D,))
    with pytest.raises(ScoreSDEError, match="it is for the kinds by name"):
        Correlated(Half(), rho=0.5, shape=(D,))


@pytest.mark.parametrize(("keys", "says"), WRONG, ids=lambda v: str(v)[:40])
def test_what_cannot_be_is_refused_in_one_line(keys, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eye = np.eye(D)
    made = {
        "wide": np.eye(4),
        "lower": np.tril(np.ones((D, D))),
        "minus": eye - 0.5,
        "flat": np.ones((D, D)),
        "tall": np.ones((9, 1)),
    }
    for name, matrix in made.items():
        np.save(f"{name}.npy", matrix)
    (tmp_path / "words.csv").write_text("a,b\nc,d\n")
    with pytest.raises(ScoreSDEError, match=says) as found:
        Correlated(**{"sigma": "equi", **keys}, shape=(D,))
    assert "\n" not in str(found.value)


def test_the_covariance_of_the_data_is_shrunk_kept_and_taken_from_what_was_kept():
    from sklearn.covariance import ledoit_wolf

    rows = normal((200, D), generator(0, "rows")) @ torch.linalg.cholesky(SPD).float().T
    sde = Correlated("data", shape=(D,), train=rows)
    expected = torch.from_numpy(ledoit_wolf(rows.double().numpy())[0])
    assert torch.allclose(covariance(sde.L), D * expected / expected.trace(), atol=1e-12)
    again = Correlated("data", shape=(D,), kept=sde.kept)
    assert torch.equal(again.L.L, sde.L.L)
    plain = Correlated("data", shrinkage=0.0, shape=(D,), train=rows)
    sample = torch.from_numpy(np.cov(rows.double().numpy().T, ddof=0))
    assert torch.allclose(covariance(plain.L), D * sample / sample.trace(), atol=1e-12)


# Euler's steps in x, with the matrices, are the steps in z.


def walks(sampler, sde, steps=60):
    """The end of a walk in x with the outer process and its operators, and of the one in white coordinates, on the same noises."""
    oracle, n = Oracle(mixture(), sde), 64
    times = sampler.times(sde)
    x = sde.sample_prior((n, D), generator(0, "start"), F64)
    z = sde.white.into(x)
    outer, inner = Walk(oracle, sde, generator(1, "w")), Walk(oracle.whitened(), sde.white.sde, generator(1, "w"))
    for t, s in itertools.pairwise(times):
        t, s = t.expand(n), s.expand(n)
        x, z = sampler.step(outer, x, t, s), sampler.step(inner, z, t, s)
    return x, sde.white.out(z)


@each
@pytest.mark.parametrize("make", [EulerMaruyama, EulerODE, HeunODE], ids=lambda m: m.__name__)
def test_trajectories_in_x_are_those_in_white_coordinates(name, make):
    """The whitening theorem: to 1e-12 of the largest coordinate, for every drift, as Euler's step commutes with linear maps."""
    x, z = walks(make(steps=60), SDES[name])
    assert float((x - z).abs().max()) < 1e-12 * (1 + float(x.abs().max()))


SAMPLERS = {
    "euler_maruyama": EulerMaruyama(steps=150, rho=3.0), "heun_ode": HeunODE(steps=40), "dpm_solver_pp": DPMSolverPP(steps=40),
    "reverse_diffusion": ReverseDiffusion(steps=150, rho=3.0), "edm_stochastic": EDMStochastic(steps=40),
    "predictor_corrector": PredictorCorrector(steps=100, rho=3.0, snr=0.05),
}  # fmt: skip
PAIRS = [(name, "heun_ode") for name in SDES] + [(name, "euler_maruyama") for name in WIDE]
PAIRS += [(name, sampler) for name in ("dense", "reversible equi") for sampler in list(SAMPLERS)[2:]]


def recovered(x, law) -> float:
    """The largest |z| of the means, variances and covariances of draws x (n, d) against a mixture's own."""
    n, mean = len(x), law.weights @ law.means
    second = torch.einsum("k,ki,kj->ij", law.weights, law.means, law.means) + torch.einsum(
        "k,kij->ij", law.weights, law.covariances()
    )
    y = x - mean
    products = y.unsqueeze(1) * y.unsqueeze(2)
    off = products.mean(0) - (second - mean.outer(mean))
    return float(
        torch.cat([(y.mean(0) / (y.std(0) / n**0.5)), (off / (products.std(0) / n**0.5)).flatten()]).abs().max()
    )


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_mixtures_are_recovered_under_every_sigma(name, sampler):
    """9 z-scores below 4.5 with the exact score; 2048 draws see a bias of a tenth of a standard deviation."""
    law = centred(mixture(2))
    sde = correlated_sdes(2)[name]
    x = SAMPLERS[sampler].sample(Oracle(law, sde), sde, (2,), 2048, 0, dtype=F64).x
    assert recovered(x, law) < 4.5


@pytest.mark.parametrize("make", [EulerODE, EulerMaruyama], ids=lambda m: m.__name__)
def test_the_mean_trace_in_place_of_sigma_is_wrong(make):
    """The same walk in x with Sigma replaced by tr(Sigma) / d = 1 in the steps, the score and the prior being right: far off."""

    class Forgetful(Correlated):
        def diffusion(self, t, x=None):
            return Scalar(self.schedule.g(t))

    d, found = 8, {}
    law = Mixture(torch.ones(1), torch.zeros(1, d), torch.full((1, d), 0.25))
    for cls in (Correlated, Forgetful):
        sde = cls("equi", rho=0.5, shape=(d,))
        oracle, sampler = Oracle(law, sde), make(steps=200)
        walk, x = Walk(oracle, sde, generator(1, "w")), sde.sample_prior((4096, d), generator(0, "s"), F64)
        for t, s in itertools.pairwise(sampler.times(sde)):
            x = sampler.step(walk, x, t.expand(4096), s.expand(4096))
        found[cls] = float(torch.linalg.eigvalsh(x.T @ x / 4096).max()) / 0.25
    assert (
        found[Correlated] < 1.25
    )  # the largest of 8 eigenvalues from 4096 draws: 1 + 2 sqrt(8 / 4096), and Euler's bias
    assert found[Forgetful] > 1.5


def test_steps_in_closed_form_know_each_eigenmode():
    """DPM-Solver++ and the ancestral sampler under the reversible drift: exact for data that is one point, whatever the step."""
    sde = SDES["reversible dense"]
    point = Mixture(torch.ones(1), torch.linspace(-1, 1, D)[None], torch.zeros(1, D))
    x = DPMSolverPP(steps=2).sample(Oracle(point, sde), sde, (D,), 16, 0, dtype=F64).x
    assert torch.allclose(x, point.means.expand(16, D), atol=1e-6)


def test_clipping_is_of_the_data_s_coordinates_and_temperature_scales_sigma():
    """N(0, v Sigma) at a temperature is N(0, temperature v Sigma), exactly."""
    sde = Correlated("equi", rho=0.8, shape=(2,))
    sigma = laws.columns(sde.L.cov, 2)[0]
    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, 2), *(each[None] for each in torch.linalg.eigh(sigma))), sde)
    oracle.bounds = oracle.inner.bounds = (torch.tensor([-0.5, -1.0]), torch.tensor([0.5, 1.0]))
    x = DPMSolverPP(clip=True).sample(oracle, sde, (2,), 200, 0).x
    assert (x.abs() <= torch.tensor([0.5001, 1.0001])).all()
    x = DPMSolverPP(temperature=0.5, steps=100).sample(oracle, sde, (2,), 4096, 0, dtype=F64).x
    assert torch.allclose(x.T @ x / 4096, 0.5 * sigma, atol=4 * 0.5 * math.sqrt(2 / 4096) + 0.005)


@pytest.mark.parametrize(
    ("sampler", "name", "says"),
    [
        (DPMSolverPP(known={"x0": 1.0}), "equi", "drawn given that of the open part"),
        (DPMSolverPP(temperature=0.5), "reversible equi", "sde.drift=isotropic has one"),
        (DPMSolverPP(), "matrix ar1", "euler_maruyama"), (Langevin(), "matrix ar1", "euler_maruyama"),
    ],
)  # fmt: skip
def test_what_a_sampler_cannot_do_is_refused(sampler, name, says):
    with pytest.raises(ScoreSDEError, match=says):
        sampler.check(Oracle(mixture(), SDES[name]), SDES[name])


# Likelihood, model and losses.


@pytest.mark.parametrize("name", WIDE)
def test_log_densities_are_exact(name):
    """Of the exact score, by the trace in white coordinates: 1e-3 nats a dimension, where the prior is p_T."""
    sde, law = correlated_sdes(3)[name], Mixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3))
    oracle = Oracle(law, sde)
    x = law.sample(20, generator(0, "x"))
    found = log_prob(oracle, sde, x, 1e-3, Flow(steps=60)).value
    assert float((found - oracle.log_prob(x, torch.full((20,), 1e-3))).abs().max()) < 3e-3


def model_of(sde, make=None, parameterisation=None):
    """A random network in white coordinates, with the moments of the mixture's draws."""
    x = mixture().sample(2000, generator(0, "fit"))
    network = randomise((make or MLP)((D,), 16, 2), 0)
    return ScoreModel(network, sde, parameterisation or Residual("full"), fit_white(sde, x, "full")).double()


DOORS = [(name, Residual("full")) for name in SDES] + [(name, p) for name in WIDE for p in (Eps(), X0())]


@pytest.mark.parametrize(
    ("name", "parameterisation"), DOORS, ids=lambda v: v if isinstance(v, str) else type(v).__name__
)
def test_the_model_s_doors_agree_with_autograd_in_both_coordinates(name, parameterisation):
    sde = SDES[name]
    model = model_of(sde, parameterisation=parameterisation)
    x, t = normal((2, D), generator(2, "x"), F64), torch.tensor([0.1, 0.6], dtype=F64)
    v = normal((3, 2, D), generator(3, "v"), F64)
    for field, y in ((model, x), (model.whitened(), sde.white.into(x))):
        J = torch.stack(
            [torch.func.jacfwd(lambda u, f=field, i=i: f(u[None], t[i : i + 1])[0])(y[i]) for i in range(2)]
        )
        scale = float(J.detach().abs().max())
        for exact in (False, True):
            score, products = divergence.score_and_projections(field, y, t, v, exact)
            assert torch.allclose(score, field(y, t), rtol=1e-9)
            assert exact or torch.allclose(products, torch.einsum("kbi,bij,kbj->kb", v, J, v), atol=1e-8 * scale)
        assert torch.allclose(
            divergence.score_and_trace(field, y, t)[1], J.diagonal(dim1=1, dim2=2).sum(1), atol=1e-8 * scale
        )
    assert torch.allclose(model.whitened()(sde.white.into(x), t), sde.L.mul_t(model(x, t)), rtol=1e-8)


@pytest.mark.parametrize("name", [*LINEAR, "reversible equi", "reversible dense"])
def test_a_zero_network_is_the_exact_score_of_gaussian_data(name):
    """In white coordinates too; of data whose eigenmodes are independent, where each has its own noise level."""
    sde = SDES[name]
    if name in LINEAR:
        law = mixture().sample(500, generator(0, "g"))
        gaussian = fit_white(sde, law, "full")
    else:
        gaussian = Gaussian(torch.linspace(-1, 1, D, dtype=F64), torch.linspace(0.2, 2.0, D, dtype=F64), None)
    model = ScoreModel(Zero(), sde, Residual("full"), gaussian).double()
    seen = model.moments
    exact = Oracle(Mixture(torch.ones(1), seen.mean[None], seen.lam[None], seen.basis[None]), sde)
    x, t = normal((5, D), generator(1, "x"), F64), torch.linspace(0.01, 0.9, 5, dtype=F64)
    assert torch.allclose(model(x, t), exact.score(x, t), atol=1e-8)


MAKERS = {
    "ism": lambda **k: ISM(**k), "ssm": lambda **k: SSM(Rademacher(), 1, **k), "ssm_vr": lambda **k: SSMVR(Rademacher(), 2, **k),
    "ssm_vr, exact": lambda **k: SSMVR(Rademacher(), D, **k), "fd_ssm": lambda **k: FDSSM(Rademacher(), 1, step=1e-3, **k),
    "dsm": lambda **k: DSM(**k), "dsm_cv": lambda **k: DSMCV(Rademacher(), 1, threshold=1.0, **k),
}  # fmt: skip
EVERY = [(name, loss) for name in WIDE[:3] for loss in MAKERS if loss != "dsm_cv" or name in LINEAR]
EVERY += [
    ("matrix ar1", loss) for loss in ("ism", "ssm", "dsm")
]  # a loss sees white coordinates alone, and these are slow


def z(values, expected=0.0):
    if float((values - expected).abs().max()) < 1e-9:
        return 0.0
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


@torch.no_grad()
@pytest.mark.parametrize(("name", "which"), EVERY)
def test_every_loss_is_the_same_up_to_a_constant(which, name):
    """As in test_losses.py: each in excess of the exact score's, against that of ISM, paired."""
    sde, n = SDES[name], 3000
    model, exact, x0 = model_of(sde), Oracle(mixture(), sde), mixture().sample(n, generator(1, "data"))

    def excess(loss):
        return loss(model, sde, x0, generator(2, "l")) - loss(exact, sde, x0, generator(2, "l"))

    ism = excess(ISM())
    assert abs(z(excess(MAKERS[which]()) - ism)) < 4
    assert float(ism.mean()) > 0


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["sigma2", "g2"])
@pytest.mark.parametrize("name", SDES)
def test_the_losses_are_weighted_by_the_matrix(name, weighting):
    """ISM is S^T C S + 2 tr(C J) and DSM |L^T (S - target)|^2 with the fields in x, C of the kernel (sigma2) or Sigma g^2 (g2)."""
    sde, n = SDES[name], 5
    model, x0 = model_of(sde), mixture().sample(n, generator(1, "data"))
    t, noised = ISM().noise(sde, x0, generator(2, "l"))
    C = sde.kernel().factor(t) if weighting == "sigma2" else sde.diffusion(t)
    s = model(noised.x_t, t)
    J = torch.stack(
        [torch.func.jacfwd(lambda u, i=i: model(u[None], t[i : i + 1])[0])(noised.x_t[i]) for i in range(n)]
    )
    cov = torch.stack([C.cov(e.expand(n, D)) for e in torch.eye(D, dtype=F64)], 2)
    expected = torch.einsum("bi,bij,bj->b", s, cov, s) + 2 * torch.einsum("bij,bji->b", cov, J)
    found = ISM(weighting=weighting).weighted(model, sde, x0, noised, t, generator(3, "v"))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    gap = C.mul_t(s - sde.kernel().targets(x0, noised, t, {"score"})["score"])
    assert torch.allclose(
        DSM(weighting=weighting).weighted(model, sde, x0, noised, t, generator(3, "v")), gap.square().sum(1), rtol=1e-6
    )


@pytest.mark.parametrize(("name", "which"), EVERY)
def test_gradients_are_unbiased_for_ism(which, name):
    sde = SDES[name]
    model, x0 = model_of(sde), mixture().sample(1500, generator(1, "data"))
    weights = list(model.network.parameters())
    along = [torch.randn(w.shape, generator=generator(3, "a", i), dtype=w.dtype) for i, w in enumerate(weights)]

    def slope(loss, i):
        value = loss(model, sde, x0[i * 50 : i * 50 + 50], generator(i, "g")).mean()
        grads = torch.autograd.grad(value, weights, allow_unused=True)
        return sum((g * a).sum() for g, a in zip(grads, along, strict=True) if g is not None)

    assert (
        abs(z(torch.stack([slope(MAKERS[which](), i) - slope(ISM(), i) for i in range(30)]))) < 4.3
    )  # Student's t, 29 degrees, 1 in 5000


def test_losses_of_whitened_data_under_vp_are_those_of_the_data_under_correlated_noise():
    """The whitening theorem for losses, sample by sample: the same network, times, noises and directions."""
    sde, x0 = SDES["dense"], mixture().sample(200, generator(1, "data"))
    model = model_of(sde)
    isotropic = ScoreModel(model.network, VP(), model.parameterisation, model.gaussian).double()
    for name, make in MAKERS.items():
        a = make()(model, sde, x0, generator(2, "l"))
        b = make()(isotropic, VP(), sde.white.into(x0), generator(2, "l"))
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8), name


def test_the_weights_of_dsm_cv_are_those_of_whitened_data():
    sde, x0, v = SDES["dense"], mixture().sample(8, generator(1, "data")), normal((2, 8, D), generator(2, "v"), F64)
    model, loss = model_of(sde), DSMCV(Rademacher(), 2)
    t, noised = loss.noise(sde, x0, generator(3, "n"))
    isotropic = ScoreModel(model.network, VP(), model.parameterisation, model.gaussian).double()
    z0 = sde.white.into(x0)
    found, expected = (
        moments(Batch(SimpleNamespace(loss=loss, sde=process), (), field, data, t, drawn), v)
        for process, field, data, drawn in (
            (sde, model, x0, noised),
            (VP(), isotropic, z0, VP().kernel().with_noise(z0, t, noised.eps)),
        )
    )
    assert torch.allclose(found, expected, rtol=1e-8)


def test_score_error_is_in_units_of_the_noise():
    sde, model = SDES["reversible dense"], model_of(SDES["reversible dense"])
    exact, x0 = Oracle(mixture(), sde), mixture().sample(500, generator(1, "data"))
    t, found = squared_errors(model, exact, sde, x0, 1e-2, 0)
    source = generator(0, "score_error")
    draw_times("uniform", 500, 1e-2, 1.0, source)
    x = sde.perturb(x0, t, source).x_t
    gap = sde.kernel().factor(t).mul_t(model(x, t) - exact.score(x, t))
    assert torch.allclose(found, gap.square().sum(1), rtol=1e-9)


# Runs.


@pytest.mark.parametrize(
    "keys", [["sde.sigma=data"], ["sde.sigma=dense", "sde.file=S.csv", "sde.drift=A.npy"]], ids=["data", "files"]
)
def test_a_run_remembers_the_matrices_that_it_took_from_data_and_files(keys, cli, tmp_path):
    """Read again and gone on with where the files are gone; the Gaussian part of the data is in its own coordinates."""
    np.savetxt(tmp_path / "S.csv", spd(3).numpy(), delimiter=",")
    np.save(tmp_path / "A.npy", laws.stable(3).numpy())
    train = [
        "train",
        "sde=correlated",
        *keys,
        "data=gaussian",
        "data.d=3",
        "sampler=heun_ode",
        "sampler.steps=5",
        "eval.metrics=[nll]",
    ]
    small = [k for k in SMALL if not k.startswith(("steps", "eval.n", "checkpoint"))] + ["steps=10", "eval.n=50"]
    code, _, err = cli(*train, "dir=run", "eval.nll.rows=10", "eval.nll.steps=2", *small, *NO_FIGURES)
    assert code == 0, err
    for file in ("S.csv", "A.npy"):
        (tmp_path / file).unlink()
    run = load_run(tmp_path / "run")
    x = run.sample(20)
    assert np.isfinite(x).all()
    parts = run.parts
    assert parts.sde.kept.keys() == ({"sigma"} if len(keys) == 1 else {"sigma", "A"})
    sigma = laws.columns(parts.sde.L.cov, 3)[0]
    if len(keys) > 1:
        assert torch.allclose(sigma, 3 * spd(3) / spd(3).trace(), atol=1e-9)
    before = (tmp_path / "run/data.safetensors").read_bytes()
    code, _, err = cli("train", "resume=run", "steps=12")
    assert code == 0, err
    assert (tmp_path / "run/data.safetensors").read_bytes() == before
    protocol = load_run(tmp_path / "run").summary["loss"]["protocol"]["sde"]
    assert protocol["class"] == "Correlated"
    assert protocol["sigma"] == keys[0].split("=")[1]
    seen = parts.model.moments
    train_rows = run.dataset().splits["train"].double()
    assert torch.allclose(seen.mean, train_rows.mean(0), atol=1e-5)
    if len(keys) > 1:  # fitted in full where directions forget at their own rates
        found = seen.basis @ seen.lam.diag() @ seen.basis.T
        assert torch.allclose(found, torch.cov(train_rows.T, correction=0), atol=1e-5)


def test_what_the_noise_does_not_forget_is_said():
    """lam_min = 0.1 under the reversible drift keeps exp(-0.1 * 10.05) of that direction's variance: 0.37 over (1 - 0.37) / 0.1."""
    found = {}
    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        for rule in ("isotropic", "reversible"):
            keys = [
                "sde=correlated",
                "sde.sigma=equi",
                "sde.rho=0.9",
                f"sde.drift={rule}",
                "data=gaussian",
                "data.n=200",
            ]
            found[rule] = compose(OmegaConf.to_container(hydra_compose("train", overrides=keys), resolve=True))
    assert remembered(found["isotropic"]) < 0.05
    lam = found["reversible"].model.lam.max()
    assert remembered(found["reversible"]) == pytest.approx(
        float(lam) * 0.1 * math.exp(-1.005) / (1 - math.exp(-1.005)), rel=0.05
    )
    assert any("at T one direction" in line for line in advice(found["reversible"], [])[1])
    assert not any("at T one direction" in line for line in advice(found["isotropic"], [])[1])
