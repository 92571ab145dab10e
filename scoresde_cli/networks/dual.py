"""Building blocks of an explicit dual pass: a primal and K tangents in one stack (1 + K, B, width).

A linear layer is then one tall matrix product for the primal and all tangents; an activation maps
(u, du) to (f(u), f'(u) du). Everything is made of differentiable torch operations, so a loss can be differentiated
through it by the ordinary reverse pass.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "tanh", "softplus", "elu", "relu", "leaky_relu"]

# No curvature: E[2 v^T J v] is right, its gradient is not (the second derivative is zero almost everywhere).
PIECEWISE_LINEAR = ("relu", "leaky_relu")
PIECEWISE_LINEAR_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold, nn.Hardsigmoid, nn.MaxPool2d,
)  # fmt: skip


def activate(name: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """(f(u), f'(u)) of the named activation."""
    match name:
        case "silu":
            s = torch.sigmoid(u)
            f = u * s
            return f, s + f * (1.0 - s)
        case "gelu":
            cdf = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5)))
            return u * cdf, cdf + u * torch.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
        case "tanh":
            f = torch.tanh(u)
            return f, 1.0 - f * f
        case "softplus":
            return F.softplus(u), torch.sigmoid(u)
        case "elu":
            return F.elu(u), torch.where(u > 0, torch.ones_like(u), torch.exp(u.clamp_max(0.0)))
        case "relu":
            return F.relu(u), (u > 0).to(u.dtype)
        case "leaky_relu":
            return F.leaky_relu(u), torch.where(u > 0, 1.0, 0.01).to(u.dtype)


def value(name: Activation, u: Tensor) -> Tensor:
    """f(u) alone."""
    return getattr(F, name)(u) if name != "tanh" else torch.tanh(u)


def linear(layer: nn.Module, stack: Tensor) -> Tensor:
    """The layer on a stack: its bias moves the primal only."""
    assert isinstance(layer, nn.Linear)
    out = stack @ layer.weight.T
    return torch.cat([out[:1] + layer.bias, out[1:]])


def activation(name: Activation, stack: Tensor) -> Tensor:
    """The activation on a stack."""
    f, slope = activate(name, stack[0])
    return torch.cat([f.unsqueeze(0), slope * stack[1:]])
