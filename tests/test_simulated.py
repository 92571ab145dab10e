"""Processes known by simulation alone: their levels, paths, prior, reversal; training from the pool."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from scoresde_cli.datasets.jump_oracle import JumpOracle
from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.likelihood import log_prob
from scoresde_cli.losses.base import draw_times
from scoresde_cli.losses.ism import ISM
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.custom import Custom
from scoresde_cli.sdes.double_well import DoubleWell
from scoresde_cli.sdes.jump_diffusion import JumpDiffusion
from scoresde_cli.sdes.poisson import PoissonKeys
from scoresde_cli.sdes.vp import VP
from scoresde_cli.training.paths import Paths
from tests.conftest import NO_FIGURES, SMALL
from tests.laws import three_modes
from tests.test_jumps import plane

F64 = torch.float64
LAW, OU = three_modes(), VP(4.0, 4.0)
ROWS = LAW.sample(20_000, generator(0, "rows")).float()


class Pull:
    """-2 x: with G = 2 the Ornstein-Uhlenbeck process that VP with beta = 4 is."""

    def __call__(self, x, t):
        return -2.0 * x


class Turn:
    """A rotation with decay: x_t hardly correlates with x_0 coordinate by coordinate, and yet remembers it."""

    def __call__(self, x, t):
        return torch.stack([-x[:, 0] - 9.0 * x[:, 1], 9.0 * x[:, 0] - x[:, 1]], 1)


class Spread:
    """A matrix that depends on x, and is no multiple of a diagonal."""

    def __call__(self, x, t):
        a, b, c = 1.0 + 0.3 * torch.sin(x[:, 0]), 0.4 * x[:, 0] * x[:, 1], 1.0 + 0.1 * x[:, 1].square()
        return torch.stack([torch.stack([a, torch.zeros_like(a)], 1), torch.stack([b, c], 1)], 1)


class Bend:
    """1 + cos(x) / 2 on the diagonal."""

    def __call__(self, x, t):
        return 1.0 + 0.5 * torch.cos(x)


def custom(drift=None, noise=2.0, train=ROWS, **keys):
    return Custom(drift or Pull(), noise, shape=tuple(train.shape[1:]), train=train, **keys)


def test_levels_are_those_of_the_kernel_where_the_process_is_linear():
    """From 4096 paths: sigma within 4 standard errors of a standard deviation, alpha within those of a slope, and Euler's O(h)."""
    found, t = custom().levels(), torch.linspace(0.01, 0.9, 30, dtype=F64)
    assert torch.allclose(found.sigma(t), OU.sigma(t), rtol=4 / (2 * 2 * 4096) ** 0.5 + 2 / 200)
    assert float((found.alpha(t) - OU.alpha(t)).abs().max()) < 4 / 4096**0.5 + 2 / 200
    still = custom(Turn(), 1.0).levels()
    assert torch.allclose(still.alpha(t), torch.exp(-t), atol=0.08)  # turned by 9 t, and no less told by x_0 for that


def test_paths_have_the_law_of_the_process():
    """At every time of a visit, mean and variance of an Ornstein-Uhlenbeck process: z-scores, and Euler's bias."""
    sde, n = custom(), 20_000
    x0 = torch.tensor([[1.0, -0.5]], dtype=F64).expand(n, 2)
    times = torch.tensor([0.002, 0.1, 0.1, 0.55], dtype=F64)
    for t, x in zip(times, sde.visit(x0, times, generator(0, "v")), strict=True):
        alpha, sigma = float(OU.alpha(t)), float(OU.sigma(t))
        assert float((x.mean(0) - alpha * x0[0]).abs().max()) < 4 * sigma / n**0.5 + 2 / 200
        assert float((x.var(0) / sigma**2 - 1).abs().max()) < 4 * (2 / n) ** 0.5 + 4 / 200


def test_a_batch_from_the_pool_has_the_law_of_times_and_of_x_t_and_is_a_function_of_seed_and_step():
    sde, loss = custom(paths=2048, refresh=10), ISM()
    pool = Paths(sde, loss, ROWS, 3)
    found = [pool.draw(step, 512, generator(1, "b", step)) for step in range(60)]
    t, x = torch.cat([t for _, t, _ in found]), torch.cat([noised.x_t for *_, noised in found])
    every = draw_times("mixed", len(t), 1e-3, 1.0, generator(2, "t"))
    # Six pools of 128 stratified times each: the empirical laws are within one stratum of half of them.
    assert kstest(t.numpy(), every.numpy()).statistic < 2 / 128
    rows = torch.cat([rows for rows, *_ in found])
    z = (x - OU.alpha(t)[:, None] * ROWS[rows]) / OU.sigma(t)[
        :, None
    ]  # white, if x_t comes from these rows at these times
    # 6 x 2048 paths, each seen 2.5 times at correlated times.
    assert float(z.mean(0).abs().max()) < 5 / (6 * 2048) ** 0.5 + 0.01
    assert float((z.T @ z / len(z) - torch.eye(2)).abs().max()) < 5 * (2 / (6 * 2048)) ** 0.5 + 0.02
    again = Paths(sde, loss, ROWS, 3)
    for step in (57, 23):  # out of order, as after a resume
        rows, t, noised = again.draw(step, 512, generator(1, "b", step))
        assert torch.equal(noised.x_t, found[step][2].x_t)
        assert torch.equal(rows, found[step][0])
    assert not torch.equal(again.draw(10, 512, generator(1, "b", 0))[2].x_t, found[0][2].x_t)


def test_the_double_well_ends_in_its_stationary_law():
    """Kolmogorov-Smirnov against the density that `prior_log_prob` names, each coordinate of 20,000 draws, one in a thousand."""
    sde = DoubleWell(beta_max=20.0, shape=(2,), train=ROWS)
    x = sde.sample_prior((20_000, 2), generator(0, "p"), F64)
    grid = torch.linspace(-4, 4, 4001, dtype=F64)
    density = (0.5 * sde.prior_log_prob(torch.stack([grid, grid], 1))).exp()  # of one coordinate
    below = torch.cumulative_trapezoid(density, grid)
    assert float(below[-1]) == pytest.approx(1.0, abs=1e-6)
    for i in range(2):
        found = kstest(x[:, i].numpy(), lambda v: np.interp(v, grid[1:], below)).statistic
        assert found < 1.95 / 20_000**0.5 + 0.01  # Euler's bias at h beta = 0.1


def test_the_density_of_simulated_paths_is_that_of_the_law_at_T():
    """Of Ornstein-Uhlenbeck paths at T: the closed form, where most of the law is."""
    sde = custom()
    x = normal((60, 2), generator(0, "d"), F64)
    expected = Oracle(LAW, OU).log_prob(x, torch.ones(60, dtype=F64))
    gap = sde.prior_log_prob(x) - expected
    near = x.norm(dim=1) < 2
    # 4096 paths under a kernel of width 0.4: some hundred of them count at each point.
    assert float(gap[near].abs().max()) < 0.25
    assert float(gap[near].mean().abs()) < 0.05


NOISES = {"matrix": Spread(), "diagonal": Bend(), "scalar": lambda x, t: 1.0 + 0.2 * x.square().sum(1)}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_the_divergence_of_noise_that_depends_on_x_is_that_of_its_rows(noise):
    sde = custom(noise=noise)
    assert sde.varies
    assert not custom().varies
    x, t = normal((4, 2), generator(0, "x"), F64).requires_grad_(), torch.full((4,), 0.3, dtype=F64)

    def sigma(y):  # (2, 2) of one point
        G = sde.diffusion(t[:1], y[None])
        return torch.stack([G.cov(e[None])[0] for e in torch.eye(2, dtype=F64)], 1)

    for point, found in zip(x, sde.div_sigma(x, t), strict=True):
        J = torch.autograd.functional.jacobian(sigma, point)
        assert torch.allclose(found, J.diagonal(dim1=1, dim2=2).sum(1), atol=1e-12)


class StationaryScore:
    """The score of p(x) = exp(-|x|^2 / 2) at all times: with f = (Sigma s + div Sigma) / 2 the process leaves it as it is."""

    provides, evaluations, variance, bounds = frozenset({"score", "velocity", "x0"}), 1, 1.0, None

    def __init__(self, sde):
        self.sde = sde

    def fields(self, x, t, names):
        known = {"score": lambda: -x, "velocity": lambda: self.sde.velocity(x, t, -x), "x0": lambda: x}
        return {name: known[name]() for name in names}


class Balanced:
    """(Sigma s + div Sigma) / 2 for s = -x and G = diag(1 + cos(x) / 2)."""

    def __call__(self, x, t):
        g = 1.0 + 0.5 * torch.cos(x)
        return 0.5 * (g.square() * -x - g * torch.sin(x))


def test_forward_and_back_under_noise_that_depends_on_x_the_stationary_law_stays():
    """Forward paths and the reverse SDE keep N(0, I), div Sigma included; without it the reverse SDE does not."""
    train = normal((10_000, 2), generator(0, "n"))
    sde = custom(Balanced(), Bend(), train)
    x = sde.sample_prior((10_000, 2), generator(1, "p"), F64)
    assert (
        kstest(x[:, 0].numpy(), "norm").statistic < 1.95 / 5000**0.5 + 0.02
    )  # and of the 10,000 rows that it starts from
    model, t = StationaryScore(sde), torch.full((50,), 0.5, dtype=F64)
    assert float(sde.velocity(train[:50].double(), t, -train[:50].double()).abs().max()) < 1e-9
    sampler = EulerMaruyama(steps=120, grid="uniform", denoise=False)
    back = sampler.sample(model, sde, (2,), 4096, 0, dtype=F64).x
    assert kstest(back[:, 0].numpy(), "norm").statistic < 1.95 / 4096**0.5 + 0.02

    class Forgetful(Custom):
        def div_sigma(self, x, t):
            return torch.zeros_like(x)

    wrong = Forgetful(Balanced(), Bend(), shape=(2,), train=train)
    back = sampler.sample(StationaryScore(wrong), wrong, (2,), 1024, 0, dtype=F64).x
    assert kstest(back[:, 0].numpy(), "norm").statistic > 0.1


def test_samplers_and_likelihoods_of_a_linear_process_are_those_of_its_kernel():
    """The exact score, and the process once with a kernel and once by its paths: the same flow, the same density."""
    sde, oracle = custom(), Oracle(LAW, OU)

    class Paired(Oracle):
        def __init__(self):
            super().__init__(LAW, OU)
            self.sde = sde

    x = LAW.sample(40, generator(4, "x"))
    expected = log_prob(oracle, OU, x, 1e-3).value
    gap = log_prob(Paired(), sde, x, 1e-3).value - expected  # that of the density at T
    assert float(gap.abs().max()) < 0.4
    assert float(gap.mean().abs()) < 0.05
    drawn = HeunODE(steps=60).sample(Paired(), sde, (2,), 4096, 0, dtype=F64).x
    true = LAW.sample(200_000, generator(5, "true"))
    assert float(((drawn.mean(0) - true.mean(0)) / true.std(0)).abs().max()) < 4 / 64 + 0.02  # and of the 10,000 rows
    assert float((drawn.var(0) / true.var(0) - 1).abs().max()) < 0.1


@pytest.mark.parametrize("joint", [True, False])
def test_jumps_beside_a_simulated_drift_have_their_law(joint):
    """x_t of a linear drift, noise and Laplace jumps by its paths and by its kernel: 17 z-scores, and Euler's bias of 1 percent."""
    keys = {"rate": 4.0, "amplitude": "laplace", "scale": 0.7, "joint": joint}
    sde, exact = custom(jumps=keys), JumpDiffusion(OU, **keys)
    x0, t = torch.tensor([[1.0, -0.5]], dtype=F64).expand(40_000, 2), torch.full((40_000,), 0.3, dtype=F64)
    draws = [process.perturb(x0, t, generator(i, "x")).x_t for i, process in enumerate((sde, exact))]
    centre = draws[1].mean(0)
    for of in (
        lambda x: x, torch.square, torch.cos, lambda x: torch.cos(3 * x), lambda x: x.abs() > 2.0,
        lambda x: (x - centre).abs().prod(1, keepdim=True),  # large where both coordinates have jumped at once
    ):  # fmt: skip
        found, wanted = (of(x).double() for x in draws)
        error = ((found.var(0) + wanted.var(0)) / len(t)).sqrt()
        gap = (found.mean(0) - wanted.mean(0)).abs()
        assert bool((gap < 4 * error + 0.01 * wanted.abs().mean(0)).all()), gap / error


def test_paths_that_are_made_to_jump_early_weigh_what_they_should():
    """The share of first jumps before t, and the mean of x_t^2, from weighted paths and from paths as they come: z-scores."""
    law = PoissonKeys(rate=4.0, scale=0.7)
    when, weight = law.first(100_000, 1e-3, 1.0, generator(0, "first"))
    for t in (2e-3, 0.02, 0.2, 0.9):
        counted = weight * (when < t)
        assert abs(float(counted.mean()) - (1 - math.exp(-4.0 * t))) < 4 * float(counted.std()) / len(when) ** 0.5
    assert float((when < 0.02).double().mean()) > 0.2  # of 0.08 by themselves
    sde, times = custom(jumps={"rate": 4.0, "scale": 0.7}), torch.tensor([0.01, 0.1, 0.6], dtype=F64)
    x0 = torch.zeros(40_000, 2, dtype=F64)
    made = sde.visit(x0, times, generator(1, "x"), when[:40_000])
    for one, other in zip(made, sde.visit(x0, times, generator(2, "x")), strict=True):
        found, wanted = (weight[:40_000, None] * one.square()), other.square()
        error = ((found.var(0) + wanted.var(0)) / len(x0)).sqrt()
        assert bool(((found.mean(0) - wanted.mean(0)).abs() < 4 * error).all())


def test_jumps_that_follow_the_first_one_in_its_step_are_not_lost():
    """Rate 8, steps of 1/8: with one jump at most where the first is settled, E x^2 would be less by a third at t = 1/8."""
    law, sde = PoissonKeys(rate=8.0, scale=0.7), custom(jumps={"rate": 8.0, "scale": 0.7}, steps=8)
    when, weight = law.first(40_000, 1e-3, 1.0, generator(0, "first"))
    x0, times = torch.zeros(40_000, 2, dtype=F64), torch.tensor([0.125, 0.25], dtype=F64)
    made = sde.visit(x0, times, generator(1, "x"), when)
    for one, other in zip(made, sde.visit(x0, times, generator(2, "x")), strict=True):
        found, wanted = weight[:, None] * one.square(), other.square()
        error = ((found.var(0) + wanted.var(0)) / len(x0)).sqrt()
        assert bool(((found.mean(0) - wanted.mean(0)).abs() < 4 * error).all())
        assert bool((4 * error < 0.2 * wanted.mean(0)).all())  # so that the line above can fail


def test_with_jumps_the_flow_of_a_simulated_process_needs_the_flux():
    """The exact fields of a mixture under a linear drift with jumps, the process by its paths: the data again; without, not."""
    keys = {"rate": 4.0, "scale": 0.7}
    law = plane()
    sde, exact = custom(train=law.sample(20_000, generator(0, "rows")).float(), jumps=keys), JumpDiffusion(OU, **keys)

    class Paired(JumpOracle):
        def __init__(self, heard=1.0):
            super().__init__(law, exact)
            self.sde, self.heard = sde, heard

        def fields(self, x, t, names):
            found = super().fields(x, t, {"score", "flux", "x0"})
            return found | {"velocity": sde.velocity(x, t, found["score"], self.heard * found["flux"])}

    true = law.sample(200_000, generator(5, "true"))
    drawn, deaf = (HeunODE(steps=60).sample(Paired(heard), sde, (2,), 4096, 0, dtype=F64).x for heard in (1.0, 0.0))
    assert float(((drawn.mean(0) - true.mean(0)) / true.std(0)).abs().max()) < 4 / 64 + 0.02  # and of the 10,000 rows
    assert float((drawn.var(0) / true.var(0) - 1).abs().max()) < 0.1
    assert float((deaf.var(0) / true.var(0) - 1).abs().max()) > 0.2


def test_a_nonlinear_process_with_jumps_trains_by_the_implicit_flux(tmp_path, cli):
    keys = [
        "sde=double_well",
        "sde.jumps.rate=4",
        "sde.steps=20",
        "sde.paths=256",
        "sampler=heun_ode",
        *SMALL,
        *NO_FIGURES,
    ]
    code, _, err = cli("train", *keys)
    assert code == 2
    assert "implicit_flux" in err
    assert cli("train", *keys, "sde.jumps.rate=-1")[2].startswith("scoresde: sde.jumps.rate=-1: expected")
    code, _, err = cli(
        "train", *keys, "loss=implicit_flux", "eval.metrics=[nll]", "eval.nll.rows=20", "steps=20", "dir=run"
    )
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["loss"]["protocol"]["sde"]["jumps.rate"] == 4.0
    assert math.isfinite(summary["nll"]["value"])


def test_the_way_back_does_not_leave_for_infinity():
    """A cubic drift backwards explodes in finite time; beyond the box of the paths it is that of the box."""
    sde = DoubleWell(shape=(2,), train=ROWS)
    far, t = torch.full((1, 2), 50.0), torch.ones(1)
    assert float(SDE.velocity(sde, far, t, torch.zeros(1, 2)).abs().max()) > 1e5
    assert float(sde.velocity(far, t, torch.zeros(1, 2)).abs().max()) < 1e3

    class Blind(StationaryScore):
        def fields(self, x, t, names):
            known = {"velocity": lambda: self.sde.velocity(x, t, 0.0 * x), "x0": lambda: x}
            return {name: known[name]() for name in names}

    x = HeunODE(steps=30).sample(Blind(sde), sde, (2,), 200, 0).x
    assert torch.equal(sde.within(x), x)
    inside = ROWS[:5]
    assert torch.allclose(sde.velocity(inside, torch.ones(5), inside), SDE.velocity(sde, inside, torch.ones(5), inside))


WRONG = [
    ({"drift": 3}, "sde.drift=3: expected a class of your own"), ({"drift": lambda x, t: x[:, 0]}, r"gives \(3,\) for x \(3, 2\)"),
    ({"drift": lambda x, t: x @ t}, "fails at x"), ({"drift": lambda x, t: 1e40 * x}, "not finite"),
    ({"noise": -1.0}, "expected a positive number or a class"), ({"noise": lambda x, t: 2.0}, "gives float"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "says"), WRONG, ids=[says for _, says in WRONG])
def test_a_process_of_one_s_own_is_checked(keys, says):
    with pytest.raises(ScoreSDEError, match=says) as found:
        custom(**keys)
    assert "\n" not in str(found.value)


def test_the_density_at_T_is_refused_in_many_dimensions():
    sde = custom(train=normal((500, 5), generator(0, "five")))
    with pytest.raises(ScoreSDEError, match="d = 5"):
        sde.prior_log_prob(torch.zeros(2, 5))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(cli, tmp_path):
    keys = [
        "sde=double_well",
        "sampler=heun_ode",
        "sampler.steps=3",
        "sde.refresh=7",
        "sde.paths=64",
        "sde.steps=20",
        *NO_FIGURES,
    ]
    keys += [k for k in SMALL if not k.startswith(("steps", "checkpoint.every", "eval.n"))]
    keys += ["checkpoint.every=10", "optimizer.schedule=constant", "eval.n=50", "eval.metrics=[loss]"]
    assert cli("train", *keys, "steps=25", "dir=whole")[0] == 0
    assert cli("train", *keys, "steps=10", "dir=cut")[0] == 0
    code, _, err = cli("train", "resume=cut", "steps=25")
    assert code == 0, err
    files = [tmp_path / name / "checkpoints/step-0000025/model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    data = [(tmp_path / name / "data.safetensors").read_bytes() for name in ("whole", "cut")]
    assert data[0] == data[1]


def test_the_process_of_the_manual_works_as_printed(cli, tmp_path, monkeypatch):
    """docs/nonlinear.md: its first Python block is saved under the name that stands above it, and its command is run."""
    text = (Path(__file__).parents[1] / "docs/nonlinear.md").read_text()
    name, code = re.search(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.S).groups()
    assert len(code.splitlines()) <= 10
    (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = re.search(r"^    scoresde (train sde=custom .*)$", text, re.M).group(1)
    small = [k for k in SMALL if k not in ("steps=60", "eval.n=300")] + ["steps=20", "eval.n=50", "eval.metrics=[loss]"]
    small += ["sde.paths=64", "sde.steps=20", "sampler.steps=3", *NO_FIGURES]
    code, _, err = cli(*line.split(), *small, "dir=run")
    assert code == 0, err
    from scoresde_cli import load_run

    with pytest.raises(ScoreSDEError, match="not a part of scoresde"):
        load_run(tmp_path / "run")
    run = load_run(tmp_path / "run", trust=True)
    assert np.isfinite(run.sample(20)).all()
    assert np.isfinite(run.log_prob(run.sample(5))).all()
