"""A denoiser for Gaussian noise of any level, on the levels that jumps bring: all that sampling given the scales needs.

Given the scales of its jumps, x_t / alpha = x_0 + v eps with v = sqrt(S) / alpha, a level that the network is told. The loss is DSM
at that level, v^2 |s + eps / v|^2 = |D - x_0|^2 / v^2; what jumps change is how often a level comes.
"""

import torch
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.table_dsm import FieldLoss, squared
from scoresde_cli.sdes.base import SDE, Noised
from scoresde_cli.sdes.operators import expand


class ScaleDSM(FieldLoss):
    """|D(x_t / alpha, v) - x_0|^2 / v^2, v^2 = S / alpha^2; for joint jumps. Arguments as for FieldLoss."""

    name = "scale_dsm"
    formula = "|D(x_t / alpha, v) - x_0|^2 / v^2"
    trains = frozenset({"gaussian_denoiser"})
    needs_kernel = needs_jumps = True

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        assert sde.jumps is not None
        if not sde.jumps.joint:
            raise ScoreSDEError("loss=scale_dsm needs joint jumps: sde.joint=true, or loss=table_dsm")

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        kernel = sde.kernel()
        assert kernel is not None
        alpha = kernel.alpha(t)
        v = noised.aux["S"].flatten(1)[:, 0].sqrt() / alpha
        return squared(model.gaussian_denoiser(noised.x_t / expand(alpha, x0), v) - x0) / v.square()
