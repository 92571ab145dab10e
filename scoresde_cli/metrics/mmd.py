"""The squared maximum mean discrepancy (Gretton et al., JMLR 13, 2012, equation 3), unbiased.

    MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y),    k(x, y) = mean over j < WIDTHS of exp(-|x - y|^2 / (2 h_j^2))

with h_0 the median distance between training rows and each h_j half of the one before: coarse and fine structure.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import UNBIASED, Metric, Numbers, Quantity, bootstrap

WIDTHS = 5
MEDIAN_ROWS = 1000


def median_distance(x: Tensor) -> float:
    """The median Euclidean distance between rows of (m, d); one where it is zero."""
    return float(torch.pdist(x).median()) or 1.0


def kernel(x: Tensor, y: Tensor, width: float) -> Tensor:
    """k(x_i, y_j), (m, m) float64, for rows (m, d) and the largest width h_0."""
    one = torch.cdist(x.double(), y.double()).square_().div_(-2 * width**2).exp_()
    total = one.clone()
    for _ in range(WIDTHS - 1):
        total += one.square_().square_()  # half the width is the fourth power
    return total.div_(WIDTHS)


def squared_mmd(x: Tensor, y: Tensor, width: float) -> float:
    """MMD^2 of two samples (m, d), unbiased, so it may be negative."""
    m = len(x)
    within = float(kernel(x, x, width).fill_diagonal_(0).sum() + kernel(y, y, width).fill_diagonal_(0).sum())
    return within / (m * (m - 1)) - 2 * float(kernel(x, y, width).mean())


class MMD(Metric):
    """The discrepancy of at most 2000 rows."""

    quantities = {"mmd2": Quantity("kernel units", limits=UNBIASED)}

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.width = median_distance(data.splits["train"][:MEDIAN_ROWS].flatten(1))

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return {"mmd2": squared_mmd(x.flatten(1), y.flatten(1), self.width)}

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """Of bootstrap copies of both samples, from one table of kernels: weights, not copies."""
        both, m = torch.cat([x, y]).flatten(1), len(x)
        table = kernel(both, both, self.width).fill_diagonal_(1)
        for drawn in bootstrap(torch.arange(m), torch.arange(m), seed):
            a, b = (torch.bincount(rows, minlength=m).to(table.dtype) for rows in drawn)
            within = float(a @ table[:m, :m] @ a + b @ table[m:, m:] @ b) - 2 * m  # less each copy with itself
            yield {"mmd2": within / (m * (m - 1)) - 2 * float(a @ table[:m, m:] @ b) / m**2}

    def protocol(self) -> dict[str, Any]:
        return {"kernel": "mean of Gaussians", "bandwidths": [self.width / 2**j for j in range(WIDTHS)]}
