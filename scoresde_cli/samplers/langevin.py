"""Langevin dynamics in the score of one time, t_min: unadjusted, or Metropolis-adjusted where the model has a density.

    x' = x + e score(x) + sqrt(2 e) z,

accepted, where `adjusted`, with probability min(1, p(x') q(x | x') / (p(x) q(x' | x))), q the density of such a step (Roberts and
Tweedie, Bernoulli 2, 1996). Unadjusted, the law is off by O(e); adjusted, it is exact once mixed. Neither leaves a mode that is
far from the others: the annealed samplers are there for that.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand


@dataclass(kw_only=True)
class Langevin(Sampler):
    """`steps` of it from a standard normal draw noised to t_min (without a kernel, from the prior); one evaluation a step.

    Args:
        step_size: e, in model units squared: well below the square of the finest scale of the data.
        adjusted: accept or refuse each step; needs a model with a density (network=energy_mlp).
    """

    descends: ClassVar[bool] = False

    steps: PositiveInt = 1000
    step_size: PositiveFloat = 2e-3
    adjusted: bool = False

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        if self.adjusted and ("log_density" not in model.provides or self.clip):
            raise ScoreSDEError(
                "sampler.adjusted=true needs a model with a density: network=energy_mlp, without guidance and without sampler.clip"
            )
        if self.grid != "power" or self.rho is not None:
            raise ScoreSDEError(f"sampler.grid={self.grid}: langevin stays at one time, t_min")

    def times(self, sde: SDE) -> Tensor:
        return torch.full((self.steps + 1,), self.t_min, dtype=torch.float64)

    def start(self, walk: Walk, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        prior = super().start(walk, shape, dtype)
        if walk.sde.kernel() is None:
            return prior
        _, sigma_T = walk.levels(prior, prior.new_full(shape[:1], walk.sde.T))
        alpha, sigma = walk.levels(prior, prior.new_full(shape[:1], self.t_min))
        return prior / sigma_T * (alpha.square() + sigma.square()).sqrt()

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        e = self.step_size
        if not self.adjusted:
            return x + e * walk.field(x, t, "score") + (2 * e) ** 0.5 * walk.noise(x)
        if walk.memory is None or walk.memory[0] is not x:
            walk.memory = (x, *walk.fields(x, t, "score", "log_density"))
        _, score, log = walk.memory
        z = walk.noise(x)
        y = x + e * score + (2 * e) ** 0.5 * z
        score_y, log_y = walk.fields(y, t, "score", "log_density")
        back = (x - y - e * score_y).flatten(1).square().sum(1) / (4 * e)
        ratio = log_y - log - back + 0.5 * z.flatten(1).square().sum(1)
        accept = torch.rand(len(x), generator=walk.source, device=x.device, dtype=x.dtype).log() < ratio
        mask = expand(accept, x)
        x = torch.where(mask, y, x)
        walk.memory = x, torch.where(mask, score_y, score), torch.where(accept, log_y, log)
        return x
