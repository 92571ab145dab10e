"""Fixed square factors L of covariance matrices Sigma = L L^T that cost O(d) or O(d log d), times a scale c(t) of each sample.

    equicorrelated  Sigma = (1 - r) I + r 1 1^T           L symmetric: sqrt(1 - r) off the mean, sqrt(1 - r + d r) along it
    AR(1)           Sigma_ij = r^|i - j|                  L the Cholesky factor: x_1 = z_1, x_i = r x_{i-1} + sqrt(1 - r^2) z_i
    circulant       Sigma = F^* diag(lam) F               L symmetric, by FFT over the axes of the data
    Fourier modes   the same Sigma                        L = H diag(sqrt lam), H the Hartley transform: its own inverse
    low rank        Sigma = D + U U^T                     L = sqrt(D) (I + Q (sqrt(1 + s^2) - 1) Q^T), Q s R^T = U / sqrt(D)
    dense           Sigma = V diag(lam) V^T               L = V diag(sqrt lam) V^T, or V diag(sqrt lam) where `modes`

All of them are square and invertible, so that eps has the shape of the data and z = L^{-1} x is white. For a low rank the
rectangular [U, sqrt(D)] would take r more normals and have no inverse; the square one costs as little, O(d r).

Numbers are kept in float64 and cast once for each precision and device that they are used in.
"""

import copy
import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from scoresde_cli.sdes.operators import LinearOperator, expand


class Structured(LinearOperator):
    """c(t) L in d dimensions: `c` has shape (B,), None for one. Subclasses act on flat rows (B, d).

    Attributes:
        d: dimensions. trace: tr(L L^T). log_det: log |det L|.
    """

    d: int
    trace: float
    log_det: float
    c: Tensor | None = None

    @abstractmethod
    def times(self, z: Tensor) -> Tensor:
        """L z for z (B, d)."""

    @abstractmethod
    def times_t(self, v: Tensor) -> Tensor:
        """L^T v for v (B, d)."""

    @abstractmethod
    def over(self, v: Tensor) -> Tensor:
        """L^{-1} v for v (B, d)."""

    @abstractmethod
    def over_t(self, v: Tensor) -> Tensor:
        """L^{-T} v for v (B, d)."""

    def scaled(self, c: Tensor) -> "Structured":
        """c(t) times it, for c of shape (B,)."""
        view = copy.copy(self)
        view.c = c if self.c is None else self.c * c
        return view

    def like(self, name: str, x: Tensor) -> Tensor:
        """The tensor of that name in the precision and on the device of x."""
        cache = self.__dict__.setdefault("cast", {})
        key = (name, x.dtype, x.device)
        if key not in cache:
            cache[key] = getattr(self, name).to(x)
        return cache[key]

    def mul(self, z: Tensor) -> Tensor:
        out = self.times(z.flatten(1)).reshape(z.shape)
        return out if self.c is None else expand(self.c, z) * out

    def mul_t(self, v: Tensor) -> Tensor:
        out = self.times_t(v.flatten(1)).reshape(v.shape)
        return out if self.c is None else expand(self.c, v) * out

    def solve(self, v: Tensor) -> Tensor:
        out = self.over(v.flatten(1)).reshape(v.shape)
        return out if self.c is None else out / expand(self.c, v)

    def solve_t(self, v: Tensor) -> Tensor:
        out = self.over_t(v.flatten(1)).reshape(v.shape)
        return out if self.c is None else out / expand(self.c, v)

    def trace_cov(self, d: int) -> Tensor:
        return self.trace * (torch.ones(1, dtype=torch.float64) if self.c is None else self.c.square())

    def logdet(self, d: int) -> Tensor:
        return self.log_det + (torch.zeros(1, dtype=torch.float64) if self.c is None else d * self.c.log())


class Symmetric(Structured):
    """L = L^T."""

    def times_t(self, v: Tensor) -> Tensor:
        return self.times(v)

    def over_t(self, v: Tensor) -> Tensor:
        return self.over(v)


class Equicorrelated(Symmetric):
    """Sigma_ii = 1, Sigma_ij = rho, for -1/(d-1) < rho < 1."""

    def __init__(self, d: int, rho: float) -> None:
        self.d, self.trace = d, float(d)
        self.across, self.along = math.sqrt(1.0 - rho), math.sqrt(1.0 - rho + d * rho)
        self.log_det = (d - 1) * math.log(self.across) + math.log(self.along)

    def times(self, z: Tensor) -> Tensor:
        return self.across * z + (self.along - self.across) * z.mean(1, keepdim=True)

    def over(self, v: Tensor) -> Tensor:
        return v / self.across + (1.0 / self.along - 1.0 / self.across) * v.mean(1, keepdim=True)


class AR1(Structured):
    """Sigma_ij = rho^|i-j| for |rho| < 1, by the recursion in ceil(log2 d) passes: y <- y + rho^(2^k) (y moved by 2^k).

    The passes end where rho^(2^k) is below a quarter of float64's rounding.
    """

    def __init__(self, d: int, rho: float) -> None:
        self.d, self.rho, self.rest, self.trace = d, rho, math.sqrt((1.0 - rho) * (1.0 + rho)), float(d)
        self.log_det = (d - 1) * math.log(self.rest)

    def _filter(self, z: Tensor, back: bool) -> Tensor:
        """sum_{j <= i} rho^(i-j) z_j, of j >= i where `back`."""
        shift, power = 1, self.rho
        while shift < self.d and abs(power) > 5e-17:
            if back:
                z = z + power * F.pad(z[:, shift:], (0, shift))
            else:
                z = z + power * F.pad(z[:, :-shift], (shift, 0))
            shift, power = 2 * shift, power * power
        return z

    def _weigh(self, z: Tensor, weight: float) -> Tensor:
        """All but the first coordinate times the weight."""
        return torch.cat([z[:, :1], weight * z[:, 1:]], dim=1)

    def times(self, z: Tensor) -> Tensor:
        return self._filter(self._weigh(z, self.rest), back=False)

    def times_t(self, v: Tensor) -> Tensor:
        return self._weigh(self._filter(v, back=True), self.rest)

    def over(self, v: Tensor) -> Tensor:
        return self._weigh(v - self.rho * F.pad(v[:, :-1], (1, 0)), 1.0 / self.rest)

    def over_t(self, v: Tensor) -> Tensor:
        u = self._weigh(v, 1.0 / self.rest)
        return u - self.rho * F.pad(u[:, 1:], (0, 1))


class Circulant(Symmetric):
    """The symmetric root of a covariance that depends on the difference of positions, on a torus.

    Args:
        shape: D of the data; its axes are those of the torus.
        lam: the eigenvalues, (*D), positive: the discrete Fourier transform of the covariance with the first position.
    """

    def __init__(self, shape: tuple[int, ...], lam: Tensor) -> None:
        self.shape, self.d, self.trace = shape, lam.numel(), float(lam.sum())
        self.log_det = 0.5 * float(lam.log().sum())
        self.root = lam[..., : shape[-1] // 2 + 1].sqrt()  # the half that a real transform has

    def _filter(self, z: Tensor, gain: Tensor) -> Tensor:
        axes = tuple(range(1, 1 + len(self.shape)))
        spectrum = gain * torch.fft.rfftn(z.reshape(-1, *self.shape), dim=axes)
        return torch.fft.irfftn(spectrum, s=self.shape, dim=axes).flatten(1)

    def times(self, z: Tensor) -> Tensor:
        return self._filter(z, self.like("root", z))

    def over(self, v: Tensor) -> Tensor:
        return self._filter(v, 1.0 / self.like("root", v))


class FourierModes(Structured):
    """x = H (sqrt(lam) z) with the Hartley transform H = (Re - Im) FFT / sqrt(d), orthogonal, symmetric and its own inverse.

    Its rows k and -k span the cosine and the sine of a frequency, so lam has to be even: lam_k = lam_{-k}. Args as for `Circulant`.

    Source: Bracewell, "Discrete Hartley transform", J. Opt. Soc. Am. 73, 1983.
    """

    def __init__(self, shape: tuple[int, ...], lam: Tensor) -> None:
        self.shape, self.d, self.trace = shape, lam.numel(), float(lam.sum())
        self.log_det, self.root = 0.5 * float(lam.log().sum()), lam.flatten().sqrt()

    def _hartley(self, z: Tensor) -> Tensor:
        spectrum = torch.fft.fftn(z.reshape(-1, *self.shape), dim=tuple(range(1, 1 + len(self.shape))))
        return (spectrum.real - spectrum.imag).flatten(1) / math.sqrt(self.d)

    def times(self, z: Tensor) -> Tensor:
        return self._hartley(self.like("root", z) * z)

    def times_t(self, v: Tensor) -> Tensor:
        return self.like("root", v) * self._hartley(v)

    def over(self, v: Tensor) -> Tensor:
        return self._hartley(v) / self.like("root", v)

    def over_t(self, v: Tensor) -> Tensor:
        return self._hartley(v / self.like("root", v))


class LowRank(Structured):
    """Sigma = diag(D) + U U^T for D (d,), positive, and U (d, r)."""

    def __init__(self, diagonal: Tensor, loadings: Tensor) -> None:
        self.root = diagonal.sqrt()
        self.Q, s, _ = torch.linalg.svd(loadings / self.root.unsqueeze(1), full_matrices=False)
        self.d, self.trace = len(diagonal), float(diagonal.sum() + loadings.square().sum())
        gain = (1.0 + s.square()).sqrt()
        self.more, self.less = gain - 1.0, 1.0 / gain - 1.0
        self.log_det = float(self.root.log().sum() + gain.log().sum())

    def _turn(self, z: Tensor, name: str) -> Tensor:
        """(I + Q diag(name) Q^T) z."""
        Q = self.like("Q", z)
        return z + (self.like(name, z) * (z @ Q)) @ Q.T

    def times(self, z: Tensor) -> Tensor:
        return self.like("root", z) * self._turn(z, "more")

    def times_t(self, v: Tensor) -> Tensor:
        return self._turn(self.like("root", v) * v, "more")

    def over(self, v: Tensor) -> Tensor:
        return self._turn(v / self.like("root", v), "less")

    def over_t(self, v: Tensor) -> Tensor:
        return self._turn(v, "less") / self.like("root", v)


class Dense(Structured):
    """A matrix Sigma (d, d), symmetric and positive definite, by its eigenvectors V: the symmetric root, or V diag(sqrt lam)."""

    def __init__(self, sigma: Tensor, modes: bool = False) -> None:
        self.lam, vectors = torch.linalg.eigh(sigma)
        self.d, self.trace = len(sigma), float(self.lam.sum())
        self.log_det = 0.5 * float(self.lam.log().sum())
        root = self.lam.sqrt()
        right = torch.eye(self.d, dtype=sigma.dtype) if modes else vectors.T
        self.L, self.inverse = (vectors * root) @ right, (right.T / root) @ vectors.T

    def times(self, z: Tensor) -> Tensor:
        return z @ self.like("L", z).T

    def times_t(self, v: Tensor) -> Tensor:
        return v @ self.like("L", v)

    def over(self, v: Tensor) -> Tensor:
        return v @ self.like("inverse", v).T

    def over_t(self, v: Tensor) -> Tensor:
        return v @ self.like("inverse", v)


class Identity(Symmetric):
    """Sigma = I."""

    def __init__(self, d: int) -> None:
        self.d, self.trace, self.log_det = d, float(d), 0.0

    def times(self, z: Tensor) -> Tensor:
        return z

    def over(self, v: Tensor) -> Tensor:
        return v
