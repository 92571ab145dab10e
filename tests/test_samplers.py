"""Contract of every sampler: its order of convergence, the law it ends in, independence of the number of samples."""

import itertools
import math

import numpy as np
import pytest
import torch

from scoresde_cli import configs
from scoresde_cli.compose import locate
from scoresde_cli.datasets.mixtures import Gaussian
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.datasets.table import Table
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers import grids
from scoresde_cli.samplers.base import Walk, block_rows
from scoresde_cli.samplers.dopri5 import Dopri5
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.edm_stochastic import EDMStochastic
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.langevin import Langevin
from scoresde_cli.samplers.predictor_corrector import PREDICTORS, PredictorCorrector
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion
from scoresde_cli.samplers.scale_path import ScalePath
from scoresde_cli.samplers.sscs import SSCS
from scoresde_cli.samplers.steering import Clipped, Known, Tempered
from scoresde_cli.samplers.true_reversal import TrueReversal
from scoresde_cli.sdes.kinetic import Kinetic
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import correlated_gaussian, name, three_modes

F64 = torch.float64

# Every sampler: settings that are fine enough for the law (VP and VE), and its evaluations a step.
SAMPLERS = {
    EulerODE: ({"steps": 1500}, 1),
    HeunODE: ({"steps": 300}, 2),
    DPMSolverPP: ({"steps": 200}, 1),
    EDMStochastic: ({"steps": 150, "churn": 20.0, "grid": "edm_rho"}, 2),
    Dopri5: ({}, None),
    EulerMaruyama: ({"steps": 1500}, 1),
    ReverseDiffusion: ({"steps": 1500}, 1),
    PredictorCorrector: ({"steps": 800, "snr": 0.05}, 2),
    Langevin: ({}, 1),
    TrueReversal: ({"steps": 1500}, 1),
    ScalePath: ({"steps": 300}, 2),
    SSCS: ({"steps": 300}, 1),
}
ANNEALED = [s for s in SAMPLERS if s not in (Langevin, SSCS)]  # the law of sscs: tests/test_kinetic.py


def process_of(make):
    return Kinetic() if make is SSCS else VP()


def test_every_shipped_sampler_is_in_the_contract():
    nodes = [configs.load(configs.conf_dir() / "sampler" / f"{o}.yaml") for o in configs.options("sampler")]
    assert {locate(node["_target_"], "sampler") for node in nodes} == set(SAMPLERS)


def gaussian_oracle(sde) -> Oracle:
    """N(0, diag(0.25, 2.0)): the flow map of the probability-flow ODE is linear, x_s = sqrt(v_s / v_t) x_t."""
    return Oracle(Mixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[0.25, 2.0]])), sde)


def variance(sde, t):
    t = torch.tensor([t], dtype=F64)
    return sde.alpha(t) ** 2 * torch.tensor([0.25, 2.0], dtype=F64) + sde.sigma(t) ** 2


@pytest.mark.parametrize(
    ("make", "order"), [(EulerODE, 1), (HeunODE, 2), (DPMSolverPP, 2), (lambda **k: EDMStochastic(churn=0.0, **k), 2)],
    ids=["euler_ode", "heun_ode", "dpm_solver_pp", "edm_stochastic without churn"],
)  # fmt: skip
@pytest.mark.parametrize("sde", [VP(1.0, 6.0), VE(0.2, 10.0)], ids=name)
def test_order_of_convergence_on_the_exact_flow(make, order, sde):
    """The error at t_min against the closed-form flow map falls like steps^-order."""
    oracle, errors, counts, t_min = gaussian_oracle(sde), [], (80, 160, 320), 0.05
    for steps in counts:
        sampler = make(steps=steps, grid="uniform", denoise=False, t_min=t_min)
        found = sampler.sample(oracle, sde, (2,), 64, 0, dtype=F64)
        start = sde.sample_prior((block_rows(2), 2), generator(0, "sample", 0), F64)[:64]
        exact = start * (variance(sde, t_min) / variance(sde, 1.0)).sqrt()
        errors.append(float((found.x - exact).abs().mean()))
        assert found.nfe == SAMPLERS.get(make, (None, 2))[1] * steps
    for a, b in itertools.pairwise(errors):
        # The next term of the error expansion is of relative size 1/steps; a two-sided 0.15 in the exponent holds it at 80 steps.
        assert math.log2(a / b) == pytest.approx(order, abs=0.15)


def test_dopri5_keeps_its_tolerance_and_counts_what_that_takes():
    sde, t_min, spent, errors = VP(1.0, 6.0), 0.05, [], []
    start = sde.sample_prior((block_rows(2), 2), generator(0, "sample", 0), F64)[:64]
    exact = start * (variance(sde, t_min) / variance(sde, 1.0)).sqrt()
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        sampler = Dopri5(rtol=tolerance, atol=tolerance, denoise=False, t_min=t_min)
        found = sampler.sample(gaussian_oracle(sde), sde, (2,), 64, 0, dtype=F64)
        errors.append(float((found.x - exact).abs().max()))
        spent.append(found.nfe)
        assert errors[-1] < 30 * tolerance  # the error of all steps together, at the largest of 64 points
    assert spent == sorted(spent)
    # Order 5: a hundred times the accuracy takes 100^(1/5) = 2.5 times the steps, once there are more than a few.
    assert spent[3] / spent[2] == pytest.approx(100**0.2, rel=0.35)


def linear_step(sampler, oracle, sde, t, s):
    """One step on a linear SDE is x <- A x + b z: (A, b), read off the step itself."""
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64)
    out = sampler.step(Walk(oracle, sde, generator(0, "em")), x, t.expand(2), s.expand(2))
    z = torch.randn(2, 2, generator=generator(0, "em"), dtype=F64)
    scale = out[1] / z[1]
    return out[0] - scale * z[0], scale


@pytest.mark.parametrize("make", [EulerMaruyama, ReverseDiffusion], ids=lambda m: m.__name__)
def test_weak_order_is_one(make):
    """The variance of the linear reverse SDE obeys its own recursion; its error halves when the steps double."""
    sde, t_min = VP(1.0, 6.0), 0.05
    oracle, found = gaussian_oracle(sde), []
    for steps in (40, 80, 160):
        sampler = make(steps=steps, grid="uniform", t_min=t_min)
        var = sde.sigma(torch.tensor([1.0], dtype=F64)).square().expand(2)
        for t, s in itertools.pairwise(sampler.times(sde)):
            slope, scale = linear_step(sampler, oracle, sde, t, s)
            var = slope.square() * var + scale.square()
        found.append(var)
    # From the prior, not from p_T: the limit is not known in closed form, and falls out of the differences.
    rate = torch.log2((found[0] - found[1]) / (found[1] - found[2]))
    assert torch.allclose(rate, torch.ones(2, dtype=F64), atol=0.2)  # the next term is 1/40 of it


class Brownian(Walk):
    """A walk whose noise is the increments of one Brownian path on 640 even steps, for any grid that divides them."""

    def __init__(self, model, sde, path, every):
        super().__init__(model, sde, generator(0, "unused"))
        self.path, self.every, self.i = path, every, 0

    def noise(self, x):
        z = self.path[self.i : self.i + self.every].sum(0) / math.sqrt(self.every)
        self.i += self.every
        return z


@pytest.mark.parametrize("make", [EulerMaruyama, ReverseDiffusion], ids=lambda m: m.__name__)
def test_strong_order_is_one_as_the_noise_is_additive(make):
    """On one Brownian path, the distance to the finest solution halves when the steps double."""
    sde, t_min = VP(1.0, 6.0), 0.05
    oracle, ends = gaussian_oracle(sde), []
    path = normal((640, 256, 2), generator(1, "path"), F64)
    start = sde.sample_prior((256, 2), generator(2, "start"), F64)
    for every in (16, 8, 4, 2, 1):
        sampler = make(steps=640 // every, grid="uniform", t_min=t_min)
        walk, x = Brownian(oracle, sde, path, every), start
        for t, s in itertools.pairwise(sampler.times(sde)):
            x = sampler.step(walk, x, t.expand(256), s.expand(256))
        ends.append(x)
    gaps = [float((a - b).square().mean().sqrt()) for a, b in itertools.pairwise(ends)]
    # Multiplicative noise would give 0.5. The pairwise gaps of an order-p method fall by 2^p.
    assert all(math.log2(a / b) == pytest.approx(1.0, abs=0.2) for a, b in itertools.pairwise(gaps))


def z_scores(x, law, n_true=400_000):
    """Of the means and second moments of x against those of the law."""

    def features(y):
        return torch.stack([y[:, 0], y[:, 1], y[:, 0] ** 2, y[:, 1] ** 2, y[:, 0] * y[:, 1]], 1)

    a, b = features(x), features(law.sample(n_true, generator(5, "true")))
    return (a.mean(0) - b.mean(0)) / (b.std(0) * math.sqrt(1 / len(x) + 1 / n_true))


@pytest.mark.parametrize("make", ANNEALED, ids=lambda m: m.__name__)
@pytest.mark.parametrize("sde", [VP(), VE(0.01, 20.0)], ids=name)
def test_every_sampler_reaches_the_law_with_the_exact_score(sde, make):
    """Mean and second moments of 4096 samples against the mixture's, at fine steps: z-scores below 4.5 (5 of them)."""
    law, n = three_modes(), 4096
    settings = dict(SAMPLERS[make][0])
    # Euler's bias is of order 1/steps, and VE's noise wants even steps of t.
    settings.setdefault("grid", "power" if isinstance(sde, VP) else "uniform")
    x = make(**settings).sample(Oracle(law, sde), sde, (2,), n, 1, dtype=F64).x
    # VE starts from N(0, sigma_max^2) instead of p_T: a bias of mean/sigma_max^2, here below 0.3 standard errors.
    assert z_scores(x, law).abs().max() < 4.5


def test_adjusted_langevin_reaches_its_law_and_unadjusted_langevin_the_wider_one_it_is_known_to():
    """Unadjusted, the variance is lam / (1 - e / (2 lam)) in each principal direction (a linear recursion); adjusted, lam."""
    law, sde, e, t_min = correlated_gaussian(), VP(), 0.1, 0.01
    oracle = Oracle(law, sde)
    kernel, t = sde.kernel(), torch.tensor([t_min], dtype=F64)
    lam = kernel.alpha(t).square() * law.lam[0] + kernel.sigma(t).square()
    for adjusted, wanted in ((True, lam), (False, lam / (1 - e / (2 * lam)))):
        sampler = Langevin(steps=300, step_size=e, adjusted=adjusted, denoise=False, t_min=t_min)
        x = sampler.sample(oracle, sde, (2,), 4096, 0, dtype=F64).x
        y = (x - kernel.alpha(t) * law.means[0]) @ law.bases[0]
        # A sample variance of n normal draws has a relative standard error of sqrt(2 / n): four of them.
        assert torch.allclose(y.var(0) / wanted, torch.ones(2, dtype=F64), atol=4 * math.sqrt(2 / 4096)), adjusted
        assert y.mean(0).abs().max() < 4 * math.sqrt(float(wanted.max()) / 4096)


@pytest.mark.parametrize("make", SAMPLERS, ids=lambda m: m.__name__)
def test_sample_i_does_not_depend_on_how_many_are_drawn(make):
    sde = process_of(make)
    oracle = Oracle(three_modes(), sde)

    def draw(n):
        return make(steps=5).sample(oracle, sde, (2,), n, 3).x

    rows = block_rows(2)
    many = draw(rows + 30)
    assert torch.equal(draw(7), many[:7])
    assert torch.equal(draw(rows + 1), many[: rows + 1])
    assert not torch.equal(many[:30], many[rows:])


@pytest.mark.parametrize("make", SAMPLERS, ids=lambda m: m.__name__)
def test_the_path_that_is_watched_ends_in_the_samples(make):
    sde, seen = process_of(make), []
    sampler = make(steps=4)
    x = sampler.sample(Oracle(three_modes(), sde), sde, (2,), 50, 0, watch=lambda block, t, x: seen.append((t, x))).x
    assert torch.equal(seen[-1][1][:50], x)
    assert [t for t, _ in seen] == pytest.approx([*sampler.times(sde).tolist(), 0.0])


def test_grids_are_even_in_what_they_say():
    sde, T, t_min, steps = VP(), 1.0, 1e-3, 10
    kernel = sde.kernel()
    even = {
        "uniform": lambda t: t,
        "power": lambda t: t ** (1 / 3),
        "edm_rho": lambda t: (grids.log_ratio(kernel, t) / 3).exp(),
        "log_snr": lambda t: grids.log_ratio(kernel, t),
    }
    for grid, scale in even.items():
        found = grids.times(grid, 3.0 if grid in grids.RHO else None, steps, sde, t_min)
        assert found[0] == T
        assert found[-1] == t_min
        gaps = scale(found).diff()
        assert torch.allclose(gaps, gaps.mean().expand(steps), rtol=1e-9), grid
        assert (found.diff() < 0).all()


def test_edm_rho_tends_to_log_snr():
    sde = VE()
    far = grids.times("edm_rho", 1e6, 8, sde, 1e-3)
    assert torch.allclose(far, grids.times("log_snr", None, 8, sde, 1e-3), atol=1e-5)


def test_a_list_of_times_is_taken_as_it_is():
    sampler = HeunODE(grid=[1.0, 0.3, 0.02])
    assert (sampler.steps, sampler.t_min) == (2, 0.02)
    assert sampler.times(VP()).tolist() == [1.0, 0.3, 0.02]
    same = HeunODE(grid="uniform", steps=2, t_min=0.5)
    oracle = Oracle(three_modes(), VP())
    listed = HeunODE(grid=[1.0, 0.75, 0.5]).sample(oracle, VP(), (2,), 10, 0).x
    assert torch.equal(listed, same.sample(oracle, VP(), (2,), 10, 0).x)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"grid": [0.5]}, "at least two times"),
        ({"grid": [1.0, 0.2, 0.3]}, "decreasing"),
        ({"grid": "uniform", "rho": 2.0}, "exponent"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(settings, says):
    with pytest.raises(ScoreSDEError, match=says):
        HeunODE(**settings)


def test_a_list_that_does_not_begin_at_T_is_refused():
    with pytest.raises(ScoreSDEError, match="begins at the process's T"):
        HeunODE(grid=[0.9, 0.1]).times(VP())


def test_churn_adds_the_noise_it_says():
    """One churned step of the exact flow on Gaussian data keeps the law: the variance at s is p_s's."""
    sde = VP()
    oracle, t, s = gaussian_oracle(sde), torch.tensor([0.5], dtype=F64), torch.tensor([0.499], dtype=F64)
    x = normal((20_000, 2), generator(0, "x"), F64) * variance(sde, 0.5).sqrt()
    sampler = EDMStochastic(steps=10, churn=4.0)
    y = sampler.step(Walk(oracle, sde, generator(1, "w")), x, t.expand(len(x)), s.expand(len(x)))
    # The step of Heun from the raised level is long (r times 1.4): its own error is below the four standard errors.
    assert torch.allclose(y.var(0) / variance(sde, 0.499), torch.ones(2, dtype=F64), atol=4 * math.sqrt(2 / 20_000))
    assert torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1] < 0.999  # and it did add noise


def test_churn_stays_between_its_ratios_and_has_its_scale():
    sde = VP()
    oracle, s = gaussian_oracle(sde), torch.tensor([0.499], dtype=F64)
    x, t = normal((20_000, 2), generator(0, "x"), F64), torch.tensor([0.5], dtype=F64)
    r = float(grids.log_ratio(sde.kernel(), t).exp())

    def ahead(**settings):
        walk = Walk(oracle, sde, generator(1, "w"))
        return EDMStochastic(steps=10, churn=4.0, **settings).step(walk, x, t.expand(len(x)), s.expand(len(x)))

    plain = EDMStochastic(steps=10, churn=0.0).step(
        Walk(oracle, sde, generator(1, "w")), x, t.expand(len(x)), s.expand(len(x))
    )
    assert torch.allclose(ahead(r_min=1.01 * r), plain, atol=1e-9)
    assert torch.allclose(ahead(r_max=0.99 * r), plain, atol=1e-9)
    once, twice = ahead(r_min=0.99 * r, r_max=1.01 * r) - ahead(noise=1e-9), ahead(noise=2.0) - ahead(noise=1e-9)
    assert torch.allclose(twice, 2 * once, atol=1e-6)  # the step is linear on Gaussian data
    assert once.std() > 0.1


def test_every_predictor_is_the_sampler_of_its_name():
    for chosen, cls in PREDICTORS.items():
        assert cls.__module__.endswith(f".{chosen}")
        assert type(PredictorCorrector(predictor=chosen).first) is cls
    for foreign, says in ((Langevin(), "stays at one time"),):
        with pytest.raises(ScoreSDEError, match=says):
            PredictorCorrector(predictor=foreign).check(Oracle(three_modes(), VP()), VP())


def test_a_tempered_density_has_the_tempered_score_as_its_gradient():
    tempered = Tempered(Oracle(three_modes(), VP()), 0.5)
    x, t = normal((20, 2), generator(0, "x"), F64).requires_grad_(), torch.full((20,), 0.3, dtype=F64)
    (gradient,) = torch.autograd.grad(tempered.log_density(x, t).sum(), x)
    assert torch.allclose(gradient, tempered.score(x, t), atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("make", [DPMSolverPP, EulerMaruyama], ids=lambda m: m.__name__)
def test_temperature_scales_the_variance_of_gaussian_data_exactly(make, temperature):
    sde = VP()
    oracle = Oracle(Mixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2)), sde)
    steps = 100 if make is DPMSolverPP else 800
    x = make(steps=steps, temperature=temperature).sample(oracle, sde, (2,), 8192, 0, dtype=F64).x
    # Four standard errors, and Euler-Maruyama's bias of 1/steps.
    assert x.var(0).mean() / temperature == pytest.approx(1.0, abs=4 / math.sqrt(8192) + 0.01)


def test_clipping_keeps_samples_and_their_predictions_in_range_and_nothing_else_changes():
    sde = VP()
    oracle = Oracle(three_modes(), sde)
    oracle.bounds = (torch.tensor([-0.7, -1.0]), torch.tensor([1.1, 0.9]))
    clipped, t = Clipped(oracle), torch.full((200,), 0.3, dtype=F64)
    x = normal((200, 2), generator(0, "x"), F64)
    x0, free = (model.fields(x, t, {"x0"})["x0"] for model in (clipped, oracle))
    low, high = (end.double() for end in oracle.bounds)
    assert torch.allclose(x0, torch.minimum(torch.maximum(free, low), high), atol=1e-10)
    inside = ((free > low) & (free < high)).all(1)
    assert inside.any()
    assert torch.equal(clipped.score(x, t)[inside], oracle.score(x, t)[inside])
    drawn = HeunODE(steps=20, clip=True, denoise=False).sample(oracle, sde, (2,), 500, 0).x
    assert (drawn >= low.float()).all()
    assert (drawn <= high.float()).all()


@pytest.mark.parametrize(("make", "steps"), [(DPMSolverPP, 40), (EulerMaruyama, 150)], ids=["ode", "sde"])
def test_known_values_are_kept_and_the_rest_is_drawn_given_them(make, steps):
    """The conditional of a Gaussian in closed form. Repainting is approximate: the shift of the mean that the known value brings
    (0.67) is met within 10 percent and the variance within 12, at ten repeats; without them they are off by 55 and 47 percent."""
    law, sde, value = correlated_gaussian(), VP(), 1.5
    cov = law.bases[0] @ torch.diag(law.lam[0]) @ law.bases[0].T
    mean = law.means[0][1] + cov[1, 0] / cov[0, 0] * (value - law.means[0][0])
    var = cov[1, 1] - cov[1, 0] ** 2 / cov[0, 0]
    known = Known(torch.tensor([[value, math.nan]], dtype=F64))
    sampler = make(steps=steps, known={"x0": value}, repaint=10)
    x = sampler.sample(Oracle(law, sde), sde, (2,), 2048, 0, dtype=F64, known=known).x
    assert (x[:, 0] == value).all()
    assert float((x[:, 1].mean() - mean) / (mean - law.means[0][1])) == pytest.approx(0.0, abs=0.1)
    assert float(x[:, 1].var() / var) == pytest.approx(1.0, abs=0.12)


def test_known_values_are_read_from_a_mapping_an_array_and_a_table(tmp_path):
    data = Gaussian(n=100)
    assert Known.read({"x0": 1.0}, data).value.tolist()[0][0] == 1.0
    assert Known.read({1: 2}, data).value[0].isnan().tolist() == [True, False]
    np.save(tmp_path / "k.npy", np.array([[np.nan, 1.0], [2.0, np.nan]]))
    found = Known.read(str(tmp_path / "k.npy"), data)
    mask, value = found.rows(1, 3, torch.zeros(3, 2))
    assert mask.tolist() == [[True, False], [False, True], [True, False]]
    assert value.tolist() == [[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]]
    rows = "\n".join(f"{i},{3 * i + 1}" for i in range(30))
    (tmp_path / "t.csv").write_text(f"a,b\n{rows}\n")
    table = Table(str(tmp_path / "t.csv"))
    (tmp_path / "k.csv").write_text("b\n4\n10\n")
    found = Known.read(str(tmp_path / "k.csv"), table)
    assert torch.allclose(table.units.to_user(found.value.nan_to_num())[:, 1], torch.tensor([4.0, 10.0], dtype=F64))
    for wrong, says in (({"c": 1}, "no such column"), ({"a": "x"}, "expected a number"), ({}, "nothing is known")):
        with pytest.raises(ScoreSDEError, match=says):
            Known.read(wrong, table)
    (tmp_path / "bad.csv").write_text("a,bb\n1,2\n")
    with pytest.raises(ScoreSDEError, match="did you mean 'b'"):
        Known.read(str(tmp_path / "bad.csv"), table)


def test_known_values_without_being_read_are_refused():
    with pytest.raises(ScoreSDEError, match="scoresde sample"):
        HeunODE(steps=2, known={"x0": 1.0}).sample(Oracle(three_modes(), VP()), VP(), (2,), 5, 0)


def test_a_tolerance_that_the_precision_cannot_meet_ends():
    with pytest.raises(ScoreSDEError, match="take larger ones"):
        Dopri5(rtol=1e-13, atol=1e-13).sample(Oracle(three_modes(), VP()), VP(), (2,), 5, 0, dtype=torch.float32)


def test_a_grid_that_floating_point_cannot_hold_is_refused():
    with pytest.raises(ScoreSDEError, match="do not decrease"):
        HeunODE(grid="edm_rho", rho=1e-3).times(VP())
