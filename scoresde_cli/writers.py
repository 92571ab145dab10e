"""Samples to a file, block by block and in the user's units, so that memory does not grow with their number.

.npz        x (n, *D) and columns, and the recorded path: path (frames, m, *D), times (frames,); x and path are float32, float64
            where that has too few digits for a column
.csv        one row a sample, columns by name
.parquet    the same
.png        a picture: images in a grid, or points in the plane; with a path, one panel a frame
.gif        the path as a film
"""

import contextlib
import os
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, nearest
from scoresde_cli.samplers.steering import Known

SUFFIXES = (".npz", ".csv", ".parquet", ".png", ".gif")
WITH_PATH = (".npz", ".png", ".gif")
SHOWN = 20_000  # points in a picture
FILM_FRAMES, FILM_NUMBERS = 40, 4_000_000


class Track:
    """Records the way of the first samples down to the data, at `frames` of the times at which a sampler looks.

    Args:
        looks: how often the sampler calls its watch.
        frames: how many of these are kept.
        n, shape: the samples.
    """

    def __init__(self, looks: int, frames: int, n: int, shape: tuple[int, ...]) -> None:
        kept = np.unique(np.linspace(0, looks - 1, min(frames, looks)).round().astype(int))
        self.kept = {int(index): place for place, index in enumerate(kept)}
        self.rows = max(1, min(n, 2000, FILM_NUMBERS // (len(kept) * int(np.prod(shape)))))
        self.times = [0.0] * len(kept)
        self.frames: list[list[Tensor]] = [[] for _ in kept]
        self.calls: dict[int, int] = {}

    def watch(self, block: int, t: float, x: Tensor) -> None:
        """To be called by a sampler before every step and at the end."""
        call = self.calls.get(block, 0)
        self.calls[block] = call + 1
        place = self.kept.get(call)
        if place is not None and block * len(x) < self.rows:
            self.times[place] = t
            self.frames[place].append(x[: self.rows - block * len(x)].cpu())

    def to_user(self, data: Dataset) -> np.ndarray:
        """(frames, rows, *D) in the user's units."""
        return np.stack([data.units.to_user(torch.cat(parts), rounded=False).numpy() for parts in self.frames])


class Writer(ABC):
    """Writes n samples to a path, from the first block to the last."""

    def __init__(self, path: Path, data: Dataset, n: int) -> None:
        self.path, self.data, self.n = path, data, n
        d = int(np.prod(data.shape))
        self.columns = data.columns or [f"x{i}" for i in range(d)]

    @abstractmethod
    def add(self, u: np.ndarray) -> None:
        """The next samples (rows, *D), in the user's units."""

    @abstractmethod
    def finish(self, path: Track | None) -> None:
        """The end, with the recorded path where there is one."""

    def abort(self) -> None:  # noqa: B027
        """Let go of the file, which is not complete and will be removed."""


class NPZ(Writer):
    def __init__(self, path: Path, data: Dataset, n: int) -> None:
        super().__init__(path, data, n)
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self.member = self.archive.open("x.npy", "w", force_zip64=True)
        units = data.units
        extreme = torch.cat(
            [units.shift.abs(), *(abs(m).flatten() for m in (units.scale, units.matrix) if m is not None)]
        ).max()
        self.kind = "<f8" if units.digits().max() > 10 or extreme > 1e30 else "<f4"
        header = {"descr": self.kind, "fortran_order": False, "shape": (n, *data.shape)}
        np.lib.format.write_array_header_2_0(self.member, header)

    def add(self, u: np.ndarray) -> None:
        self.member.write(np.ascontiguousarray(u, dtype=self.kind).tobytes())

    def finish(self, path: Track | None) -> None:
        self.member.close()
        arrays: dict[str, Any] = {} if self.data.columns is None else {"columns": np.array(self.data.columns)}
        if path is not None:
            arrays |= {"path": path.to_user(self.data).astype(self.kind), "times": np.array(path.times)}
        for name, array in arrays.items():
            with self.archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        self.archive.close()

    def abort(self) -> None:
        self.member.close()
        self.archive.close()


class CSV(Writer):
    def add(self, u: np.ndarray) -> None:
        import pandas as pd

        first = not self.path.exists()
        frame = pd.DataFrame(u.reshape(len(u), -1), columns=self.columns)
        # Nine digits hold a float32, and show a value on a column's grid as it was written in the user's file.
        for i, digits in enumerate(self.data.units.digits().tolist()):
            if digits > 9:
                frame.isetitem(i, [f"{value:.{digits}g}" for value in u.reshape(len(u), -1)[:, i]])
        frame.to_csv(self.path, index=False, header=first, mode="w" if first else "a", float_format="%.9g")

    def finish(self, path: Track | None) -> None:
        pass


class Parquet(Writer):
    def __init__(self, path: Path, data: Dataset, n: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path, data, n)
        self.schema = pa.schema([(name, pa.float64()) for name in self.columns])
        self.file = pq.ParquetWriter(path, self.schema)

    def add(self, u: np.ndarray) -> None:
        import pyarrow as pa

        self.file.write_table(pa.table(list(u.reshape(len(u), -1).T), schema=self.schema))

    def finish(self, path: Track | None) -> None:
        self.file.close()


class Picture(Writer):
    """A .png or .gif: the first samples are kept, the rest is not looked at. Of images with gaps, each beside its samples."""

    known: Known | None = None

    def __init__(self, path: Path, data: Dataset, n: int) -> None:
        super().__init__(path, data, n)
        self.parts: list[np.ndarray] = []
        self.left = SHOWN if data.kind != "image" else 256

    def add(self, u: np.ndarray) -> None:
        if self.left > 0:
            self.parts.append(u[: self.left])
            self.left -= len(u)

    def finish(self, path: Track | None) -> None:
        from scoresde_cli import figures

        samples = np.concatenate(self.parts)
        if path is None and self.known is not None and self.data.kind == "image":
            assert self.known.given is not None
            figures.inpainting(self.data, samples, self.known.given, self.path)
        elif path is None:
            figures.picture(self.data, samples, self.path)
        elif self.path.suffix.lower() == ".gif":
            figures.film(self.data, path.to_user(self.data), path.times, self.path)
        else:
            figures.frames(self.data, path.to_user(self.data), path.times, self.path)


WRITERS: dict[str, type[Writer]] = {".npz": NPZ, ".csv": CSV, ".parquet": Parquet, ".png": Picture, ".gif": Picture}


def check_out(path: Path, overwrite: bool) -> Path:
    """Refuse a file name that cannot be written. Raises ScoreSDEError."""
    if path.suffix.lower() not in SUFFIXES:
        raise ScoreSDEError(
            f"out={path}: expected a name ending in {', '.join(SUFFIXES)}{nearest(path.suffix, SUFFIXES)}"
        )
    if path.exists() and not overwrite:
        raise ScoreSDEError(f"{path} exists already; choose another out= or say overwrite=true")
    return path


def check_folder(path: Path) -> None:
    """Refuse, before any work, a file whose folder does not exist or cannot be written to."""
    if not path.parent.is_dir():
        raise ScoreSDEError(f"out={path}: the folder {path.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as problem:
        raise ScoreSDEError(f"out={path}: the folder {path.parent} cannot be written to ({problem.strerror})") from None


def write_samples(
    out: Path, data: Dataset, blocks: Iterable[Tensor], n: int, overwrite: bool, path: Track | None = None,
    known: Known | None = None,
) -> None:  # fmt: skip
    """Write n samples, given in model coordinates block by block, under a temporary name that is renamed at the end.

    `known` values are written as they were given.
    """
    check_out(out, overwrite)
    kind = WRITERS[out.suffix.lower()]
    if kind is Picture and data.kind != "image" and int(np.prod(data.shape)) != 2:
        raise ScoreSDEError(f"out={out}: a picture needs images or data in the plane; take .csv, .parquet or .npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp{out.suffix}")
    temporary.unlink(missing_ok=True)
    done, writer = 0, None
    try:
        writer = kind(temporary, data, n)
        if isinstance(writer, Picture):
            writer.known = known
        for block in blocks:
            u = data.units.to_user(block.cpu()).numpy()
            writer.add(u if known is None else known.restore(u, done))
            done += len(u)
        writer.finish(path)
        temporary.replace(out)
    except BaseException as problem:
        if isinstance(problem, OSError) and problem.filename in (None, str(temporary)):
            problem.filename = str(out)  # a full disk says nothing of where
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.abort()
        raise
    finally:
        temporary.unlink(missing_ok=True)
