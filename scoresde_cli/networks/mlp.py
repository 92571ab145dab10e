"""A multilayer perceptron with the noise level among its inputs, and its explicit dual pass."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from scoresde_cli.networks import dual
from scoresde_cli.networks.embedding import NoiseEmbedding


class MLP(nn.Module):
    """(x, c) -> (B, *D): `depth` hidden layers of `width` units on [x, embedding(c)].

    The last layer starts at zero, so an untrained network returns zero.

    Args:
        shape: D, any data shape; it is flattened inside.
        width: units of a hidden layer.
        depth: number of hidden layers.
        activation: smooth ones for implicit and sliced losses (dual.PIECEWISE_LINEAR are refused there).
    """

    def __init__(
        self, shape: tuple[int, ...], width: PositiveInt = 128, depth: PositiveInt = 3,
        activation: dual.Activation = "silu",
    ) -> None:  # fmt: skip
        super().__init__()
        d = int(torch.Size(shape).numel())
        self.activation = activation
        self.embedding = NoiseEmbedding()
        self.first = nn.Linear(d, width)
        self.level = nn.Linear(self.embedding.features, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = dual.value(self.activation, self.first(x.flatten(1)) + self.level(self.embedding(c)))
        for layer in self.hidden:
            h = dual.value(self.activation, layer(h))
        return self.last(h).reshape(x.shape)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out (B, *D), J v (K, B, *D)) for directions v of shape (K, B, *D)."""
        u, du = dual.linear(self.first, (x.flatten(1), v.flatten(2)))
        pair = u + self.level(self.embedding(c)), du
        for layer in self.hidden:
            pair = dual.linear(layer, dual.activation(self.activation, pair))
        out, jvp = dual.linear(self.last, dual.activation(self.activation, pair))
        return out.reshape(x.shape), jvp.reshape(v.shape)
