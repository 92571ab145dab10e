"""A multilayer perceptron with the noise level among its inputs, and its explicit dual pass."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde_cli.networks import dual
from scoresde_cli.networks.embedding import NoiseEmbedding


class MLP(nn.Module):
    """(x, c) -> (B, *D): u_1 = W_1 x + E_1 e(c), u_i = (W_i act(u_{i-1}) + b_i) (1 + E_i e(c)), out = W act(u_depth).

    The noise level scales every hidden layer (cf. Perez et al., "FiLM", AAAI 2018).
    The last layer starts at zero, so an untrained network returns zero.

    Args:
        shape: D, any data shape; it is flattened inside.
        width: units of a hidden layer.
        depth: number of hidden layers.
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
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.level = nn.Linear(self.embedding.features, depth * width, bias=False)
        self.last = nn.Linear(width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def _levels(self, c: Tensor) -> tuple[Tensor, ...]:
        """E_1 e(c), then 1 + E_i e(c) of each further layer, (B, width) each, by one product."""
        first, *others = self.level(self.embedding(c)).chunk(1 + len(self.hidden), dim=1)
        return first, *(1.0 + gain for gain in others)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, *scales = self._levels(c)
        h = dual.value(self.activation, self.first(x.flatten(1)) + shift)
        for layer, scale in zip(self.hidden, scales, strict=True):
            h = dual.value(self.activation, layer(h) * scale)
        return self.last(h).reshape(x.shape)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out (B, *D), J v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        (shift, *scales), sizes = self._levels(c), (len(x), v.shape[1])
        u = F.linear(dual.stack(x, v), self.first.weight)
        h = dual.activation(self.activation, u, sizes, self.first.bias + shift)
        for layer, scale in zip(self.hidden, scales, strict=True):
            assert isinstance(layer, nn.Linear)
            h = dual.activation(self.activation, F.linear(h, layer.weight), sizes, layer.bias, scale)
        return dual.split(self.last, h, x, v)
