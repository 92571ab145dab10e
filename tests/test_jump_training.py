"""Training under jumps: the losses have the exact fields as their minimisers, models convert one field into another, runs work."""

import functools
import json
import math

import pytest
import torch

from scoresde_cli import likelihood
from scoresde_cli.datasets.jump_oracle import JumpOracle
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.identity import randomise
from scoresde_cli.losses.augmented_dsm import AugmentedDSM
from scoresde_cli.losses.implicit_flux import ImplicitFlux
from scoresde_cli.losses.jump_ratio import JumpRatio
from scoresde_cli.losses.scale_dsm import ScaleDSM
from scoresde_cli.losses.table_dsm import TableDSM
from scoresde_cli.networks.energy_mlp import EnergyMLP
from scoresde_cli.networks.flow_model import FlowModel, gaussian_model, model_of
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, ScoreModel
from scoresde_cli.networks.parameterisation import X0, Eps, Raw, Residual
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.true_reversal import TrueReversal
from scoresde_cli.sdes import scale_table
from scoresde_cli.sdes.jump_diffusion import JumpDiffusion
from scoresde_cli.sdes.vp import VP

F64 = torch.float64
PLANE = Gaussian(torch.tensor([0.2, -0.1], dtype=F64), torch.full((2,), 0.8, dtype=F64), None)


def law() -> Mixture:
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[1.0, 0.0], [-0.6, 1.0], [-0.5, -1.2]]), torch.full((3, 2), 0.06)
    )


@functools.cache
def process(joint=True):
    return JumpDiffusion(VP(4.0, 8.0), 6.0, amplitude="laplace", joint=joint)


def model(trains, sde, seed, parameterisation=None, make=MLP) -> ScoreModel:
    networks = [randomise(make((2,), 16, 2), 10 * seed + i) for i in range(2)]
    return model_of(trains, networks.__getitem__, sde, parameterisation or Residual(), PLANE).double()


@pytest.mark.parametrize(("amplitude", "joint"), [("gaussian", True), ("student_t", True), ("laplace", False)])
def test_moments_are_those_of_draws(amplitude, joint):
    """Power and push of score and transport given x_0 against 40,000 draws: 5 standard errors of their means. The flux at the
    earliest time has a tail that is cut, so it is held to a factor of two there."""
    sde, n = JumpDiffusion(VP(4.0, 8.0), 6.0, amplitude=amplitude, joint=joint), 40_000
    for now in (0.05, 0.4):
        t = torch.full((n,), now, dtype=F64)
        zero = torch.zeros(n, 2, dtype=F64)
        noised = sde.kernel().sample(zero, t, generator(0, "m"))
        found = sde.kernel().targets(zero, noised, t, {"score", "flux"})
        found["transport"] = sde.velocity(noised.x_t, t, found["score"], found["flux"]) - sde.drift(noised.x_t, t)
        moments = sde.scales(t[:1], 2)
        for name, u in found.items():
            for got, want in (
                (u.square().mean(1), moments[name].power),
                ((u * noised.x_t).mean(1), moments[name].push),
            ):
                error = float(got.std() / math.sqrt(n))
                slack = 0.03 * float(want.abs())  # radii of the table, and what CUT takes of Student's tail
                assert abs(float(got.mean() - want)) < 5 * error + slack, (name, now)


def test_without_jumps_the_moments_are_those_of_the_gaussian_kernel():
    t = torch.linspace(0.01, 1, 20, dtype=F64)
    ours, theirs = JumpDiffusion(rate=0.0).scales(t, 3), VP().scales(t, 3)
    for name in theirs:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))


def test_the_coefficients_of_a_gaussian_kernel_are_one_formula():
    """Residual.regression of the score is Residual.coefficients (Karras' preconditioning) where there are no jumps."""
    t, lam = torch.linspace(0.01, 1, 20, dtype=F64), torch.tensor([0.3, 2.0], dtype=F64)
    alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    found = Residual().regression(VP().scales(t, 2)["score"], alpha**2 * lam, sigma**2)
    for a, b in zip(found, Residual().coefficients(alpha, sigma, lam), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
    with pytest.raises(ScoreSDEError, match="residual, eps and raw do"):
        X0().regression(VP().scales(t, 2)["score"], alpha**2 * lam, sigma**2)


def test_the_zero_network_carries_gaussian_data_exactly_without_jumps():
    """Its velocity is that of N(m, lam) under VP, and log p by its own flow is the closed form."""
    zero = gaussian_model(VP(), PLANE, frozenset({"score", "velocity"}))
    exact = Oracle(Mixture(torch.ones(1), PLANE.mean[None], PLANE.lam[None]), VP())
    x, t = normal((50, 2), generator(0, "x"), F64), torch.linspace(0.01, 1, 50, dtype=F64)
    for name in ("velocity", "score", "x0"):
        assert torch.allclose(zero.fields(x, t, {name})[name], exact.fields(x, t, {name})[name], atol=1e-9)
    assert zero.own_flow
    found = likelihood.log_prob(zero, VP(), x, 1e-3, likelihood.Flow(steps=60)).value
    # The prior is N(0, sigma_T^2) and the flow ends at N(alpha m, ..): alpha^2 = 4e-5 of a square of a few.
    assert torch.allclose(found, exact.log_prob(x, torch.full((50,), 1e-3, dtype=F64)), atol=2e-2)


@pytest.mark.parametrize("parameterisation", [Residual(), Eps(), Raw()])
@pytest.mark.parametrize("carried", ["velocity", "flux"])
def test_velocity_flux_and_score_fit_together(carried, parameterisation):
    """velocity = f - g^2/2 score + flux, asked for one by one or together; and the divergence of the flow is that of autograd."""
    sde = process()
    field = model(frozenset({"score", carried}), sde, 1, parameterisation)
    x, t = normal((6, 2), generator(0, "x"), F64), torch.linspace(0.1, 0.9, 6, dtype=F64)
    both = field.fields(x, t, {"score", "velocity", "flux"})
    assert torch.allclose(both["velocity"], sde.velocity(x, t, both["score"], both["flux"]))
    assert torch.equal(field.velocity(x, t), both["velocity"])
    assert torch.allclose(field.flux(x, t), both["flux"])
    assert not torch.allclose(both["flux"], torch.zeros_like(x))
    _, div = likelihood.flow_and_divergence(field, x, t, None, 1)
    jacobian = torch.autograd.functional.jacobian(lambda y: field.velocity(y, t).sum(0), x)
    assert torch.allclose(div[0], jacobian.diagonal(dim1=0, dim2=2).sum(1))


LOSSES = {
    "table": lambda: TableDSM(),
    "table, power": lambda: TableDSM(scale="power"),
    "augmented": lambda: AugmentedDSM(),
    "augmented, table": lambda: AugmentedDSM(flux="table"),
    "implicit": lambda: ImplicitFlux(Rademacher(), 1),
    "implicit, exact trace": lambda: ImplicitFlux(Rademacher(), 2, draws=1),
}


@torch.no_grad()
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_every_loss_is_the_weighted_squared_error_up_to_a_constant(make, joint):
    """E[loss(a) - loss(b)] = E[errors(a) - errors(b)] against the exact fields, in the loss's own units: |z| < 4.

    Both sides on the same x_t. With coordinates that jump each by itself, forms (i) and (iii) of the flux are one, coordinate by
    coordinate, so the implicit loss has the table's flux as its minimiser there too.
    """
    sde, loss, n = process(joint), make(), 12_000
    a, b = (model(loss.trains, sde, seed) for seed in (1, 2))
    exact, x0 = JumpOracle(law(), sde), law().sample(n, generator(1, "data"))
    t, noised = loss.noise(sde, x0, generator(2, "l"))
    moments, weight = sde.scales(t, 2), noised.aux.get("weight", 1.0)
    second = next(iter(loss.trains - {"score"}))
    power = moments["flux"].power
    if second == "velocity":
        power, push = moments["transport"]
        signal = sde.alpha(t) ** 2 * a.variance
        var = signal + sde.sigma(t) ** 2
        power = torch.maximum(power - push**2 / var, power * signal / var) if loss.scale == "residual" else power
    truth = exact.fields(noised.x_t, t, {"score", second})

    def errors(field):
        found = field.fields(noised.x_t, t, {"score", second})
        gaps = {name: (found[name] - truth[name]).square().sum(1) for name in found}
        return weight * (gaps["score"] / moments["score"].power + gaps[second] / power)

    def value(field):
        return loss.weighted(field, sde, x0, noised, t, generator(3, "v"))

    excess = value(a) - value(b) - (errors(a) - errors(b))
    assert abs(float(excess.mean() / (excess.std() / math.sqrt(n)))) < 4
    gap = errors(a) - errors(b)
    assert abs(float(gap.mean() / (gap.std() / math.sqrt(n)))) > 3  # there is something to tell apart


@pytest.mark.parametrize(
    "make", [TableDSM, AugmentedDSM, JumpRatio, ScaleDSM, functools.partial(ImplicitFlux, Rademacher())]
)
def test_every_loss_has_its_times_and_its_convention(make):
    loss = make(half=True, times="log_uniform", t_min=0.01)
    assert (loss.half, loss.times, loss.t_min, loss.weighting) == (True, "log_uniform", 0.01, "one")
    assert not make().half


class Tilted(JumpOracle):
    """The exact fields with h, a bump, added to the log-density, and its like to the denoiser."""

    tilt = 0.0

    def log_density(self, x, t):
        return self.log_prob(x, t) + self.tilt * torch.exp(-x.square().sum(1))

    def gaussian_denoiser(self, y, noise):
        return super().gaussian_denoiser(y, noise) + self.tilt * torch.sin(y)


@torch.no_grad()
@pytest.mark.parametrize("loss", [JumpRatio(), ScaleDSM()], ids=lambda loss: loss.name)
def test_the_exact_ratio_and_denoiser_are_stationary_points(loss):
    """The central difference of the loss along a bump is zero at the exact field (|z| < 4) and not at another."""
    sde, n, h = process(), 12_000, 0.05
    x0 = law().sample(n, generator(1, "data"))
    t, noised = loss.noise(sde, x0, generator(2, "l"))

    def at(tilt):
        field = Tilted(law(), sde)
        field.tilt = tilt
        return loss.weighted(field, sde, x0, noised, t, generator(3, "v"))

    slopes = {centre: (at(centre + h) - at(centre - h)) / (2 * h) for centre in (0.0, 0.5)}
    z = {centre: float(s.mean() / (s.std() / math.sqrt(n))) for centre, s in slopes.items()}
    assert abs(z[0.0]) < 4
    assert z[0.5] > 6


def test_a_score_model_is_a_denoiser_of_any_level():
    """E[x_0 | x_0 + v eps = y] of y = x / alpha and v = sigma / alpha is its x0 at that time."""
    field = ScoreModel(randomise(MLP((2,), 16, 2), 0), VP(), Residual(), PLANE).double()
    x, t = normal((20, 2), generator(0, "x"), F64), torch.linspace(0.05, 0.9, 20, dtype=F64)
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    found = field.gaussian_denoiser(x / alpha[:, None], sigma / alpha)
    assert torch.allclose(found, field.fields(x, t, {"x0"})["x0"], atol=1e-9)


@torch.no_grad()
def test_the_ratio_of_a_model_with_a_log_density_is_estimated_without_bias():
    """nu*p / p by 4096 candidates against the table's, at 40 points: within 5 standard errors of weights that vary by a few."""
    from scoresde_cli.samplers.base import Walk

    exact = JumpOracle(law(), process())
    x, t = 0.8 * normal((40, 2), generator(0, "x"), F64), torch.full((40,), 0.3, dtype=F64)
    walk = Walk(exact, exact.sde, generator(1, "c"))
    _, ratio = TrueReversal(candidates=4096).candidates_of(walk, x, t)
    assert (ratio / exact.fields(x, t, {"ratio"})["ratio"] - 1).abs().max() < 5 * 2 / math.sqrt(4096)


def test_a_model_without_the_flux_is_refused_by_name():
    energy = model(frozenset({"score", "log_density"}), process(), 0, make=EnergyMLP)
    assert isinstance(energy, FlowModel)
    with pytest.raises(ScoreSDEError, match="log p needs the velocity"):
        likelihood.log_prob(energy, process(), torch.zeros(2, 2, dtype=F64), 1e-3)
    TrueReversal().check(energy, process())
    with pytest.raises(ScoreSDEError, match="infinite variance"):
        AugmentedDSM(flux="importance")


SMALL = ["data.n=300", "eval.n=100", "network.width=16", "steps=12", "tracker.mode=disabled", "sde=jump_diffusion"]


@pytest.fixture
def coarse(monkeypatch):
    """Tables that are built in a tenth of a second: what is tested here is how the parts go together."""
    monkeypatch.setattr(scale_table, "TIMES", 16)
    monkeypatch.setattr(scale_table, "RADII", 64)


@pytest.mark.parametrize(
    ("loss", "way", "numbers"),
    [
        (None, "HeunODE", {"score_error", "flux_error", "nll"}),
        ("augmented_dsm", "HeunODE", {"score_error", "flux_error", "nll"}),
        ("implicit_flux", "HeunODE", {"score_error", "flux_error", "nll"}),
        ("jump_ratio", "TrueReversal", {"score_error"}),
        ("scale_dsm", "ScalePath", set()),
    ],
)
def test_every_loss_trains_samples_and_is_evaluated(loss, way, numbers, coarse, tmp_path, cli):
    """Each brings a sampler that fits; every number that its fields allow is measured."""
    chosen = [] if loss is None else [f"loss={loss}"]
    code, _, err = cli(
        "train", *SMALL, *chosen, "dir=run", "sampler.steps=4", f"eval.figures={str(loss is None).lower()}"
    )
    assert code == 0, err
    config = (tmp_path / "run/config.yaml").read_text()
    assert way in config
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert numbers - {"nll"} <= set(summary)
    assert ("flux_error" in summary) == ("flux_error" in numbers)
    assert cli("sample", "run=run", "n=8", "out=x.csv")[0] == 0
    asked = "null" if loss is None else f"[{','.join(sorted({*numbers, 'sliced_wasserstein'}))}]"
    code, _, err = cli(
        "evaluate", "run=run", "n=200", "nll.rows=10", "nll.steps=3", "figures=false", f"metrics={asked}"
    )
    assert code == 0, err
    assert numbers <= set(json.loads((tmp_path / "run/evaluation.json").read_text())[-1]["summary"])
    if loss is None:
        assert cli("sample", "run=run", "n=8", "out=y.csv", "sampler=euler_maruyama")[0] == 0
        code, _, err = cli("sample", "run=run", "n=8", "out=z.csv", "sampler=true_reversal")
        assert code == 2
        assert "log_density" in err


def test_a_rate_of_zero_has_no_flux_to_measure(coarse, tmp_path, cli):
    assert cli("train", *SMALL, "sde.rate=0", "dir=run", "eval.figures=false")[0] == 0
    assert "flux_error" not in json.loads((tmp_path / "run/summary.json").read_text())
    code, _, err = cli("evaluate", "run=run", "metrics=[flux_error]")
    assert code == 2
    assert "nothing jumps" in err


def test_a_cut_run_goes_on_bit_for_bit(coarse, tmp_path, cli):
    """Both networks, their averages and the optimiser's moments: 6 steps and 6 more are 12."""
    from safetensors.torch import load_file

    base = [*SMALL, "eval.figures=false", "sampler.steps=2", "optimizer.schedule=constant", "checkpoint.every=6"]
    assert cli("train", *base, "dir=whole")[0] == 0
    assert cli("train", *base, "steps=6", "dir=cut")[0] == 0
    assert cli("train", "resume=cut", "steps=12")[0] == 0
    for name in ("model", "ema"):
        a, b = (load_file(tmp_path / run / f"checkpoints/step-0000012/{name}.safetensors") for run in ("whole", "cut"))
        assert a.keys() == b.keys()
        assert any(".second." in key for key in a)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_study_answers_from_known_fields_and_from_runs(coarse, tmp_path, cli):
    grid = ["size=smoke", "study.samplers=[heun_ode,euler_maruyama]"]
    code, _, err = cli("ablate", "study=jump", *grid, "tracker.mode=disabled", "hydra/launcher=basic", "dir=s")
    assert code == 0, err
    report = (tmp_path / "s/report.md").read_text()
    assert "Leaving the flux out costs" in report
    assert "reverse jumps a path" in report
    assert "flux\\_error" in report or "flux_error" in report
    assert "not compared, the protocols differ" not in report  # the sampler is what is compared
