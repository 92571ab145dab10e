"""Data-parallel training: every process draws the whole batch and all its random numbers, and computes the network on its rows.

Process r of n has the rows r, r + n, r + 2n, ... To the loss the field looks whole: what the network says of the rows of the other
processes is filled with zeros, and the losses of those rows are left out. So a loss knows nothing of it, batch, times, noise and
directions are those of one process, and the sum of the processes' gradients is that of the whole batch up to rounding. (Rows apart
from each other, as samples are sorted by time in some losses, whose early ones cost more.)
"""

from typing import Any

from torch import Tensor, nn

from scoresde_cli import divergence, processes
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel


class Rows(FieldModel):
    """A field model that computes every n-th row and returns zeros for the rest."""

    partial = True

    def __init__(self, model: FieldModel, rank: int, size: int) -> None:
        self.model, self.mine = model, slice(rank, None, size)
        self.sde, self.provides = model.sde, model.provides
        labels = getattr(model, "labels", None)
        if labels is not None and len(labels) > 1:
            self.model = model.labelled(labels[self.mine])

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy in the making has none
            raise AttributeError(name)
        return getattr(self.model, name)

    def whitened(self) -> "Rows":
        found = object.__new__(Rows)
        model = self.model.whitened()
        found.model, found.mine, found.sde, found.provides = model, self.mine, model.sde, model.provides
        return found

    def filled(self, part: Tensor, count: int, axis: int = 0) -> Tensor:
        """`part` in its rows of `count`, zeros in the others; rows are along `axis`."""
        whole = part.new_zeros(*part.shape[:axis], count, *part.shape[axis + 1 :])
        whole[(slice(None),) * axis + (self.mine,)] = part
        return whole

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self.filled(self.model.score(x[self.mine], t[self.mine]), len(x))

    def forward_dual(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), J v (K, m, *D))."""
        out, jvp = divergence.dual(self.model, x[self.mine], t[self.mine], v[:, self.mine])
        return self.filled(out, len(x)), self.filled(jvp, v.shape[1], 1)

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(score (B, *D), v_k^T J v_k (K, m))."""
        v_mine, x_mine, t_mine = v[:, self.mine], x[self.mine], t[self.mine]
        if v_mine.shape[1] == 0:  # fewer samples have directions than there are processes
            return self.score(x, t), v.new_zeros(v.shape[:2])
        out, found = divergence.score_and_projections(self.model, x_mine, t_mine, v_mine, exact)
        return self.filled(out, len(x)), self.filled(found, v.shape[1], 1)

    def forward_trace(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), tr J (B,))."""
        out, trace = divergence.score_and_trace(self.model, x[self.mine], t[self.mine])
        return self.filled(out, len(x)), self.filled(trace, len(x))


def share(field: FieldModel) -> FieldModel:
    """The field as this process's part of a training step sees it."""
    return field if processes.size() == 1 else Rows(field, processes.rank(), processes.size())


def mean(losses: Tensor) -> Tensor:
    """This process's part of the mean of a batch's losses (B,)."""
    n = processes.size()
    return losses.mean() if n == 1 else losses[processes.rank() :: n].sum() / len(losses)


def check(network: nn.Module, batch_size: int, accumulate: int) -> None:
    """Refuse what several processes cannot do as one."""
    n = processes.size()
    if batch_size % (n * accumulate):
        each = f"{n} times accumulate={accumulate}" if accumulate > 1 else str(n)
        raise ScoreSDEError(f"batch_size={batch_size} with {n} processes: expected a multiple of {each}")
    mixing = [type(m).__name__ for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if n > 1 and mixing:
        raise ScoreSDEError(
            f"the network holds {mixing[0]}, whose statistics are of the whole batch: it trains in one process; take LayerNorm "
            "or GroupNorm"
        )
