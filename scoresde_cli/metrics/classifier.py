"""What classifiers of real images make of samples: whether they are clear instances of a class, and of which.

Two classifiers of unlike kinds are fitted to the training images (in a PCA of them): a support vector machine with a Gaussian
kernel, and nearest neighbours.

    agreement      the share of images in which the two see one class: clear images are told alike, what lies between is not
    balance        1/2 sum_k |share of class k among samples - among held-out images|, by the machine (total variation)
    label_accuracy of samples drawn for each class in turn, the share in which the machine sees that class; the floor is its
                   accuracy on held-out images
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import FRACTION, Metric, Numbers, Quantity, bootstrap, interval
from scoresde_cli.rng import generator

COMPONENTS, NEIGHBOURS, FIT_ROWS = 50, 5, 20_000


class Classifier(Metric):
    """Agreement and balance of the classes that are seen in samples."""

    quantities = {
        "classifier_agreement": Quantity("share", "higher", FRACTION),
        "class_balance": Quantity("total variation", limits=FRACTION),
    }
    rows = 10_000

    def __init__(self, data: Dataset) -> None:
        from sklearn.decomposition import PCA
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        super().__init__(data)
        assert data.known is not None
        codes, self.names = data.known
        x, y = flat(data.splits["train"][:FIT_ROWS]), codes["train"][:FIT_ROWS].numpy()

        def fitted(judge: Any) -> Any:
            return make_pipeline(PCA(min(COMPONENTS, *x.shape), random_state=0), judge).fit(x, y)

        self.machine, self.neighbours = fitted(SVC(C=5.0)), fitted(KNeighborsClassifier(min(NEIGHBOURS, len(x))))

    @staticmethod
    def unfit(data: Dataset) -> str | None:
        return None if data.kind == "image" and data.known is not None else "the data is no images of known classes"

    def seen(self, x: Tensor) -> Tensor:
        """(m, 2), the classes of images (m, *D) by the machine and by the neighbours."""
        z = flat(x)
        return torch.from_numpy(np.stack([judge.predict(z) for judge in (self.machine, self.neighbours)], 1)).long()

    def numbers(self, a: Tensor, b: Tensor) -> Numbers:
        """Of the classes that are seen in two samples, (m, 2) each."""
        shares = self.shares(a) - self.shares(b)
        agreement = float((a[:, 0] == a[:, 1]).double().mean())
        return {"classifier_agreement": agreement, "class_balance": 0.5 * float(shares.abs().sum())}

    def shares(self, seen: Tensor) -> Tensor:
        return torch.bincount(seen[:, 0], minlength=len(self.names)).double() / len(seen)

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return self.numbers(self.seen(x), self.seen(y))

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        for a, b in bootstrap(self.seen(x), self.seen(y), seed):
            yield self.numbers(a, b)

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        of = {
            "classes": self.names,
            "samples": self.shares(self.seen(x)).tolist(),
            "data": self.shares(self.seen(y)).tolist(),
        }
        return {"class_balance": of}

    def protocol(self) -> dict[str, Any]:
        rows = min(FIT_ROWS, len(self.data.splits["train"]))
        return {
            "classifiers": f"SVC and {NEIGHBOURS} nearest neighbours in {COMPONENTS} components",
            "fitted_to": f"{rows} training images",
        }

    def label_accuracy(self, samples: Tensor, seed: int) -> dict[str, Any]:
        """The entry of the share of samples (classes, k, *D), drawn for each class, that are seen as it.

        The i-th sample of every class starts from the same noise, so these are drawn again together for the interval.
        """
        classes, k = samples.shape[:2]
        seen = self.seen(samples.flatten(0, 1))[:, 0].reshape(classes, k)
        right = (seen == torch.arange(classes)[:, None]).double()
        assert self.data.known is not None
        real = (self.seen(self.data.comparable(self.data.splits["test"]))[:, 0] == self.data.known[0]["test"]).double()

        def mean_of(values: Tensor, i: int) -> float:
            rows = torch.randint(len(values), (len(values),), generator=generator(seed, "bootstrap", i))
            return float(values[rows].mean())

        value, chance, of_noise = float(right.mean()), float(real.mean()), right.mean(0)
        return {
            "value": value, "ci": interval(value, [mean_of(of_noise, i) for i in range(200)], FRACTION), "floor": chance,
            "floor_high": float(np.quantile([mean_of(real, i) for i in range(200)], 0.05)), "unit": "share",
            "protocol": {"n": right.numel(), "better": "higher", "floor": "accuracy on the test split", **self.protocol()},
            "detail": {"classes": self.names, "samples": right.mean(1).tolist()},
        }  # fmt: skip


def flat(x: Tensor) -> np.ndarray:
    return np.asarray(x.flatten(1).float().numpy())
