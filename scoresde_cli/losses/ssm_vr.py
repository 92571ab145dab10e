"""Sliced score matching with variance reduction (Song, Garg, Shi and Ermon, UAI 2019, eq. 8, times two)."""

import torch
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.sdes.base import SDE, Noised


class SSMVR(SSM):
    """|S|^2 + 2 mean_k v_k^T J v_k: the square exact, the trace projected.

    With n_proj >= d the exact trace costs no more than the projections, and is taken. The part of J that is known
    (the linear part of the model) enters by its exact trace: this changes the value's noise, not the gradient.
    Arguments as for SSM.
    """

    name = "ssm_vr"
    formula = "|S|^2 + 2 v^T J v"

    def tangents(self, d: int) -> int:
        return min(self.n_proj, d)

    def convention(self, d: int | None = None) -> str:
        if d is not None and self.n_proj >= d and not self.automatic:
            return f"{Loss.convention(self, d)}, the trace exact (n_proj={self.n_proj} >= d={d})"
        return super().convention(d)

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        x = noised.x_t
        if self.n_proj >= x[0].numel():
            score, trace = divergence.score_and_trace(model, x, t)
        else:
            v = self.directions(model, x, t, generator)
            score, projected = divergence.score_and_projections(model, x, t, v, exact=True)
            trace = projected.mean(0)
        return score.square().flatten(1).sum(1) + 2.0 * trace
