"""How far the weights of a mixture's modes are off in its samples.

A row belongs to mode k with the posterior probability r_k(x) = w_k N_k(x) / sum_j w_j N_j(x). Under the law E r_k(X) = w_k
exactly, however much the modes overlap (counts by the likeliest mode would not do that), so

    error = 1/2 sum_k |mean of r_k over the samples - w_k|     (total variation)
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.metrics.base import FRACTION, Metric, Numbers, Quantity, bootstrap

NUMBERS_AT_ONCE = 10_000_000


def responsibilities(law: Mixture, x: Tensor) -> Tensor:
    """r_k(x), (m, K) float64, for x (m, d)."""
    parts = []
    for rows in x.double().split(max(1, NUMBERS_AT_ONCE // law.means.numel())):
        y = rows[:, None] - law.means
        if law.bases is not None:
            y = torch.einsum("kij,bki->bkj", law.bases, y)
        exponent = (y.square() / law.lam + (2 * math.pi * law.lam).log()).sum(-1)
        parts.append(torch.softmax(law.weights.log() - 0.5 * exponent, dim=1))
    return torch.cat(parts)


class ModeWeights(Metric):
    """The error over all rows; it needs no data to compare with, but has the data's own floor."""

    quantities = {"mode_weight_error": Quantity("total variation", limits=FRACTION)}
    rows = 100_000
    interval = "bootstrap of the samples"

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.law: Mixture = data.law  # type: ignore[attr-defined]

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        law = getattr(data, "law", None)
        if not isinstance(law, Mixture):
            return "the data is no mixture of known modes"
        return "the law has one mode" if len(law.weights) == 1 else None

    def error(self, fractions: Tensor) -> Numbers:
        return {"mode_weight_error": 0.5 * float((fractions - self.law.weights).abs().sum())}

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return self.error(responsibilities(self.law, x).mean(0))

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """Of bootstrap copies of the samples, from one table of responsibilities."""
        table, rows = responsibilities(self.law, x), torch.arange(len(x))
        for drawn, _ in bootstrap(rows, rows, seed):
            yield self.error(torch.bincount(drawn, minlength=len(x)).double() @ table / len(x))

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        fractions = responsibilities(self.law, x).mean(0)
        return {"mode_weight_error": {"samples": fractions.tolist(), "law": self.law.weights.tolist()}}
