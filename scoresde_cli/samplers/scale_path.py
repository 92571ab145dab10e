"""Sampling given the scales of the jumps: a denoiser for Gaussian noise is all it takes (linear drift, Gaussian scale mixtures).

Given the times and scales of its jumps, x_T = alpha x_0 + sqrt(S) eps with a known S, so y = x / alpha follows the probability
flow of plain Gaussian noise of level v, from v = sqrt(S(T)) / alpha(T), a random one for each sample,

    dy / dv = (y - D(y, v)) / v,   D(y, v) = E[x_0 | x_0 + v eps = y]       (Karras et al., NeurIPS 2022, eq. 1 and 3).

With the scales revealed, jump noise is a random noise level for each sample and nothing else.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.samplers import grids
from scoresde_cli.samplers.base import Sampler, Walk
from scoresde_cli.sdes.base import SDE, Kernel
from scoresde_cli.sdes.operators import expand


@dataclass(kw_only=True)
class ScalePath(Sampler):
    """Heun's method in v; two evaluations a step, order 2. Without jumps, the probability flow in sigma / alpha.

    At time t of the grid, log v is log r(t) of the process without jumps, stretched so that it begins at the sample's own level.
    """

    needs: ClassVar[Set[str]] = frozenset()
    with_jumps: ClassVar[Set[str]] = frozenset({"gaussian_denoiser"})

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        if sde.phase or sde.kernel() is None or (sde.jumps is not None and not (sde.jumps.joint and sde.jumps.without)):
            raise ScoreSDEError(
                "sampler ScalePath needs a closed-form kernel of the data itself, and joint jumps if any; take heun_ode"
            )

    def start(self, walk: Walk, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if walk.sde.jumps is None:
            return super().start(walk, shape, dtype)
        kernel, plain = walk.sde.kernel(), quiet(walk.sde)
        assert kernel is not None
        x0 = torch.zeros(shape, device=walk.source.device, dtype=dtype)
        first = torch.full(shape[:1], walk.sde.T).to(x0)
        noised = kernel.sample(x0, first, walk.source)
        log_v = 0.5 * noised.aux["S"].flatten(1)[:, 0].log() - kernel.alpha(first).log()
        low = grids.log_ratio(plain, torch.full_like(first, self.t_min))
        walk.memory = (log_v - low) / (grids.log_ratio(plain, first) - low)
        return noised.x_t

    def level(self, walk: Walk, t: Tensor) -> Tensor:
        """v of each sample at time t, (B,)."""
        plain = quiet(walk.sde)
        low = grids.log_ratio(plain, torch.full_like(t, self.t_min))
        stretch = 1.0 if walk.memory is None else walk.memory
        return (low + stretch * (grids.log_ratio(plain, t) - low)).exp()

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        kernel = quiet(walk.sde)
        high, low = self.level(walk, t), self.level(walk, s)
        y, v, w = x / expand(kernel.alpha(t), x), expand(high, x), expand(low, x)
        first = (y - self.denoised(walk, y, high, t)) / v
        ahead = y + (w - v) * first
        second = (ahead - self.denoised(walk, ahead, low, s)) / w
        return expand(kernel.alpha(s), x) * (y + 0.5 * (w - v) * (first + second))

    def finish(self, walk: Walk, x: Tensor, t: Tensor) -> Tensor:
        return self.denoised(walk, x / expand(quiet(walk.sde).alpha(t), x), self.level(walk, t), t)

    def denoised(self, walk: Walk, y: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """D(y, v); without jumps v is that of time t, so any model has it."""
        if walk.sde.jumps is None:
            return walk.field(expand(quiet(walk.sde).alpha(t), y) * y, t, "x0")
        walk.nfe += walk.model.evaluations
        return walk.model.gaussian_denoiser(y, v)


def quiet(sde: SDE) -> Kernel:
    """The kernel of the process without its jumps."""
    kernel = (sde if sde.jumps is None or sde.jumps.without is None else sde.jumps.without).kernel()
    assert kernel is not None
    return kernel
