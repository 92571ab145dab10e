"""No process: x_t = x_0 at all times. Score matching on clean data, as it was before diffusions.

The score is that of the data itself, the same at all times, and the network sees one constant level: it is time-free. ISM
(Hyvarinen, JMLR 6, 2005) and SSM (Song, Garg, Shi and Ermon, UAI 2019) learn it; DSM has no noise to learn from. Samples are drawn
by Langevin dynamics, Metropolis-adjusted where the network is an energy.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE, Levels
from scoresde_cli.sdes.operators import Scalar


class CleanLevels(Levels):
    """sigma = detail s and alpha^2 s^2 + sigma^2 = s^2, s^2 the data's mean variance: no noise, but the scale of what is learnt.

    A model so scaled has the data's Gaussian as its linear part (a share detail^2 of the variances is taken evenly from all
    directions), and outputs of unit order where the score changes over lengths of sigma.
    """

    def __init__(self, detail: float, variance: float) -> None:
        self.detail, self.variance = detail, variance

    def alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, (1.0 - self.detail**2) ** 0.5)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.detail * self.variance**0.5)

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        return x0


class Static(SDE):
    """dx = 0.

    Args:
        detail: the finest scale of the data over its standard deviation: what the network is scaled for, not noise.
        shape: D of the data. train: the training data, whose mean and variance the sampling starts from. kept: what a run
            remembers of it.
    """

    still = True
    remedy = "sampler=langevin works"

    def __init__(
        self, detail: Annotated[float, Field(gt=0, lt=1)] = 0.2, *, shape: tuple[int, ...], train: Tensor | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.detail, self.kept, d = detail, dict(kept or {}), int(torch.Size(shape).numel())
        if "start" not in self.kept:
            x = torch.zeros(1, d) if train is None else train.flatten(1)
            var = torch.ones(1) if train is None else x.double().var(0, correction=0).mean().reshape(1)
            self.kept["start"] = torch.cat([x.double().mean(0), var]).unsqueeze(
                0
            )  # (1, d + 1): the mean, and the mean variance
        self.centre, self.variance = self.kept["start"][0, :-1], float(self.kept["start"][0, -1])

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> Scalar:
        return Scalar(torch.zeros_like(t))

    def levels(self) -> CleanLevels:
        return CleanLevels(self.detail, self.variance)

    def simulate(self, x0: Tensor, t: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        return x0

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Where Langevin dynamics starts: an isotropic Gaussian with the data's mean and mean variance."""
        z = normal(shape, generator, dtype)
        return self.centre.to(z).reshape(shape[1:]) + self.variance**0.5 * z
