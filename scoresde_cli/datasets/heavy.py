"""Laws with heavy tails: x = sqrt(w) s N(0, I) with a random w, the same for all coordinates.

    student_t        w = nu / chi2_nu;            P(|x| > r) ~ r^(-nu)
    alpha_stable     w = 2 A, A positive (alpha/2)-stable;   E exp(i k.x) = exp(-|s k|^alpha), P(|x| > r) ~ r^(-alpha)
    laplace_mixture  w ~ Exp(1) about the points of a circle; exponential tails

Sources: Kanter, "Stable densities under change of scale and total variation inequalities", Ann. Prob. 3, 1975 (the draw of A);
Samorodnitsky and Taqqu, "Stable Non-Gaussian Random Processes", 1994, section 2.5.
"""

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.datasets.base import Sampled, Size
from scoresde_cli.rng import normal, uniform

F64 = torch.float64


class StudentT(Sampled):
    """The multivariate Student t law, with its tail index in `facts`; variance s^2 nu / (nu - 2) for nu > 2, else none.

    Args:
        d: dimension.
        nu: degrees of freedom: the tail index.
        scale: s.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, d: PositiveInt = 2, nu: PositiveFloat = 3.0, scale: PositiveFloat = 0.5, n: Size = 100_000, seed: int = 0
    ) -> None:
        self.d, self.nu, self.scale = d, nu, scale
        super().__init__((d,), n, seed)
        self.facts["tail_index"] = nu

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        half = torch.full((n, 1), self.nu / 2, dtype=F64, device=source.device)
        w = self.nu / (2 * torch._standard_gamma(half, generator=source))
        return self.scale * w.sqrt() * normal((n, self.d), source, F64)


class AlphaStable(Sampled):
    """The isotropic alpha-stable law: no variance, and for alpha <= 1 no mean.

    Args:
        d: dimension.
        alpha: the tail index, below 2; each coordinate is scipy's levy_stable(alpha, 0, scale=scale).
        scale: s.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, d: PositiveInt = 2, alpha: Annotated[float, Field(gt=0, lt=2)] = 1.7, scale: PositiveFloat = 0.5,
        n: Size = 100_000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.d, self.alpha, self.scale = d, alpha, scale
        super().__init__((d,), n, seed)
        self.facts["tail_index"] = alpha

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        a = self.alpha / 2
        u = math.pi * uniform((n, 1), source, F64).clamp_min(1e-15)
        e = (-torch.log1p(-uniform((n, 1), source, F64))).clamp_min(1e-300)
        # Kanter: E exp(-l A) = exp(-l^a)
        A = (a * u).sin() / u.sin() ** (1 / a) * (((1 - a) * u).sin() / e) ** ((1 - a) / a)
        return self.scale * (2 * A).sqrt() * normal((n, self.d), source, F64)


class LaplaceMixture(Sampled):
    """Isotropic Laplace laws about points of a circle, equally likely.

    Args:
        modes: how many.
        radius: of the circle.
        scale: standard deviation of each along each coordinate.
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, modes: PositiveInt = 8, radius: PositiveFloat = 1.4, scale: PositiveFloat = 0.15, n: Size = 100_000,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.modes, self.radius, self.scale = modes, radius, scale
        super().__init__((2,), n, seed)

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        angle = 2 * math.pi / self.modes * torch.randint(self.modes, (n,), generator=source)
        w = -torch.log1p(-uniform((n, 1), source, F64))
        centre = self.radius * torch.stack([angle.cos(), angle.sin()], dim=1).double()
        return centre + self.scale * w.sqrt() * normal((n, 2), source, F64)
