"""Building blocks of an explicit dual pass: a primal and its K tangents in one tensor (1 + K, B, width), the primal first.

A linear layer is one tall matrix product W [u; du_1 .. du_K] for all of them, without its bias, which moves the primal only;
the activation that follows adds it, scales and bends the primal, and multiplies the tangents by the slope. With
a = scale (u + shift):

    [u; du_k] -> [f(a); f'(a) scale du_k]

Its reverse pass is written out, so that a training step costs few kernels besides its matrix products:

    grad_a    = f'(a) grad_0 + f''(a) scale sum_k grad_k du_k          grad_du_k = f'(a) scale grad_k
    grad_u    = scale grad_a                                           grad_scale = (u + shift) grad_a + f'(a) sum_k grad_k du_k

Under autocast the tall products and their operands are of low precision (and so are the products that make shift and scale);
a, the slopes and the sums over k are float32.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "tanh", "softplus", "elu", "relu", "leaky_relu"]

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
            return value(name, u), s, s * (1.0 - s)
        case "elu":
            e = torch.exp(u.clamp_max(0.0))
            negative = (u <= 0).to(u.dtype)
            return F.elu(u), 1.0 + negative * (e - 1.0), negative * e
        case "relu":
            return F.relu(u), (u > 0).to(u.dtype), torch.zeros_like(u)
        case "leaky_relu":
            return F.leaky_relu(u), torch.where(u > 0, 1.0, 0.01).to(u.dtype), torch.zeros_like(u)


class Activate(torch.autograd.Function):
    """(stack (1 + K, B, w), shift, scale) -> stack, differentiable once; shift (B, w), scale (B, w) or None for one."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, shift: Tensor, scale: Tensor | None, name: Activation) -> Tensor:
        moved = stack[0] + shift
        f, slope, curvature = derivatives(name, moved if scale is None else moved * scale)
        out = torch.empty_like(stack)
        out[0] = f
        torch.mul(stack[1:], (slope if scale is None else slope * scale).to(stack.dtype), out=out[1:])
        ctx.save_for_backward(stack, slope, curvature, scale, None if scale is None else moved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        stack, slope, curvature, scale, moved = ctx.saved_tensors
        bent = (grad[1:] * stack[1:]).sum(0, dtype=slope.dtype)
        grad_a = slope * grad[0] + curvature * (bent if scale is None else bent * scale)
        grad_u = grad_a if scale is None else grad_a * scale
        out = torch.empty_like(stack)
        out[0] = grad_u
        torch.mul(grad[1:], (slope if scale is None else slope * scale).to(stack.dtype), out=out[1:])
        return out, grad_u, None if scale is None else moved * grad_a + slope * bent, None


def stack(primal: Tensor, tangents: Tensor) -> Tensor:
    """(B, *D) and (K, B, *D) in one tensor, each sample flat: (1 + K, B, d)."""
    return torch.cat([primal.flatten(1).unsqueeze(0), tangents.flatten(2)])


def split(layer: nn.Linear, stack: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, *D), J v (K, B, *D)) of the last layer."""
    primal, tangents = torch.split(F.linear(stack, layer.weight), [1, len(v)])
    return (primal.squeeze(0) + layer.bias).reshape(x.shape), tangents.reshape(v.shape)


def activation(name: Activation, stack: Tensor, shift: Tensor, scale: Tensor | None = None) -> Tensor:
    """f(scale (u + shift)) and its tangents; shift (w,) or (B, w), scale (B, w)."""
    return Activate.apply(stack, shift.expand_as(stack[0]), scale, name)


def value(name: Activation, u: Tensor) -> Tensor:
    """f(u) alone."""
    if name == "softplus":
        return F.softplus(u, threshold=40.0)  # at torch's 20 it would leave its own derivative by 1e-9
    return torch.tanh(u) if name == "tanh" else getattr(F, name)(u)
