"""Correlated noise: kernels against closed forms, and everything built on them against isotropic noise."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm, solve_continuous_lyapunov

from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.sdes.covariances import KINDS, Equi, Periodic
from scoresde_cli.sdes.vp import VP
from scoresde_cli.sdes.whitened import General, Modes
from tests import laws
from tests.laws import correlated_sdes, spd

F64 = torch.float64
D = 6
SPD = spd(D)


def columns(act):
    return laws.columns(act, D)


SDES = correlated_sdes(D)
each = pytest.mark.parametrize("name", SDES)
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
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_the_kernel_is_that_of_van_loan_lyapunov_and_quadrature(name, t):
    """Of the SDE's own A and Sigma in x, by three routes that know nothing of whitening."""
    sde = SDES[name]
    A, sigma = matrices(sde)
    times = torch.full((2,), t, dtype=F64)
    s = 0.5 * float(sde.schedule.integral(times[:1]))
    kernel = sde.kernel()
    M, C = columns(lambda v: kernel.mean(v, times))[0].numpy(), covariance(kernel.factor(times)).numpy()
    assert np.abs(M - expm(-A * s)).max() < 1e-10
    quadrature = quad_vec(lambda u: 2.0 * expm(-A * u) @ sigma @ expm(-A.T * u), 0, s, epsabs=1e-11, epsrel=1e-11)[0]
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
    sde, n, steps = SDES[name], 20_000, 150
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
