"""The gradient of a scalar multilayer perceptron, and its explicit dual pass: forward over reverse.

The field is grad_x e(x, c), so its Jacobian is a Hessian: symmetric, and v^T J v = v^T (grad grad e) v. With
a_1 = W_1 x + b_1 + E_1 c', a_i = s_i (W_i f(a_{i-1}) + b_i), e = w^T f(a_depth), the reverse sweep is

    r_depth = f'(a_depth) w,    r_{i-1} = f'(a_{i-1}) W_i^T (s_i r_i),    grad e = W_1^T r_1,

and a tangent follows both sweeps: da_1 = W_1 v, da_i = s_i W_i (f' da_{i-1}); dr_depth = f'' w da_depth,
dr_{i-1} = f' W_i^T (s_i dr_i) + f'' (W_i^T s_i r_i) da_{i-1}; Hessian v = W_1^T dr_1.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde_cli.networks import dual
from scoresde_cli.networks.embedding import NoiseEmbedding

Smooth = Literal["silu", "gelu", "tanh", "softplus"]  # three derivatives: the gradient of tr J holds f'''


class EnergyMLP(nn.Module):
    """(x, c) -> grad_x e(x, c), (B, *D), of the scalar perceptron above; `energy` is e itself, (B,).

    w starts at zero, so an untrained network returns zero.

    Args:
        shape: D, any data shape; it is flattened inside.
        width: units of a hidden layer.
        depth: number of hidden layers.
        activation: smooth ones.
        classes: as for MLP.
    """

    conservative = partial = True

    def __init__(
        self, shape: tuple[int, ...], width: PositiveInt = 128, depth: PositiveInt = 3, activation: Smooth = "silu",
        classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        d = int(torch.Size(shape).numel())
        self.activation: Smooth = activation
        self.classes = classes
        self.embedding = NoiseEmbedding(classes=classes)
        self.first = nn.Linear(d, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.level = nn.Linear(self.embedding.features, depth * width, bias=False)
        self.last = nn.Parameter(torch.zeros(width))

    def _layers(self, c: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(W, shift, s) of each layer: the shift (B, width) or (width,), s (B, width) or None for one."""
        first, *others = self.level(self.embedding(c)).chunk(1 + len(self.hidden), dim=1)
        layers: list[tuple[Tensor, Tensor, Tensor | None]] = [(self.first.weight, self.first.bias + first, None)]
        for layer, gain in zip(self.hidden, others, strict=True):
            assert isinstance(layer, nn.Linear)
            layers.append((layer.weight, layer.bias, 1.0 + gain))
        return layers

    def energy(self, x: Tensor, c: Tensor) -> Tensor:
        h = x.flatten(1)
        for weight, shift, scale in self._layers(c):
            a = F.linear(h, weight) + shift
            h = dual.value(self.activation, a if scale is None else a * scale)
        return h @ self.last

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        layers, slopes, h = self._layers(c), [], x.flatten(1)
        for weight, shift, scale in layers:
            a = F.linear(h, weight) + shift
            h, slope = dual.first(self.activation, a if scale is None else a * scale)
            slopes.append(slope if scale is None else slope * scale)  # f' s: what a layer passes back
        r = self.last.expand_as(h)
        for (weight, _, _), slope in zip(reversed(layers), reversed(slopes), strict=True):
            r = F.linear(slope * r, weight.T)
        return r.reshape(x.shape)

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(grad e (B, *D), Hessian v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        layers, saved, h = self._layers(c), [], dual.stack(x, v)
        B, m = sizes = len(x), v.shape[1]
        for weight, shift, scale in layers:
            u, du = dual.parts(F.linear(h, weight), sizes)
            a = u + shift
            a = a if scale is None else a * scale
            f, slope = dual.first(self.activation, a)
            curvature = dual.second(self.activation, a[:m], f[:m])
            if scale is not None:
                slope, curvature = slope * scale, curvature * scale[:m].square()
            h = dual.stack(f, slope[:m] * du)
            saved.append((du, slope, curvature))
        r, dr = self.last.expand(B, -1), None  # the constant w, which has no tangent
        for (weight, _, _), (du, slope, curvature) in zip(reversed(layers), reversed(saved), strict=True):
            bent = curvature * r[:m] * du
            tall = dual.stack(slope * r, bent if dr is None else slope[:m] * dr + bent)
            r, dr = dual.parts(F.linear(tall, weight.T), sizes)
        assert dr is not None
        return r.reshape(x.shape), dr.reshape(v.shape)
