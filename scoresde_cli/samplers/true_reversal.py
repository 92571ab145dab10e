"""The time reversal of a jump diffusion, with its jumps (Conforti and Leonard, Stoch. Proc. Appl. 144, 2022).

Forward, x -> x + y at rate lambda nu(dy). The reversed process carries the same flux back,

    x -> x - y  at rate  lambda nu(dy) p(x - y) / p(x),   in total  lambda (nu*p)(x) / p(x),

beside the drift -f + Sigma score and the noise G of Anderson's reversal.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import uniform
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand

AT_ONCE = 200_000  # densities that are asked for at a time


@dataclass(kw_only=True)
class TrueReversal(Sampler):
    """Euler-Maruyama with reverse jumps, at most one a step, with chance 1 - exp(-h lambda nu*p/p); two evaluations a step.

    The jump is one of `candidates` draws y of nu, by weights p(x - y): many are needed where nu is wide against p, exponentially
    many in high dimension. A model with a log-density and no ratio nu*p/p has it from the same candidates. Without jumps,
    Euler-Maruyama.

    Args:
        candidates: draws among which a jump is chosen.
    """

    with_jumps: ClassVar[Set[str]] = frozenset({"log_density"})

    candidates: PositiveInt = 256

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        if sde.jumps is not None and not sde.jumps.joint:
            raise ScoreSDEError("sampler TrueReversal needs joint jumps; take sde.joint=true, or heun_ode")

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if walk.sde.jumps is not None:
            if "ratio" in walk.model.provides:
                landing, ratio = None, walk.field(x, t, "ratio")
            else:
                landing, ratio = self.candidates_of(walk, x, t)
            chance = -torch.expm1(-(t - s) * walk.sde.jumps.rate(t) * ratio)
            jumping = (uniform((len(x),), walk.source, x.dtype) < chance).nonzero().flatten()
            walk.memory = len(jumping) + (walk.memory or 0)  # jumps of the block so far
            if len(jumping):
                to = self.candidates_of(walk, x[jumping], t)[0] if landing is None else landing[jumping]
                x = x.index_copy(0, jumping, to)
        h = expand(t - s, x)
        noise = walk.sde.diffusion(t, x).mul(walk.noise(x))
        return x - h * walk.sde.reverse_drift(x, t, walk.field(x, t, "score")) + h.sqrt() * noise

    def candidates_of(self, walk: Walk, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where each of x (B, *D) goes if it jumps back at time t, one of the candidates x - y by weights p(x - y) / p(x), and the
        mean of these (B,), which estimates nu*p / p without bias."""
        jumps, L = walk.sde.jumps, walk.model.log_density
        assert jumps is not None
        parts, ratios = [], []
        for rows in x.split(max(1, AT_ONCE // self.candidates)):
            n, c = len(rows), self.candidates
            y = jumps.sample(n * c, tuple(x.shape[1:]), t[:1], walk.source).to(x)
            landing = rows.repeat_interleave(c, 0) - y
            log = L(landing, t[:1].expand(n * c)).view(n, c)
            chosen = torch.multinomial(torch.softmax(log, 1), 1, generator=walk.source).flatten()
            parts.append(landing[torch.arange(n, device=x.device) * c + chosen])
            ratios.append((torch.logsumexp(log, 1) - L(rows, t[:1].expand(n))).exp() / c)
        return torch.cat(parts), torch.cat(ratios)
