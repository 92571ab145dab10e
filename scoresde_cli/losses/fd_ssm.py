"""Finite-difference sliced score matching (Pang et al., NeurIPS 2020, section 4, the form for score networks, times two).

The step of a direction with E|v|^2 = d is h(t) = step * sigma(t) a coordinate: sigma is the width of the narrowest mode of
p_t, so the bias, O(step^2) of the loss, is of the same size at every noise level. Halving the step quarters the bias;
rounding grows like 1/step. `scripts/experiments/fd_bias.py` measures both: at 0.01 the gradient is off by 1e-3, and rounding
is below it.
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss, MinTime, Times, Weighting
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.projections import Projection, Rademacher
from scoresde_cli.sdes.base import SDE, Noised


class FDSSM(SSM):
    """mean_k (v_k^T (S_+ + S_-) / 2)^2 + v_k^T (S_+ - S_-) / h, with S_+- = S(x +- h v_k): no derivative of the network in x.

    Args:
        projection, n_proj: as for SSM.
        step: h(t) / sigma(t).
        weighting, half, times, t_min: as for every loss (base.py).
    """

    name = "fd_ssm"
    formula = "(v^T (S_+ + S_-)/2)^2 + v^T (S_+ - S_-)/h"
    second_order = False

    def __init__(
        self, projection: Projection, n_proj: PositiveInt = 4, step: Annotated[float, Field(gt=0, le=1)] = 0.01,
        weighting: Weighting = "sigma2", half: bool = False, times: Times = "mixed", t_min: MinTime = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(projection, n_proj, weighting, half, times, t_min)
        self.step = step

    def tangents(self, d: int) -> int:
        return 2 * self.n_proj - 1  # 2 n_proj evaluations, and no primal

    def reference(self, d: int) -> Loss:
        """The same with more directions: a network may have no derivative in x at all."""
        n = max(self.n_proj, 16)
        return FDSSM(Rademacher(), n, self.step, self.weighting, self.half, self.times, self.t_min)

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        v, kernel = self.directions(model, noised.x_t, t, generator), sde.kernel()
        h = self.step * (torch.ones_like(t) if kernel is None else kernel.sigma(t))
        score, jvp = divergence.finite_difference(model, noised.x_t, t, v, h)
        return (divergence.inner(v, score, 2).square() + 2.0 * divergence.inner(v, jvp, 2)).mean(0)
