"""The stochastic sampler of EDM: Heun's method with churn (Karras et al., NeurIPS 2022, algorithm 2), for any alpha and sigma.

In y = x / alpha and r = sigma / alpha the probability flow is dy/dr = (y - D) / r with D = E[x_0 | x_t]. Before each step noise is
added, from r to r (1 + gamma), gamma = min(churn / steps, sqrt(2) - 1) where r_min <= r <= r_max.
"""

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from scoresde_cli.samplers import grids
from scoresde_cli.samplers.base import Sampler, Walk


@dataclass(kw_only=True)
class EDMStochastic(Sampler):
    """Two evaluations a step; order 2 where churn is 0.

    Args:
        churn: how much noise is added over all steps (S_churn).
        r_min, r_max: the noise-to-signal ratios between which it is added; None for no limit (S_tmin, S_tmax).
        noise: scale of the added noise, 1 or a little more (S_noise).
    """

    needs: ClassVar[Set[str]] = frozenset({"x0"})
    needs_kernel: ClassVar[bool] = True

    churn: NonNegativeFloat = 5.0
    r_min: NonNegativeFloat = 0.0
    r_max: PositiveFloat | None = None
    noise: PositiveFloat = 1.0

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = walk.levels(x, t)
        y, r = x / alpha, sigma / alpha
        if self.churn > 0:
            kernel = walk.sde.kernel()
            assert kernel is not None
            level = grids.log_ratio(kernel, t)
            within = (level.exp() >= self.r_min) & (level.exp() <= (self.r_max or torch.inf))
            wanted = level + within * math.log1p(min(self.churn / self.steps, 2**0.5 - 1))
            t = grids.time_at(kernel, wanted[:1].double(), walk.sde.T).to(x).expand(len(x))  # at most T
            alpha, sigma = walk.levels(x, t)
            added = ((sigma / alpha).square() - r.square()).clamp_min(0.0).sqrt()
            y, r = y + self.noise * added * walk.noise(x), sigma / alpha
        alpha_s, sigma_s = walk.levels(x, s)
        r_s = sigma_s / alpha_s
        slope = (y - walk.field(alpha * y, t, "x0")) / r
        ahead = y + (r_s - r) * slope
        slope_s = (ahead - walk.field(alpha_s * ahead, s, "x0")) / r_s
        return alpha_s * (y + 0.5 * (r_s - r) * (slope + slope_s))
