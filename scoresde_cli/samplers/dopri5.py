"""The probability-flow ODE by an adaptive Runge-Kutta method of order 5 (Dormand and Prince, J. Comp. Appl. Math. 6, 1980)."""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk


@dataclass(kw_only=True)
class Dopri5(Sampler):
    """torchdiffeq's dopri5 within each step; `steps` are only where the path is looked at. The evaluations are counted.

    Args:
        rtol, atol: tolerances of the error of a step, relative and absolute, over a block of samples (root mean square).
    """

    needs: ClassVar[Set[str]] = frozenset({"velocity"})
    adaptive: ClassVar[bool] = True

    steps: PositiveInt = 1
    rtol: PositiveFloat = 1e-5
    atol: PositiveFloat = 1e-5

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        from torchdiffeq import odeint

        def velocity(now: Tensor, y: Tensor) -> Tensor:
            return walk.field(y, now.to(y.dtype).expand(len(y)), "velocity")

        ends = torch.stack([t[0], s[0]])
        exactly = {"step_t": ends[1:]}  # no step beyond s: there may be no process
        return odeint(velocity, x, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=exactly)[-1]
