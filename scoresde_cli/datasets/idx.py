"""Images from local IDX files, the format of MNIST (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist, "FILE FORMATS").

A file is: two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of dimensions, the dimensions as
big-endian 32-bit integers, the values. Files of images have 3 dimensions (n, H, W), files of labels 1.
"""

import gzip
import hashlib
import re
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from scoresde_cli.datasets.base import MIN_ROWS, existing
from scoresde_cli.datasets.images import Images, area_pool, class_codes, in_blocks
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.rng import generator

IMAGES = re.compile(r"images[-.]idx3[-.]ubyte(\.gz)?$")
WHAT = {1: "labels", 3: "images"}


class IDX(Images):
    """Grey levels 0 to 255 of one file of images, or of all in a folder (MNIST's training and test files together).

    Args:
        path: a file of images, raw or .gz, or a folder of files named as MNIST's are (train-images-idx3-ubyte.gz, ...).
        size: pool to size x size pixels, each the mean of the area that it covers, to the nearest grey level; None keeps the size.
        labels: the labels are in the files beside, of the same names with labels-idx1 for images-idx3.
        n: take so many images, drawn at random by the seed; None for all.
        dequantise: add uniform noise of one grey level (for likelihoods; samples are rounded back to the levels).
        seed: of the choice, of the split and of the dequantisation.

    Raises Unreadable (exit code 4) where a file cannot serve, ScoreSDEError (2) where a setting does not fit it.
    """

    def __init__(
        self, path: str, size: Annotated[int, Field(ge=2)] | None = None, labels: bool = False,
        n: Annotated[int, Field(ge=MIN_ROWS)] | None = None, dequantise: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        files = image_files(existing(path), path)
        found: tuple[torch.Tensor | None, list[str]] = None, []
        parts = [read_idx(file, 3) for file in files]
        sizes = {part.shape[1:] for part in parts}
        if len(sizes) > 1:
            listed = ", ".join(f"{f.name} {p.shape[1]} x {p.shape[2]}" for f, p in zip(files, parts, strict=True))
            raise Unreadable(f"data.path={path}: the files hold images of unlike sizes ({listed}); name one of them")
        with (
            nullcontext() if labels else suppress(ScoreSDEError)
        ):  # labels that the model is not given serve metrics alone
            names = np.concatenate([read_labels(f, len(p)) for f, p in zip(files, parts, strict=True)])
            found = class_codes(names, path)
        u = torch.from_numpy(np.concatenate(parts)).unsqueeze(1)
        height, width = u.shape[-2:]
        if size is not None and size > min(height, width):
            raise ScoreSDEError(
                f"data.size={size}: the images are {height} x {width}, and pooling makes no pixels; "
                f"expected at most {min(height, width)}"
            )
        codes, classes = found
        if n is not None:
            if n > len(u):
                raise ScoreSDEError(f"data.n={n}: {path} holds {len(u)} images; expected at most that, or null")
            chosen = torch.randperm(len(u), generator=generator(seed, "choice"))[:n].sort().values
            u, codes = u[chosen], None if codes is None else codes[chosen]
        if size is not None:
            u = in_blocks(lambda block: area_pool(block, size).round().to(torch.uint8), u)
        sha256 = {str(file.resolve()): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        facts = {"path": str(Path(path).expanduser().resolve()), "sha256": sha256, "pooled_from": [height, width]}
        super().__init__(
            u, 255, codes, classes, labels=labels, dequantise=dequantise, seed=seed, path=path, facts=facts
        )


def image_files(place: Path, path: str) -> list[Path]:
    """The file itself, or the files of images in the folder; of one that is there raw and as .gz, the raw one."""
    if place.is_file():
        return [place]
    found = {
        file.name.removesuffix(".gz"): file
        for file in sorted(place.iterdir(), reverse=True)
        if IMAGES.search(file.name)
    }
    if not found:
        raise Unreadable(
            f"data.path={path}: no IDX files of images in this folder; expected names such as train-images-idx3-ubyte.gz"
        )
    return [found[name] for name in sorted(found)]


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The values (n, ...) uint8 of an IDX file of so many dimensions. Raises Unreadable where it is none, or cut."""
    try:
        raw = file.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise Unreadable(f"data.path={file}: not readable as .gz, it is cut or damaged") from problem
    wanted = f"an IDX file of {WHAT[dimensions]}: first bytes 0 0 8 {dimensions}"
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] not in WHAT:
        raise Unreadable(
            f"data.path={file}: its first bytes are {' '.join(map(str, data[:4])) or 'none'}; expected {wanted}"
        )
    if data[3] != dimensions:
        raise Unreadable(f"data.path={file}: a file of {WHAT[data[3]]}; expected {wanted}")
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:head].ljust(4 * dimensions, b"\0"), ">u4").astype(int).tolist())
    size = int(np.prod([1, *shape], dtype=object))
    if len(data) != head + size or not size:
        raise Unreadable(
            f"data.path={file}: cut or damaged: its head says {' x '.join(map(str, shape))} values, after it stand "
            f"{max(len(data) - head, 0)} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()


def read_labels(file: Path, n: int) -> np.ndarray:
    """The labels (n,) of the images in a file, from the file beside it."""
    if not IMAGES.search(file.name):
        raise ScoreSDEError(
            f"data.labels=true: {file.name} is not named as MNIST's files are, so its labels are not found; expected a name such "
            "as train-images-idx3-ubyte, and train-labels-idx1-ubyte beside it"
        )
    name = IMAGES.sub(lambda m: m[0].replace("images", "labels").replace("idx3", "idx1"), file.name).removesuffix(".gz")
    found = [other for other in (file.with_name(name), file.with_name(f"{name}.gz")) if other.is_file()]
    if not found:
        raise ScoreSDEError(f"data.labels=true: no file of labels beside {file}; expected {name} or {name}.gz")
    labels = read_idx(found[0], 1)
    if len(labels) != n:
        raise Unreadable(f"data.path={file}: {n} images, and {len(labels)} labels in {found[0].name}")
    return labels
