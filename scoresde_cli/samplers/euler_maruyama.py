"""Euler-Maruyama on the reverse SDE (Song et al., ICLR 2021, eq. 6)."""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde_cli.rng import normal
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand


class EulerMaruyama(Sampler):
    """x <- x - h [f - Sigma score] + sqrt(h) G z; one evaluation a step, strong order 1 for additive noise."""

    def step(
        self, fields: Callable[..., Tensor], sde: SDE, x: Tensor, t: Tensor, s: Tensor, source: torch.Generator
    ) -> Tensor:
        h = expand(t - s, x)
        noise = sde.diffusion(t, x).mul(normal(tuple(x.shape), source, x.dtype))
        return x - h * sde.reverse_drift(x, t, fields(x, t, "score")) + h.sqrt() * noise
