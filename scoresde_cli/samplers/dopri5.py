"""The probability-flow ODE by an adaptive Runge-Kutta method of order 5 (Dormand and Prince, J. Comp. Appl. Math. 6, 1980)."""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError, one_line
from scoresde_cli.samplers.base import Sampler, Walk

MOST_STEPS = 400


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
        # No step beyond s, where there may be no process, and an end to tolerances that the precision cannot meet.
        options = {"step_t": ends[1:], "max_num_steps": MOST_STEPS}
        try:
            return odeint(velocity, x, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)[-1]
        except AssertionError as problem:
            raise ScoreSDEError(
                f"sampler.rtol={self.rtol:g}, sampler.atol={self.atol:g}: not met in {MOST_STEPS} steps of {x.dtype} "
                f"({one_line(problem)[:80]}); take larger ones"
            ) from None
