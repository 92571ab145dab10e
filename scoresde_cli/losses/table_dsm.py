"""Denoising score matching under jumps: score and velocity against those of the law of x_t given x_0, which is a table.

Given x_0 the score and the flux are functions of |x_t - alpha x_0| and t alone (sdes/scale_table.py), and the fields of p_t
are their means given x_t, so regression on them is unbiased (Vincent, Neural Computation 23, 2011, eq. 9). Regressed is the
total velocity: at late times the drift and the rest of it nearly cancel, and the flow would amplify the errors of either.
"""

from typing import Literal

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss, MinTime, Times, draw_times
from scoresde_cli.sdes.base import SDE, Noised

Scale = Literal["residual", "power"]


def squared(x: Tensor) -> Tensor:
    """|x|^2 of each sample, (B,)."""
    return x.square().flatten(1).sum(1)


class FieldLoss(Loss):
    """A loss of several fields, each in units of its own scale at t, so that `weight` is one."""

    second_order = False
    varying = True

    def __init__(self, half: bool = False, times: Times = "mixed", t_min: MinTime = 1e-3) -> None:
        super().__init__("one", half, times, t_min)

    def noise(self, sde: SDE, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Noised]:
        if sde.jumps is None or sde.jumps.often is None:
            return super().noise(sde, x0, generator)
        t = draw_times(self.times, len(x0), self.t_min, sde.T, generator).to(x0.dtype)
        return t, sde.jumps.often(x0, t, generator)

    def weight(self, sde: SDE, t: Tensor, d: int) -> Tensor:
        return torch.ones_like(t)

    def convention(self, d: int | None = None) -> str:
        return f"{self.name}: {'1/2 ' if self.half else ''}E[ {self.formula} ]"


class TableDSM(FieldLoss):
    """|s - s*|^2 / power + |v - v*|^2 / n^2, with s* and v* given x_0, for any process with moments, jumping or not.

    Args:
        scale: n^2 is what a linear regression leaves of E|v*|^2 / d (residual), or all of E|v* - f|^2 / d (power).
        half, times, t_min: as for every loss (base.py).
    """

    name = "table_dsm"
    formula = "|s - s*|^2 / E|s*|^2 + |v - v*|^2 / n^2"
    trains = frozenset({"score", "velocity"})
    needs_kernel = True

    def __init__(
        self, scale: Scale = "residual", half: bool = False, times: Times = "mixed", t_min: MinTime = 1e-3
    ) -> None:
        super().__init__(half, times, t_min)
        self.scale = scale

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        kernel, x, moments = sde.kernel(), noised.x_t, sde.scales(t, x0[0].numel())
        assert kernel is not None
        names = {"score"} if sde.jumps is None else {"score", "flux"}
        targets = kernel.targets(x0, noised, t, names)
        target = sde.velocity(x, t, targets["score"], targets.get("flux"))
        found = model.fields(x, t, {"score", "velocity"})
        power, push = moments["transport"]
        if self.scale == "residual":
            signal = kernel.alpha(t).square() * model.variance
            var = signal + kernel.sigma(t).square()
            power = torch.maximum(power - push.square() / var, power * signal / var)
        score = squared(found["score"] - targets["score"]) / moments["score"].power
        return score + squared(found["velocity"] - target) / power
