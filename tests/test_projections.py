"""Contract of every law of directions: unbiased, of the stated variance, exact where it says so."""

import math

import pytest
import torch

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.identity import bonferroni
from scoresde_cli.projections import Hadamard, Orthogonal, Projection, Sphere, check_law, moments
from scoresde_cli.rng import generator, normal
from scoresde_cli.sketching import sketch
from tests.laws import ADAPTED, EXACT_AT_D, PROJECTIONS, name

DRAWS = 100_000


def traces(
    law: Projection, A: torch.Tensor, n: int, seed: int, device: torch.device, draws: int = DRAWS
) -> torch.Tensor:
    """`draws` estimates of tr A from n directions each, float64."""
    parts, A = [], A.to(device)
    for block in range(draws // 10_000):
        source = generator(seed, "test", block, device=device)
        v = law.directions(lambda w: w @ A.T, (10_000, len(A)), n, source, torch.float64)
        parts.append(torch.einsum("kbi,ij,kbj->kb", v, A, v).mean(0))
    return torch.cat(parts).cpu()


def matrix(d: int, kind: str) -> torch.Tensor:
    A = normal((d, d), generator(d, kind), torch.float64)
    return A if kind == "plain" else A + 3.0 * torch.diag(torch.arange(d, dtype=torch.float64))


@pytest.mark.parametrize("d", [2, 6, 8])
@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_trace_is_unbiased_and_has_the_stated_variance(law, d, device):
    for n in (1, 3):
        A = matrix(d, "plain" if n == 1 else "strong diagonal")
        values = traces(law, A, n, 10 * d + n, device)
        off = values - A.trace()
        predicted = law.variance(A, n)
        # One in 16,000 right laws fails a z-score of 4; the seeds are fixed.
        if float(values.std()) < 1e-10:
            assert off.abs().max() < 1e-10
            assert predicted is None or float(predicted) < 1e-20
            continue
        assert abs(off.mean() / (values.std() / math.sqrt(DRAWS))) < 4
        if predicted is None:
            continue
        # The measured variance has a relative standard error of 0.5 to 0.9 percent at 1e5 draws (kurtosis up to 10).
        assert abs(float(off.square().mean() / predicted) - 1) < 0.03


@pytest.mark.parametrize("n", [4, 5, 8, 11, 16])
@pytest.mark.parametrize("law", [law for law in PROJECTIONS if isinstance(law, EXACT_AT_D)], ids=name)
def test_frames_without_replacement_have_the_stated_variance_at_any_n(law, n, device):
    A = matrix(8, "plain")
    values = traces(law, A, n, n, device)
    predicted = float(law.variance(A, n))
    if n % 8 == 0:
        assert predicted == 0
        assert (values - A.trace()).abs().max() < 1e-11 * A.abs().sum()  # exact to rounding
    else:
        assert abs(float((values - A.trace()).square().mean()) / predicted - 1) < 0.03


@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_moments_are_zero_and_identity(law):
    for d in (1, 3, 8):
        found = moments(law, d, 50_000)
        assert found["mean_z"] < 5  # the largest of at most 8, and of 64, standard normals
        assert found["second_z"] < 5


@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_directions_take_any_data_shape_and_differ_between_samples(law):
    v = law.directions(lambda w: w.flip(3), (5, 2, 3), 4, generator(0, "shape"), torch.float32)
    assert v.shape == (4, 5, 2, 3)
    assert v.dtype == torch.float32
    assert not torch.equal(v[:, 0], v[:, 1])


def test_hadamard_directions_are_signs_even_when_padded():
    v = Hadamard().sample((50, 6), 8, generator(0, "pad"), torch.float64)
    assert (v.abs() == 1).all()
    # All eight rows of the padded matrix together are exact, though d = 6.
    outer = torch.einsum("kbi,kbj->bij", v, v) / 8
    assert torch.allclose(outer, torch.eye(6, dtype=torch.float64).expand_as(outer), atol=1e-14)


RANKS = {
    "full": lambda A: A, "one": lambda A: A[:1].T @ A[1:2], "zero": torch.zeros_like,
    "falling": lambda A: A * torch.logspace(0, -5, len(A), dtype=A.dtype),
}  # fmt: skip


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 9, 15])
@pytest.mark.parametrize("law", ADAPTED, ids=name)
def test_aimed_directions_have_the_identity_as_their_mean(law, n, rank, device):
    """All entries of W = mean_k v_k v_k^T over 20,000 draws with a non-symmetric Jacobian, and the mean direction."""
    d, draws = 6, 20_000
    A = RANKS[rank](matrix(d, "plain")).to(device)
    v = law.directions(lambda w: w @ A.T, (draws, d), n, generator(n, rank, device=device), torch.float64)
    W = torch.einsum("kbi,kbj->bij", v, v) / n
    off = (W.mean(0) - torch.eye(d).to(W)).abs()
    # An entry that is exact has rounding in place of a standard error.
    assert float((off / (W.std(0) / math.sqrt(draws)).clamp_min(1e-12)).max()) < bonferroni(d * d)
    assert float((v.sum(0).mean(0).abs() / (v.sum(0).std(0) / math.sqrt(draws))).max()) < bonferroni(d)
    # The trace of W does not vary: a multiple of the identity in the Jacobian brings no variance.
    assert torch.allclose(W.diagonal(dim1=1, dim2=2).sum(1), torch.tensor(float(d)).to(W), rtol=1e-10)


@pytest.mark.parametrize("law", ADAPTED, ids=name)
def test_aimed_directions_know_a_jacobian_of_low_rank(law, device):
    """10 I + rank 2 in d = 40, 8 directions: the variance of the estimate is a twentieth of that of frames, or less."""
    a = normal((40, 2), generator(0, "low", device=device), torch.float64)
    A = 10.0 * torch.eye(40).to(a) + a @ a.T
    ours, frames = (traces(one, A, 8, 0, device, 10_000).var() for one in (law, Orthogonal()))
    assert float(ours) < 0.05 * float(frames)


@pytest.mark.parametrize("law", ADAPTED, ids=name)
def test_aimed_directions_are_exact_with_enough_of_them(law, device):
    A = matrix(6, "plain")
    for n in (law.whole(6), 2 * law.whole(6)):
        off = (traces(law, A, n, n, device, 10_000) - A.trace()).abs()
        assert off.quantile(0.99) < 1e-12
        assert (
            off.max() < 1e-8
        )  # rounding times the square of the largest condition number of so many sketches, about 1e4


@pytest.mark.parametrize("law", ADAPTED, ids=name)
def test_a_law_that_needs_products_says_so_without_them(law):
    with pytest.raises(ScoreSDEError, match="products with the Jacobian"):
        law.sample((5, 2), 4, generator(0, "none"))


def test_a_sketch_sees_no_multiple_of_the_identity():
    """Each column stays that of its own test vector, whatever the others are, and J + c I is sketched as J is."""
    A, w = matrix(6, "plain"), normal((3, 6, 4), generator(0, "w"), torch.float64)
    found = sketch(lambda v: A @ v, w)
    assert torch.allclose(sketch(lambda v: A @ v + 7.0 * v, w), found, atol=1e-12)
    assert torch.allclose(sketch(lambda v: A @ v, w[..., :1]), found[..., :1], atol=1e-12)


class Unscaled(Sphere):
    """A unit vector: the missing sqrt(d)."""

    def sample(self, shape, n, generator, dtype=torch.float32):
        return super().sample(shape, n, generator, dtype) / shape[-1] ** 0.5


class Shared(Projection):
    """Right for one direction, too short for several."""

    def sample(self, shape, n, generator, dtype=torch.float32):
        return normal((n, *shape), generator, dtype) / n**0.5


class Correlated(Projection):
    def sample(self, shape, n, generator, dtype=torch.float32):
        z = normal((n, *shape), generator, dtype)
        z[..., 1] = 0.6 * z[..., 0] + 0.8 * z[..., 1]
        return z


class Shifted(Projection):
    """E[v v^T] = I but E[v] = 1/2 in the first coordinate."""

    def sample(self, shape, n, generator, dtype=torch.float32):
        z = normal((n, *shape), generator, dtype)
        z[..., 0] = 0.5 + math.sqrt(0.75) * z[..., 0]
        return z


@pytest.mark.parametrize(
    ("law", "says"),
    [
        (Unscaled(), r"scale the directions by 2\.4"),
        (Correlated(), "an entry is off by 0.6"),
        (Shifted(), "E\\[v\\] = 0"),
        (Shared(), r"scale the directions by 1\.41"),
    ],
)
def test_a_law_that_breaks_the_identity_is_refused_by_name(law, says):
    with pytest.raises(ScoreSDEError, match=says) as caught:
        check_law(law, (6,), 2, 10, torch.float64, "mine")
    assert "mine" in str(caught.value)


@pytest.mark.parametrize("law", PROJECTIONS, ids=name)
def test_right_laws_pass_the_check(law):
    check_law(law, (5,), 3, 10, torch.float32, name(law))
