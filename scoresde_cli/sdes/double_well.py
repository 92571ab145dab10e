"""Noise that falls into two wells: dx = 1/2 beta(t) r x (1 - x^2 / w^2) dt + sqrt(beta(t)) dW, each coordinate by itself.

VP's schedule with another drift, that of an overdamped particle in a double well. It is not linear, so that the law of x_t given
x_0 is not known; that of late times is, p(x) ~ exp(r (x^2 / 2 - x^4 / (4 w^2))) by coordinate. By default time ends before: the
prior is simulated and knows the law at T in any case, and the longer the way back, the more of the score's error adds up on it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.sdes.operators import Scalar, expand
from scoresde_cli.sdes.poisson import NONE
from scoresde_cli.sdes.simulated import Simulated
from scoresde_cli.sdes.vp import VP


class DoubleWell(Simulated):
    """
    Args:
        rate: r, how steep the wells are. well: w, where they are, at -w and w.
        beta_min, beta_max: as for VP.
        steps, paths, refresh, jumps: as for every simulated process.
    """

    def __init__(
        self, rate: PositiveFloat = 1.0, well: PositiveFloat = 1.0, beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 6.0,
        steps: PositiveInt = 200, paths: PositiveInt = 2048, refresh: PositiveInt = 100, jumps: Mapping[str, Any] = NONE,
        *, shape: tuple[int, ...], train: Tensor | None = None, kept: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.rate, self.well, self.schedule = rate, well, VP(beta_min, beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__(self.schedule.T, steps, paths, refresh, jumps, shape=shape, train=train, kept=kept)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return expand(0.5 * self.rate * self.schedule.beta(t), x) * x * (1.0 - (x / self.well).square())

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> Scalar:
        return Scalar(self.schedule.g(t))

    def exponent(self, x: Tensor) -> Tensor:
        """log p at late times up to its constant, by coordinate."""
        return self.rate * (0.5 * x.square() - 0.25 * x**4 / self.well**2)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Of the stationary law where that has been reached, else as for every simulated process."""
        if self.jumps is not None or float(self.kept["levels"][-1, 0]) > 0.05:  # how much of x_0 is left at T
            return super().prior_log_prob(x)
        reach = 2.0 * self.well + 8.0 / math.sqrt(self.rate)
        grid = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
        constant = torch.trapezoid(self.exponent(grid).exp(), grid).log()
        return (self.exponent(x.double().flatten(1)) - constant.to(x.device)).sum(1).to(x.dtype)
