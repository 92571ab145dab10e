"""How samples err where data is rare.

    tail_quantile_error   largest over columns and levels q of |Q_x(q) - Q_y(q)| / sd, Q the column's empirical quantile in the
                          user's units, sd the training column's; only levels with BEYOND rows expected beyond them
    hill_error            |H_x - H_y| with Hill's estimator of 1/alpha for P(R > r) ~ r^(-alpha) (Hill, Ann. Stat. 3, 1975),

                              H = mean over i <= k of log(R_(i) / R_(k+1)),   R_(1) >= R_(2) >= ...,   k = 5 percent of the rows

R is the Euclidean distance from the data's coordinate-wise median in model coordinates, for both samples.
"""

from typing import Any

import numpy as np
from torch import Tensor

from scoresde_cli.metrics.base import Numbers, Quantity
from scoresde_cli.metrics.columns import Flat

LEVELS = (0.001, 0.01, 0.99, 0.999)
BEYOND = 10
SHARE = 20  # the tail is one row in so many
TINY = 1e-12


def levels(m: int) -> list[float]:
    """The levels that m rows can tell."""
    return [q for q in LEVELS if round(m * min(q, 1 - q), 6) >= BEYOND]


def hill(radius: Tensor, share: int = SHARE) -> float:
    """H of the largest radii of (m,): one in `share`."""
    k = len(radius) // share
    logs = radius.double().clamp_min(TINY).topk(k + 1).values.log()
    return float(logs[:k].mean() - logs[k])


def about_median(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (m,) of both samples (m, d) from the median of y."""
    x, y = x.double(), y.double()
    centre = y.median(0).values
    return (x - centre).norm(dim=1), (y - centre).norm(dim=1)


class Tails(Flat):
    """Quantiles and Hill's estimator, over at most 10,000 rows; a number that m rows cannot tell is left out."""

    quantities = {"tail_quantile_error": Quantity("sd of the column"), "hill_error": Quantity("1 / tail index")}

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        found = {}
        if levels(len(x)):
            found["tail_quantile_error"] = float(self.quantile_errors(x, y)[0].max())
        if len(x) >= BEYOND * SHARE:
            h, g = map(hill, about_median(x, y))
            found["hill_error"] = abs(h - g)
        return found

    def quantile_errors(self, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(errors, quantiles of x, of y), each (levels, d)."""
        q, v = (np.quantile(self.user(z), levels(len(z)), axis=1) for z in (x, y))
        return np.abs(q - v) / self.sd, q, v

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if levels(len(x)):
            errors, q, v = self.quantile_errors(x, y)
            i, j = np.unravel_index(int(errors.argmax()), errors.shape)
            found["tail_quantile_error"] = {
                "column": self.names[j], "level": levels(len(x))[i], "samples": float(q[i, j]), "data": float(v[i, j])
            }  # fmt: skip
        if len(x) >= BEYOND * SHARE:
            h, g = (hill(radius) for radius in about_median(x, y))
            # Without a spread in the tail (H = 0) there is no finite index.
            found["hill_error"] = {"alpha_samples": 1 / h if h else None, "alpha_data": 1 / g if g else None}
        return found

    def protocol(self) -> dict[str, Any]:
        return {"levels": list(LEVELS), "rows_beyond": BEYOND, "tail": 1 / SHARE, "radius_about": "median of the data"}
