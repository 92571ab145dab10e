"""The energy distance (Szekely and Rizzo, J. Stat. Plan. Inference 143, 2013)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from scoresde_cli.metrics.base import RESAMPLES, UNBIASED, Metric, Numbers, Quantity
from scoresde_cli.rng import generator


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (m, d), unbiased, so it may be negative."""
    m = len(x)
    within = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / (m * (m - 1))
    return float(2.0 * torch.cdist(x, y).mean() - within)


class EnergyDistance(Metric):
    """The distance of at most 2000 rows."""

    quantities = {"energy_distance": Quantity("model units", limits=UNBIASED)}

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return {"energy_distance": energy_distance(x.flatten(1), y.flatten(1))}

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """Of bootstrap copies of both samples, from one table of distances: weights, not copies."""
        x, y, m = x.flatten(1), y.flatten(1), len(x)
        table = torch.cdist(torch.cat([x, y]), torch.cat([x, y]))
        for i in range(RESAMPLES):
            source = generator(seed, "bootstrap", i)
            a, b = (torch.bincount(torch.randint(m, (m,), generator=source), minlength=m).to(x.dtype) for _ in range(2))
            within = (a @ table[:m, :m] @ a + b @ table[m:, m:] @ b) / (m * (m - 1))
            yield {"energy_distance": float(2.0 * (a @ table[:m, m:] @ b) / m**2 - within)}
