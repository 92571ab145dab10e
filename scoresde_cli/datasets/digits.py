"""scikit-learn's real handwritten digits: 1797 images of 8 x 8 pixels with 17 grey levels (Alpaydin and Kaynak 1998)."""

import torch

from scoresde_cli.datasets.images import Images


class Digits(Images):
    """Grey levels 0 to 16.

    Args:
        dequantise: add uniform noise of one grey level (for likelihoods; samples are rounded back to the levels).
        labels: the digit is the label.
        seed: of the split and of the dequantisation.
    """

    def __init__(self, dequantise: bool = False, labels: bool = False, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        u = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(1)
        codes, names = torch.from_numpy(loaded.target), [str(name) for name in loaded.target_names]
        super().__init__(u, 16, codes, names, labels=labels, dequantise=dequantise, seed=seed)
