"""Laws with exact densities and scores: Gaussians and their mixtures."""

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from scoresde_cli.datasets.base import SampledMixture, Size
from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal


class EightGaussians(SampledMixture):
    """Eight Gaussians on a circle.

    Args:
        radius: of the circle.
        std: standard deviation of each.
        weights: eight positive numbers, or None for equal ones.
        labels: the component of each row is its label.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, radius: PositiveFloat = 1.4, std: PositiveFloat = 0.1, weights: list[PositiveFloat] | None = None,
        labels: bool = False, n: Size = 100_000, seed: int = 0,
    ) -> None:  # fmt: skip
        if weights is not None and len(weights) != 8:
            raise ScoreSDEError(f"data.weights={weights}: expected 8 numbers, got {len(weights)}")
        angles = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
        means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        law = Mixture(torch.tensor(weights or [1.0] * 8), means, torch.full((8, 2), std**2))
        super().__init__(law, n, seed, labels)


class GMM(SampledMixture):
    """A mixture with random modes, of mean variance one per coordinate, in any dimension.

    Args:
        d: dimension.
        modes: number of components, with random weights (a factor of four apart at most).
        std: standard deviation of each component, below one; the modes have the rest of the variance.
        law_seed: of the law itself.
        labels: the component of each row is its label.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, d: PositiveInt = 2, modes: PositiveInt = 8, std: Annotated[float, Field(gt=0, lt=1)] = 0.3,
        law_seed: int = 0, labels: bool = False, n: Size = 100_000, seed: int = 0,
    ) -> None:  # fmt: skip
        source = generator(law_seed, "gmm", d, modes)
        weights = 1.0 + 3.0 * torch.rand(modes, generator=source, dtype=torch.float64)
        means = normal((modes, d), source, torch.float64)
        weights = weights / weights.sum()
        if modes > 1:
            means = means - weights @ means
            means = means * math.sqrt((1 - std**2) * d / float(weights @ means.square().sum(1)))
        super().__init__(Mixture(weights, means, torch.full((modes, d), std**2)), n, seed, labels)


class Gaussian(SampledMixture):
    """One Gaussian with mean zero, a random basis and log-spaced variances of mean one.

    Args:
        d: dimension.
        condition: largest over smallest variance, at least one.
        law_seed: of the basis.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, d: PositiveInt = 2, condition: Annotated[float, Field(ge=1)] = 10.0, law_seed: int = 0,
        n: Size = 100_000, seed: int = 0,
    ) -> None:  # fmt: skip
        lam = torch.logspace(0, math.log10(condition), d, dtype=torch.float64)
        basis = torch.linalg.qr(normal((d, d), generator(law_seed, "gaussian", d), torch.float64))[0]
        law = Mixture(torch.ones(1), torch.zeros(1, d), (lam / lam.mean())[None], basis[None])
        super().__init__(law, n, seed)
