"""The variance-preserving SDE (Song et al., ICLR 2021, eq. 11; DDPM's continuous limit)."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import LinearSDE


class VP(LinearSDE):
    """dx = -1/2 beta(t) x dt + sqrt(beta(t)) dW, beta linear in t on [0, 1].

    alpha = exp(-1/2 B(t)) and sigma^2 = 1 - exp(-B(t)), with B(t) = int_0^t beta.

    Args:
        beta_min: beta(0), positive.
        beta_max: beta(1), at least beta_min.
    """

    def __init__(self, beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 20.0) -> None:
        if beta_max < beta_min:
            raise ScoreSDEError(f"sde.beta_max={beta_max}: expected at least beta_min={beta_min}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def a(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t)

    def g(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.integral(t))).sqrt()
