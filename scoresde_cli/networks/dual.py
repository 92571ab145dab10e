"""Building blocks of an explicit dual pass: a primal h (B, width) and K tangents dh (K, B, width) side by side.

A linear layer maps (h, dh) to (W h + b, W dh), the tangents in one tall matrix product; an activation maps (u, du) to
(f(u), f'(u) du). The activation's own reverse pass is written out, with f'', so that a training step costs few kernels:

    grad_u  = f'(u) grad_f + f''(u) sum_k grad_k du_k        grad_du_k = f'(u) grad_k
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "tanh", "softplus", "elu", "relu", "leaky_relu"]
Pair = tuple[Tensor, Tensor]

# No curvature: E[2 v^T J v] is right, its gradient is not (the second derivative is zero almost everywhere).
PIECEWISE_LINEAR = ("relu", "leaky_relu")
PIECEWISE_LINEAR_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold, nn.Hardsigmoid, nn.MaxPool2d,
)  # fmt: skip


def derivatives(name: Activation, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(f(u), f'(u), f''(u)) of the named activation."""
    match name:
        case "silu":
            s = torch.sigmoid(u)
            f = u * s
            slope = s + f * (1.0 - s)
            return f, slope, (1.0 - s) * (s + slope - f * s)
        case "gelu":
            cdf = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5)))
            pdf = torch.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
            return u * cdf, cdf + u * pdf, pdf * (2.0 - u * u)
        case "tanh":
            f = torch.tanh(u)
            slope = 1.0 - f * f
            return f, slope, -2.0 * f * slope
        case "softplus":
            s = torch.sigmoid(u)
            return F.softplus(u), s, s * (1.0 - s)
        case "elu":
            e = torch.exp(u.clamp_max(0.0))
            negative = (u <= 0).to(u.dtype)
            return F.elu(u), 1.0 + negative * (e - 1.0), negative * e
        case "relu":
            return F.relu(u), (u > 0).to(u.dtype), torch.zeros_like(u)
        case "leaky_relu":
            return F.leaky_relu(u), torch.where(u > 0, 1.0, 0.01).to(u.dtype), torch.zeros_like(u)


class Activate(torch.autograd.Function):
    """(u, du) -> (f(u), f'(u) du), differentiable once."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, du: Tensor, name: Activation) -> Pair:
        f, slope, curvature = derivatives(name, u)
        ctx.save_for_backward(slope, curvature, du)
        return f, slope * du

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_df: Tensor) -> tuple[Tensor, Tensor, None]:
        slope, curvature, du = ctx.saved_tensors
        return slope * grad_f + curvature * (grad_df * du).sum(0), slope * grad_df, None


def activation(name: Activation, pair: Pair) -> Pair:
    """The activation on a primal and its tangents."""
    return Activate.apply(*pair, name)


def linear(layer: nn.Module, pair: Pair) -> Pair:
    """The layer on a primal and its tangents: its bias moves the primal only."""
    assert isinstance(layer, nn.Linear)
    h, dh = pair
    return layer(h), F.linear(dh, layer.weight)


def value(name: Activation, u: Tensor) -> Tensor:
    """f(u) alone."""
    return torch.tanh(u) if name == "tanh" else getattr(F, name)(u)
