"""The contract of every number that compares samples with data, and the protocol that all of them share.

Two samples of equal size m in model coordinates, x drawn by the model and y held out. Each number comes with

    floor, floor_high   mean and 95 percent quantile of the same number between PAIRS pairs of fresh data samples of that
                        size (the quantile by its expected rank, so that fresh data is on the good side of it in 95 percent
                        of cases, few as the pairs are); where more is better, the 5 percent quantile
    ci                  a 95 percent interval for the expected number at that size (so that it may be held against the
                        floor): copies of both samples, shifted so that their mean is the value, since resampling adds
                        chance to a distance. At the floor it is wider than it need be (the statistics degenerate
                        there), never narrower

A metric is one class in one file: `measure` gives its numbers, `quantities` says what they are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde_cli import processes
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.rng import generator

PAIRS = 20
RESAMPLES = 50
FRACTION = (0.0, 1.0)  # the limits of a share
UNBIASED = (-math.inf, math.inf)  # those of an estimate that may be negative
Numbers = dict[str, float]


@dataclass(frozen=True)
class Quantity:
    """What a number is: its unit, whether less or more of it is better, and between what it lies."""

    unit: str
    better: Literal["lower", "higher"] = "lower"
    limits: tuple[float, float] = (0.0, math.inf)


class Metric(ABC):
    """One or several numbers of two samples (m, *D).

    Attributes:
        quantities: what the numbers are, by name.
        rows: at most that many rows of each sample are used.
        interval: how `copies` makes its copies, for the protocol.
    """

    quantities: Mapping[str, Quantity]
    rows: int = 2000
    interval: str = "bootstrap of both samples"

    def __init__(self, data: Dataset) -> None:
        self.data = data

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        """Why the metric means nothing on this data, or None."""
        return None

    @abstractmethod
    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        """The numbers of samples x against y, both (m, *D) float32 in model coordinates."""

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """The numbers of RESAMPLES copies of both samples."""
        for a, b in bootstrap(x, y, seed):
            yield self.measure(a, b)

    def protocol(self) -> dict[str, Any]:
        """The settings that two numbers must share to be compared."""
        return {}

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What a reader may want to see behind the numbers (by column, by mode), by name of the quantity."""
        return {}


def bootstrap(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """RESAMPLES copies of both samples, rows drawn with replacement (Efron, Ann. Stat. 7, 1979)."""
    for i in range(RESAMPLES):
        source = generator(seed, "bootstrap", i)
        yield tuple(z[torch.randint(len(z), (len(z),), generator=source)] for z in (x, y))  # type: ignore[misc]


def halves(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """RESAMPLES copies of half the rows of both samples, drawn without replacement.

    The variance of a smooth statistic over halves is its variance at full size, 1/(m/2) - 1/m = 1/m (Shao and Wu, Ann. Stat. 17,
    1989, the delete-half jackknife); no row stands twice, which statistics of nearest neighbours do not bear.
    """
    for i in range(RESAMPLES):
        source = generator(seed, "halves", i)
        yield tuple(z[torch.randperm(len(z), generator=source)[: len(z) // 2]] for z in (x, y))  # type: ignore[misc]


def interval(value: float, copies: Sequence[float], limits: tuple[float, float] = UNBIASED) -> list[float]:
    """The 95 percent interval: the copies' spread about their mean, put about the value (quantiles by expected rank).

    It is cut at the limits of what the number can be, which takes nothing from its coverage.
    """
    shifted = np.asarray(copies) - np.mean(copies) + value
    return [float(q) for q in np.clip(np.quantile(shifted, [0.025, 0.975], method="weibull"), *limits)]


def chance(values: Sequence[float], better: str) -> tuple[float, float]:
    """(floor, floor_high) from the numbers of fresh pairs."""
    level = 0.95 if better == "lower" else 0.05
    return float(np.mean(values)), float(np.quantile(values, level, method="weibull"))


def compare(
    metrics: Sequence[Metric], samples: Tensor, held_out: Tensor, pair: Callable[[int], tuple[Tensor, Tensor]], seed: int
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Every number of samples against held-out data (m, *D), with interval, floor, unit and protocol, by name.

    Args:
        pair: i -> the i-th pair of fresh data samples, each of m rows.
    """
    found: dict[str, dict[str, Any]] = {}
    chances: list[list[Numbers]] = [[] for _ in metrics]

    def of_pair(i: int) -> tuple[Numbers, ...]:
        a, b = pair(i)
        sizes = [min(metric.rows, len(samples)) for metric in metrics]
        return tuple(metric.measure(a[:m], b[:m]) for metric, m in zip(metrics, sizes, strict=True))

    for numbers_of_pair in processes.shared(PAIRS, of_pair):
        for fresh, numbers in zip(chances, numbers_of_pair, strict=True):
            fresh.append(numbers)

    def of_metric(i: int) -> tuple[Numbers, list[Numbers], dict[str, Any]]:
        metric, m = metrics[i], min(metrics[i].rows, len(samples))
        x, y = samples[:m], held_out[:m]
        return metric.measure(x, y), list(metric.copies(x, y, seed)), metric.detail(x, y)

    measured = processes.shared(len(metrics), of_metric)
    for metric, fresh, (numbers, copies, detail) in zip(metrics, chances, measured, strict=True):
        m = min(metric.rows, len(samples))
        for name, value in numbers.items():
            quantity = metric.quantities[name]
            floor, floor_high = chance([numbers[name] for numbers in fresh], quantity.better)
            found[name] = {
                "value": value, "ci": interval(value, [copy[name] for copy in copies], quantity.limits),
                "floor": floor, "floor_high": floor_high, "unit": quantity.unit,
                "protocol": {"n": m, "better": quantity.better, "floor_pairs": PAIRS, "interval": metric.interval}
                | metric.protocol(),
            }  # fmt: skip
            if name in detail:
                found[name]["detail"] = detail[name]
    return found
