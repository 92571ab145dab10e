"""The sliced 2-Wasserstein distance in coordinates in which the data is white: no direction counts more for its variance."""

from typing import Any

import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import Metric, Numbers, Quantity
from scoresde_cli.metrics.sliced_wasserstein import SLICES, sliced_wasserstein

FLAT = 1e-8  # directions with less than so much of the largest variance are left out


class WhitenedSlicedWasserstein(Metric):
    """That of W^T x and W^T y, W W^T the inverse of the held-out data's covariance."""

    quantities = {"whitened_sliced_wasserstein": Quantity("standard deviations")}
    rows = 100_000

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        flat = data.splits["test"].double().flatten(1)
        lam, basis = torch.linalg.eigh(torch.atleast_2d(torch.cov(flat.T)))
        kept = lam > FLAT * lam[-1]
        self.whiten = basis[:, kept] / lam[kept].sqrt()

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        rows, d = len(data.splits["test"]), int(torch.Size(data.shape).numel())
        return None if rows >= 5 * d else f"the covariance of {rows} held-out rows is not known in {d} dimensions"

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        u, v = (z.double().flatten(1) @ self.whiten for z in (x, y))
        return {"whitened_sliced_wasserstein": sliced_wasserstein(u, v)}

    def protocol(self) -> dict[str, Any]:
        return {"slices": SLICES, "order": 2, "white": "by the covariance of the test split"}
