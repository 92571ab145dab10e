"""Distances between two samples, each next to what chance gives.

Protocol of every distance here: two samples of equal size m; `floor` and `floor_high` are the mean and the 95 percent
quantile of the same distance between PAIRS pairs of fresh data samples of size m (the quantile by its expected rank, so
that fresh data lies below it in 95 percent of cases, few as the pairs are). `ci` is for the expected value of the
distance at that size (so it may be held against the floor): a bootstrap of both samples, shifted so that its mean is the
value, since resampling adds chance to a distance. At the floor it is wider than it need be (the statistic degenerates
there), never narrower.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.rng import generator, normal

PAIRS = 20
RESAMPLES = 50
SLICES = 64
ENERGY_ROWS = 2000

Distance = Callable[[Tensor, Tensor], float]


def sliced_wasserstein(x: Tensor, y: Tensor, slices: int = SLICES, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two samples (m, d): root of the mean over random directions of W2 squared.

    Source: Bonneel et al., J. Math. Imaging Vis. 51, 2015. The directions depend on `seed` and d alone.
    """
    theta = normal((x.shape[1], slices), generator(seed, "slices"), x.dtype)
    theta = theta / theta.norm(dim=0)
    u, v = (x @ theta).sort(dim=0).values, (y @ theta).sort(dim=0).values
    return float((u - v).square().mean().sqrt())


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (m, d), unbiased, so it may be negative.

    Source: Szekely and Rizzo, J. Stat. Plan. Inference 143, 2013.
    """
    m = len(x)
    within = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / (m * (m - 1))
    return float(2.0 * torch.cdist(x, y).mean() - within)


def resample(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """RESAMPLES bootstrap copies of both samples."""
    for i in range(RESAMPLES):
        source = generator(seed, "bootstrap", i)
        yield tuple(z[torch.randint(len(z), (len(z),), generator=source)] for z in (x, y))  # type: ignore[misc]


def energy_copies(x: Tensor, y: Tensor, seed: int) -> list[float]:
    """The energy distance of bootstrap copies of both samples, from one table of distances: weights, not copies."""
    m = len(x)
    table = torch.cdist(torch.cat([x, y]), torch.cat([x, y]))
    copies = []
    for i in range(RESAMPLES):
        source = generator(seed, "bootstrap", i)
        a, b = (torch.bincount(torch.randint(m, (m,), generator=source), minlength=m).to(x.dtype) for _ in range(2))
        within = (a @ table[:m, :m] @ a + b @ table[m:, m:] @ b) / (m * (m - 1))
        copies.append(float(2.0 * (a @ table[:m, m:] @ b) / m**2 - within))
    return copies


def interval(value: float, copies: list[float]) -> list[float]:
    """The 95 percent interval: the bootstrap's spread about its mean, put about the value."""
    shifted = np.asarray(copies) - np.mean(copies) + value
    return [float(q) for q in np.quantile(shifted, [0.025, 0.975])]


def compare(
    samples: Tensor, held_out: Tensor, pair: Callable[[int], tuple[Tensor, Tensor]], seed: int
) -> dict[str, dict[str, Any]]:
    """Every distance between samples and held-out data (m, *D), with interval, floor and unit, by name.

    Args:
        pair: i -> the i-th pair of fresh data samples, each of m rows.
    """
    x, y = samples.flatten(1), held_out.flatten(1)
    few = min(ENERGY_ROWS, len(x))
    pairs = [tuple(z.flatten(1) for z in pair(i)) for i in range(PAIRS)]
    energy_floor = [energy_distance(a[:few], b[:few]) for a, b in pairs]
    sliced_floor = [sliced_wasserstein(a, b) for a, b in pairs]
    sliced_copies = [sliced_wasserstein(a, b) for a, b in resample(x, y, seed)]

    def entry(value: float, copies: list[float], floor: list[float], **protocol: Any) -> dict[str, Any]:
        return {
            "value": value, "ci": interval(value, copies), "floor": float(np.mean(floor)),
            "floor_high": float(np.quantile(floor, 0.95, method="weibull")), "unit": "model units", "protocol": protocol,
        }  # fmt: skip

    return {
        "sliced_wasserstein": entry(
            sliced_wasserstein(x, y), sliced_copies, sliced_floor, n=len(x), slices=SLICES, order=2, floor_pairs=PAIRS
        ),
        "energy_distance": entry(
            energy_distance(x[:few], y[:few]), energy_copies(x[:few], y[:few], seed), energy_floor, n=few,
            floor_pairs=PAIRS,
        ),
    }  # fmt: skip
