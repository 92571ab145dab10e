"""scikit-learn's real handwritten digits: 1797 images of 8 x 8 pixels with 17 grey levels (Alpaydin and Kaynak 1998)."""

import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset, Units, split_rows
from scoresde_cli.rng import generator, uniform


class Digits(Dataset):
    """Grey levels 0 to 16, scaled to [-1, 1] for the model.

    Args:
        dequantise: add uniform noise of one grey level (for likelihoods; samples are rounded back to the levels).
        labels: the digit is the label.
        seed: of the split and of the dequantisation.
    """

    kind = "image"

    def __init__(self, dequantise: bool = False, labels: bool = False, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        u = torch.from_numpy(loaded.images)
        rows, _ = split_rows(u, seed)
        self.shape, d = (1, 8, 8), 64
        ones = torch.ones(d, dtype=torch.float64)
        self.units = Units(self.shape, 8.0 * ones, 8.0 * ones, resolution=ones if dequantise else None)
        self.quantum = ones
        if dequantise:
            u = u + uniform(tuple(u.shape), generator(seed, "dequantise"), torch.float64) - 0.5
        x: Tensor = self.units.to_model(u).float()
        self.splits = {name: x[index] for name, index in rows.items()}
        if labels:
            self.classes = [str(name) for name in loaded.target_names]
            self.labels = {name: torch.from_numpy(loaded.target)[index] for name, index in rows.items()}
        self.facts = {"rows": len(x), "dequantised": dequantise}
