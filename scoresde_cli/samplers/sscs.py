"""The symmetric splitting sampler for critically damped Langevin diffusion (Dockhorn, Vahdat and Kreis, ICLR 2022, section 3).

In reversed time tau the reversal is the sum of two parts,

    A   dx = -beta v / M dtau,  dv = beta (x - Gamma v / M) dtau + sqrt(2 Gamma beta) dW       the stationary law stays as it is
    S   dv = 2 Gamma beta (s_v(x, v, t) + v / M) dtau                                          what the data brings

A is the forward process with the velocity turned round, so its steps are exact; a step is half of A, all of S, half of A.
"""

from dataclasses import dataclass

from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.kinetic import Kinetic
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.phase import join, split


@dataclass(kw_only=True)
class SSCS(Sampler):
    """S by Euler's method at the middle of the step's time; one evaluation a step, weak order 1, exact where the data is N(0, I)
    with the stationary velocity."""

    def check(self, model: FieldModel, sde: SDE) -> None:
        if not sde.phase:
            raise ScoreSDEError(
                f"sampler SSCS splits position and velocity, and {type(sde).__name__} has no velocity; it is for sde=kinetic"
            )
        super().check(model, sde)

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        sde = walk.sde
        assert isinstance(sde, Kinetic)
        rate = 2.0 * sde.friction * sde.beta
        half = 0.5 * (t - s)
        x, middle = self.drift(walk, sde, x, half), t - half
        position, velocity = split(x)
        score = split(walk.field(x, middle, "score"))[1]
        x = join(position, velocity + expand(rate * (t - s), velocity) * (score + velocity / sde.mass))
        return self.drift(walk, sde, x, half)

    def drift(self, walk: Walk, sde: Kinetic, x: Tensor, time: Tensor) -> Tensor:
        """Part A over a time (B,)."""
        flow, factor = sde.between(time)
        return turned(flow.mul(turned(x)) + factor.mul(walk.noise(x)))


def turned(x: Tensor) -> Tensor:
    """The state with its velocity turned round."""
    position, velocity = split(x)
    return join(position, -velocity)
