"""Contract of every loss: the identity, the sign, the scale, the weighting, and what each needs."""

import math

import pytest
import torch

from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.identity import bonferroni, checks, randomise
from scoresde_cli.losses.base import draw_times
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.dsm_cv import DSMCV
from scoresde_cli.losses.fd_ssm import FDSSM
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import ScoreModel, fit_gaussian
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.projections import Rademacher, Sphere
from scoresde_cli.rng import generator
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import PROJECTIONS, name, three_modes

SDE, LAW = VP(), three_modes()
N = 40_000


def model_of(sde=SDE) -> ScoreModel:
    gaussian = fit_gaussian(LAW.sample(2000, generator(0, "fit")), "isotropic")
    return ScoreModel(randomise(MLP((2,), 16, 2), 0), sde, Residual(), gaussian).double()


def data(n=N):
    return LAW.sample(n, generator(1, "data"))


MAKERS = {
    "ism": lambda **k: ISM(**k),
    "ssm": lambda **k: SSM(Rademacher(), 1, **k),
    "ssm, sphere, n=3": lambda **k: SSM(Sphere(), 3, **k),
    "ssm_vr": lambda **k: SSMVR(Rademacher(), 1, **k),
    "ssm_vr, exact": lambda **k: SSMVR(Rademacher(), 2, **k),
    "fd_ssm": lambda **k: FDSSM(Rademacher(), 1, step=1e-3, **k),  # its bias, step^2, is below the noise of these tests
    "dsm": lambda **k: DSM(**k),
    "dsm_cv": lambda **k: DSMCV(Rademacher(), 1, threshold=0.5, **k),
    "dsm_cv, exact": lambda **k: DSMCV(Rademacher(), 2, **k),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
IMPLICIT = {k: v for k, v in MAKERS.items() if k != "dsm"}


def z(values, expected=0.0):
    if float((values - expected).abs().max()) < 1e-9:
        return 0.0  # equal sample by sample, to rounding
    return float((values.mean() - expected) / (values.std() / math.sqrt(len(values))))


@torch.no_grad()
@every
def test_every_loss_is_the_same_up_to_a_constant(make):
    """The difference of the losses of two fields is that of ISM: each loss in excess of the exact score's."""
    model, exact, x0 = model_of(), Oracle(LAW, SDE), data()

    def excess(loss):
        return loss(model, SDE, x0, generator(2, "l")) - loss(exact, SDE, x0, generator(2, "l"))

    ism = excess(ISM())
    # The same t and x_t in both (the directions come after) but for dsm_cv, which sorts t; the difference has mean zero.
    assert abs(z(excess(make()) - ism)) < 4
    assert float(ism.mean()) > 0  # the exact score is the minimiser


@torch.no_grad()
@pytest.mark.parametrize("make", IMPLICIT.values(), ids=IMPLICIT)
def test_sign_and_scale_at_the_exact_score(make):
    """At the exact score, E[|S|^2 + 2 tr J] = -E|S|^2 (integration by parts), weight by weight."""
    exact, x0 = Oracle(LAW, SDE), data()
    values = make()(exact, SDE, x0, generator(2, "l"))
    t = draw_times("mixed", N, 1e-3, 1.0, generator(2, "l")).double()
    source = generator(2, "l")
    draw_times("mixed", N, 1e-3, 1.0, source)
    x = SDE.kernel().sample(x0, t, source).x_t
    minus = -SDE.sigma(t).square() * exact.score(x, t).square().sum(1)
    assert abs(z(values - minus)) < 4


@every
def test_gradient_is_unbiased_for_ism(make):
    """The gradient's excess over ISM's, along a random direction in weight space, has mean zero over batches."""
    model, x0 = model_of(), data(4000)
    weights = list(model.network.parameters())
    along = [torch.randn(w.shape, generator=generator(3, "a", i), dtype=w.dtype) for i, w in enumerate(weights)]

    def slope(loss, i):
        grads = torch.autograd.grad(
            loss(model, SDE, x0[i * 100 : i * 100 + 100], generator(i, "g")).mean(), weights, allow_unused=True
        )
        return sum((g * a).sum() for g, a in zip(grads, along, strict=True) if g is not None)

    excess = torch.stack([slope(make(), i) - slope(ISM(), i) for i in range(40)])
    # Forty batches: Student's t with 39 degrees of freedom, two-sided at 1 in 4000.
    assert abs(z(excess)) < 4


@torch.no_grad()
def test_the_bias_of_finite_differences_is_of_order_two():
    """On the same draws, the excess over ssm falls by four with each halving of the step."""
    exact, x0 = Oracle(LAW, SDE), data(4000)
    sliced = SSM(Rademacher(), 2)(exact, SDE, x0, generator(2, "fd"))
    coarse, fine = (
        (FDSSM(Rademacher(), 2, step=h)(exact, SDE, x0, generator(2, "fd")) - sliced).mean() for h in (0.02, 0.01)
    )
    assert (
        3.8 < float(coarse / fine) < 4.2
    )  # the next order is step^2 times the score's fifth derivative: a few percent


def test_finite_differences_train_networks_without_curvature():
    """ReLU: the gradient of fd_ssm is that of dsm in expectation, where that of v^T J v misses the kinks."""
    gaussian = fit_gaussian(LAW.sample(2000, generator(0, "fit")), "isotropic")
    model = ScoreModel(randomise(MLP((2,), 16, 2, "relu"), 0), SDE, Residual(), gaussian).double()
    weights, x0 = list(model.network.parameters()), data(40_000)

    def gradients(loss):
        found = []
        for i in range(40):
            value = loss(model, SDE, x0[i * 1000 : i * 1000 + 1000], generator(i, "relu")).mean()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
        return torch.stack(found)

    keys = {"t_min": 0.05, "times": "uniform"}
    dsm = gradients(DSM(**keys))

    def mean_square_z(loss):
        excess = gradients(loss) - dsm
        return float((40 * excess.mean(0).square() / excess.var(0).clamp_min(1e-20)).mean())

    # One in expectation for an unbiased gradient; over 300 weights, of which tens are independent, 2 is three sigma off.
    assert mean_square_z(FDSSM(Rademacher(), 8, step=0.05, **keys)) < 2
    assert mean_square_z(SSM(Rademacher(), 8, **keys)) > 50


@torch.no_grad()
@every
def test_half_is_half(make):
    model, x0 = model_of(), data(50)
    whole, half = (make(half=h)(model, SDE, x0, generator(0, "h")) for h in (False, True))
    assert torch.equal(half, 0.5 * whole)
    assert "1/2" in make(half=True).convention()
    assert "1/2" not in make().convention()


@torch.no_grad()
@pytest.mark.parametrize("sde", [VP(), VE()], ids=name)
@every
def test_weightings_multiply_each_sample(make, sde):
    model, x0 = model_of(sde), data(50)
    t = make().noise(sde, x0, generator(0, "w"))[0]
    one = make(weighting="one")(model, sde, x0, generator(0, "w"))
    assert torch.allclose(make(weighting="sigma2")(model, sde, x0, generator(0, "w")), sde.sigma(t).square() * one)
    assert torch.allclose(make(weighting="g2")(model, sde, x0, generator(0, "w")), sde.g(t).square() * one)


@torch.no_grad()
@pytest.mark.parametrize("d", [2, 200])
@every
def test_the_reported_loss_has_the_same_expectation(make, d):
    loss = make(half=True, weighting="g2")
    reference = loss.reference(d)
    assert (reference.half, reference.weighting) == (True, "g2")
    own = loss.name in ("dsm", "fd_ssm")
    assert reference.name in ((loss.name,) if own else ("ism",) if d == 2 else ("ssm_vr", "ism"))
    assert reference.needs_kernel <= loss.needs_kernel


@pytest.mark.parametrize("law", ["mixed", "uniform", "log_uniform"])
def test_times_follow_their_law(law):
    n = 10_000
    t = draw_times(law, n, 1e-3, 1.0, generator(0, "t")).double()
    assert t.min() >= 1e-3
    assert t.max() <= 1
    even, logs = (
        t[: {"mixed": n // 2, "uniform": n, "log_uniform": 0}[law]],
        t[{"mixed": n // 2, "uniform": n}.get(law, 0) :],
    )
    # Stratified: the empirical law is within one stratum of the true one everywhere.
    for part, u in ((even, (even - 1e-3) / 0.999), (logs, torch.log(logs / 1e-3) / math.log(1e3))):
        if len(part):
            grid = (torch.arange(len(part)) + 0.5) / len(part)
            assert (u.sort().values - grid).abs().max() < 1.01 / len(part)


@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_verify_holds_for_every_law(law):
    network = randomise(MLP((5,), 12, 2), 0)
    lines = checks(network, law, 5, 2, 4000, 0)
    assert [line.name for line in lines if not line.good] == []
    assert len(lines) == (7 if law.adapted else 8)  # no closed form of the variance


class Long(Sphere):
    """Directions 3 percent too long: E[v v^T] = 1.06 I."""

    def sample(self, shape, n, generator, dtype=torch.float32):
        return 1.03 * super().sample(shape, n, generator, dtype)


def test_verify_sees_a_law_that_is_slightly_wrong():
    lines = checks(randomise(MLP((5,), 12, 2), 0), Long(), 5, 2, 20_000, 0)
    wrong = {line.name for line in lines if not line.good}
    assert "E[v v^T] - I, largest |z|" in wrong
    assert "L_SSM of the exact score of N(0, I): -d" in wrong


def test_the_limit_for_many_scores_grows_slowly():
    assert bonferroni(1) == pytest.approx(4.0)
    assert 4.4 < bonferroni(8) < bonferroni(64) < 5.0
