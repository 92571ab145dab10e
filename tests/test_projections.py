"""Contract of every law of directions: unbiased, of the stated variance, exact where it says so."""

import math

import pytest
import torch

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.projections import Hadamard, Projection, Sphere, check_law, moments
from scoresde_cli.rng import generator, normal
from tests.laws import EXACT_AT_D, PROJECTIONS, name

DRAWS = 100_000


def traces(law: Projection, A: torch.Tensor, n: int, seed: int, device: torch.device) -> torch.Tensor:
    """DRAWS estimates of tr A from n directions each, float64."""
    parts = []
    for block in range(DRAWS // 10_000):
        v = law.sample((10_000, len(A)), n, generator(seed, "test", block, device=device), torch.float64)
        parts.append(torch.einsum("kbi,ij,kbj->kb", v, A.to(v), v).mean(0))
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
        predicted = float(law.variance(A, n))
        # One in 16,000 right laws fails a z-score of 4; the seeds are fixed.
        if predicted < 1e-20:
            assert off.abs().max() < 1e-10
            continue
        assert abs(off.mean() / (values.std() / math.sqrt(DRAWS))) < 4
        # The measured variance has a relative standard error of 0.5 to 0.9 percent at 1e5 draws (kurtosis up to 10).
        assert abs(float(off.square().mean()) / predicted - 1) < 0.03


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
    v = law.sample((5, 2, 3), 4, generator(0, "shape"), torch.float32)
    assert v.shape == (4, 5, 2, 3)
    assert v.dtype == torch.float32
    assert not torch.equal(v[:, 0], v[:, 1])


def test_hadamard_directions_are_signs_even_when_padded():
    v = Hadamard().sample((50, 6), 8, generator(0, "pad"), torch.float64)
    assert (v.abs() == 1).all()
    # All eight rows of the padded matrix together are exact, though d = 6.
    outer = torch.einsum("kbi,kbj->bij", v, v) / 8
    assert torch.allclose(outer, torch.eye(6, dtype=torch.float64).expand_as(outer), atol=1e-14)


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
