"""Small files of images for the tests: IDX as MNIST's, folders of PNGs."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image


def idx_bytes(values):
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder, prefix="train", n=60, height=6, width=6, seed=0, pack=False):
    """Files of n random images and of their labels; the folder."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, height, width), dtype=np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", (np.arange(n) % 10).astype(np.uint8))):
        data = idx_bytes(values)
        (folder / f"{prefix}-{name}-ubyte{'.gz' if pack else ''}").write_bytes(gzip.compress(data) if pack else data)
    return folder


def write_pictures(folder, n=30, sizes=((8, 8),), mode="RGB", names=None, seed=0):
    """PNGs of random pixels, of the sizes (width, height) in turn; the folder."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        width, height = sizes[i % len(sizes)]
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = folder / (names[i % len(names)] if names else ".") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).convert(mode).save(file)
    return folder


def write_hf(folder, n=60, size=(8, 8), seed=0):
    """A set of random images of three named classes, as Hugging Face's save_to_disk writes it; the folder."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "kind": [i % 3 for i in range(n)]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(30))}).save_to_disk(str(folder / "set"))
    return folder / "set"
