"""Networks, their dual passes and the parameterisations: one contract over networks x parameterisations x shapes."""

import contextlib

import pytest
import torch
from torch import nn

from scoresde_cli import divergence
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.identity import randomise
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks import unet
from scoresde_cli.networks.energy_mlp import EnergyMLP
from scoresde_cli.networks.log_mlp import LogMLP
from scoresde_cli.networks.mlp import MLP
from scoresde_cli.networks.model import Gaussian, ScoreModel, Zero, fit_gaussian
from scoresde_cli.networks.parameterisation import X0, Eps, Raw, Residual, covariance_for
from scoresde_cli.networks.resmlp import ResMLP
from scoresde_cli.networks.sharp_mlp import SharpMLP
from scoresde_cli.networks.unet import UNet
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from tests.laws import name


class Plain(nn.Module):
    """A user's network without forward_dual: torch.func does the work."""

    def __init__(self, shape):
        super().__init__()
        d = torch.Size(shape).numel()
        self.net = nn.Sequential(nn.Linear(d + 1, 16), nn.Tanh(), nn.Linear(16, d))

    def forward(self, x, c):
        return self.net(torch.cat([x.flatten(1), c[:, None]], 1)).reshape(x.shape)


class PlainEnergy(nn.Module):
    """A user's energy: the score by reverse mode, and torch.func's forward mode over it."""

    conservative = True

    def __init__(self, shape):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(torch.Size(shape).numel() + 1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x, c):
        def total(y):
            return self.net(torch.cat([y.flatten(1), c[:, None]], 1)).sum()

        return torch.func.grad(total)(x)


NETWORKS = {
    "mlp": lambda s: MLP(s, 16, 3),
    "sharp_mlp": lambda s: SharpMLP(s, 16, 3),
    "mlp, one layer": lambda s: MLP(s, 16, 1, "tanh"),
    "mlp, gelu": lambda s: MLP(s, 16, 2, "gelu"),
    "mlp, softplus": lambda s: MLP(s, 16, 2, "softplus"),
    "mlp, elu": lambda s: MLP(s, 16, 2, "elu"),
    "log_mlp": lambda s: LogMLP(s, 16, 2),
    "resmlp": lambda s: ResMLP(s, 16, 2),
    "energy": lambda s: EnergyMLP(s, 16, 3),
    "energy, one layer": lambda s: EnergyMLP(s, 16, 1, "tanh"),
    "energy, gelu": lambda s: EnergyMLP(s, 16, 2, "gelu"),
    "unet": lambda s: UNet(s, channels=4, multipliers=[1, 2]),
    "unet, patches": lambda s: UNet(s, channels=4, multipliers=[1, 2], patch=2),
    "plain": Plain,
    "plain energy": PlainEnergy,
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # a few million roundings; cancellation at the smallest sigma
PARAMETERISATIONS = [Residual("isotropic"), Residual("full"), Eps(), Raw(), X0()]


def model_of(make, parameterisation, shape, sde=None) -> ScoreModel:
    data = normal((200, *shape), generator(0, "data"), torch.float64) @ torch.diag(
        torch.linspace(0.3, 2, shape[-1]).double()
    )
    gaussian = fit_gaussian(data + 0.5, parameterisation.covariance)
    return ScoreModel(randomise(make(shape), 1), sde or VP(), parameterisation, gaussian).double()


def batch(shape, n=3):
    x = normal((n, *shape), generator(2, "x"), torch.float64)
    return x, torch.linspace(0.1, 0.8, n, dtype=torch.float64)


def autograd_jacobian(model, x, t):
    d = x[0].numel()
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda y, i=i: model(y[None], t[i : i + 1])[0], x[i]).reshape(d, d)
            for i in range(len(x))
        ]
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS, ids=lambda p: f"{name(p)}-{p.covariance}")
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_every_route_to_the_jacobian_agrees_with_autograd(make, parameterisation, shape, device, dtype):
    """Against reverse mode in float64 on the CPU, whatever the device and the precision of the routes."""
    model = model_of(make, parameterisation, shape)
    x, t = batch(shape)
    J, expected_score = autograd_jacobian(model, x, t), model(x, t)
    v = normal((2, *x.shape), generator(3, "v"), torch.float64)
    expected = torch.einsum("kbi,bij,kbj->kb", v.flatten(2), J, v.flatten(2))
    trace_of_J = J.diagonal(dim1=1, dim2=2).sum(1)
    model, x, t, v = model.to(device, dtype), *(tensor.to(device, dtype) for tensor in (x, t, v))
    scale, tolerance = float(J.abs().max()), TOLERANCE[dtype]

    def close(found, exact):
        return torch.allclose(found.double().cpu(), exact, rtol=tolerance, atol=tolerance * scale)

    for exact in (False, True):
        score, projected = divergence.score_and_projections(model, x, t, v, exact)
        assert close(score, expected_score)
        assert exact or close(projected, expected)
    score, trace = divergence.score_and_trace(model, x, t)
    assert close(score, expected_score)
    assert close(trace, trace_of_J)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("m", [1, 2, 3])
def test_directions_of_the_first_samples_alone_give_what_those_of_all_do(make, m):
    """The score of every sample, the projections of the first m, and both gradients; one pass or two."""
    model = model_of(make, Residual("full"), (4,))
    x, t = batch((4,))
    v = normal((2, *x.shape), generator(3, "v"), torch.float64)
    weights = [p for p in model.network.parameters() if p.requires_grad]

    def of(v):
        score, projected = divergence.score_and_projections(model, x, t, v)
        value = score.square().sum() + projected[:, :m].exp().sum()
        found = torch.autograd.grad(value, weights, allow_unused=True)
        return score, projected[:, :m], *(g for g in found if g is not None)

    for part, whole in zip(of(v[:, :m]), of(v), strict=True):
        assert torch.allclose(
            part, whole, rtol=1e-10, atol=1e-12 * float(whole.detach().abs().max())
        )  # float64 rounding


class Hidden(nn.Module):
    """A network whose own dual pass is not seen: the way of torch.func."""

    def __init__(self, network):
        super().__init__()
        self.network, self.conservative = network, getattr(network, "conservative", False)

    def forward(self, x, c):
        return self.network(x, c)


def through_torch_func(model, x, t, v):
    model.network = Hidden(model.network)
    return divergence.score_and_projections(model, x, t, v)


def in_chunks_of_one(model, x, t, v):
    model.chunk = 1
    return divergence.score_and_projections(model, x, t, v)


def by_differences(model, x, t, v):
    score, slope = divergence.finite_difference(model, x, t, v, torch.full_like(t, 1e-4))
    return score.mean(0), divergence.inner(v, slope, 2)


# A route and what it may be off by, as a multiple of the tolerance: differences of step 1e-4 have a bias of 1e-8 times
# derivatives of third order at sigma = 0.2, and rounding of eps/1e-4.
ROUTES = {
    "as it comes": (divergence.score_and_projections, 1.0), "torch.func": (through_torch_func, 1.0),
    "chunks of one": (in_chunks_of_one, 1.0), "differences": (by_differences, 1e4),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_values_and_gradients_of_every_route_agree_with_double_reverse(make, route, shape, device, dtype):
    if route == "differences" and dtype != torch.float64:
        pytest.skip("differences of step 1e-4 need float64")
    model = model_of(make, Residual("full"), shape)
    x, t = batch(shape)
    v = normal((2, *x.shape), generator(3, "v"), torch.float64)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.network.parameters()), allow_unused=True)

    y = x.clone().requires_grad_()
    score = model(y, t)
    curvature = torch.stack(
        [divergence.inner(torch.autograd.grad((score * one).sum(), y, create_graph=True)[0], one, 1) for one in v]
    )
    backward = gradients(score.square().sum() + curvature.sum())
    model, x, t, v = model.to(device, dtype), *(tensor.to(device, dtype) for tensor in (x, t, v))
    push, factor = ROUTES[route]
    tolerance = factor * TOLERANCE[dtype]
    found, projected = push(model, x, t, v)
    for one, exact in ((found.detach(), score.detach()), (projected.detach(), curvature.detach())):
        assert torch.allclose(one.double().cpu(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max() + 1))
    forward = gradients(found.square().sum() + projected.sum())
    for a, b in zip(forward, backward, strict=True):
        assert (a is None) == (b is None) or float((a if b is None else b).abs().max()) == 0
        if a is not None and b is not None:
            assert torch.allclose(a.double().cpu(), b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1))


def test_the_trace_does_not_depend_on_the_chunk():
    model = model_of(NETWORKS["resmlp"], Residual("full"), (7,))
    x, t = batch((7,))
    whole = divergence.weighted_trace(model.network, x, t, None)[1]
    for chunk in (1, 2, 5):
        assert torch.allclose(divergence.weighted_trace(model.network, x, t, None, chunk)[1], whole, rtol=1e-12)


@pytest.mark.parametrize("make", [MLP, ResMLP, EnergyMLP, UNet])
def test_an_untrained_network_returns_zero(make):
    x, t = batch((3,))
    assert not make((3,)).double()(x, t).any()


@pytest.mark.parametrize("make", [NETWORKS["mlp"], NETWORKS["energy"], Plain])
def test_gradients_do_not_depend_on_the_chunk_and_memory_does(make):
    """Chunks are computed again in the backward pass: the same gradient, and less kept for it."""
    model = model_of(make, Residual("full"), (8,))
    x, t = batch((8,))
    v = normal((6, *x.shape), generator(3, "v"), torch.float64)

    def of(chunk):
        model.chunk, kept = chunk, {}

        def pack(tensor):
            with contextlib.suppress(RuntimeError):  # the wrapped tensors of torch.func have no storage
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            score, projected = divergence.score_and_projections(model, x, t, v)
            trace = divergence.score_and_trace(model, x, t)[1]
            value = score.square().sum() + projected.square().sum() + trace.sum()
        return torch.autograd.grad(value, list(model.network.parameters()), allow_unused=True), sum(kept.values())

    (whole, much), (parts, little) = of(None), of(2)
    for a, b in zip(whole, parts, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    assert make is Plain or little < 0.5 * much  # torch.func hides its tensors from the hook


@pytest.mark.parametrize("make", [NETWORKS["energy"], PlainEnergy])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS, ids=lambda p: f"{name(p)}-{p.covariance}")
def test_the_score_of_an_energy_is_a_gradient(make, parameterisation):
    """Its Jacobian is symmetric in every parameterisation; that of a perceptron is not."""
    x, t = batch((4,))

    def skew(network):
        J = autograd_jacobian(model_of(network, parameterisation, (4,)), x, t)
        return float((J - J.mT).abs().max() / J.abs().max())

    assert skew(make) < 1e-12
    assert skew(NETWORKS["mlp"]) > 1e-3


def test_the_field_of_an_energy_network_is_the_gradient_of_its_energy():
    for make in (NETWORKS["energy"], NETWORKS["energy, one layer"], NETWORKS["energy, gelu"]):
        network = randomise(make((4,)), 1)
        x, t = batch((4,))
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network.energy(y, t).sum(), y)
        assert torch.allclose(network(x, t), gradient, rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_finite_differences_converge_with_order_two_and_are_exact_for_a_linear_score():
    model = model_of(NETWORKS["mlp"], Residual("full"), (4,))
    x, t = batch((4,))
    v = normal((3, *x.shape), generator(3, "v"), torch.float64)
    score, jvp = divergence.dual(model, x, t, v)

    def errors(h):
        mean, slope = divergence.finite_difference(model, x, t, v, torch.full_like(t, h))
        return float((mean - score).abs().max()), float((slope - jvp).abs().max())

    for coarse, fine in zip(errors(0.02), errors(0.01), strict=True):
        assert 3.9 < coarse / fine < 4.1  # the next order is h^2 = 1e-4 smaller, times a ratio of derivatives
    linear = ScoreModel(Zero(), VP(), Residual(), model.gaussian).double()
    score, jvp = divergence.dual(linear, x, t, v)
    mean, slope = divergence.finite_difference(linear, x, t, v, torch.full_like(t, 0.5))
    assert torch.allclose(mean, score.expand_as(mean), rtol=1e-10)
    assert torch.allclose(slope, jvp, rtol=1e-10)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=name)
@pytest.mark.parametrize("covariance", ["isotropic", "full"])
def test_zero_network_is_the_exact_score_of_gaussian_data(sde, covariance):
    data = normal((500, 3), generator(0, "g"), torch.float64) * torch.tensor([0.5, 1.0, 2.0]).double() + 1.0
    gaussian = fit_gaussian(data, covariance)
    model = ScoreModel(Zero(), sde, Residual(), gaussian).double()
    x, t = batch((3,))
    C = (
        torch.diag(gaussian.lam)
        if gaussian.basis is None
        else gaussian.basis @ torch.diag(gaussian.lam) @ gaussian.basis.T
    )
    for i in range(len(x)):
        alpha, sigma = sde.alpha(t[i : i + 1]), sde.sigma(t[i : i + 1])
        cov = alpha**2 * C + sigma**2 * torch.eye(3, dtype=torch.float64)
        exact = -torch.linalg.solve(cov, x[i] - alpha * gaussian.mean)
        assert torch.allclose(model.score(x, t)[i], exact, rtol=1e-10)
    if covariance == "full":
        assert torch.allclose(C, torch.cov(data.T, correction=0), rtol=1e-10, atol=1e-12)


def test_a_constant_pixel_keeps_the_score_finite():
    data = torch.cat([normal((300, 2), generator(0, "c"), torch.float64), torch.zeros(300, 1, dtype=torch.float64)], 1)
    model = ScoreModel(randomise(MLP((3,)), 0), VP(), Residual(), fit_gaussian(data, "full")).double()
    x, t = batch((3,))
    assert model.score(x, t).isfinite().all()


def test_conversions_of_fields_agree_with_tweedie():
    model = model_of(NETWORKS["mlp"], Residual("isotropic"), (3,))
    x, t = batch((3,))
    found = model.fields(x, t, {"score", "eps", "x0", "velocity"})
    sigma, alpha = model.sde.sigma(t)[:, None], model.sde.alpha(t)[:, None]
    assert torch.allclose(alpha * found["x0"] + sigma * found["eps"], x)
    assert torch.allclose(found["eps"], -sigma * found["score"])
    assert torch.allclose(found["velocity"], model.sde.velocity(x, t, found["score"]))


def test_the_linear_part_enters_by_its_trace_where_asked():
    model = ScoreModel(
        Zero(), VP(), Residual(), Gaussian(torch.zeros(3), torch.tensor([0.2, 1.0, 3.0]), torch.eye(3))
    ).double()
    x, t = batch((3,))
    v = normal((4, *x.shape), generator(0, "v"), torch.float64)
    _, projected = divergence.score_and_projections(model, x, t, v, exact=True)
    _, trace = divergence.score_and_trace(model, x, t)
    assert torch.allclose(projected, trace.expand(4, -1), rtol=1e-10)


def test_the_gaussian_part_of_a_network_on_images_knows_no_place():
    """One mean and one variance a channel: the score of shifted images is the shifted score. Others keep theirs."""
    unet, mlp = UNet((2, 4, 6), channels=4, multipliers=[1, 2]), MLP((48,))
    place = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 4, 6)
    data = place + normal((500, 2, 4, 6), generator(0, "data"), torch.float64)
    x, t = data[:5], torch.linspace(0.1, 0.9, 5, dtype=torch.float64)

    def score(x, network):
        parameterisation = Residual()
        gaussian = fit_gaussian(data, covariance_for(parameterisation, network))
        return ScoreModel(Zero(), VP(), parameterisation, gaussian).double()(x, t)

    assert torch.allclose(score(x.roll((1, 2), (2, 3)), unet), score(x, unet).roll((1, 2), (2, 3)), rtol=1e-12)
    assert not torch.allclose(score(x.roll((1, 2), (2, 3)), mlp), score(x, mlp).roll((1, 2), (2, 3)), rtol=1e-2)
    gaussian = fit_gaussian(data, covariance_for(Eps(), unet))
    assert torch.allclose(gaussian.mean.reshape(2, 24), data.mean((0, 2, 3)).unsqueeze(1).expand(2, 24), rtol=1e-12)
    assert torch.allclose(gaussian.lam, (data - gaussian.mean.reshape(2, 4, 6)).square().mean(), rtol=1e-12)
    assert fit_gaussian(data.flatten(1), "image").mean.unique().numel() == 1  # an image of one row
    assert covariance_for(Residual("full"), mlp) == "full"
    assert covariance_for(Residual(), mlp) == "auto"
    with pytest.raises(ScoreSDEError, match="principal coordinates are no image"):
        covariance_for(Residual("full"), unet)


def unet_of(shape):
    return randomise(
        UNet(shape, channels=8, multipliers=[1, 2], blocks=2, attention=[shape[1] + shape[1] % 2], classes=3), 1
    )


def test_labels_attention_and_padding_of_the_unet_push_as_autograd_does():
    """Two channels of 5 x 7 pixels, padded to 6 x 8; attention at the finer level; the label moves the output."""
    network, x = unet_of((2, 5, 7)), normal((3, 2, 5, 7), generator(0, "x"), torch.float64)
    c = torch.tensor([[-1.0, 0], [0.5, 2], [1.0, -1]], dtype=torch.float64)
    v = normal((2, 2, 2, 5, 7), generator(0, "v"), torch.float64)
    out, jvp = network.forward_dual(x, c, v)
    assert torch.allclose(out, network(x, c), rtol=1e-10, atol=1e-12)
    for direction, found in zip(v, jvp, strict=True):
        exact = torch.func.jvp(lambda y: network(y, c[:2]), (x[:2],), (direction,))[1]
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-11)
    other = c.clone()
    other[:, 1] = 1
    assert (network(x, other) - out).abs().max() > 1e-3


def test_a_unet_without_a_gradient_is_passed_in_parts_and_the_same(monkeypatch):
    network, x = unet_of((1, 4, 4)), normal((7, 1, 4, 4), generator(0, "x"), torch.float64)
    c = torch.stack([torch.linspace(-1, 1, 7, dtype=torch.float64), torch.arange(7).double() % 3], 1)
    passes = []
    network.stem.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(unet, "CACHED", 3 * 8 * 4 * 4 * 8)  # three images of 8 channels, 4 x 4 pixels, 8 bytes
    whole = network(x, c)
    with torch.no_grad():
        parts = network(x, c)
    assert len(passes) == 1 + 3
    assert torch.allclose(parts, whole, rtol=1e-12, atol=1e-14)


def test_no_pixel_is_beyond_the_reach_of_another():
    network = unet_of((1, 8, 8))
    x, c = normal((1, 1, 8, 8), generator(0, "x"), torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda y: network(y, c), x).reshape(64, 64)
    assert (J.abs() > 0).all()


def test_auto_covariance_is_full_for_many_dimensions_and_enough_data():
    few, many = normal((100, 16), generator(0, "f")), normal((200, 16), generator(0, "f"))
    assert fit_gaussian(few, "auto").basis is None
    assert fit_gaussian(many, "auto").basis is not None
    assert fit_gaussian(many[:, :8], "auto").basis is None


@pytest.mark.parametrize("loss", [DSM(), SSMVR(Rademacher(), 1)], ids=["dsm", "ssm_vr"])
def test_bfloat16_gradients_of_a_unet_are_those_of_float32_but_for_rounding(loss):
    x = normal((64, 1, 8, 8), generator(0, "x"))
    model = ScoreModel(
        randomise(UNet((1, 8, 8), channels=16, multipliers=[1, 2]), 1), VP(), Residual(), fit_gaussian(x, "image")
    )
    model = model.float()
    weights, found = [p for p in model.parameters() if p.requires_grad], {}
    for low in (False, True):
        model.low = low
        value = loss(model, model.sde, x, generator(0, "loss")).mean()
        found[low] = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])
    assert {g.dtype for g in found.values()} == {torch.float32}
    off = float((found[True] - found[False]).norm() / found[False].norm())
    assert 1e-4 < off < 0.03  # a product keeps 8 bits (4e-3), and some twenty layers add up
