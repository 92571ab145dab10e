"""States (x, v) of a position and its velocity: how the pair is one tensor, and linear maps that act on both in each coordinate.

With data of shape D, a state is (B, 2 D_1, ..): position and velocity one after the other along the first axis of D, so that
flattened it is (B, 2 d).
"""

import torch
from torch import Tensor

from scoresde_cli.sdes.operators import LinearOperator, expand


def join(x: Tensor, v: Tensor) -> Tensor:
    """The state of positions x and velocities v, (B, *D) each."""
    return torch.cat([x, v], dim=1)


def split(z: Tensor) -> tuple[Tensor, Tensor]:
    """(x, v), (B, *D) each, of states z."""
    x, v = z.chunk(2, dim=1)
    return x, v


class Blocks(LinearOperator):
    """The matrix [[xx, xv], [vx, vv]] on (x, v), the same in each coordinate: four numbers a sample, (B,) each."""

    def __init__(self, xx: Tensor, xv: Tensor, vx: Tensor, vv: Tensor) -> None:
        self.xx, self.xv, self.vx, self.vv = xx, xv, vx, vv

    def mul(self, z: Tensor) -> Tensor:
        x, v = split(z)
        xx, xv, vx, vv = (expand(c, x) for c in (self.xx, self.xv, self.vx, self.vv))
        return join(xx * x + xv * v, vx * x + vv * v)

    def mul_t(self, v: Tensor) -> Tensor:
        return Blocks(self.xx, self.vx, self.xv, self.vv).mul(v)

    def inverse(self) -> "Blocks":
        det = self.xx * self.vv - self.xv * self.vx
        return Blocks(self.vv / det, -self.xv / det, -self.vx / det, self.xx / det)

    def solve(self, v: Tensor) -> Tensor:
        return self.inverse().mul(v)

    def solve_t(self, v: Tensor) -> Tensor:
        return self.inverse().mul_t(v)

    def trace_cov(self, d: int) -> Tensor:
        """tr(L L^T) for data of d dimensions, states of 2 d."""
        return d * (self.xx.square() + self.xv.square() + self.vx.square() + self.vv.square())

    def logdet(self, d: int) -> Tensor:
        """log |det L| for data of d dimensions, states of 2 d."""
        return d * (self.xx * self.vv - self.xv * self.vx).abs().log()
