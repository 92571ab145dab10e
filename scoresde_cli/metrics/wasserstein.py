"""The exact 2-Wasserstein distance (Villani, Optimal Transport, 2009, chapter 6), by POT's network simplex.

    W2(x, y)^2 = min over couplings P of the two samples of sum_ij P_ij |x_i - y_j|^2

At n rows in d > 4 dimensions even fresh data is n^(-1/d) away (Dudley, Ann. Math. Stat. 40, 1969): compare with the floor.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.metrics.base import Metric, Numbers, Quantity, bootstrap

PIVOTS = 10_000_000  # of the simplex; POT's own limit can stop short of the optimum at a thousand rows


def squared_distances(x: Tensor, y: Tensor) -> np.ndarray:
    """|x_i - y_j|^2, (m, m) float64, of two samples (m, *D)."""
    return torch.cdist(x.double().flatten(1), y.double().flatten(1)).square().numpy()


def transport(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Root of the least cost of moving the masses a (m,) to b (m,), each of sum one; rows without mass are left out."""
    import ot

    table = np.ascontiguousarray(cost[np.ix_(a > 0, b > 0)])
    return float(np.sqrt(max(ot.emd2(a[a > 0], b[b > 0], table, numItermax=PIVOTS), 0.0)))


class Wasserstein(Metric):
    """The distance of at most 1000 rows."""

    quantities = {"wasserstein": Quantity("model units")}
    rows = 1000

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        even = np.full(len(x), 1 / len(x))
        return {"wasserstein": transport(squared_distances(x, y), even, even)}

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """Of bootstrap copies of both samples, from one table of costs: masses, not copies."""
        cost, m = squared_distances(x, y), len(x)
        for drawn in bootstrap(torch.arange(m), torch.arange(m), seed):
            a, b = (np.bincount(rows.numpy(), minlength=m) / m for rows in drawn)
            yield {"wasserstein": transport(cost, a, b)}
