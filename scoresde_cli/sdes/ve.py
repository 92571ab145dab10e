"""The variance-exploding SDE (Song et al., ICLR 2021, eq. 9)."""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import LinearSDE


class VE(LinearSDE):
    """dx = s(t) sqrt(2 log r) dW with s(t) = sigma_min r^t and r = sigma_max / sigma_min.

    alpha = 1 and sigma^2(t) = s(t)^2 - s(0)^2: the variance that the SDE itself adds, so that x_0 is the data (the
    published code takes s(t)^2, which leaves noise of sigma_min in the data).

    Args:
        sigma_min: smallest noise scale, positive, in the data's units.
        sigma_max: largest noise scale, above sigma_min; well above the data's standard deviation.
    """

    def __init__(self, sigma_min: PositiveFloat = 0.01, sigma_max: PositiveFloat = 50.0) -> None:
        if sigma_max <= sigma_min:
            raise ScoreSDEError(f"sde.sigma_max={sigma_max}: expected more than sigma_min={sigma_min}")
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def a(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def g(self, t: Tensor) -> Tensor:
        return self.sigma_min * math.sqrt(2.0 * self.log_ratio) * torch.exp(self.log_ratio * t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(2.0 * self.log_ratio * t).sqrt()
