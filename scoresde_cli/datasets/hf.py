"""Image sets by name, through Hugging Face's `datasets`, which fetches a set once and keeps it (pip install 'scoresde[images]')."""

import hashlib
import os
import socket
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import Field

from scoresde_cli.datasets.base import MIN_ROWS
from scoresde_cli.datasets.image_folder import GREY, ORIENTATION, check_sizes, levels_of
from scoresde_cli.datasets.images import Images, class_codes
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest, one_line
from scoresde_cli.rng import generator

SECONDS_TO_CONNECT = 5
PRESETS = {
    "mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10",
}  # fmt: skip


class HF(Images):
    """Grey levels 0 to 255 of the images of one split.

    Args:
        path: mnist, fashion_mnist, cifar10, the OWNER/NAME of a set on the Hub, or a folder written by its `save_to_disk`.
        config: which variant, for a set that has several.
        part: the split of the set that is taken; training, validation and test rows are drawn from it.
        image, label: the columns; null for the first of images, and for the first of class labels.
        size, fit, channels, flips, dequantise, seed: as for image_folder.
        labels: the model is given the labels.
        n: take so many images, drawn at random by the seed; None for all.

    Raises ScoreSDEError where the package, the network, the set or a column is missing, Unreadable where the images do not serve.
    """

    def __init__(
        self, path: str, config: str | None = None, part: str = "train", image: str | None = None, label: str | None = None,
        size: Annotated[int, Field(ge=2, le=1024)] | None = None, fit: Literal["crop", "resize"] | None = None,
        channels: Literal[1, 3] | None = None, labels: bool = False, flips: bool = False,
        n: Annotated[int, Field(ge=MIN_ROWS)] | None = None, dequantise: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        if fit is not None and size is None:
            raise ScoreSDEError(f"data.fit={fit}: to which size? say data.size=32, for instance")
        rows = fetch(path, config, part)
        image = column(rows, "image", image, path)
        label = column(rows, "label", label, path) if labels or label or of_type(rows, "label") else None
        if n is not None:
            if n > len(rows):
                raise ScoreSDEError(f"data.n={n}: {path} holds {len(rows)} images; expected at most that, or null")
            chosen = torch.randperm(len(rows), generator=generator(seed, "choice"))[:n].sort().values
            rows = rows.select(chosen.tolist())
        try:
            pictures = rows[image][:]
        except Exception as problem:  # every way in which bytes can fail to be an image
            raise Unreadable(f"data.path={path}: an image is not readable: {one_line(problem)[:120]}") from problem
        turned = [picture.getexif().get(ORIENTATION, 1) >= 5 for picture in pictures]
        check_sizes(Counter(p.size[::-1] if t else p.size for p, t in zip(pictures, turned, strict=True)), path, size, fit)
        grey = channels == 1 if channels is not None else all(picture.mode in GREY for picture in pictures)
        u = torch.from_numpy(np.stack([levels_of(picture, grey, size, fit) for picture in pictures]))
        codes: torch.Tensor | None = None
        classes: list[str] = []
        if label is not None:
            codes, names = class_codes(np.array(rows[label][:]), path)
            known = getattr(rows.features[label], "names", None)
            classes = [known[int(name)] for name in names] if known else names
        facts = {"path": path, "part": part, "sha256": hashlib.sha256(u.numpy().tobytes()).hexdigest(), "fit": fit}
        super().__init__(
            u, 255, codes, classes, labels=labels, dequantise=dequantise, flips=flips, seed=seed, path=path, facts=facts
        )


def fetch(path: str, config: str | None, part: str) -> Any:
    """The rows of one split: from a folder, from what was fetched before, or from the Hub. Raises ScoreSDEError."""
    place = Path(path).expanduser()
    if not place.is_dir() and not reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what was fetched before, without minutes of retries
    try:
        library = import_module("datasets")
    except ModuleNotFoundError:
        raise ScoreSDEError("data=hf needs Hugging Face's datasets: pip install 'scoresde[images]'") from None
    library.disable_progress_bars()
    try:
        if place.is_dir():
            found = library.load_from_disk(str(place))
        else:
            fetching = library.DownloadConfig(max_retries=0)
            found = library.load_dataset(PRESETS.get(path, path), config, download_config=fetching)
    except Exception as problem:  # no network, no such set, a variant to be named: each library below has its own
        hint = "" if path in PRESETS else nearest(path, PRESETS)
        what = f"{type(problem).__name__}: {one_line(problem)[:160]}"
        raise ScoreSDEError(
            f"data.path={path}: not to be had ({what}); expected {', '.join(PRESETS)}, the OWNER/NAME of a set on the Hub, with "
            f"the network or fetched before, or a folder of one's save_to_disk{hint}"
        ) from None
    if isinstance(found, library.DatasetDict):
        if part not in found:
            raise ScoreSDEError(f"data.part={part}: {path} has {', '.join(found)}{nearest(part, found)}")
        found = found[part]
    return found


def reachable() -> bool:
    """Whether the Hub answers; a proxy, where there is one, is taken to know the way."""
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname or "", host.port or 443), SECONDS_TO_CONNECT).close()
    except OSError:
        return False
    return True


def of_type(rows: Any, kind: str) -> list[str]:
    """The columns of images or of class labels."""
    wanted = {"image": "Image", "label": "ClassLabel"}[kind]
    return [name for name, feature in rows.features.items() if type(feature).__name__ == wanted]


def column(rows: Any, kind: str, given: str | None, path: str) -> str:
    """The column of that kind: the one that is given, else the first. Raises ScoreSDEError where there is none."""
    found = of_type(rows, kind)
    if given is not None and (given not in rows.features or (kind == "image" and given not in found)):
        raise ScoreSDEError(
            f"data.{kind}={given}: no column of {kind}s in {path}; it has {', '.join(rows.features)}{nearest(given, rows.features)}"
        )
    if given is None and not found:
        raise ScoreSDEError(f"data.path={path}: no column of {kind}s; it has {', '.join(rows.features)}; name one by data.{kind}=")
    return given or found[0]
