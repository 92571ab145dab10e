"""Covariances Sigma of the noise, of trace d, by kind: each gives a factor L with L L^T = Sigma in the shape of the data.

`factor` is the cheapest one; `modes` is the one whose columns are orthogonal, x = V diag(sqrt lam) z, in which a drift that is a
function of Sigma acts coordinate by coordinate. A class of one's own is a `Covariance` with its keys as annotated arguments.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError, Unreadable, one_line
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.structured import (
    AR1,
    Circulant,
    Dense,
    Equicorrelated,
    FourierModes,
    Identity,
    LowRank,
    Structured,
)

CONDITION = 1e12  # largest over smallest eigenvalue: beyond it, whitening has no digit left in float64's square root
Share = Annotated[float, Field(ge=0, lt=1)]
Shape = tuple[int, ...]


def read_matrix(file: str, where: str) -> Tensor:
    """A finite matrix (m, n) in float64 from an .npy or a .csv file without a header. Raises ScoreSDEError or Unreadable."""
    path = Path(file).expanduser()
    if path.suffix.lower() not in (".npy", ".csv"):
        raise ScoreSDEError(f"{where}={file}: expected an .npy or a .csv file (numbers alone, no header)")
    if not path.is_file():
        raise ScoreSDEError(f"{where}={file}: the file does not exist")
    try:
        found = (
            np.load(path, allow_pickle=False)
            if path.suffix.lower() == ".npy"
            else np.loadtxt(path, delimiter=",", ndmin=2)
        )
        if np.iscomplexobj(found):
            raise ValueError("complex numbers")
        matrix = torch.from_numpy(np.asarray(found, dtype=np.float64).copy())
    except Exception as problem:
        raise Unreadable(f"{where}={file}: not readable as {path.suffix[1:]} ({one_line(problem)[:120]})") from problem
    if matrix.ndim != 2:
        raise ScoreSDEError(f"{where}={file}: expected a matrix, found the shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        row, column = (~matrix.isfinite()).nonzero()[0].tolist()
        raise ScoreSDEError(
            f"{where}={file}: expected finite numbers, found {float(matrix[row, column])} in row {row}, column {column}"
        )
    return matrix


def positive(sigma: Tensor, where: str) -> Tensor:
    """A matrix (d, d) that is a covariance, scaled to trace d. Raises ScoreSDEError where it is none, or is singular."""
    d = len(sigma)
    off = float((sigma - sigma.T).abs().max() / sigma.abs().max().clamp_min(1e-300))
    if off > 1e-6:
        raise ScoreSDEError(f"{where}: not symmetric (largest difference {off:.1e} of the largest entry)")
    sigma = 0.5 * (sigma + sigma.T)
    lam = torch.linalg.eigvalsh(sigma)
    if float(lam[-1]) <= 0 or float(lam[0]) < -1e-9 * float(lam[-1]):
        raise ScoreSDEError(
            f"{where}: not positive semidefinite, its eigenvalues go from {float(lam[0]):.2g} to {float(lam[-1]):.2g}"
        )
    if float(lam[0]) * CONDITION < float(lam[-1]):
        raise ScoreSDEError(
            f"{where}: singular (smallest eigenvalue {float(lam[0]):.1g}), so some directions would never be noised; add a diagonal"
        )
    return sigma * (d / float(lam.sum()))


def square(matrix: Tensor, d: int, where: str) -> Tensor:
    """The matrix, where it is d x d."""
    if tuple(matrix.shape) != (d, d):
        raise ScoreSDEError(
            f"{where}: a matrix of shape {tuple(matrix.shape)}, expected ({d}, {d}) for data of {d} numbers"
        )
    return matrix


class Covariance(ABC):
    """A kind of Sigma. `kept` is what a run remembers of it: matrices from files, or of the data."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def load(self, kept: dict[str, Tensor], rows: Tensor | None) -> None:  # noqa: B027 (most kinds need nothing)
        """Take what is needed from a run's memory, or else from files and the training data, rows (n, d)."""

    @abstractmethod
    def factor(self, shape: Shape) -> Structured:
        """L for data of shape D."""

    def modes(self, shape: Shape) -> tuple[Structured, Tensor]:
        """(V diag(sqrt lam), lam (d,)), V orthogonal; by a dense eigendecomposition where there is no closed form."""
        d = math.prod(shape)
        eye = torch.eye(d, dtype=torch.float64)
        L = self.factor((d,)) if len(shape) == 1 else self.factor(shape)
        dense = Dense(L.mul(L.mul_t(eye.reshape(d, *shape))).flatten(1), modes=True)
        return dense, dense.lam


class White(Covariance):
    """Sigma = I."""

    def factor(self, shape: Shape) -> Structured:
        return Identity(math.prod(shape))


class Equi(Covariance):
    """Every pair of coordinates has the correlation rho.

    Args:
        rho: above -1/(d - 1), below one.
    """

    def __init__(self, rho: Annotated[float, Field(gt=-1, lt=1)] = 0.5) -> None:
        super().__init__()
        self.rho = rho

    def factor(self, shape: Shape) -> Structured:
        d = math.prod(shape)
        if (d - 1) * self.rho <= -1:
            raise ScoreSDEError(
                f"sde.rho={self.rho}: expected more than -1/(d - 1) = {-1 / (d - 1):.3g} for sde.sigma=equi at d={d}"
            )
        return Equicorrelated(d, self.rho)

    def modes(self, shape: Shape) -> tuple[Structured, Tensor]:
        d = self.factor(shape).d
        lam = torch.full((d,), 1.0 - self.rho, dtype=torch.float64)
        lam[0] += d * self.rho  # frequency zero: the mean
        return FourierModes((d,), lam), lam


class Autoregressive(Covariance):
    """Correlation rho^|i - j|, in the order of the flattened data.

    Args:
        rho: between -1 and one.
    """

    def __init__(self, rho: Annotated[float, Field(gt=-1, lt=1)] = 0.5) -> None:
        super().__init__()
        self.rho = rho

    def factor(self, shape: Shape) -> Structured:
        return AR1(math.prod(shape), self.rho)


class Periodic(Covariance):
    """Correlation exp(-|i - j| / length) along each axis of the data, closed to a ring: for signals and images.

    Args:
        length: of the correlation, in positions.
    """

    def __init__(self, length: PositiveFloat = 3.0) -> None:
        super().__init__()
        self.length = length

    def spectrum(self, shape: Shape) -> Tensor:
        """The eigenvalues, (*D)."""
        lam = torch.ones((), dtype=torch.float64)
        for n in shape:
            i = torch.arange(n, dtype=torch.float64)
            axis = torch.fft.fft(torch.exp(-torch.minimum(i, n - i) / self.length)).real
            lam = lam.unsqueeze(-1) * axis
        if float(lam.min()) * CONDITION < float(lam.max()):
            raise ScoreSDEError(
                f"sde.length={self.length}: Sigma is singular on a grid of {'x'.join(map(str, shape))}; take less"
            )
        return lam

    def factor(self, shape: Shape) -> Structured:
        return Circulant(shape, self.spectrum(shape))

    def modes(self, shape: Shape) -> tuple[Structured, Tensor]:
        lam = self.spectrum(shape)
        return FourierModes(shape, lam), lam.flatten()


class Factors(Covariance):
    """(1 - rho) I + rho U U^T with a few factors U (d, rank), scaled so that both parts have the variances 1 - rho and rho.

    Args:
        rho: share of the factors. rank: their number. file: U as .npy or .csv; None for normal draws. law_seed: of the draws.
    """

    def __init__(self, rho: Share = 0.5, rank: PositiveInt = 1, file: str | None = None, law_seed: int = 0) -> None:
        super().__init__()
        self.rho, self.rank, self.file, self.law_seed = rho, rank, file, law_seed

    def load(self, kept: dict[str, Tensor], rows: Tensor | None) -> None:
        if self.file is not None:
            self.kept["loadings"] = kept["loadings"] if "loadings" in kept else read_matrix(self.file, "sde.file")

    def factor(self, shape: Shape) -> Structured:
        d, U = math.prod(shape), self.kept.get("loadings")
        if U is None:
            if self.rank > d:
                raise ScoreSDEError(f"sde.rank={self.rank}: expected at most {d}, for data of {d} numbers")
            U = normal((d, self.rank), generator(self.law_seed, "factors", d, self.rank), torch.float64)
        if len(U) != d or U.shape[1] > d:
            raise ScoreSDEError(
                f"sde.file={self.file}: a matrix of shape {tuple(U.shape)}, expected ({d}, r) with r at most {d}"
            )
        U = U * math.sqrt(self.rho * d / float(U.square().sum()))
        return LowRank(torch.full((d,), 1.0 - self.rho, dtype=torch.float64), U)


class Given(Covariance):
    """A matrix (d, d) from a file, scaled to trace d.

    Args:
        file: .npy, or .csv without a header.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def load(self, kept: dict[str, Tensor], rows: Tensor | None) -> None:
        self.kept["sigma"] = kept["sigma"] if "sigma" in kept else read_matrix(self.file, "sde.file")

    def factor(self, shape: Shape) -> Structured:
        return Dense(self.matrix(shape))

    def matrix(self, shape: Shape) -> Tensor:
        where = f"sde.file={self.file}"
        return positive(square(self.kept["sigma"], math.prod(shape), where), where)

    def modes(self, shape: Shape) -> tuple[Structured, Tensor]:
        dense = Dense(self.matrix(shape), modes=True)
        return dense, dense.lam


class OfTheData(Given):
    """The covariance of the training data, shrunk towards a multiple of the identity, scaled to trace d.

    Args:
        shrinkage: weight of the identity; None for the one of least expected error (Ledoit and Wolf, J. Multivar. Anal. 88, 2004).
    """

    def __init__(self, shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None) -> None:
        Covariance.__init__(self)
        self.shrinkage = shrinkage

    def load(self, kept: dict[str, Tensor], rows: Tensor | None) -> None:
        if "sigma" in kept:
            self.kept["sigma"] = kept["sigma"]
        elif rows is not None:
            from sklearn.covariance import ledoit_wolf, shrunk_covariance

            flat = rows.flatten(1).double().numpy()
            shrunk = (
                ledoit_wolf(flat)[0]
                if self.shrinkage is None
                else shrunk_covariance(np.cov(flat.T, ddof=0), self.shrinkage)
            )
            self.kept["sigma"] = torch.from_numpy(np.atleast_2d(shrunk))
        else:
            raise ScoreSDEError("sde.sigma=data: the training data is not here")

    def matrix(self, shape: Shape) -> Tensor:
        where = "sde.sigma=data (a constant column, or fewer rows than columns; sde.shrinkage=0.01 may help)"
        return positive(square(self.kept["sigma"], math.prod(shape), where), where)


KINDS: dict[str, type[Covariance]] = {
    "identity": White, "equi": Equi, "ar1": Autoregressive, "circulant": Periodic, "low_rank": Factors, "dense": Given,
    "data": OfTheData,
}  # fmt: skip
