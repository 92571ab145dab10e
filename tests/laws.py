"""Shared test problems, each with its source: laws whose densities, scores and noised versions are known in closed form."""

from collections.abc import Callable

import torch

from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.projections import Coordinate, Gaussian, Hadamard, Orthogonal, Projection, Rademacher, Sphere
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import LinearSDE
from scoresde_cli.sdes.correlated import Correlated
from scoresde_cli.sdes.subvp import SubVP
from scoresde_cli.sdes.ve import VE
from scoresde_cli.sdes.vp import VP
from scoresde_cli.sketching import HutchPP, XTrace

SDES: list[LinearSDE] = [VP(), SubVP(), VE(), VP(beta_min=1.0, beta_max=8.0), VE(sigma_min=0.05, sigma_max=5.0)]
PROJECTIONS: list[Projection] = [
    Gaussian(), Rademacher(), Sphere(), Orthogonal(), Hadamard(), Coordinate(), HutchPP(), XTrace(),
]  # fmt: skip
EXACT_AT_D = (Orthogonal, Coordinate, Hadamard)
ADAPTED = [law for law in PROJECTIONS if law.adapted]


def name(thing: object) -> str:
    return type(thing).__name__


def correlated_gaussian() -> Mixture:
    """N(mu, C) in 2-D with C of eigenvalues 1.5 and 0.2, turned by 0.7."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    basis = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return Mixture(torch.ones(1), torch.tensor([[0.5, -0.3]]), torch.tensor([[1.5, 0.2]]), basis[None])


def three_modes() -> Mixture:
    """Three anisotropic modes of unlike weight in 2-D."""
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[1.0, 0.0], [-0.6, 1.0], [-0.5, -1.2]]),
        torch.tensor([[0.04, 0.3], [0.1, 0.1], [0.2, 0.02]]),
        torch.linalg.qr(torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0],
    )


MIXTURES = {"correlated_gaussian": correlated_gaussian, "three_modes": three_modes}


def columns(act: Callable[[torch.Tensor], torch.Tensor], d: int) -> torch.Tensor:
    """The matrices (2, d, d) of a linear map of pairs of rows (2, d)."""
    return torch.stack([act(e.expand(2, d)) for e in torch.eye(d, dtype=torch.float64)], dim=2)


def spd(d: int) -> torch.Tensor:
    """A covariance without structure, of condition about 30."""
    G = normal((d, 2 * d), generator(0, "spd", d), torch.float64)
    return G @ G.T / (2 * d) + 0.05 * torch.eye(d, dtype=torch.float64)


def stable(d: int) -> torch.Tensor:
    """A drift matrix with rotation, neither symmetric nor commuting with anything: eigenvalues with real parts near one."""
    G = normal((d, d), generator(0, "stable", d), torch.float64)
    return torch.eye(d, dtype=torch.float64) + 0.3 * (G - G.T) + 0.05 * G


def correlated_sdes(d: int) -> dict[str, Correlated]:
    """Every kind of Sigma and of drift in d dimensions; files are given as what a run remembers of them."""
    shape, files = (d,), {"sigma": spd(d), "A": stable(d)}
    return {
        "equi": Correlated("equi", rho=0.6, shape=shape), "ar1": Correlated("ar1", rho=0.8, shape=shape),
        "circulant": Correlated("circulant", length=2.0, shape=shape), "low_rank": Correlated("low_rank", rank=2, shape=shape),
        "dense": Correlated("dense", file="x.npy", shape=shape, kept=files),
        "reversible equi": Correlated("equi", rho=0.4, drift="reversible", shape=shape),
        "reversible dense": Correlated("dense", file="x.npy", drift="reversible", shape=shape, kept=files),
        "matrix ar1": Correlated("ar1", rho=0.5, drift="a.npy", shape=shape, kept=files),
    }  # fmt: skip
