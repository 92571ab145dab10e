"""What all image sets share: whole grey levels 0 to `top`, scaled to [-1, 1] for the model.

u = top/2 (1 + x) for levels u and model coordinates x. Levels stay whole numbers at every size, as an image file of that size
would hold them; so dequantisation by uniform noise of one level, the way back, and bits per dimension mean the same everywhere.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset, Kind, Units, check_rows, check_splits, label_name, split_rows
from scoresde_cli.errors import Unreadable
from scoresde_cli.rng import generator, uniform

BLOCK = 4096  # images that are held in float64 at a time


class Images(Dataset):
    """Images of one size.

    Args:
        u: grey levels (n, C, H, W), uint8.
        top: the lightest level.
        codes: the number of each image's class (n,) int64, or None.
        classes: their names.
        labels: the classes are labels that the model is given.
        dequantise: add uniform noise of one grey level (for likelihoods; samples are rounded back to the levels).
        flips: the training split holds each image and its mirror image, and no image's mirror image stands in another split.
        seed: of the split and of the dequantisation.
        path: where the images came from, for messages.

    Raises Unreadable where there are too few images.
    """

    kind: Kind = "image"

    def __init__(
        self, u: Tensor, top: int, codes: Tensor | None, classes: list[str], *, labels: bool, dequantise: bool, flips: bool = False,
        seed: int, path: str = "", facts: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_rows(len(u), path)
        rows, repeated = split_rows(unmirrored(u) if flips else u, seed)
        check_splits(rows, path)
        self.shape = tuple(u.shape[1:])
        ones = torch.ones(u[0].numel(), dtype=torch.float64)
        self.units = Units(self.shape, top / 2 * ones, top / 2 * ones, resolution=ones if dequantise else None)
        self.quantum = ones
        noise = generator(seed, "dequantise")

        def to_model(levels: Tensor) -> Tensor:
            if dequantise:
                levels = levels + uniform(tuple(levels.shape), noise, torch.float64) - 0.5
            return self.units.to_model(levels).float()

        x = in_blocks(to_model, u)
        self.splits = {name: x[index] for name, index in rows.items()}
        self.unflipped = self.splits["train"]
        if flips:
            self.splits["train"] = torch.cat([self.unflipped, self.unflipped.flip(-1)])
        if codes is not None:
            found = {name: codes[index].repeat(2 if flips and name == "train" else 1) for name, index in rows.items()}
            self.known = found, classes
            if labels:
                self.classes, self.labels = classes, found
        self.facts = {
            "rows": len(u), "rows_repeated": repeated, "dequantised": dequantise, "flips": flips, **(facts or {}),
        }  # fmt: skip

    def comparable(self, x: Tensor) -> Tensor:
        """On whole levels from black to white, as an image file holds them: samples between levels are told from data on them by
        that alone."""

        def rounded(block: Tensor) -> Tensor:
            levels = self.units.to_user(block.clamp(-1.0, 1.0), rounded=False).round()
            return self.units.to_model(levels).reshape(block.shape).to(block)

        return in_blocks(rounded, x)

    def everything(self) -> Tensor:
        return torch.cat([self.unflipped, *(x for name, x in self.splits.items() if name != "train")])


def in_blocks(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """f of rows u (n, ...), a block of rows after the other."""
    return torch.cat([f(block) for block in u.split(BLOCK)])


def unmirrored(u: Tensor) -> Tensor:
    """Of each image (n, C, H, W) uint8 and its mirror image the one that comes first in order: the same for both."""
    a, b = u.flatten(1).numpy(), u.flip(-1).flatten(1).numpy()
    first = (a != b).argmax(1)[:, None]  # 0 where they are equal
    later = np.take_along_axis(a, first, 1) > np.take_along_axis(b, first, 1)
    return torch.from_numpy(np.where(later, b, a)).reshape(u.shape)


def overlaps(old: int, new: int) -> Tensor:
    """(new, old) float64: the share of each of `old` equal pixels in each of `new`; rows sum to 1, columns to new / old."""
    i, j = torch.arange(new)[:, None], torch.arange(old)
    shared = torch.minimum((i + 1) * old, (j + 1) * new) - torch.maximum(i * old, j * new)
    return shared.clamp_min(0).double() / old


def area_pool(u: Tensor, size: int) -> Tensor:
    """Images (n, C, H, W) as float64 (n, C, size, size): each new pixel is the mean of the area that it covers.

    Areas may cut pixels (28 to 8: 3.5 pixels a side), so the mean over an image is kept exactly at every size.
    """
    return overlaps(u.shape[-2], size) @ u.double() @ overlaps(u.shape[-1], size).T


def class_codes(names: np.ndarray, path: str) -> tuple[Tensor, list[str]]:
    """(the number of each image's class (n,), the names of the classes in order). Raises Unreadable for fewer than two."""
    values, codes = np.unique(names, return_inverse=True)
    if len(values) < 2:
        raise Unreadable(f"data.path={path}: data.labels=true, and all images have the label {label_name(values[0])!r}")
    return torch.from_numpy(codes).long(), [label_name(value) for value in values.tolist()]
