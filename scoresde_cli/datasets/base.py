"""The contract of every data set: splits in model coordinates, the way back to the user's units, the law if known."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoresde_cli.datasets.jump_oracle import JumpOracle, covers
from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest
from scoresde_cli.rng import generator
from scoresde_cli.sdes.base import SDE

Kind = Literal["points", "table", "image"]
Size = Annotated[int, Field(ge=10)]  # training samples of a law that can be sampled
MIN_ROWS = 20  # of a user's own data


@dataclass(frozen=True)
class Units:
    """user = F x + shift for model coordinates x; F is given by `scale` (d,) or, where that is None, `matrix` (d, d).

    Attributes:
        resolution: (d,), the grid of each coordinate that was dequantised, 0 for a continuous one. The way back rounds
            to it.
        origin: (d,), a value on each grid; None for zero.
    """

    shape: tuple[int, ...]
    shift: Tensor
    scale: Tensor | None
    matrix: Tensor | None = None
    resolution: Tensor | None = None
    origin: Tensor | None = None

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> "Units":
        d = int(torch.Size(shape).numel())
        return cls(shape, torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64))

    def to_model(self, u: Tensor) -> Tensor:
        """(n, *D) in the user's units to float64 model coordinates."""
        y = u.double().flatten(1) - self.shift
        x = y / self.scale if self.scale is not None else torch.linalg.solve(self.matrix, y.T).T
        return x.reshape(-1, *self.shape)

    def to_user(self, x: Tensor, rounded: bool = True) -> Tensor:
        """(n, *D) in model coordinates to float64 in the user's units, on the grid of dequantised columns."""
        y = x.double().flatten(1)
        y = y * self.scale if self.scale is not None else y @ self.matrix.T  # type: ignore[union-attr]
        u = y + self.shift
        if rounded and self.resolution is not None:
            step = torch.where(self.resolution > 0, self.resolution, 1.0)
            origin = torch.zeros_like(step) if self.origin is None else self.origin
            on_grid = ((u - origin) / step).round() * step + origin
            digits = 10.0 ** (
                6 - step.log10().floor()
            )  # a decimal comes back as the file has it, without the rounding of sums
            u = torch.where(self.resolution > 0, (on_grid * digits).round() / digits + 0.0, u)  # no -0
        return u.reshape(-1, *self.shape)

    def digits(self) -> Tensor:
        """(d,) decimal digits by which a coordinate in the user's units keeps nine of its spread: 9 to 15 (dates, identities)."""
        spread = self.scale.abs() if self.scale is not None else self.matrix.norm(dim=1)  # type: ignore[union-attr]
        return (9 + (self.shift.abs() / spread).clamp(1.0, 1e6).log10().ceil()).long()

    def log_det(self) -> float:
        """log |det dx/du|: added to log p(x), it gives the log-density in the user's units."""
        if self.scale is not None:
            return -float(self.scale.abs().log().sum())
        return -float(torch.linalg.slogdet(self.matrix)[1])


class Dataset(ABC):
    """Data in model coordinates.

    Attributes:
        shape: D of one sample.
        kind: how to show it.
        columns: names of the columns of a table, else None.
        units: the way to the user's units and back.
        classes: names of the labels, none where the data has none.
        quantum: the step of each coordinate (d,), in the user's units, where the data is levels of grey.
        labels: the label of each row by split, (n,) int64, where there are classes.
        known: (the class of each row by split, the names of the classes), whether or not the model is told, where they are known.
        splits: float32 tensors (n, *D) by name: train, valid, test.
        bounds: the least and the largest value of each coordinate in the training split, (d,) each.
        kept: matrices that a run remembers of its process (SDE.kept), where the data set comes from a run.
        facts: what a reader of the run should know (file, rows dropped, ...).
    """

    shape: tuple[int, ...]
    kind: Kind = "points"
    columns: list[str] | None = None
    units: Units
    classes: list[str] = []
    quantum: Tensor | None = None
    labels: dict[str, Tensor] | None = None
    known: tuple[dict[str, Tensor], list[str]] | None = None
    splits: dict[str, Tensor]
    kept: Mapping[str, Tensor] = {}
    facts: dict[str, Any]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        low, high = self.splits["train"].flatten(1).aminmax(dim=0)
        return low, high

    def everything(self) -> Tensor:
        """All rows of all splits (n, *D), each as often as the data has it."""
        return torch.cat(list(self.splits.values()))

    def comparable(self, x: Tensor) -> Tensor:
        """Rows x (n, *D) as two samples are compared."""
        return x

    def fresh(self, n: int, source: torch.Generator) -> Tensor | None:
        """n new samples (n, *D) float32 where the law can be sampled, else None."""
        return None

    def oracle(self, sde: SDE) -> Oracle | None:
        """Exact log p_t and score where the law is known, else None."""
        return None


class Sampled(Dataset):
    """A law that can be sampled: the splits are independent draws from it.

    Args:
        n: training samples; validation and test have a fifth of it each.
        seed: of the draws; fixed by default, so that runs of unlike `seed` share their data.
    """

    def __init__(self, shape: tuple[int, ...], n: int, seed: int) -> None:
        self.shape, self.units, self.facts = shape, Units.identity(shape), {"n": n}
        sizes = {"train": n, "valid": max(n // 5, 100), "test": max(n // 5, 100)}
        self.splits = {
            name: self.fresh(size, generator(seed, "data", i)) for i, (name, size) in enumerate(sizes.items())
        }

    @abstractmethod
    def draw(self, n: int, source: torch.Generator) -> Tensor:
        """n draws (n, *D), float64."""

    def fresh(self, n: int, source: torch.Generator) -> Tensor:
        return self.draw(n, source).float()


class SampledMixture(Sampled):
    """A Gaussian mixture: exact density and score at every t. With `labels`, the component of each row is its label."""

    def __init__(self, law: Mixture, n: int, seed: int, labels: bool = False) -> None:
        self.law = law
        super().__init__((law.means.shape[1],), n, seed)
        if labels:
            self.classes = [str(k) for k in range(len(law.weights))]
            self.labels = {
                name: law.components(len(x), generator(seed, "data", i))
                for i, (name, x) in enumerate(self.splits.items())
            }  # the first that a draw takes of its generator

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        return self.law.sample(n, source)

    def oracle(self, sde: SDE) -> Oracle | None:
        if sde.jumps is not None:
            return JumpOracle(self.law, sde) if covers(self.law, sde) else None
        return Oracle(self.law, sde) if sde.still or sde.kernel() is not None else None


def label_name(value: object) -> str:
    """A label as the user writes it: whole numbers without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def split_rows(rows: Tensor, seed: int) -> tuple[dict[str, Tensor], int]:
    """(row numbers by split, how many rows repeat another): 70 percent train, 10 valid, 20 test of rows (n, *D).

    Equal rows go to the same split: a test row is never one that was trained on.
    """
    unique, group = torch.unique(rows.flatten(1), dim=0, return_inverse=True)
    place = torch.randperm(len(unique), generator=generator(seed, "split"))[group]
    order = torch.argsort(place, stable=True)
    n = len(rows)
    ends = []
    for end in (round(0.7 * n), round(0.8 * n)):
        while 0 < end < n and place[order[end]] == place[order[end - 1]]:
            end += 1
        ends.append(end)
    a, b = ends
    return {"train": order[:a], "valid": order[a:b], "test": order[b:]}, n - len(unique)


def check_rows(n: int, path: str) -> None:
    """Refuse a user's data of too few rows."""
    if n < MIN_ROWS:
        raise Unreadable(f"data.path={path}: {n} row(s) of data, expected at least {MIN_ROWS}")


def check_splits(rows: dict[str, Tensor], path: str) -> None:
    """Refuse a user's data with too few rows that differ to train and measure on."""
    small = [name for name, index in rows.items() if len(index) < 2]
    if small:
        raise Unreadable(
            f"data.path={path}: so many rows are equal that the {' and '.join(small)} split would hold fewer than two (equal "
            "rows stand in one split)"
        )


def existing(path: str) -> Path:
    """The file or folder that data.path names. Raises ScoreSDEError, with the nearest name, where there is none."""
    place = Path(path).expanduser()
    if not place.exists():
        near = nearest(place.name, [p.name for p in place.parent.iterdir()]) if place.parent.is_dir() else ""
        raise ScoreSDEError(f"data.path={path}: it does not exist{near}")
    return place
