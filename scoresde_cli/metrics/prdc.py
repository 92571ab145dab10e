"""Precision and recall (Kynkaanniemi et al., NeurIPS 2019), density and coverage (Naeem et al., ICML 2020).

With B_i the ball about row i that reaches its K-th nearest neighbour in its own sample, x drawn by the model, y data:

    precision   fraction of x in some ball of y         recall     fraction of y in some ball of x
    density     mean number of balls of y that hold     coverage   fraction of the balls of y that hold some x
                an x, over K

Density may exceed one: samples crowd where data is dense.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scoresde_cli.metrics.base import FRACTION, Metric, Numbers, Quantity, halves

K = 5
NARROW = 64  # coordinates


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|, (m, m) float64, of two samples (m, *D).

    By differences where that is affordable: by products of rows, equal rows are not quite at distance zero.
    """
    mode = "donot_use_mm_for_euclid_dist" if x[0].numel() <= NARROW else "use_mm_for_euclid_dist"
    return torch.cdist(x.double().flatten(1), y.double().flatten(1), compute_mode=mode)


def radii(table: Tensor) -> Tensor:
    """Distance to the K-th nearest neighbour (m,) by a table (m, m) of a sample's own distances."""
    k = min(K, len(table) - 1)
    return table.topk(k + 1, dim=1, largest=False).values[:, k]  # the nearest of all is the row itself


def prdc(xx: Tensor, xy: Tensor, yy: Tensor) -> Numbers:
    """The four numbers from tables of distances (m, m)."""
    in_data, in_samples = xy <= radii(yy), xy <= radii(xx)[:, None]
    return {
        "precision": float(in_data.any(1).double().mean()),
        "recall": float(in_samples.any(0).double().mean()),
        "density": float(in_data.sum()) / (min(K, len(yy) - 1) * len(xx)),
        "coverage": float(in_data.any(0).double().mean()),
    }


class PRDC(Metric):
    """The four numbers of at most 2000 rows."""

    quantities = {
        "precision": Quantity("fraction", "higher", FRACTION), "recall": Quantity("fraction", "higher", FRACTION),
        "density": Quantity("ratio to data", "higher"), "coverage": Quantity("fraction", "higher", FRACTION),
    }  # fmt: skip
    interval = "halves of both samples"

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return prdc(distances(x, x), distances(x, y), distances(y, y))

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        xx, xy, yy = distances(x, x), distances(x, y), distances(y, y)
        rows = torch.arange(len(x))
        for a, b in halves(rows, rows, seed):
            yield prdc(xx[a][:, a], xy[a][:, b], yy[b][:, b])

    def protocol(self) -> dict[str, Any]:
        return {"k": K, "features": "model coordinates"}
