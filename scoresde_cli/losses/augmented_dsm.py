"""Denoising score matching given the scales of the jumps: no table is needed.

Given x_0 and the times and scales of its jumps, x_t is normal about alpha x_0 with a known variance S, so  -(x_t - alpha x_0) / S
has the score as its mean given x_t. It is noisier than the table's target, which is its mean given x_0 and x_t.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import MinTime, Times
from scoresde_cli.losses.implicit_flux import TINY, flux_value
from scoresde_cli.losses.table_dsm import FieldLoss, squared
from scoresde_cli.sdes.base import SDE, Noised


class AugmentedDSM(FieldLoss):
    """|s + (x_t - alpha x_0) / S|^2 / E|s*|^2, and a loss of the flux in units of its target's power given x_0.

    Args:
        flux: how the flux is learnt: implicit (no kernel), or by the table. `importance`, with the target
            (lambda w / 2) N(y; S + w) / N(y; S) y / (S + w), has infinite variance where w > S, and is refused.
        draws: jumps a sample of the implicit loss.
        half, times, t_min: as for every loss (base.py).
    """

    name = "augmented_dsm"
    formula = "|s - s*(S)|^2 / E|s*|^2 + the flux's / E|v*|^2"
    trains = frozenset({"score", "flux"})
    needs_kernel = needs_jumps = True

    def __init__(
        self, flux: Literal["implicit", "table", "importance"] = "implicit", draws: PositiveInt = 2, half: bool = False,
        times: Times = "mixed", t_min: MinTime = 1e-3,
    ) -> None:  # fmt: skip
        if flux == "importance":
            raise ScoreSDEError(
                "loss.flux=importance: this target has infinite variance wherever a jump is wider than the noise so far, and does "
                "not converge; implicit and table do"
            )
        super().__init__(half, times, t_min)
        self.flux, self.draws = flux, draws

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        kernel, x, moments = sde.kernel(), noised.x_t, sde.scales(t, x0[0].numel())
        assert kernel is not None
        assert noised.factor is not None
        assert noised.eps is not None
        score = squared(model.score(x, t) + noised.factor.solve_t(noised.eps)) / moments["score"].power
        power = moments["flux"].power.clamp_min(TINY)
        if self.flux == "table":
            target = kernel.targets(x0, noised, t, {"flux"})["flux"]
            return score + squared(model.fields(x, t, {"flux"})["flux"] - target) / power
        return score + flux_value(model, sde, x, t, generator, self.draws) / power
