"""Ancestral sampling: the reverse diffusion in steps of the forward kernel (Ho et al., NeurIPS 2020, algorithm 2; Song et al., ICLR
2021, eq. 4 and appendix F).

Forward, x_t = a x_s + b eps with a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2. Backward, given x_t and
x_0 = E[x_0 | x_t], x_s is normal with mean (x_t + b^2 score) / a and standard deviation b sigma_s / sigma_t.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk


@dataclass(kw_only=True)
class ReverseDiffusion(Sampler):
    """x <- (x + b^2 score) / a + b sigma_s / sigma_t z; one evaluation a step, weak order 1, exact where the data is one point."""

    needs_kernel: ClassVar[bool] = True

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = walk.levels(x, t), walk.levels(x, s)
        a = alpha_t / alpha_s
        b2 = (sigma_t.square() - (a * sigma_s).square()).clamp_min(0.0)
        mean = (x + b2 * walk.field(x, t, "score")) / a
        return mean + b2.sqrt() * sigma_s / sigma_t * walk.noise(x)
