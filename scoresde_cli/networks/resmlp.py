"""A residual multilayer perceptron, and its explicit dual pass (He et al., CVPR 2016, in pre-activation form)."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde_cli.networks import dual
from scoresde_cli.networks.embedding import NoiseEmbedding


class ResMLP(nn.Module):
    """(x, c) -> (B, *D): h <- h + W2 act(W1 act(h) + E embedding(c)), `depth` times.

    W2 of each block and the last layer start at zero, so the network starts as zero and each block as the identity.

    Args:
        shape: D, any data shape; it is flattened inside.
        width: units of the residual stream and of each block.
        depth: number of blocks, two layers each.
        activation: smooth ones for implicit and sliced losses (dual.PIECEWISE_LINEAR are refused there).
        classes: labels of the data, 0 where it has none; c is then (B, 2), the noise level and the label.
    """

    partial = True

    def __init__(
        self, shape: tuple[int, ...], width: PositiveInt = 128, depth: PositiveInt = 3,
        activation: dual.Activation = "silu", classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        d = int(torch.Size(shape).numel())
        self.activation, self.classes = activation, classes
        self.embedding = NoiseEmbedding(classes=classes)
        self.first = nn.Linear(d, width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.level = nn.ModuleList(nn.Linear(self.embedding.features, width, bias=False) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, d)
        for layer in (*self.outer, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h, features = self.first(x.flatten(1)), self.embedding(c)
        for inner, level, outer in zip(self.inner, self.level, self.outer, strict=True):
            u = inner(dual.value(self.activation, h)) + level(features)
            h = h + outer(dual.value(self.activation, u))
        return self.last(dual.value(self.activation, h)).reshape(x.shape)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out (B, *D), J v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        features, shift, sizes = self.embedding(c), torch.as_tensor(self.first.bias), (len(x), v.shape[1])
        h = F.linear(dual.stack(x, v), self.first.weight)
        for inner, level, outer in zip(self.inner, self.level, self.outer, strict=True):
            assert isinstance(inner, nn.Linear)
            assert isinstance(outer, nn.Linear)
            u = F.linear(dual.activation(self.activation, h, sizes, shift), inner.weight)
            h = h + F.linear(dual.activation(self.activation, u, sizes, inner.bias + level(features)), outer.weight)
            shift = shift + outer.bias  # the biases of the residual stream are added up beside it
        return dual.split(self.last, dual.activation(self.activation, h, sizes, shift), x, v)
