"""A multilayer perceptron that sees the logarithm of the radius: for data with heavy tails."""

import torch
from torch import Tensor

from scoresde_cli.networks.mlp import MLP


def compress(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x log(1 + r) / r with r = |x|, and what its Jacobian is made of: x, g = log(1 + r) / r and g' / r, for x (B, d)."""
    r2 = x.square().sum(1, keepdim=True)
    r = (r2 + 1e-12).sqrt()
    g = torch.log1p(r) / r
    return g * x, g, (1 / (1 + r) - g) / (r * r)


class LogMLP(MLP):
    """MLP of (x log(1 + |x|) / |x|, c): its inputs stay small however far out x is. Arguments as for MLP."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(compress(x.flatten(1))[0], c).reshape(x.shape)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        flat, w = x.flatten(1), v.flatten(2)
        m = w.shape[1]
        z, g, slope = compress(flat)
        along = (flat[:m] * w).sum(2, keepdim=True)
        out, jvp = super().forward_dual(z, c, g[:m] * w + slope[:m] * along * flat[:m])
        return out.reshape(x.shape), jvp.reshape(v.shape)
