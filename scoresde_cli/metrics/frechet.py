"""The Frechet distance between Gaussian fits (Dowson and Landau, J. Multivar. Anal. 12, 1982), in a PCA of the images.

    |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2})

With C = R^T R the eigenvalues of C_x C_y are the squared singular values of R_x R_y^T, so the last trace is the sum of these:
no square root of a matrix, and no loss of digits where C is singular (Dowson and Landau's closed form, by factors).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import Metric, Numbers, Quantity, bootstrap

COMPONENTS = 32
PCA_ROWS = 10_000


def root(z: Tensor) -> Tensor:
    """R with R^T R the covariance of the rows of z (m, d), unbiased; (min(m, d), d)."""
    centred = (z - z.mean(0)) / (len(z) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(z) > z.shape[1] else centred


def frechet(x: Tensor, y: Tensor) -> float:
    """The squared distance of the Gaussian fits of two samples (m, d)."""
    r, s = root(x), root(y)
    joint = torch.linalg.svdvals(r @ s.T).sum()
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + r.square().sum() + s.square().sum() - 2 * joint))


class FrechetPCA(Metric):
    """The distance of images in the leading principal components of the training images, fixed once."""

    quantities = {"frechet_pca": Quantity("model units^2")}
    rows = 10_000

    def __init__(self, data: Dataset) -> None:
        from sklearn.decomposition import PCA

        super().__init__(data)
        train = data.splits["train"][:PCA_ROWS].flatten(1).double().numpy()
        self.pca = PCA(min(COMPONENTS, *train.shape), random_state=0).fit(train)

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        return None if len(data.shape) > 1 else "the data is no images"

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return {"frechet_pca": frechet(self.components(x), self.components(y))}

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        for a, b in bootstrap(self.components(x), self.components(y), seed):
            yield {"frechet_pca": frechet(a, b)}

    def components(self, x: Tensor) -> Tensor:
        """(m, k) float64 of x (m, *D)."""
        return torch.from_numpy(self.pca.transform(x.double().flatten(1).numpy()))

    def protocol(self) -> dict[str, Any]:
        return {"components": int(self.pca.n_components_), "of": "training images"}
