"""Heun's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1, in t)."""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.operators import expand


@dataclass(kw_only=True)
class HeunODE(Sampler):
    """The mean of the velocities at t and, after an Euler step, at s; two evaluations a step, order 2."""

    needs: ClassVar[Set[str]] = frozenset({"velocity"})

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(t - s, x)
        first = walk.field(x, t, "velocity")
        second = walk.field(x - h * first, s, "velocity")
        return x - 0.5 * h * (first + second)
