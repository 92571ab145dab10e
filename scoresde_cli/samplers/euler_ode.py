"""Euler's method on the probability-flow ODE (Song et al., ICLR 2021, eq. 13)."""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde_cli.samplers.base import Sampler
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand


class EulerODE(Sampler):
    """x <- x - h velocity(x, t); one evaluation a step, order 1."""

    needs = frozenset({"velocity"})

    def step(
        self, fields: Callable[..., Tensor], sde: SDE, x: Tensor, t: Tensor, s: Tensor, source: torch.Generator
    ) -> Tensor:
        return x - expand(t - s, x) * fields(x, t, "velocity")
