"""Jump diffusions: the table of the conditional law against closed forms, the forward equation, samplers with exact fields."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from scoresde_cli.datasets.jump_oracle import JumpOracle
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.base import Walk
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion
from scoresde_cli.samplers.scale_path import ScalePath
from scoresde_cli.samplers.true_reversal import TrueReversal
from scoresde_cli.sdes.jump_diffusion import JumpDiffusion
from scoresde_cli.sdes.measures import Atoms, panjer
from scoresde_cli.sdes.scale_mixture import Amplitude
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from scoresde_cli.studies.jump_exact import Mistaken
from tests.laws import three_modes

F64 = torch.float64
LAWS = ["gaussian", "laplace", "student_t"]
EIGHT = VP(8.0, 8.0)  # constant beta, as in the prototype that the tolerances come from


@functools.cache
def eight(rate, amplitude="gaussian"):
    """EIGHT with jumps: one object, so that its tables are built once for all tests."""
    return JumpDiffusion(EIGHT, rate, amplitude=amplitude)


def line() -> Mixture:
    """Three modes in 1-D."""
    return Mixture(torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-2.0], [0.5], [2.5]]), torch.full((3, 1), 0.04))


def plane() -> Mixture:
    """Three isotropic modes in 2-D."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[1.0, 0.0], [-0.6, 1.0], [-0.5, -1.2]]),
        torch.full((3, 2), 0.06),
    )  # fmt: skip


def w1(x, y):
    return float((x.flatten().sort().values - y.flatten().sort().values).abs().mean())


def log_characteristic(sde, k, t):
    """log phi(k | x_0 = 0) = -sigma^2 k^2 / 2 + int_0^t lambda(u) [nuhat(r(t, u) k) - 1] du, for k (n,)."""
    decay, mass = sde.coefficients.instants(t, 64)
    nuhat = sde.amplitude.characteristic(k[:, None] * decay.sqrt())
    return -0.5 * sde.base.sigma(t).square() * k.square() + ((nuhat - 1) * mass).sum(1)


@pytest.mark.parametrize("law", LAWS)
def test_density_flux_and_ratio_agree_with_fourier_inversion(law):
    """lambda = 8, t = 0.4: the prototype's table erred by 2.8e-6 to 4.8e-5 in p and 1.1e-5 to 1.3e-4 in flux p; this one's
    errors are below 4.1e-7 and 1.9e-6 (interpolation), and 2.7e-7 and 6e-7 without it."""
    sde, t = eight(8.0, law), torch.full((1,), 0.4, dtype=F64)
    k = torch.linspace(0, 60, 60_001, dtype=F64)  # phi(60) = 0 in float64; an even grid is spectrally accurate
    x, weight = torch.linspace(0, 6, 61, dtype=F64), torch.full_like(k, 60 / 60_000 / math.pi)
    weight[0] /= 2
    phi, nuhat = log_characteristic(sde, k, t).exp(), sde.amplitude.characteristic(k)
    cos, sin = torch.cos(x[:, None] * k), torch.sin(x[:, None] * k)
    p, jumped = cos @ (phi * weight), cos @ (phi * nuhat * weight)
    flux = 8 * (
        sin @ (phi * (1 - nuhat) / k.clamp_min(1e-3) * weight)
    )  # -lambda grad psi, psihat = phat (1 - nuhat) / k^2
    table = sde.table(1)
    for found, tight in ((table(x**2, t.expand(61)), 1), (table.exact(x**2, 0.4), 0.4)):
        density = found.log_p.exp()
        assert (density - p).abs().max() < tight * 1e-6
        assert (8 * found.c_flux * x * density - flux).abs().max() < tight * 4e-6
        assert (found.log_ratio.exp() * density - jumped).abs().max() < tight * 1e-6


@pytest.mark.parametrize("d", [1, 12])
def test_the_tail_of_the_table_has_its_digits_far_beyond_single_rounding(d):
    """VE with Gaussian jumps: nothing decays, so p is the Poisson mixture of N(0, sigma^2 + n s^2); down to p = 1e-150 and less."""
    sde = JumpDiffusion(VE(0.05, 5.0), 3.0, scale=0.8)
    t, n = torch.tensor([0.5], dtype=F64), torch.arange(80, dtype=F64)
    S, rho2 = sde.base.sigma(t) ** 2 + 0.64 * n, torch.linspace(0, 40, 60, dtype=F64) ** 2
    log_poisson = n * math.log(1.5) - 1.5 - torch.lgamma(n + 1)
    parts = log_poisson - 0.5 * d * torch.log(2 * math.pi * S) - rho2[:, None] / (2 * S)
    exact = torch.logsumexp(parts, 1)
    pull = (torch.logsumexp(parts - S.log(), 1) - exact).exp()
    found = sde.table(d).exact(rho2, 0.5)
    deep = exact > math.log(1e-150) - d  # the table holds V up to 20 jumps, whose chance is 1e-12
    assert deep.sum() > 20
    # A jump is shared by two points of a grid of V, of relative step 1/256 or finer: its variance is 4e-6 too large at most,
    # and the exponents of up to 350 feel that. Measured: 9e-4 of log p = -345, 2e-5 of log p > -28 (p > 1e-12).
    error = (found.log_p - exact).abs() / (1 + exact.abs())
    assert error[deep].max() < 2e-3
    assert error[exact > -28].max() < 5e-5
    assert (found.c_score / pull - 1).abs()[exact > -28].max() < 1e-3
    if d == 1:  # cubic interpolation, over turns of width 1 / rho^2 in z
        read = sde.table(d)(rho2, t.expand(60))
        assert (read.c_score / found.c_score - 1).abs()[deep].max() < 2e-2


@pytest.mark.parametrize(("law", "d"), [("gaussian", 1), ("laplace", 2), ("gaussian", 16)])
def test_interpolation_in_time_and_radius_is_accurate_where_samples_are(law, d):
    """Against the table without interpolation, at x_t drawn from the kernel; the worst is d = 16, where the
    fields turn within a few percent of rho and of t."""
    sde = JumpDiffusion(rate=6.0, amplitude=law)
    for now in (0.003, 0.0317, 0.23, 0.777):
        t = torch.full((400,), now, dtype=F64)
        rho2 = sde.kernel().sample(torch.zeros(400, d, dtype=F64), t, generator(0, "rho")).x_t.square().sum(1)
        apart = t.clone() * torch.ones(400, dtype=F64)
        for found in (sde.table(d)(rho2, apart), sde.table(d)(rho2, t[:1].expand(400))):
            exact = sde.table(d).exact(rho2, now)
            assert (found.log_p - exact.log_p).abs().max() < 3e-3
            for a, b in ((found.c_score, exact.c_score), (found.c_flux, exact.c_flux)):
                assert (a / b - 1).abs().max() < 3e-3
            assert (found.log_ratio - exact.log_ratio).abs().max() < 3e-3


def test_the_flux_has_its_three_forms():
    """(i) lambda E[A p(x - theta A)] = lambda E[P(x) - P(x - A)] in 1-D (P the distribution function); (ii) is the Fourier test;
    (iii) is what the table holds; and for Laplace jumps -lambda s^2/2 grad(nu*p) / p, in 2-D."""
    oracle = JumpOracle(line(), eight(8.0))
    grid, t = torch.linspace(-30, 30, 60_001, dtype=F64), torch.tensor([0.3], dtype=F64)
    p = oracle.log_prob(grid[:, None], t.expand(len(grid))).exp()
    below = torch.cumsum(p, 0) - p / 2  # midpoint sums, times the step 1e-3
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    at = torch.arange(24_000, 36_001, 400)
    shifted = np.interp((grid[at, None] - torch.as_tensor(z)).numpy(), grid.numpy(), below.numpy())
    form_i = 8e-3 * (below[at] - torch.as_tensor(shifted @ weight / weight.sum()))
    flux = oracle.fields(grid[at, None], t.expand(len(at)), {"flux"})["flux"].squeeze(1)
    assert (flux * p[at] - form_i).abs().max() < 2e-5 * float(form_i.abs().max()) + 1e-6

    oracle = JumpOracle(plane(), eight(8.0, "laplace"))
    x, t = normal((40, 2), generator(0, "x"), F64), torch.full((40,), 0.2, dtype=F64)
    h, found = 1e-3, oracle.fields(x, t, {"flux", "log_density"})

    def jumped(y):
        parts = oracle.fields(y, t, {"ratio", "log_density"})
        return parts["ratio"] * parts["log_density"].exp()

    gradient = torch.stack([(jumped(x + h * e) - jumped(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)], 1)
    closed = -8 / 2 * gradient / found["log_density"].exp()[:, None]
    assert (found["flux"] - closed).abs().max() < 1e-4 * float(closed.abs().max())  # interpolation over h: 1e-7 / 1e-3


PROCESSES = {
    "1-D": (eight(8.0), line()),
    "2-D, linear beta and rate": (JumpDiffusion(VP(), 12.0, rate_end=2.0, amplitude="laplace"), plane()),
    "1-D, subvp": (JumpDiffusion("subvp", 4.0, scale=0.7), line()),
    "by coordinate": (JumpDiffusion(EIGHT, 6.0, amplitude="laplace", joint=False), Mixture(
        torch.tensor([0.6, 0.4]), torch.tensor([[1.0, 0.0], [-0.6, 1.0]]), torch.tensor([[0.04, 0.1], [0.1, 0.04]]))),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSES)
def test_forward_equation_and_liouvilles_hold_with_the_exact_fields(case):
    """d log p/dt = -div v - v . score (the flow), and = (f, g part) + lambda (nu*p/p - 1) summed (the forward equation)."""
    sde, law = PROCESSES[case]
    oracle, d = JumpOracle(law, sde), law.means.shape[1]
    x, t, h = 1.5 * normal((60, d), generator(0, "kfe"), F64), torch.linspace(0.03, 0.9, 60, dtype=F64), 1e-3

    def at(y, s, name):
        return oracle.fields(y, s, {name})[name]

    change = (oracle.log_prob(x, t * (1 + h)) - oracle.log_prob(x, t * (1 - h))) / (2 * h * t)

    def divergence(name):
        steps = torch.eye(d, dtype=F64) * h
        return sum((at(x + e, t, name) - at(x - e, t, name))[:, i] / (2 * h) for i, e in enumerate(steps))

    score, v = at(x, t, "score"), at(x, t, "velocity")
    flow = -divergence("velocity") - (v * score).sum(1)
    # Central differences over a table that errs by 1e-6: 1e-3 of the largest rate; the prototype's residual was 3e-3 to 3e-2.
    assert (change - flow).abs().max() < 1e-3 * float(1 + change.abs().max())
    g2, ratio = sde.g(t).square(), at(x, t, "ratio").reshape(60, -1)
    diffusive = d * sde.a(t) + sde.a(t) * (x * score).sum(1) + g2 / 2 * (divergence("score") + score.square().sum(1))
    forward = diffusive + sde.rate(t) * (ratio - 1).sum(1)
    assert (change - forward).abs().max() < 1e-3 * float(1 + change.abs().max())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("joint", [True, False])
def test_the_kernel_draws_the_law_of_the_characteristic_function(law, joint):
    """E cos(k x_1) of 40,000 draws in 2-D from x_0 = 0, rate falling from 9 to 1, against phi: z-scores below 4."""
    sde = JumpDiffusion(VP(), 9.0, rate_end=1.0, amplitude=law, joint=joint)
    n, t = 40_000, torch.tensor([0.6], dtype=F64)
    noised = sde.kernel().sample(torch.zeros(n, 2, dtype=F64), t.expand(n), generator(3, "draws"))
    k = torch.tensor([0.2, 0.5, 1.0, 2.0], dtype=F64)
    phi = log_characteristic(sde, k, t).exp()
    for i in range(2):
        waves = torch.cos(noised.x_t[:, i : i + 1] * k)
        assert ((waves.mean(0) - phi) / (waves.std(0) / math.sqrt(n))).abs().max() < 4
    # The variance is that of `sigma`; Student's fourth moment exists at nu = 5, and its sampling error is the largest.
    assert float(noised.x_t.var(0).mean() / sde.sigma(t) ** 2) == pytest.approx(1, abs=0.06)
    # Squares of two coordinates go together under joint jumps and not otherwise: 4 standard errors of a correlation.
    together = float(torch.corrcoef(noised.x_t.abs().T)[0, 1])
    assert (together > 0.02) == joint or abs(together) < 4 / math.sqrt(n)


@pytest.mark.parametrize("now", [0.02, 0.6])
def test_draws_that_jump_often_are_the_same_law_by_their_weights(now):
    """Of 40,000 at least half have jumped; weighted, the share that has, the mean number and E cos(k x) are right: |z| < 4."""
    sde = JumpDiffusion(VP(), 9.0, rate_end=1.0, amplitude="laplace")
    n, t = 40_000, torch.tensor([now], dtype=F64)
    noised = sde.kernel().often(torch.zeros(n, 2, dtype=F64), t.expand(n), generator(3, "draws"))
    weight, jumped = noised.aux["weight"], noised.aux["S"].flatten() > 1.0001 * sde.base.sigma(t) ** 2
    chance = -torch.expm1(-sde.expected(t))
    assert float(jumped.double().mean()) > max(0.5, float(chance)) - 4 / (2 * math.sqrt(n))
    k = torch.tensor([0.2, 1.0, 2.0], dtype=F64)
    found = torch.cat([jumped.double()[:, None], torch.cos(noised.x_t[:, :1] * k), noised.x_t[:, :1].square()], dim=1)
    wanted = torch.cat([chance, log_characteristic(sde, k, t).exp(), sde.sigma(t) ** 2])
    gap = weight[:, None] * (found - wanted)
    assert (gap.mean(0) / (gap.std(0) / math.sqrt(n))).abs().max() < 4
    assert float(weight.mean()) == pytest.approx(1, abs=4 * float(weight.std()) / math.sqrt(n) + 1e-9)


@pytest.mark.parametrize("joint", [True, False])
def test_simulation_agrees_with_the_kernel(joint):
    """Euler-Maruyama with Poisson jumps has the kernel's variance: 1 percent of bias, 4 standard errors."""
    sde, n = JumpDiffusion(VP(2.0, 2.0), 6.0, joint=joint), 20_000
    t = torch.full((n,), 0.7, dtype=F64)
    x = sde.simulate(torch.ones(n, 2, dtype=F64), t, 200, generator(0, "sim"))
    assert float(x.var(0).mean() / sde.sigma(t[:1]) ** 2) == pytest.approx(1, abs=0.01 + 4 * math.sqrt(1.5 / n))
    assert float(x.mean()) == pytest.approx(math.exp(-0.7), abs=0.02 + 4 * float(sde.sigma(t[:1])) / math.sqrt(n))


@pytest.mark.parametrize("case", PROCESSES)
def test_targets_have_the_exact_fields_as_their_conditional_means(case):
    """E[(target - field(x_t)) h(x_t)] = 0 for h = 1, x/|x|: z-scores of 20,000 draws below 4.5 (16 of them a case)."""
    sde, law = PROCESSES[case]
    n = 20_000
    x0, t = law.sample(n, generator(0, "x0")), torch.full((n,), 0.15, dtype=F64)
    noised = sde.kernel().sample(x0, t, generator(1, "xt"))
    names = {"score", "flux", "velocity", "ratio", "eps"}
    targets, fields = sde.kernel().targets(x0, noised, t, names), JumpOracle(law, sde).fields(noised.x_t, t, names)
    for name in names:
        gap = (targets[name] - fields[name]).reshape(n, -1)
        for h in (torch.ones(n, 1, dtype=F64), torch.nn.functional.normalize(noised.x_t, dim=1)):
            moments = gap * h
            assert (moments.mean(0) / (moments.std(0) / math.sqrt(n))).abs().max() < 4.5, name


def test_rate_zero_is_the_process_without_jumps():
    """Draws, prior and samples bit for bit; fields to the rounding of the tables."""
    sde, base = JumpDiffusion(rate=0.0), VP()
    x0, t = normal((50, 2), generator(0, "x0"), F64), torch.linspace(0.01, 1, 50, dtype=F64)
    a, b = sde.kernel().sample(x0, t, generator(1, "n")), base.kernel().sample(x0, t, generator(1, "n"))
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(sde.sigma(t), base.sigma(t))
    prior = (sde.sample_prior((9, 2), generator(2, "p")), base.sample_prior((9, 2), generator(2, "p")))
    assert torch.equal(*prior)
    ours, theirs = sde.kernel().targets(x0, a, t, {"score", "eps"}), base.kernel().targets(x0, b, t, {"score", "eps"})
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-11, atol=1e-11)
    assert not sde.kernel().targets(x0, a, t, {"flux"})["flux"].any()
    exact, plain = JumpOracle(plane(), sde), Oracle(plane(), base)
    for name in ("score", "velocity", "eps", "x0"):
        assert torch.allclose(exact.fields(a.x_t, t, {name})[name], plain.fields(a.x_t, t, {name})[name], atol=1e-9)
    # log p is interpolated, and for one Gaussian it is -rho^2 / 2 l^2 = -(e^(2z) - 1) / 2.
    assert torch.allclose(exact.log_prob(a.x_t, t), plain.log_prob(a.x_t, t), atol=1e-8)
    assert torch.allclose(sde.prior_log_prob(x0), base.prior_log_prob(x0), atol=1e-8)


def test_small_frequent_jumps_tend_to_a_diffusion_with_error_of_order_s_squared():
    """Fixed rate s^2 = 2 under a drift of rate 4: g^2 becomes 8 + 2. Halving s quarters the distance of log p and velocity."""
    x, t = torch.linspace(-2, 2, 41, dtype=F64)[:, None], torch.full((41,), 0.2, dtype=F64)
    law, gaps = line(), []
    decay = -math.expm1(-8 * 0.2)
    var = math.exp(-8 * 0.2) * 0.04 + decay * 10 / 8
    gap = x - math.exp(-4 * 0.2) * law.means.T
    share = torch.softmax(law.weights.log() - gap.square() / (2 * var), 1)
    score = -(share * gap).sum(1) / var
    limit = -4 * x.squeeze(1) - 5 * score
    for s in (0.4, 0.2, 0.1):
        oracle = JumpOracle(law, JumpDiffusion(EIGHT, 2 / s**2, scale=s))
        gaps.append(float((oracle.fields(x, t, {"velocity"})["velocity"].squeeze(1) - limit).abs().max()))
    # The next term is of relative order s^2: 16 percent of a factor of 4 at s = 0.4.
    for a, b in itertools.pairwise(gaps):
        assert math.log2(a / b) == pytest.approx(2, abs=0.15)


def test_panjer_agrees_with_the_fourier_transform_of_a_compound_poisson_law():
    """P = IFFT(exp(rate (FFT q - 1))), padded; absolute errors of rounding only."""
    q = np.random.default_rng(0).dirichlet(np.ones(40))[None]
    found = panjer(np.pad(q, ((0, 0), (0, 984))), np.array([5.0]))[0]
    fourier = np.fft.irfft(np.exp(5 * (np.fft.rfft(q[0], 4096) - 1)), 4096)[:1024]
    assert np.abs(found - fourier).max() < 1e-15
    assert found[600] > 0


def test_compression_keeps_mass_and_three_moments_with_positive_weights():
    source = np.random.default_rng(1)
    atoms = Atoms(np.exp(source.normal(0, 2, 5000)), source.exponential(1, 5000))
    small = atoms.compressed(float(atoms.at.min()), 0.12)
    assert len(small.at) < 400
    assert (small.mass > 0).all()
    for k in range(4):
        assert (small.mass @ small.at**k) / (atoms.mass @ atoms.at**k) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("law", "rate", "makes"),
    [("gaussian", 2.0, [HeunODE]), ("laplace", 8.0, [HeunODE, EulerMaruyama, ScalePath, TrueReversal])],
)
def test_four_samplers_recover_the_law_and_without_the_flux_none_would(law, rate, makes):
    """1-D, exact fields, 100 steps. W1 of 1024 samples to the law: mean 0.05, 95 percent below 0.13 (the weights of the modes,
    1.7 sd/sqrt(n) apart by 2 to 4.5). Without the flux the flow misses by 2.2 (gaussian, 2) and 17 (laplace, 8) there."""
    sde, n, data = eight(rate, law), 1072, line()
    oracle, true = JumpOracle(data, sde), data.sample(200_000, generator(1, "true"))
    true = true.flatten().sort().values[95::195][: n - 48]
    settings = {"steps": 100, "rho": 4.0, "t_min": 1e-5, "denoise": False}
    for make in makes:
        more = {"candidates": 32} if make is TrueReversal else {}
        x = make(**settings, **more).sample(oracle, sde, (1,), len(true), 0, dtype=F64).x
        assert w1(x, true) < 0.14, make

    x = HeunODE(**settings).sample(Mistaken(data, sde), sde, (1,), len(true), 0, dtype=F64).x
    assert w1(x, true) > 1.5


@pytest.mark.parametrize("make", [HeunODE, ScalePath])
def test_eight_modes_in_two_dimensions_come_back_with_their_weights(make):
    """Rate 8, Gaussian: shares of 2048 samples by nearest mode against the weights (chi-square of 7 degrees below its 1e-4
    quantile), and the spread about the modes."""
    angles, weights = torch.arange(8, dtype=F64) * math.pi / 4, torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1], dtype=F64)
    law = Mixture(weights, 2 * torch.stack([angles.cos(), angles.sin()], 1), torch.full((8, 2), 0.15**2))
    oracle = JumpOracle(law, eight(8.0))
    x = make(steps=60, rho=4.0, t_min=1e-5, denoise=False).sample(oracle, oracle.sde, (2,), 2048, 0, dtype=F64).x
    gaps = torch.cdist(x, law.means)
    counts, expected = torch.bincount(gaps.argmin(1), minlength=8), 2048 * law.weights
    assert float(((counts - expected).square() / expected).sum()) < 29.9
    spread = float(gaps.min(1).values.square().mean() / (2 * 0.15**2))
    assert spread == pytest.approx(1, abs=4 / math.sqrt(2048) + 0.03)  # exponential squares, and 60 steps of Heun


def test_the_reversal_jumps_as_often_as_the_process():
    """Mean number of reverse jumps = rate T, 2 here: Poisson noise of 2048 paths, less second jumps within a step (1 percent)."""
    sde, data = eight(2.0), line()
    sampler, oracle = TrueReversal(steps=150, rho=4.0, t_min=1e-5, candidates=64), JumpOracle(data, sde)
    walk = Walk(oracle, sde, generator(0, "jumps"))
    x = sde.sample_prior((2048, 1), generator(1, "prior"), F64)
    for t, s in itertools.pairwise(sampler.times(sde)):
        x = sampler.step(walk, x, t.expand(2048), s.expand(2048))
    assert walk.memory / 2048 == pytest.approx(2, abs=0.04 + 4 * math.sqrt(2 / 2048))
    assert w1(x, data.sample(2048, generator(2, "true"))) < 0.13  # two samples of 2048: 95 percent below 0.12


def test_the_density_of_the_prior_is_that_of_its_draws():
    """The share of 40,000 draws within |x| < 1 against the integral of the density, in 1-D; it integrates to one."""
    sde = JumpDiffusion(rate=4.0, amplitude="laplace")
    x = torch.linspace(-40, 40, 16_001, dtype=F64)[:, None]
    p = sde.prior_log_prob(x).exp() * 0.005
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    inside = float(p[x.squeeze(1).abs() < 1].sum())
    found = float((sde.sample_prior((40_000, 1), generator(0, "prior"), F64).abs() < 1).double().mean())
    assert found == pytest.approx(inside, abs=4 * math.sqrt(0.25 / 40_000) + 0.005)


class Drawn(Amplitude):
    """A user's law, by a function of the shape."""

    def __init__(self, draws):
        self.draws = draws

    def draw(self, shape, source, dtype=torch.float32):
        return self.draws(shape)


@pytest.mark.parametrize(
    ("draws", "says"),
    [
        (lambda shape: torch.full(shape, -0.5), "gave -0.5: expected finite numbers above zero"),
        (lambda shape: torch.full(shape, math.nan), "gave nan"),
        (lambda shape: torch.ones(3), r"gave shape \(3,\)"),
        (lambda shape: 1.0, "gave float"),
        (lambda shape: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_users_law_with_draws_that_are_none_is_refused(draws, says):
    with pytest.raises(ScoreSDEError, match=says):
        JumpDiffusion(amplitude=Drawn(draws))


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ScoreSDEError, match="more than 2"):
        JumpDiffusion(amplitude="student_t", nu=1.5)
    with pytest.raises(ScoreSDEError, match="at most 500 jumps"):
        JumpDiffusion(rate=1e4)
    with pytest.raises(ScoreSDEError, match="isotropic components"):
        JumpOracle(three_modes(), JumpDiffusion())
    sde = JumpDiffusion()
    with pytest.raises(ScoreSDEError, match="takes the noise for Gaussian"):
        ReverseDiffusion().check(JumpOracle(plane(), sde), sde)
    with pytest.raises(ScoreSDEError, match="needs flux"):
        HeunODE().check(Oracle(plane(), sde), sde)
    each = JumpDiffusion(joint=False)
    for sampler in (TrueReversal(), ScalePath()):
        with pytest.raises(ScoreSDEError, match="joint"):
            sampler.check(JumpOracle(plane(), each), each)
