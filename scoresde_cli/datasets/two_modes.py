"""Two modes in correlated noise: what the covariance of a diffusion has to match, at any condition number."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat

from scoresde_cli.datasets.base import SampledMixture, Size
from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.errors import ScoreSDEError


class TwoModes(SampledMixture):
    """x = +- a e + C^(1/2) z, scaled to mean variance one: C a correlation matrix, e its top eigenvector with eigenvalue lam.

    The covariance is C + a^2 e e^T up to scale; its condition number that of C times 1 + separation^2.

    Args:
        d: dimension.
        correlation: of C: none, equi (1 - rho + rho J) or ar1 (rho^|i - j|). rho: its parameter.
        separation: a / sqrt(lam).
        n, seed: as for `Sampled`.
    """

    def __init__(
        self, d: Annotated[int, Field(ge=2)] = 32, correlation: Literal["none", "equi", "ar1"] = "ar1",
        rho: Annotated[float, Field(gt=-1, lt=1)] = 0.95, separation: NonNegativeFloat = 1.75, n: Size = 100_000,
        seed: int = 0,
    ) -> None:  # fmt: skip
        at = torch.arange(d, dtype=torch.float64)
        C = torch.eye(d, dtype=torch.float64)
        if correlation == "ar1":
            C = rho ** (at[:, None] - at).abs()
        elif correlation == "equi":
            C = (1.0 - rho) * C + rho
        lam, basis = torch.linalg.eigh(C)
        if lam[0] <= 0:
            raise ScoreSDEError(f"data.rho={rho}: expected more than -1/(d - 1) = {-1 / (d - 1):.4g} of equi")
        means = separation * lam[-1].sqrt() * torch.stack([basis[:, -1], -basis[:, -1]])
        scale = (lam.sum() + separation**2 * lam[-1]) / d
        law = Mixture(
            torch.ones(2), means / scale.sqrt(), (lam / scale).expand(2, d).clone(), basis.expand(2, d, d).clone()
        )
        super().__init__(law, n, seed)
