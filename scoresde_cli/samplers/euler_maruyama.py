"""Euler-Maruyama on the reverse SDE (Song et al., ICLR 2021, eq. 6)."""

from dataclasses import dataclass

from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.operators import expand


@dataclass(kw_only=True)
class EulerMaruyama(Sampler):
    """x <- x - h [f - Sigma score] + sqrt(h) G z; one evaluation a step, weak order 1, strong order 1 for additive noise.

    With jumps the drift holds their flux too: the marginals are the process's own, the paths do not jump.
    """

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(t - s, x)
        noise = walk.sde.diffusion(t, x).mul(walk.noise(x))
        fields = walk.fields(x, t, "score") if walk.sde.jumps is None else walk.fields(x, t, "score", "flux")
        return x - h * walk.sde.reverse_drift(x, t, *fields) + h.sqrt() * noise
