"""FID (Heusel et al., NeurIPS 2017) and KID (Binkowski et al., ICLR 2018): distances between features of images.

    FID   the Frechet distance between Gaussian fits to the features (`frechet`, the number of torchmetrics' own class)
    KID   the unbiased MMD^2 with the kernel (f . g / F + 1)^3 of F features (torchmetrics' poly_mmd, one subset of all rows)

The features are those of torchmetrics' Inception-v3 (the weights of the FID's authors, by torch-fidelity) or of a module of the
caller's. Images go to it as torchmetrics wants them: uint8, 0 to 255, three channels; Inception resizes them itself. FID is
biased at few rows, more than most numbers here: it compares with its floor, never with a published one at 50,000 rows.
"""

from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, one_line
from scoresde_cli.metrics.base import UNBIASED, Metric, Numbers, Quantity, bootstrap
from scoresde_cli.metrics.frechet import frechet

MISSING = "FID and KID need torchmetrics and torch-fidelity: pip install 'scoresde[images]'"
BATCH = 64


def to_bytes(x: Tensor) -> Tensor:
    """(m, 3, H, W) uint8 of images (m, C, H, W) in [-1, 1], C one or three."""
    levels = ((x + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.expand(-1, 3, -1, -1)


def torchmetrics_image(name: str) -> Any:
    """A module of torchmetrics.image.

    Raises ScoreSDEError where it is missing, or something that it needs does not import.
    """
    try:
        return import_module(f"torchmetrics.image.{name}")
    except ModuleNotFoundError:
        raise ScoreSDEError(MISSING) from None
    except Exception as problem:  # a torchvision built for another torch, for instance
        raise ScoreSDEError(f"{MISSING} (now: {one_line(problem)[:200]})") from problem


def inception() -> Module:
    """torchmetrics' extractor of 2048 features; its weights are downloaded once."""
    fid = torchmetrics_image("fid")
    try:
        module = fid.FrechetInceptionDistance(feature=2048).inception
    except ModuleNotFoundError:
        raise ScoreSDEError(MISSING) from None
    except OSError as problem:
        raise ScoreSDEError(f"the weights of Inception-v3 could not be fetched: {one_line(problem)[:200]}") from problem
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


class Features:
    """Features of images, each image's computed once: floors and copies ask for the same images again and again."""

    def __init__(self, module: Module | None) -> None:
        self.name = "inception-v3, 2048 (torch-fidelity)"
        if module is not None:
            self.name = f"{type(module).__module__}.{type(module).__qualname__}"
        self.module = (inception() if module is None else module).eval()
        self.known: dict[tuple[torch.Size, bytes], Tensor] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(m, F) float64 of images (m, C, H, W) in [-1, 1]."""
        images = to_bytes(x)
        keys = [(image.shape, image.numpy().tobytes()) for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        for part in torch.tensor(list(new.values()), dtype=torch.long).split(BATCH):
            if len(part):
                found = self.module(images[part].to(device)).cpu()
                self.known |= {keys[i]: row for i, row in zip(part.tolist(), found, strict=True)}
        return torch.stack([self.known[key] for key in keys]).double()


features_of = lru_cache(maxsize=2)(Features)  # FID and KID share what they have computed


class OfFeatures(Metric):
    """A distance between the features of at most 1000 images of each kind.

    Args:
        features: (B, 3, H, W) uint8 -> (B, F), or None for Inception-v3.

    Raises ScoreSDEError where torchmetrics, or Inception-v3 when it is asked for, cannot be had.
    """

    rows = 1000

    def __init__(self, data: Dataset, features: Module | None = None) -> None:
        super().__init__(data)
        torchmetrics_image("kid")
        self.features = features_of(features)

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        if data.kind != "image" or len(data.shape) != 3:
            return "the data is no images"
        return None if data.shape[0] in (1, 3) else f"images of {data.shape[0]} channels, not one or three"

    @abstractmethod
    def distance(self, f: Tensor, g: Tensor) -> Numbers:
        """The number of two samples of features (m, F) float64."""

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return self.distance(self.features(x), self.features(y))

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        for f, g in bootstrap(self.features(x), self.features(y), seed):
            yield self.distance(f, g)

    def protocol(self) -> dict[str, Any]:
        return {"features": self.features.name}


class FID(OfFeatures):
    """The Frechet distance; torchmetrics' own `compute` gives the same in 25 times the time."""

    quantities = {"fid": Quantity("feature units^2")}

    def distance(self, f: Tensor, g: Tensor) -> Numbers:
        return {"fid": frechet(f, g)}


class KID(OfFeatures):
    """The kernel distance."""

    quantities = {"kid": Quantity("kernel units", limits=UNBIASED)}

    def distance(self, f: Tensor, g: Tensor) -> Numbers:
        return {"kid": float(torchmetrics_image("kid").poly_mmd(g, f))}
