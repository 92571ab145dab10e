"""How a network becomes a score: s = skip * y + out * net(inp * y, c), coordinate by coordinate.

y is x_t, centred on alpha m and turned into the principal coordinates of the data where `centred` is set; lam are the
data's variances in these coordinates; c = 1/2 log(sigma / alpha) is the noise level that the network sees.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import Moments

Coefficients = tuple[Tensor, Tensor, Tensor]


class Parameterisation(ABC):
    """The coefficients (skip, out, inp), each (B, d), from alpha (B, 1), sigma (B, 1) and lam (d,)."""

    centred = False
    covariance: Literal["auto", "isotropic", "full"] = "isotropic"
    warning = ""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor, lam: Tensor) -> Coefficients:
        """(skip, out, inp)."""

    def regression(self, moments: Moments, signal: Tensor, noise: Tensor) -> Coefficients:
        """The same for any field u, from its power and push given x_0 (B,), and the variances of x_t: alpha^2 lam (B, d) of
        the data in it, and noise (B, 1). For the score of a Gaussian kernel they are `coefficients`."""
        raise ScoreSDEError(
            f"parameterisation {type(self).__name__}: with jumps, or for a velocity, it says nothing; residual, eps and raw do"
        )


class Residual(Parameterisation):
    """The exact score of Gaussian data plus a correction of unit scale; a zero network is the Gaussian.

    skip = -1/var, out = alpha sqrt(lam) / (sigma sqrt(var)), inp = 1/sqrt(var), with var = alpha^2 lam + sigma^2 (the
    preconditioning of Karras et al., NeurIPS 2022, table 1, written for the score and by principal coordinate).

    Args:
        covariance: isotropic, full (in principal coordinates), or auto: full for d >= 16 and more than 10 d samples, but
            isotropic, and one mean a channel, for a network on images (`covariance_for`).
    """

    centred = True

    def __init__(self, covariance: Literal["auto", "isotropic", "full"] = "auto") -> None:
        self.covariance = covariance

    def coefficients(self, alpha: Tensor, sigma: Tensor, lam: Tensor) -> Coefficients:
        var = alpha.square() * lam + sigma.square()
        root = var.sqrt()
        return -1.0 / var, alpha * lam.sqrt() / (sigma * root), 1.0 / root

    def regression(self, moments: Moments, signal: Tensor, noise: Tensor) -> Coefficients:
        """skip = push / var, the slope of the linear regression of u on x_t; out^2 = power - push^2 / var, what it leaves."""
        power, push, var = moments.power[:, None], moments.push[:, None], signal + noise
        left = torch.maximum(
            power - push.square() / var, power * signal / var
        )  # the second where rounding leaves nothing
        return push / var, left.sqrt(), var.rsqrt()


class Eps(Parameterisation):
    """s = -net / sigma (Ho et al., NeurIPS 2020)."""

    warning = "parameterisation eps: with ISM or SSM the network must learn the Gaussian part of the score from noise"

    def coefficients(self, alpha: Tensor, sigma: Tensor, lam: Tensor) -> Coefficients:
        zero = torch.zeros_like(sigma * lam)
        return zero, zero - 1.0 / sigma, zero + 1.0

    def regression(self, moments: Moments, signal: Tensor, noise: Tensor) -> Coefficients:
        """u = sqrt(power) net."""
        zero = torch.zeros_like(signal + noise)
        return zero, zero + moments.power[:, None].sqrt(), zero + 1.0


class Raw(Parameterisation):
    """s = net (Song and Ermon, NeurIPS 2019, without its 1/sigma)."""

    warning = "parameterisation raw: with ISM or SSM the network must learn the scale of the score from noise"

    def coefficients(self, alpha: Tensor, sigma: Tensor, lam: Tensor) -> Coefficients:
        zero = torch.zeros_like(sigma * lam)
        return zero, zero + 1.0, zero + 1.0

    def regression(self, moments: Moments, signal: Tensor, noise: Tensor) -> Coefficients:
        zero = torch.zeros_like(signal + noise)
        return zero, zero + 1.0, zero + 1.0


class X0(Parameterisation):
    """s = (alpha net - x) / sigma^2: the network predicts the data (Tweedie's formula turned round)."""

    warning = "parameterisation x0: with ISM or SSM small errors of the network are divided by sigma^2"

    def coefficients(self, alpha: Tensor, sigma: Tensor, lam: Tensor) -> Coefficients:
        zero = torch.zeros_like(sigma * lam)
        return zero - sigma.square().reciprocal(), zero + alpha / sigma.square(), zero + 1.0


def covariance_for(parameterisation: Parameterisation, network: nn.Module) -> str:
    """The parameterisation's covariance, given the network. Raises ScoreSDEError where they do not fit.

    A network on images (`spatial`) takes one mean for each channel and one variance, as convolutions know little of where a pixel
    is: on the digits after 400 steps of DSM the held-out loss of the small U-Net is 15.9, with a mean for each pixel 17.2, and with
    a variance for each pixel, or for each coefficient of the cosine transform, 0.6 and 2.7 more.
    """
    if not getattr(network, "spatial", False):
        return parameterisation.covariance
    if parameterisation.covariance == "full":
        raise ScoreSDEError(
            f"parameterisation.covariance=full: principal coordinates are no image, which {type(network).__name__} expects; "
            "take auto or isotropic"
        )
    return "image"
