"""Structured factors of covariances: each is one matrix, whatever it is asked for."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scoresde_cli.likelihood import Flow, log_prob
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks.model import Gaussian, ScoreModel, Zero
from scoresde_cli.networks.parameterisation import Residual
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.sdes.covariances import Periodic
from scoresde_cli.sdes.operators import Diagonal, Inverse, LinearOperator, Matrix, Product, Scalar
from scoresde_cli.sdes.structured import AR1, Circulant, Dense, Equicorrelated, FourierModes, Identity, LowRank
from tests.laws import columns, spd

F64 = torch.float64
D = 6
SPD = spd(D)
TORUS = torch.fft.fft2(
    torch.exp(-torch.tensor([[0.0, 1, 1], [1, 2, 2]], dtype=F64))
).real  # of exp(-distance), separable

OPERATORS = {
    "scalar": Scalar(torch.tensor([0.5, 2.0], dtype=F64)),
    "diagonal": Diagonal(torch.rand(2, D, generator=generator(0, "d"), dtype=F64) + 0.5),
    "matrix": Matrix(normal((2, D, D), generator(0, "m"), F64)),
    "product": Product(Dense(SPD), Diagonal(torch.rand(2, D, generator=generator(1, "d"), dtype=F64) + 0.5)),
    "inverse": Inverse(Dense(SPD)), "identity": Identity(D),
    "equicorrelated": Equicorrelated(D, 0.7), "equicorrelated, negative": Equicorrelated(D, -0.15),
    "ar1": AR1(D, 0.9), "ar1, negative": AR1(D, -0.6), "circulant": Circulant((D,), Periodic(2.0).spectrum((D,))),
    "circulant, two axes": Circulant((2, 3), TORUS), "modes": FourierModes((D,), Periodic(2.0).spectrum((D,))),
    "modes, two axes": FourierModes((2, 3), TORUS), "low rank": LowRank(torch.linspace(0.5, 1.0, D, dtype=F64), SPD[:, :2]),
    "dense": Dense(SPD), "dense, modes": Dense(SPD, modes=True),
}  # fmt: skip
EXPECTED = {
    "identity": torch.eye(D, dtype=F64), "equicorrelated": 0.3 * torch.eye(D, dtype=F64) + 0.7,
    "equicorrelated, negative": 1.15 * torch.eye(D, dtype=F64) - 0.15,
    "ar1": 0.9 ** (torch.arange(D)[:, None] - torch.arange(D)).abs().double(),
    "ar1, negative": (-0.6) ** (torch.arange(D)[:, None] - torch.arange(D)).abs().double(),
    "low rank": torch.linspace(0.5, 1.0, D, dtype=F64).diag() + SPD[:, :2] @ SPD[:, :2].T, "dense": SPD, "dense, modes": SPD,
}  # fmt: skip
ring = (torch.arange(D)[:, None] - torch.arange(D)).abs()
EXPECTED["circulant"] = EXPECTED["modes"] = torch.exp(-torch.minimum(ring, D - ring).double() / 2.0)


def scaled(operator: LinearOperator) -> LinearOperator:
    return operator.scaled(torch.tensor([0.5, 2.0], dtype=F64)) if hasattr(operator, "scaled") else operator


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_one_matrix(name):
    """mul_t is its transpose, solve and solve_t their inverses, cov its square, logdet and trace_cov those of the matrix."""
    operator = scaled(OPERATORS[name])
    L = columns(operator.mul, D)
    assert torch.allclose(columns(operator.mul_t, D), L.mT, atol=1e-13)
    assert torch.allclose(columns(operator.cov, D), L @ L.mT, atol=1e-12)
    assert torch.allclose(columns(operator.solve, D) @ L, torch.eye(D, dtype=F64).expand(2, D, D), atol=1e-11)
    assert torch.allclose(columns(operator.solve_t, D) @ L.mT, torch.eye(D, dtype=F64).expand(2, D, D), atol=1e-11)
    assert torch.allclose(operator.logdet(D).expand(2), torch.linalg.slogdet(L)[1], atol=1e-11)
    if name not in ("product", "inverse"):
        assert torch.allclose(operator.trace_cov(D).expand(2), L.square().sum((1, 2)), rtol=1e-12)
    if name in EXPECTED:
        scale = torch.tensor([0.25, 4.0], dtype=F64).reshape(2, 1, 1)
        assert torch.allclose(L @ L.mT, scale * EXPECTED[name], atol=1e-13)


def test_the_recursion_of_ar1_is_the_cholesky_factor():
    d, rho = 64, 0.95
    sigma = rho ** (torch.arange(d)[:, None] - torch.arange(d)).abs().double()
    L, eye = AR1(d, rho), torch.eye(d, dtype=F64)
    cholesky = torch.linalg.cholesky(sigma)
    assert float((L.mul(eye).T - cholesky).abs().max()) < 5e-15  # sums of 64 numbers below one
    # That, times the (1 + rho)/sqrt(1 - rho^2) = 6.2 by which the recursion takes neighbours from each other.
    assert float((L.solve(cholesky.T.contiguous()) - eye).abs().max()) < 3.1e-14


def test_the_root_of_a_low_rank_is_as_its_matrix_says_and_needs_no_more_normals_than_coordinates():
    D_, U = torch.linspace(0.1, 2.0, 40, dtype=F64), normal((40, 3), generator(0, "U"), F64)
    L, eye = LowRank(D_, U), torch.eye(40, dtype=F64)
    assert torch.allclose(L.cov(eye), D_.diag() + U @ U.T, atol=1e-12)
    assert torch.allclose(L.solve_t(L.solve(eye)), torch.linalg.inv(D_.diag() + U @ U.T), atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, leaf.numel())
        return out


KEYS = {
    "equi": {"rho": 0.9}, "ar1": {"rho": 0.9}, "circulant": {}, "low_rank": {"rank": 4},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KEYS)
def test_sampling_training_and_densities_in_4096_dimensions_make_no_matrix(kind):
    """From the process to samples, losses and log p: no tensor is as large as d x d; the largest is 2048 rows of directions."""
    d = 4096
    with Largest() as made:
        sde = Correlated(kind, **KEYS[kind], shape=(d,))
        gaussian = Gaussian(torch.zeros(d).double(), torch.ones(d).double(), None)
        model = ScoreModel(Zero(), sde, Residual("isotropic"), gaussian).float()
        x = EulerMaruyama(steps=2).sample(model, sde, (d,), 64, 0).x
        DSM()(model, sde, x, generator(0, "dsm"))
        SSMVR(Rademacher(), 1)(model, sde, x, generator(0, "ssm"))
        found = log_prob(model, sde, x[:4], 1e-3, Flow(steps=2, projection=Rademacher(), repeats=1)).value
    assert x.isfinite().all()
    assert found.isfinite().all()
    assert made.elements < d * d


@pytest.mark.parametrize(
    ("make", "share"), [(lambda d: AR1(d, 0.9), 32), (lambda d: Equicorrelated(d, 0.9), 8)], ids=["ar1", "equi"]
)
def test_noise_in_4096_dimensions_makes_no_matrix(make, share):
    """All tensors that a draw makes are together a few tens of batches: three for each pass of the recursion."""
    from scoresde_cli.tuning import Created

    d, B = 4096, 32
    z = normal((B, d), generator(0, "z"))
    with Created() as made:
        L = make(d)
        x = L.mul(z)
    assert made.bytes < 4 * share * B * d  # 4 d^2 bytes of a matrix in single precision would be 128 batches
    assert float((L.solve(x) - z).abs().max()) < 1e-4
    draws = L.mul(normal((4000, d), generator(1, "z")))[:, 2000:2002]
    assert float(torch.corrcoef(draws.T)[0, 1]) == pytest.approx(0.9, abs=4 * 0.19 / math.sqrt(4000))
