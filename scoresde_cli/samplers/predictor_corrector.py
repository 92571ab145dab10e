"""Predictor-corrector (Song et al., ICLR 2021, algorithms 2 to 5): any sampler's step, then Langevin steps at the new time."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.edm_stochastic import EDMStochastic
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.langevin import Langevin
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion
from scoresde_cli.sdes.base import SDE

Predictor = Literal["reverse_diffusion", "euler_maruyama", "euler_ode", "heun_ode", "dpm_solver_pp", "edm_stochastic"]
PREDICTORS: dict[str, type[Sampler]] = {
    "reverse_diffusion": ReverseDiffusion, "euler_maruyama": EulerMaruyama, "euler_ode": EulerODE, "heun_ode": HeunODE,
    "dpm_solver_pp": DPMSolverPP, "edm_stochastic": EDMStochastic,
}  # fmt: skip


@dataclass(kw_only=True)
class PredictorCorrector(Sampler):
    """A predictor's step, then x <- x + e score + sqrt(2 e) z with e = 2 (snr |z| / |score|)^2, the norms' means over a block.

    Args:
        predictor: the sampler whose step comes first, by name or by a `_target_` of one's own.
        corrections: Langevin steps after each, one evaluation each.
        snr: their signal-to-noise ratio; less is more exact and slower.
    """

    needs_kernel: ClassVar[bool] = True

    predictor: Predictor | Sampler = "reverse_diffusion"
    corrections: PositiveInt = 1
    snr: PositiveFloat = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self.predictor
        self.first = PREDICTORS[chosen](steps=self.steps) if isinstance(chosen, str) else chosen

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        self.first.check(model, sde)
        if isinstance(self.first, Langevin):
            raise ScoreSDEError("sampler.predictor: langevin stays at one time; take a sampler that goes down in t")

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x = self.first.step(walk, x, t, s)
        for _ in range(self.corrections):
            score, z = walk.field(x, s, "score"), walk.noise(x)
            e = 2.0 * (self.snr * norm(z) / norm(score)).square()
            x = x + e * score + (2.0 * e).sqrt() * z
        return x


def norm(x: Tensor) -> Tensor:
    """The mean over a block (B, *D) of the Euclidean norm."""
    return x.flatten(1).norm(dim=1).mean()
