"""Poisson jumps beside a drift and a noise that are known by their paths alone: dx = f dt + G dW + dJ (simulated.py)."""

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from scoresde_cli.rng import uniform
from scoresde_cli.sdes.base import Jumps, Moments
from scoresde_cli.sdes.scale_mixture import Amplitude, Law, amplitude_of

NONE = {"rate": 0.0, "amplitude": "gaussian", "scale": 1.0, "nu": 5.0, "joint": True}


@dataclass(frozen=True)
class PoissonKeys:
    """The keys under `sde.jumps`.

    Args:
        rate: jumps in a unit of time; 0 for none. amplitude, scale, nu, joint: as for jump_diffusion.
    """

    rate: NonNegativeFloat = 0.0
    amplitude: Law = "gaussian"
    scale: PositiveFloat = 1.0
    nu: PositiveFloat = 5.0
    joint: bool = True

    def law(self) -> Amplitude:
        return amplitude_of(self.amplitude, self.scale, self.nu, "sde.jumps.")

    def jumps(self) -> Jumps | None:
        return (
            Jumps(lambda t: torch.full_like(t, self.rate), self.law().sample, joint=self.joint) if self.rate else None
        )

    def first(self, n: int, t_min: float, T: float, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """When the first jumps of n paths come, half of them drawn evenly in log t over [t_min, T], and what each path counts for.

        By itself few paths jump early, and all of the flux is theirs then: so many have to, and weigh little.
        """
        u, which = uniform((2, n), source, torch.float64)
        span = math.log(T / t_min)
        when = torch.where(which < 0.5, -torch.log1p(-u) / self.rate, t_min * torch.exp(span * u))
        own = self.rate * torch.exp(-self.rate * when)
        forced = torch.where((when >= t_min) & (when <= T), 1.0 / (when * span), 0.0)
        return when, 2.0 * own / (own + forced)

    def moments(self, t: Tensor, sigma: Tensor, quiet: Tensor) -> dict[str, Moments]:
        """What scales score and flux given x_0, where x_t has the standard deviation sigma (B,) then, without jumps `quiet` (B,).

        The score's power is that of a normal law, without jumps for the samples that have not jumped, with them for the others.
        E[flux . (x_t - E x_t)] = lambda E|A|^2 / 2 is exact. The power is that of a linear flux and of a lone early jump, which
        spreads over a path of length |A| what has come in a time t: |flux| ~ A / t, of a share lambda t of the samples.
        """
        pull = torch.full_like(t, self.rate * self.law().mean)
        power = (0.5 * pull / sigma).square() + 0.25 * pull / t
        still = torch.exp(-self.rate * t)
        precision = still / quiet.square() + (1 - still) / sigma.square()
        return {"score": Moments(precision, torch.full_like(t, -1.0)), "flux": Moments(power, 0.5 * pull)}
