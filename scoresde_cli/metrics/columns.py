"""What a reader of a table asks first: is each column right, and is each correlation.

    column_wasserstein   largest over columns of W1 / sd, with W1 = mean of |x_(i) - y_(i)| of the sorted column
    correlation_error    largest over pairs of columns of |r_x - r_y|, r Pearson's correlation

Both in the user's units and on the user's grid; sd is the training column's.
"""

from typing import Any

import numpy as np
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import Metric, Numbers, Quantity

NUMBERS = 1_000_000  # per sample, so that wide data takes no longer than narrow
SD_ROWS = 20_000


def rows_of(d: int) -> int:
    """Rows to use of data of d columns: 10,000, down to 1000 where there are a thousand."""
    return min(10_000, max(1000, NUMBERS // d))


class Flat(Metric):
    """A metric of named columns.

    Attributes:
        names: of the columns.
        sd: (d,), standard deviations of the training columns in the user's units, one where a column is constant.
    """

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        (d,) = data.shape
        self.names = data.columns or [f"x{i}" for i in range(d)]
        self.rows = rows_of(d)
        train = self.user(data.splits["train"][:SD_ROWS])
        self.sd = np.where(varies(train), train.std(axis=1), 1.0)

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        return None if len(data.shape) == 1 else "the data has no columns"

    def user(self, x: Tensor) -> np.ndarray:
        """Columns in the user's units, (d, m) float64, of x (m, d)."""
        return np.ascontiguousarray(self.data.units.to_user(x, rounded=True).numpy().T)


def varies(u: np.ndarray) -> np.ndarray:
    """Which of the columns (d, m) are not constant."""
    return np.ptp(u, axis=1) > 0


def column_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """W1 of each column, (d,), of two samples (d, m)."""
    return np.abs(np.sort(u, axis=1) - np.sort(v, axis=1)).mean(axis=1)


def correlations(u: np.ndarray) -> np.ndarray:
    """Pearson's correlations (d, d) of columns (d, m); a constant column has none, written 0."""
    z = u - u.mean(axis=1, keepdims=True)
    norm = np.where(varies(u), np.sqrt(np.square(z).sum(axis=1)), np.inf)
    z /= norm[:, None]
    return z @ z.T


class Columns(Flat):
    """The worst column and the worst correlation, over at most 10,000 rows."""

    quantities = {
        "column_wasserstein": Quantity("sd of the column"),
        "correlation_error": Quantity("correlation", limits=(0.0, 2.0)),
    }

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        u, v = self.user(x), self.user(y)
        found = {"column_wasserstein": float((column_distances(u, v) / self.sd).max())}
        if len(u) > 1:
            found["correlation_error"] = float(off_diagonal(np.abs(correlations(u) - correlations(v))).max())
        return found

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        u, v = self.user(x), self.user(y)
        by_column = (column_distances(u, v) / self.sd).tolist()
        found: dict[str, Any] = {"column_wasserstein": dict(zip(self.names, by_column, strict=True))}
        if len(u) > 1:
            r, s = correlations(u), correlations(v)
            i, j = np.unravel_index(int(off_diagonal(np.abs(r - s)).argmax()), r.shape)
            found["correlation_error"] = {
                "columns": [self.names[i], self.names[j]], "samples": float(r[i, j]), "data": float(s[i, j])
            }  # fmt: skip
        return found


def off_diagonal(table: np.ndarray) -> np.ndarray:
    np.fill_diagonal(table, 0.0)
    return table
