"""Laws of the random directions v of sliced score matching: E[v] = 0 and E[v v^T] = I, and nothing else is needed.

With that, E[v^T A v] = tr A for any matrix A (Hutchinson, Commun. Stat. Simul. Comput. 19, 1990), so every law here
makes the sliced loss equal to the implicit one in expectation. They differ in variance. With S the symmetric part of
A, and n directions a sample, `variance(A, n)` is Var[1/n sum_k v_k^T A v_k] in closed form:

    gaussian     (2/n) |S|^2
    rademacher   (2/n) (|S|^2 - sum_i S_ii^2)
    sphere       (2/n) d/(d+2) (|S|^2 - (tr S)^2/d)
    orthogonal   sphere's times (d-n)/(d-1)          frames: exact at n = d
    hadamard     rademacher's times (D-n)/(D-1)      D = d where d is a power of two, else the next one
    coordinate   (d/n) (sum_i S_ii^2 - (tr S)^2/d) (d-n)/(d-1)

The last three draw without replacement; for n beyond one frame, whole frames (which are exact) and a remainder.

Two more aim the directions at A itself, from products A w that need no gradient: hutchpp and xtrace, in `sketching`. A law gives
its directions by `directions(push, ...)`, where push(w) = A w; one that knows nothing of A gives `sample` alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator as make_generator
from scoresde_cli.rng import normal, uniform

Push = Callable[[Tensor], Tensor]  # w (K, B, *D) -> J w (K, B, *D), without gradient


class Projection(ABC):
    """A law of directions; `sample` is all that a new one has to give.

    Attributes:
        adapted: whether `directions` looks at the Jacobian.
    """

    adapted = False

    @abstractmethod
    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """n directions for each sample: shape (B, *D) and n give (n, B, *D), on the generator's device."""

    def directions(
        self, push: Push, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """n directions for each sample of a field whose Jacobian `push` multiplies: (n, B, *D), constants in every gradient."""
        return self.sample(shape, n, generator, dtype)

    def variance(self, A: Tensor, n: int) -> Tensor | None:
        """Var of the mean of n values v^T A v for a matrix A (d, d); None where no closed form is known."""
        return None


def symmetric(A: Tensor) -> tuple[Tensor, Tensor, int]:
    """The symmetric part of A, its diagonal, and d."""
    S = 0.5 * (A + A.T)
    return S, S.diagonal(), len(S)


class Gaussian(Projection):
    """Standard normal directions."""

    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return normal((n, *shape), generator, dtype)

    def variance(self, A: Tensor, n: int) -> Tensor:
        S, _, _ = symmetric(A)
        return 2.0 / n * S.square().sum()


class Rademacher(Projection):
    """Independent signs: least variance of all laws with independent coordinates (Hutchinson 1990)."""

    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        bits = torch.randint(0, 2, (n, *shape), generator=generator, device=generator.device, dtype=torch.int8)
        return bits.to(dtype).mul_(2.0).sub_(1.0)

    def variance(self, A: Tensor, n: int) -> Tensor:
        S, diagonal, _ = symmetric(A)
        return 2.0 / n * (S.square().sum() - diagonal.square().sum())


class Sphere(Projection):
    """Uniform on the sphere of radius sqrt(d)."""

    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        v = normal((n, *shape), generator, dtype)
        flat = v.flatten(2)
        scale = flat.shape[-1] ** 0.5 / flat.norm(dim=-1)
        return (flat * scale.unsqueeze(-1)).reshape(v.shape)

    def variance(self, A: Tensor, n: int) -> Tensor:
        S, diagonal, d = symmetric(A)
        return 2.0 / n * d / (d + 2) * (S.square().sum() - diagonal.sum().square() / d)


class Frames(Projection):
    """Laws that draw frames of directions without replacement within a sample; a whole frame has sum v v^T = size I."""

    def frame_size(self, d: int) -> int:
        """How many directions make a whole frame."""
        return d

    @abstractmethod
    def frame(self, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """The first n <= frame_size(d) directions of a random frame for each sample, shape (n, B, d)."""

    @abstractmethod
    def single(self, A: Tensor) -> Tensor:
        """Var[v^T A v] of one direction."""

    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        batch, d = shape[0], int(torch.Size(shape[1:]).numel())
        size = self.frame_size(d)
        counts = [size] * (n // size) + ([n % size] if n % size else [])
        parts = [self.frame(batch, d, count, generator, dtype) for count in counts]
        return torch.cat(parts).reshape(n, *shape)

    def variance(self, A: Tensor, n: int) -> Tensor:
        size = self.frame_size(len(A))
        rest = n % size
        if rest == 0:
            return torch.zeros((), dtype=A.dtype)
        return self.single(A) * rest / n**2 * (size - rest) / (size - 1)


class Orthogonal(Frames):
    """A Haar-distributed orthogonal frame times sqrt(d) (cf. Yu et al., "Orthogonal Random Features", NeurIPS 2016)."""

    def frame(self, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        q, r = torch.linalg.qr(normal((batch, d, n), generator, dtype))
        # The signs of diag R make the law of Q Haar's (Mezzadri, Notices AMS 54, 2007).
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return q.permute(2, 0, 1) * d**0.5

    def single(self, A: Tensor) -> Tensor:
        return Sphere().variance(A, 1)


def drawn(batch: int, size: int, n: int, generator: torch.Generator) -> Tensor:
    """n of `size` numbers without replacement for each sample, (n, B): the least n of random ones, as a whole sort is dear."""
    return uniform((batch, size), generator).topk(n, dim=1, largest=False).indices.T


class Hadamard(Frames):
    """Rows of a Hadamard matrix, drawn without replacement, with the columns' signs flipped at random.

    Where d is not a power of two, the first d columns of the next larger matrix: E[v v^T] = I still holds, the
    directions are no longer quite orthogonal, and the frame that is exact has that matrix's size.
    """

    def frame_size(self, d: int) -> int:
        return 1 << (d - 1).bit_length()

    def frame(self, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        rows = drawn(batch, self.frame_size(d), n, generator)
        # H[r, j] = (-1)^(number of ones in r & j) (Sylvester's construction): fold the parity into the lowest bit.
        parity = rows.unsqueeze(-1) & torch.arange(d, device=generator.device)
        for shift in (16, 8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        signs = Rademacher().sample((batch, d), 1, generator, dtype)
        return signs * (1.0 - 2.0 * (parity & 1).to(dtype))

    def single(self, A: Tensor) -> Tensor:
        return Rademacher().variance(A, 1)


class Coordinate(Frames):
    """Random coordinate axes without replacement, times sqrt(d) and a random sign."""

    def frame(self, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        axes = drawn(batch, d, n, generator)
        signs = Rademacher().sample((batch, 1), n, generator, dtype)
        return torch.nn.functional.one_hot(axes, d).to(dtype) * signs * d**0.5

    def single(self, A: Tensor) -> Tensor:
        _, diagonal, d = symmetric(A)
        return d * diagonal.square().sum() - diagonal.sum().square()


def shear(w: Tensor) -> Tensor:
    """A w for a non-symmetric A that costs nothing in any dimension, a diagonal and a cyclic shift: what laws are checked on."""
    flat = w.flatten(2)
    rising = torch.linspace(-1.0, 2.0, flat.shape[-1], dtype=w.dtype, device=w.device)
    return (rising * flat + flat.roll(1, 2)).reshape(w.shape)


def moments(
    law: Projection, d: int, draws: int, seed: int = 0, n: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """E[v] and E[v v^T] of a law in d dimensions, measured (on at most 256 coordinates, spread evenly).

    All n directions of each draw count: those of a frame are no worse than independent ones, so the errors below are safe (of
    xtrace's, which share a sketch, up to 10 percent too small). A law that looks at the Jacobian is given `shear`.

    Returns:
        `mean_z`, `second_z`: the largest deviation of any entry from 0 and from I in standard errors;
        `mean`: the largest |E[v_i]|; `diagonal`: mean of the diagonal of E[v v^T]; `deviation`: its largest deviation from I.
    """
    kept = torch.linspace(0, d - 1, min(d, 256)).round().long()
    eye = torch.eye(len(kept), dtype=torch.float64)
    total, outer, squares, count = torch.zeros_like(eye[0]), torch.zeros_like(eye), torch.zeros_like(eye), 0
    source = make_generator(seed, "moments")
    while count < draws:
        v = (
            law.directions(shear, (min(4096, -(-(draws - count) // n)), d), n, source, dtype)
            .flatten(0, 1)[:, kept]
            .double()
        )
        total += v.sum(0)
        outer += v.T @ v
        squares += v.square().T @ v.square()
        count += len(v)
    mean, second = total / count, outer / count
    spread = (squares / count - second.square()).clamp_min(0.0)
    # An entry that never varies has no standard error: rounding alone may then move it.
    se = (spread / count).sqrt().clamp_min(1e-9)
    mean_se = (second.diagonal() - mean.square()).clamp_min(0.0).div(count).sqrt().clamp_min(1e-9)
    deviation = (second - eye).abs()
    return {
        "mean_z": float((mean.abs() / mean_se).max()),
        "second_z": float((deviation / se).max()),
        "mean": float(mean.abs().max()),
        "diagonal": float(second.diagonal().mean()),
        "deviation": float(deviation.max()),
    }


def check_law(
    law: Projection, shape: tuple[int, ...], n: int, batch: int, dtype: torch.dtype, name: str, draws: int = 20_000
) -> dict[str, float]:
    """Refuse a law that breaks E[v] = 0 or E[v v^T] = I, in the shape and dtype that it is to be used in.

    Entries further than 7 standard errors off are refused: among 10^6 entries of a right law that happens with
    probability below 10^-5. Raises ScoreSDEError, which names the law and by how much it is wrong.
    """
    d = int(torch.Size(shape).numel())
    try:
        for asked in ((batch, *shape), (3, *shape)):
            probe = law.directions(shear, asked, n, make_generator(0, "moments", 1), dtype)
            if not isinstance(probe, Tensor) or tuple(probe.shape) != (n, *asked) or probe.dtype != dtype:
                got = f"{tuple(probe.shape)} of {probe.dtype}" if isinstance(probe, Tensor) else type(probe).__name__
                raise ScoreSDEError(
                    f"projection {name}: sample({asked}, {n}, generator, {dtype}) gave {got}, expected a tensor of "
                    f"shape {(n, *asked)} of {dtype}"
                )
            if not torch.isfinite(probe).all():
                raise ScoreSDEError(f"projection {name}: sample(...) gave values that are not finite")
        found = moments(law, d, draws, 0, n, dtype)
    except ScoreSDEError:
        raise
    except Exception as problem:  # a user's own law can fail in any way
        raise ScoreSDEError(f"projection {name}: sample(...) failed, {type(problem).__name__}: {problem}") from problem
    if found["second_z"] > 7.0:
        if abs(found["diagonal"] - 1.0) > 0.02:
            why = f"the diagonal's mean is {found['diagonal']:.4g}, expected 1"
            if found["diagonal"] > 0:
                why += f" (scale the directions by {found['diagonal'] ** -0.5:.4g})"
        else:
            why = f"an entry is off by {found['deviation']:.3g}"
        raise ScoreSDEError(f"projection {name} breaks E[v v^T] = I in d={d}: {why}; the sliced loss would be biased")
    if found["mean_z"] > 7.0:
        raise ScoreSDEError(f"projection {name} breaks E[v] = 0 in d={d}: a coordinate's mean is {found['mean']:.3g}")
    return found
