"""Denoising score matching (Vincent, Neural Computation 23, 2011, eq. 9, times two)."""

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss
from scoresde_cli.sdes.base import SDE, Noised


class DSM(Loss):
    """|S - grad log p(x_t | x_0)|^2; needs a process with a tractable kernel. Equal to ISM up to a constant."""

    name = "dsm"
    formula = "|S - grad log p(x_t | x_0)|^2"
    needs_kernel = True
    second_order = False

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        kernel = sde.kernel()
        assert kernel is not None
        target = kernel.targets(x0, noised, t, {"score"})["score"]
        return (model.score(noised.x_t, t) - target).square().flatten(1).sum(1)
