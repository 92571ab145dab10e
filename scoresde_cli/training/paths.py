"""The pool of simulated paths that feeds training where x_t given x_0 is known by simulation alone.

Pool k holds `paths` paths from random training rows at up to TIMES times, stratified by the loss's own law and drawn anew for each
pool. It feeds the steps k refresh, .., (k + 1) refresh - 1 and is a function of (seed, k): a resumed run simulates it again and
goes on bit for bit. A batch takes times evenly from the pool's and paths at random, so its (t, x_t) have the law of the loss.
"""

import torch
from torch import Tensor

from scoresde_cli.losses.base import Loss, draw_times
from scoresde_cli.rng import generator, uniform
from scoresde_cli.sdes.base import SDE, Noised
from scoresde_cli.sdes.simulated import Simulated

TIMES = 128
ELEMENTS = 1 << 26  # numbers in a pool


class Paths:
    """
    Args:
        sde: the process. loss: whose law of times is drawn by. train: the training rows (n, *D), on the device. seed: of the run.
    """

    def __init__(self, sde: Simulated, loss: Loss, train: Tensor, seed: int) -> None:
        self.sde, self.loss, self.train, self.seed = sde, loss, train, seed
        count = min(sde.paths, max(64, ELEMENTS // (16 * train[0].numel())))
        self.times, self.count = max(16, min(TIMES, ELEMENTS // (count * train[0].numel()))), count
        self.number = -1

    def fill(self, number: int) -> None:
        """Simulate pool `number`."""
        source = generator(self.seed, "paths", number, device=self.train.device)
        t = draw_times(self.loss.times, self.times, self.loss.t_min, self.sde.T, source).double().sort().values
        self.rows = torch.randint(len(self.train), (self.count,), generator=source, device=self.train.device)
        first, self.weight = None, None
        if self.sde.jumps is not None and self.sde.jumps.joint:
            first, weight = self.sde.poisson.first(self.count, self.loss.t_min, self.sde.T, source)
            self.weight = weight.to(self.train.dtype)
        self.x = torch.stack(list(self.sde.visit(self.train[self.rows], t, source, first)))
        self.t, self.number = t.to(self.train.dtype), number

    def draw(self, step: int, n: int, source: torch.Generator) -> tuple[Tensor, Tensor, Noised]:
        """For a training step: n rows of the training data, times (n,), and these rows at these times."""
        if step // self.sde.refresh != self.number:
            self.fill(step // self.sde.refresh)
        u = (torch.arange(n, device=self.train.device) + uniform((n,), source)) / n
        when = (u * self.times).long().clamp_max(self.times - 1)
        which = torch.randint(self.count, (n,), generator=source, device=self.train.device)
        aux = {} if self.weight is None else {"weight": self.weight[which]}
        return self.rows[which], self.t[when], Noised(self.x[when, which], aux=aux)


def pool(sde: SDE, loss: Loss, train: Tensor, seed: int) -> Paths | None:
    """The pool of a process that needs one."""
    return Paths(sde, loss, train, seed) if isinstance(sde, Simulated) else None
