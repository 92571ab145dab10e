"""Euler's method on the probability-flow ODE (Song et al., ICLR 2021, eq. 13)."""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.operators import expand


@dataclass(kw_only=True)
class EulerODE(Sampler):
    """x <- x - h velocity(x, t); one evaluation a step, order 1."""

    needs: ClassVar[Set[str]] = frozenset({"velocity"})

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x - expand(t - s, x) * walk.field(x, t, "velocity")
