"""Sliced score matching (Song, Garg, Shi and Ermon, UAI 2019, eq. 7, times two)."""

import torch
from pydantic import PositiveInt
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss, MinTime, Times, Weighting
from scoresde_cli.losses.ism import ISM
from scoresde_cli.projections import Projection, Rademacher
from scoresde_cli.sdes.base import SDE, Noised

EXACT_UP_TO = 128  # dimensions up to which the loss is reported with the exact trace


class SSM(Loss):
    """mean_k (v_k^T S)^2 + 2 v_k^T J v_k: exactly the sliced loss, whatever n_proj is.

    Args:
        projection: the law of the directions.
        n_proj: directions a sample.
        weighting, half, times, t_min: as for every loss (base.py).
    """

    name = "ssm"
    formula = "(v^T S)^2 + 2 v^T J v"
    automatic = False  # n_proj is chosen as training goes (training/directions.py)

    def __init__(
        self, projection: Projection, n_proj: PositiveInt = 4, weighting: Weighting = "sigma2", half: bool = False,
        times: Times = "mixed", t_min: MinTime = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(weighting, half, times, t_min)
        self.projection, self.n_proj = projection, n_proj

    def tangents(self, d: int) -> int:
        return self.n_proj

    def directions(
        self, model: FieldModel, x: Tensor, t: Tensor, generator: torch.Generator, m: int | None = None
    ) -> Tensor:
        """(n_proj, m, *D) for the first m samples, B by None; drawn given the Jacobians at x where the law looks at them.

        They are constants in the gradient.
        """

        @torch.no_grad()
        def push(w: Tensor) -> Tensor:
            return divergence.dual(model, x, t, w)[1]

        return self.projection.directions(push, tuple(x[:m].shape), self.n_proj, generator, x.dtype)

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        v = self.directions(model, noised.x_t, t, generator)
        score, projected = divergence.score_and_projections(model, noised.x_t, t, v)
        return (divergence.inner(v, score, 2).square() + 2.0 * projected).mean(0)

    def reference(self, d: int) -> Loss:
        if d <= EXACT_UP_TO:
            return ISM(self.weighting, self.half, self.times, self.t_min)
        from scoresde_cli.losses.ssm_vr import SSMVR

        return SSMVR(Rademacher(), 4, self.weighting, self.half, self.times, self.t_min)

    def convention(self, d: int | None = None) -> str:
        n = "auto" if self.automatic else self.n_proj
        return f"{super().convention(d)}, n_proj={n} ({type(self.projection).__name__.lower()})"
