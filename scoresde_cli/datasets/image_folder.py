"""The user's own pictures: a folder of PNG and JPEG files, read by Pillow."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from scoresde_cli.datasets.base import MIN_ROWS, existing
from scoresde_cli.datasets.images import Images, class_codes
from scoresde_cli.errors import ScoreSDEError, Unreadable, one_line
from scoresde_cli.rng import generator

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
MANY_PIXELS = 256 * 256
ORIENTATION = 0x0112  # of Exif; from 5 on, width and height change places
Read = TypeVar("Read")


class ImageFolder(Images):
    """Grey levels 0 to 255 of all PNG and JPEG files in a folder and its sub-folders, in the order of their names.

    Transparent pixels are laid on white, 16-bit levels brought to 8 bits, photographs turned as their Exif data says.

    Args:
        path: the folder.
        size: side in pixels of the square images to model; None where all have one size already.
        fit: how others come to that size: crop (the largest square in the middle, scaled), resize (proportions change), or
            None: they are refused.
        channels: 1 (grey) or 3 (colour); None is 1 where all images are grey.
        labels: the name of the sub-folder is the label.
        flips: mirror images (left to right) of the training split are trained on too.
        n: take so many files, drawn at random by the seed; None for all.
        skip_broken: leave out what is no image, instead of refusing it.
        dequantise: add uniform noise of one grey level (for likelihoods; samples are rounded back to the levels).
        seed: of the choice, of the split and of the dequantisation.

    Raises Unreadable (exit code 4) where the folder cannot serve, ScoreSDEError (2) where a setting does not fit it.
    """

    def __init__(
        self, path: str, size: Annotated[int, Field(ge=2, le=1024)] | None = None,
        fit: Literal["crop", "resize"] | None = None, channels: Literal[1, 3] | None = None, labels: bool = False,
        flips: bool = False, n: Annotated[int, Field(ge=MIN_ROWS)] | None = None, skip_broken: bool = False,
        dequantise: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        if fit is not None and size is None:
            raise ScoreSDEError(f"data.fit={fit}: to which size? say data.size=32, for instance")
        files = picture_files(path, labels)
        if n is not None:
            if n > len(files):
                raise ScoreSDEError(f"data.n={n}: {path} holds {len(files)} files; expected at most that, or null")
            chosen = torch.randperm(len(files), generator=generator(seed, "choice"))[:n].sort().values
            files = [files[i] for i in chosen.tolist()]
        heads = read_all(files, read_head, path, skip_broken)
        grey = channels == 1 if channels is not None else all(mode in GREY for mode, _ in heads.values())
        check_sizes(Counter(shape for _, shape in heads.values()), path, size, fit)
        pixels = read_all(list(heads), lambda file: read_pixels(file, grey, size, fit), path, skip_broken)
        if not pixels:
            raise Unreadable(f"data.path={path}: none of the {len(files)} files is readable as an image")
        u = torch.from_numpy(np.stack(list(pixels.values())))
        root = existing(path)
        folders = np.array([file.relative_to(root).parts[0] for file in pixels])
        codes, classes = class_codes(folders, path) if labels else (None, [])
        facts = {
            "path": str(Path(path).expanduser().resolve()), "sha256": hashlib.sha256(u.numpy().tobytes()).hexdigest(),
            "broken": len(files) - len(pixels), "fit": fit,
        }  # fmt: skip
        super().__init__(
            u, 255, codes, classes, labels=labels, dequantise=dequantise, flips=flips, seed=seed, path=path, facts=facts
        )


def picture_files(path: str, labels: bool) -> list[Path]:
    """The PNG and JPEG files below a folder, by name; hidden ones are none. With labels, those in sub-folders."""
    root = existing(path)
    if not root.is_dir():
        raise ScoreSDEError(f"data.path={path}: it is a file, expected a folder of PNG or JPEG files")
    inside = [
        file for file in sorted(root.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]  # fmt: skip
    files = [file for file in inside if file.suffix.lower() in SUFFIXES]
    if not files:
        others = ", ".join(sorted({file.suffix or file.name for file in inside})[:5])
        raise Unreadable(
            f"data.path={path}: no PNG or JPEG files in this folder ({f'only {others}' if others else 'it is empty'})"
        )
    loose = [file for file in files if file.parent == root]
    if labels and loose:
        raise ScoreSDEError(
            f"data.labels=true: {len(loose)} of {len(files)} images stand in no sub-folder of {path}, {loose[0].name} for "
            "instance; expected path/LABEL/image.png"
        )
    return files


def read_all(files: list[Path], read: Callable[[Path], Read], path: str, skip_broken: bool) -> dict[Path, Read]:
    """What `read` makes of each file; those that are no image are left out or refused, by name."""
    found: dict[Path, Read] = {}
    broken: list[tuple[Path, Exception]] = []
    for file in files:
        try:
            found[file] = read(file)
        except MemoryError:
            raise
        except Exception as problem:  # every way in which bytes can fail to be an image
            broken.append((file, problem))
    if broken and not skip_broken:
        file, first = broken[0]
        more = f" (and {len(broken) - 1} more of {len(files)})" if len(broken) > 1 else ""
        reason = "it is no PNG or JPEG" if "cannot identify" in str(first) else one_line(first)[:100]
        raise Unreadable(
            f"data.path={path}: {file.relative_to(existing(path))} is not readable as an image: {reason}{more}; leave such files "
            "out with data.skip_broken=true"
        ) from first
    return found


def read_head(file: Path) -> tuple[str, tuple[int, int]]:
    """(mode, (width, height) as it is looked at) of an image."""
    with Image.open(file, formats=("PNG", "JPEG")) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return image.mode, image.size[::-1] if turned else image.size


def check_sizes(counts: Counter[tuple[int, int]], path: str, size: int | None, fit: str | None) -> None:
    """Refuse images that are not of one size, or not of the size asked for, unless `fit` says what to do with them."""
    if fit is not None or not counts:
        return
    common = counts.most_common()
    listed = ", ".join(f"{count} of {width} x {height}" for (width, height), count in common[:4])
    if len(common) > 4:
        listed += f", {sum(count for _, count in common[4:])} of others"
    ways = "data.fit=crop (the middle square) or data.fit=resize"
    if size is not None and set(counts) != {(size, size)}:
        raise ScoreSDEError(f"data.size={size}: the images are {listed}; bring them to {size} x {size} with {ways}")
    if size is None and len(common) > 1:
        raise Unreadable(
            f"data.path={path}: images of {len(common)} sizes ({listed}); make them one with data.size=32 and {ways}"
        )
    width, height = common[0][0]
    if width * height > MANY_PIXELS and size is None:
        raise ScoreSDEError(
            f"data.path={path}: the images are {width} x {height}; say the size to model, as in data.size=64 {ways}"
        )


def read_pixels(file: Path, grey: bool, size: int | None, fit: str | None) -> np.ndarray:
    """The levels (C, H, W) uint8 of an image file."""
    with Image.open(file, formats=("PNG", "JPEG")) as opened:
        return levels_of(opened, grey, size, fit)


def levels_of(opened: Image.Image, grey: bool, size: int | None, fit: str | None) -> np.ndarray:
    """The levels (C, H, W) uint8 of an image."""
    image = eight_bits(ImageOps.exif_transpose(opened)).convert("L" if grey else "RGB")
    if size is not None and image.size != (size, size):
        cubic = Image.Resampling.BICUBIC  # Pillow widens it to the area of the new pixel where it scales down
        image = ImageOps.fit(image, (size, size), cubic) if fit == "crop" else image.resize((size, size), cubic)
    levels = np.asarray(image)
    return levels[None] if grey else levels.transpose(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """The image without 16-bit levels and without transparency (on white)."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
