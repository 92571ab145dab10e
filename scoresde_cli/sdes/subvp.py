"""The sub-variance-preserving SDE (Song et al., ICLR 2021, eq. 12)."""

import torch
from torch import Tensor

from scoresde_cli.sdes.vp import VP


class SubVP(VP):
    """dx = -1/2 beta(t) x dt + sqrt(beta(t) (1 - exp(-2 B(t)))) dW: VP's mean with less variance on the way.

    alpha = exp(-1/2 B(t)) and sigma = 1 - exp(-B(t)), with B(t) = int_0^t beta. Arguments as for VP.
    """

    def g(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(-2.0 * self.integral(t))).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integral(t))
