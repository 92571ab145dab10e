"""Laws in the plane without a closed-form score, each of about unit variance per coordinate."""

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from scoresde_cli.datasets.base import Sampled, Size
from scoresde_cli.rng import normal, uniform

F64 = torch.float64


class Planar(Sampled):
    """A law in the plane with Gaussian noise of standard deviation `noise` on top."""

    def __init__(self, noise: NonNegativeFloat, n: Size, seed: int) -> None:
        self.noise = noise
        super().__init__((2,), n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        """n points (n, 2) before the noise."""
        raise NotImplementedError

    def draw(self, n: int, source: torch.Generator) -> Tensor:
        x = self.curve(n, source)
        return x + self.noise * normal((n, 2), source, F64)


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def pick(n: int, k: int, source: torch.Generator) -> Tensor:
    return torch.randint(k, (n,), generator=source)


class Moons(Planar):
    """Two interleaved half circles (scikit-learn's make_moons, centred and scaled)."""

    def __init__(self, noise: NonNegativeFloat = 0.06, n: Size = 100_000, seed: int = 0) -> None:
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        angle, lower = math.pi * uniform((n,), source, F64), pick(n, 2, source).bool()
        arc = polar(torch.ones(n, dtype=F64), angle)
        x = torch.where(lower[:, None], torch.tensor([1.0, 0.5], dtype=F64) - arc, arc)
        return (x - torch.tensor([0.5, 0.25], dtype=F64)) * 1.4


class Checkerboard(Planar):
    """Uniform on the black squares of a 4 x 4 board."""

    def __init__(self, noise: NonNegativeFloat = 0.0, n: Size = 100_000, seed: int = 0) -> None:
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        column, pair = pick(n, 4, source), pick(n, 2, source)
        corner = torch.stack([column, 2 * pair + column % 2], dim=1)
        return (corner + uniform((n, 2), source, F64) - 2.0) * (math.sqrt(12) / 4)


class Rings(Planar):
    """Concentric circles of equal weight."""

    def __init__(
        self, rings: PositiveInt = 3, noise: NonNegativeFloat = 0.06, n: Size = 100_000, seed: int = 0
    ) -> None:
        self.rings = rings
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        radius = (pick(n, self.rings, source) + 1.0).to(F64) * (2.0 / self.rings)
        return polar(radius, 2 * math.pi * uniform((n,), source, F64))


class SwissRoll(Planar):
    """The spiral of scikit-learn's make_swiss_roll, seen along its axis, scaled."""

    def __init__(self, noise: NonNegativeFloat = 0.06, n: Size = 100_000, seed: int = 0) -> None:
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        angle = 1.5 * math.pi * (1 + 2 * uniform((n,), source, F64))
        return polar(angle, angle) / 6.8


class Pinwheel(Planar):
    """Five blades of an anisotropic Gaussian, bent (Johnson et al., NeurIPS 2016)."""

    def __init__(
        self, blades: PositiveInt = 5, noise: NonNegativeFloat = 0.0, n: Size = 100_000, seed: int = 0
    ) -> None:
        self.blades = blades
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        blade = 2 * math.pi * pick(n, self.blades, source) / self.blades
        radius = 1.0 + 0.3 * normal((n,), source, F64)
        across = 0.1 * normal((n,), source, F64)
        angle = blade + 0.25 * radius.exp()
        turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=1).reshape(n, 2, 2)
        return 1.3 * torch.einsum("ni,nij->nj", torch.stack([radius, across], dim=1), turn)


class TwoSpirals(Planar):
    """Two interleaved spirals."""

    def __init__(self, noise: NonNegativeFloat = 0.06, n: Size = 100_000, seed: int = 0) -> None:
        super().__init__(noise, n, seed)

    def curve(self, n: int, source: torch.Generator) -> Tensor:
        angle = 3 * math.pi * uniform((n,), source, F64).sqrt()
        sign = 2.0 * pick(n, 2, source) - 1.0
        return sign[:, None] * polar(angle, angle) / (1.5 * math.pi)
