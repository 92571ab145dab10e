"""Implicit score matching (Hyvarinen, JMLR 6, 2005, theorem 1): the exact trace."""

import torch
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss
from scoresde_cli.sdes.base import SDE, Noised


class ISM(Loss):
    """|S|^2 + 2 tr J, the trace by d unit directions. Needs samples of x_t alone."""

    name = "ism"
    formula = "|S|^2 + 2 tr J"

    def tangents(self, d: int) -> int:
        return d

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        score, trace = divergence.score_and_trace(model, noised.x_t, t)
        return score.square().flatten(1).sum(1) + 2.0 * trace
