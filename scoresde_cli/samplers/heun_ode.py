"""Heun's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1, in t)."""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde_cli.samplers.base import Sampler
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand


class HeunODE(Sampler):
    """The mean of the velocities at t and, after an Euler step, at s; two evaluations a step, order 2."""

    needs = frozenset({"velocity"})

    def step(
        self, fields: Callable[..., Tensor], sde: SDE, x: Tensor, t: Tensor, s: Tensor, source: torch.Generator
    ) -> Tensor:
        h = expand(t - s, x)
        first = fields(x, t, "velocity")
        second = fields(x - h * first, s, "velocity")
        return x - 0.5 * h * (first + second)
