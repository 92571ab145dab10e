"""What a run remembers of its data: shape, names, units and Gaussian part, in data.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from scoresde_cli.datasets.base import Dataset, Units
from scoresde_cli.errors import Unreadable, one_line
from scoresde_cli.networks.model import Gaussian


class Stored(Dataset):
    """A data set without its data: enough to sample and to give the samples their units."""

    def __init__(
        self, shape: tuple[int, ...], kind: Any, columns: list[str] | None, units: Units, bounds: tuple[Tensor, Tensor],
        classes: list[str],
    ) -> None:  # fmt: skip
        self.shape, self.kind, self.columns, self.units, self.bounds = shape, kind, columns, units, bounds
        self.classes = classes
        self.splits, self.facts = {}, {}


KEPT = "sde."  # before the names of the process's matrices


def pack_data(data: Dataset, gaussian: Gaussian, kept: Mapping[str, Tensor] | None = None) -> bytes:
    """Units, names, Gaussian part and the process's matrices (SDE.kept) as safetensors bytes."""
    units = data.units
    tensors = {
        "shift": units.shift, "scale": units.scale, "matrix": units.matrix, "resolution": units.resolution, "origin": units.origin,
        "low": data.bounds[0], "high": data.bounds[1], "mean": gaussian.mean, "lam": gaussian.lam, "basis": gaussian.basis,
    }  # fmt: skip
    tensors |= {KEPT + name: tensor for name, tensor in (kept or {}).items()}
    facts = {"shape": list(data.shape), "kind": data.kind, "columns": data.columns, "classes": data.classes}
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    return save(present, {"data": json.dumps(facts)})


def unpack_data(path: Path) -> tuple[Stored, Gaussian]:
    """The inverse of `pack_data`, from a file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["data"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = tuple(int(n) for n in facts["shape"])
        units = Units(
            shape,
            tensors["shift"],
            tensors.get("scale"),
            tensors.get("matrix"),
            tensors.get("resolution"),
            tensors.get("origin"),
        )
        gaussian = Gaussian(tensors["mean"], tensors["lam"], tensors.get("basis"))
        d = int(np.prod(shape))
        sizes = {"matrix": (d, d), "basis": (d, d)}
        for name, tensor in tensors.items():
            right = tensor.ndim == 2 if name.startswith(KEPT) else tuple(tensor.shape) == sizes.get(name, (d,))
            if not right or not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite or not of {d} coordinates")
        if ("scale" in tensors) == ("matrix" in tensors):
            raise ValueError("expected a scale or a matrix")
        stored = Stored(
            shape, facts["kind"], facts["columns"], units, (tensors["low"], tensors["high"]), facts["classes"]
        )
        stored.kept = {name.removeprefix(KEPT): x for name, x in tensors.items() if name.startswith(KEPT)}
        return stored, gaussian
    except Exception as problem:  # every way in which foreign bytes can fail to be this file
        raise Unreadable(f"{path}: not readable ({one_line(problem)[:120]})") from problem
