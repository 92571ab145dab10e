"""How far out samples go: quantiles of the radius, and Hill's index of the outermost rows.

    radial_q99_error, radial_q999_error, radial_q9999_error    |Q_x(q) / Q_y(q) - 1|, Q the quantile of R at q = 0.99, 0.999, 0.9999
    tail_index_error                                            |alpha_x / alpha_y - 1|, 1 / alpha Hill's estimator (tails.py)

R is the distance from the data's coordinate-wise median in model coordinates; alpha is from the outermost half percent. A level
needs BEYOND rows beyond it, so q = 0.9999 wants 100,000 samples (eval.n, and data to match). Signed errors are in the details.
"""

from typing import Any

import torch
from torch import Tensor

from scoresde_cli.metrics.base import Metric, Numbers, Quantity
from scoresde_cli.metrics.tails import BEYOND, about_median, hill

LEVELS = {"radial_q99_error": 0.99, "radial_q999_error": 0.999, "radial_q9999_error": 0.9999}
SHARE = 200  # the tail is one row in so many


class RadialTails(Metric):
    """Relative errors of far quantiles and of the tail index; what m rows cannot tell is left out."""

    quantities = {name: Quantity("relative") for name in (*LEVELS, "tail_index_error")}
    rows = 200_000

    def measure(self, x: Tensor, y: Tensor) -> Numbers:
        return {name: abs(value) for name, value in self.signed(x, y).items()}

    def signed(self, x: Tensor, y: Tensor) -> Numbers:
        """The errors with their signs: above zero, the samples go too far out (or, for the index, fall off too fast)."""
        found, (a, b) = {}, about_median(x.flatten(1), y.flatten(1))
        for name, q in LEVELS.items():
            if round(len(a) * (1 - q), 6) >= BEYOND:
                found[name] = float(quantile(a, q) / quantile(b, q)) - 1
        if len(a) >= BEYOND * SHARE:
            h, g = hill(a, SHARE), hill(b, SHARE)
            if h > 0 and g > 0:
                found["tail_index_error"] = g / h - 1
        return found

    def detail(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {name: {"signed": value} for name, value in self.signed(x, y).items()}

    def protocol(self) -> dict[str, Any]:
        return {"rows_beyond": BEYOND, "tail": 1 / SHARE, "radius_about": "median of the data"}


def quantile(radius: Tensor, q: float) -> Tensor:
    """The empirical quantile of (m,), linear between order statistics (torch.quantile takes at most 16 million rows)."""
    place = q * (len(radius) - 1)
    k = len(radius) - int(place)
    top = radius.topk(k).values
    return torch.lerp(top[-1], top[-2] if k > 1 else top[-1], place - int(place))
