"""The classifier two-sample test (Lopez-Paz and Oquab, ICLR 2017): how often a classifier tells samples from data.

Each row is judged by a classifier that was fitted without it (FOLDS folds); the accuracy is 1/2 where the laws agree. The
judges vote, for their blind spots differ: trees see margins and edges, a kernel's logistic regression sees
correlations, neighbours see fine structure (in few dimensions; in many all rows are about as near, Beyer et al., ICDT 1999).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.metrics.base import FRACTION, Metric, Numbers, Quantity, halves

FOLDS = 3
LANDMARKS, NEIGHBOURS, TREES, QUANTILES = 200, 30, 40, 200
FEW, NARROW, WIDE = 8, 32, 128  # coordinates


def judges(m: int, d: int) -> Any:
    """An unfitted classifier for two samples of m rows and d coordinates: a vote of probabilities.

    Coordinates are ranked to a normal scale first, so that a far row does not hide the others from kernel and neighbours.
    Trees, and then ranks, are left out where they would take nearly all the time: there the kernel judges alone.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import QuantileTransformer, StandardScaler

    landmarks = Nystroem(n_components=min(LANDMARKS, m), random_state=0)
    kernel = make_pipeline(landmarks, LogisticRegression(max_iter=1000))
    if d > WIDE:
        return make_pipeline(StandardScaler(), kernel)
    voters = [("kernel", kernel)]
    if d <= NARROW:
        trees = HistGradientBoostingClassifier(
            max_iter=TREES, learning_rate=0.07, max_leaf_nodes=8, early_stopping=False, random_state=0
        )
        voters.append(("trees", trees))
    if d <= FEW:
        voters.append(("neighbours", KNeighborsClassifier(min(NEIGHBOURS, m))))
    ranks = QuantileTransformer(n_quantiles=min(QUANTILES, m), output_distribution="normal", random_state=0)
    return make_pipeline(ranks, VotingClassifier(voters, voting="soft"))


def accuracy(x: Tensor, y: Tensor, classifier: Any = None) -> float:
    """The fraction of rows of x and y, two samples (m, *D), told rightly by the classifier that had not seen them."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    m, rows = len(x), torch.cat([x, y]).flatten(1).numpy()
    labels = np.repeat([0, 1], m)
    judge = judges(m, rows.shape[1]) if classifier is None else classifier
    folds = StratifiedKFold(min(FOLDS, m), shuffle=True, random_state=0)
    # Trees of so few rows are slower, and on a busy machine many times slower, on several threads.
    with threadpool_limits(1):
        return float(np.mean(cross_val_predict(judge, rows, labels, cv=folds) == labels))


class C2ST(Metric):
    """The accuracy on at most 2000 rows of each kind; 1000 of wide data.

    Args:
        classifier: an unfitted one of scikit-learn's with a seed of its own, or None for the judges' vote.
    """

    quantities = {"c2st": Quantity("accuracy", limits=FRACTION)}
    interval = "halves of both samples, refitted"

    def __init__(self, data: Dataset, classifier: Any = None) -> None:
        super().__init__(data)
        self.classifier = classifier
        self.d = int(torch.Size(data.shape).numel())
        self.rows = 2000 if self.d <= NARROW else 1000

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return {"c2st": accuracy(x, y, self.classifier)}

    def copies(self, x: Tensor, y: Tensor, seed: int) -> Iterator[Numbers]:
        """Refitted: to draw the rights and wrongs again holds the classifiers fixed, and is too narrow near 1/2."""
        for a, b in halves(x, y, seed):
            yield self.measure(a, b)

    def protocol(self) -> dict[str, Any]:
        names = [f"Nystroem ({LANDMARKS}) logistic regression"]
        names += [f"HistGradientBoosting ({TREES} trees)"] * (self.d <= NARROW)
        names += [f"{NEIGHBOURS} nearest neighbours"] * (self.d <= FEW)
        classifier = " + ".join(names) if self.classifier is None else repr(self.classifier)
        return {"classifier": classifier, "folds": FOLDS}
