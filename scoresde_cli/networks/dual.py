"""Building blocks of an explicit dual pass: a batch of B primals and K tangents of its first m samples in one tall matrix
(B + K m, width), the primals first, then the tangents direction by direction.

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

from scoresde_cli.errors import ScoreSDEError

Sizes = tuple[int, int]  # (B, m)
Activation = Literal["silu", "gelu", "tanh", "softplus", "elu", "relu", "leaky_relu"]

# No curvature: E[2 v^T J v] is right, its gradient is not (the second derivative is zero almost everywhere).
PIECEWISE_LINEAR = ("relu", "leaky_relu")
PIECEWISE_LINEAR_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold, nn.Hardsigmoid, nn.MaxPool2d,
)  # fmt: skip


def first(name: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    """(f(u), f'(u)) of the named activation."""
    match name:
        case "silu":
            s = torch.sigmoid(u)
            f = u * s
            return f, torch.addcmul(s + f, f, s, value=-1.0)
        case "gelu":
            cdf = 0.5 * (1.0 + torch.erf(u * math.sqrt(0.5)))
            return u * cdf, cdf + u * torch.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
        case "tanh":
            f = torch.tanh(u)
            return f, 1.0 - f * f
        case "softplus":
            return value(name, u), torch.sigmoid(u)
        case "elu":
            return F.elu(u), torch.exp(u.clamp_max(0.0))
        case "relu":
            return F.relu(u), (u > 0).to(u.dtype)
        case "leaky_relu":
            return F.leaky_relu(u), torch.where(u > 0, 1.0, 0.01).to(u.dtype)


def second(name: Activation, u: Tensor, f: Tensor) -> Tensor:
    """f''(u) of the named activation, f = f(u) being known."""
    match name:
        case "silu":
            s, f = torch.sigmoid(u), f.to(u.dtype)
            slope = torch.addcmul(f, s, 1.0 - f, value=2.0)
            return torch.addcmul(slope, slope, s, value=-1.0)  # (1 - s) (f + 2 s (1 - f))
        case "gelu":
            return torch.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi) * (2.0 - u * u)
        case "tanh":
            f = torch.tanh(u)
            return -2.0 * f * (1.0 - f * f)
        case "softplus":
            s = torch.sigmoid(u)
            return s * (1.0 - s)
        case "elu":
            return (u <= 0).to(u.dtype) * torch.exp(u.clamp_max(0.0))
        case "relu" | "leaky_relu":
            return torch.zeros_like(u)


def pull(name: Activation, u: Tensor, grad: Tensor) -> Tensor:
    """f'(u) grad, by one kernel where there is one."""
    return torch.ops.aten.silu_backward(grad, u) if name == "silu" else first(name, u)[1] * grad


class Activate(torch.autograd.Function):
    """(stack, shift, scale) -> stack, differentiable once; shift (B, w), scale (B, w) or None for one.

    Slopes and curvatures are those of the m samples that have tangents.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, sizes: Sizes, shift: Tensor, scale: Tensor | None, name: Activation) -> Tensor:
        m = sizes[1]
        u, du = parts(stack, sizes)
        moved = u + shift
        a = moved if scale is None else moved * scale
        out = torch.empty_like(stack)
        f, tangents = parts(out, sizes)
        if name == "silu" and f.dtype == a.dtype:
            torch.ops.aten.silu.out(a, out=f)
        else:
            f.copy_(value(name, a))
        steep = pull(name, a[:m], a.new_ones(()).expand_as(a[:m]) if scale is None else scale[:m])
        torch.mul(du, steep.to(stack.dtype), out=tangents)
        ctx.sizes, ctx.name = sizes, name
        ctx.save_for_backward(stack, moved, a, steep, scale, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
        stack, moved, a, steep, scale, made = ctx.saved_tensors
        B, m = ctx.sizes
        (_, du), (grad_0, grad_k) = parts(stack, ctx.sizes), parts(grad, ctx.sizes)
        bent = (grad_k[0] * du[0]).to(a.dtype) if len(du) == 1 else (grad_k * du).sum(0, dtype=a.dtype)
        grad_a = pull(ctx.name, a, grad_0.to(a.dtype))
        grad_a[:m].addcmul_(second(ctx.name, a[:m], made[:m]), bent if scale is None else bent * scale[:m])
        grad_u, grad_scale = grad_a, None
        if scale is not None:
            grad_u, grad_scale = grad_a * scale, moved * grad_a
            grad_scale[:m] += pull(ctx.name, a[:m], bent)
        out = torch.empty_like(stack)
        out[:B] = grad_u
        torch.mul(grad_k, steep.to(stack.dtype), out=parts(out, ctx.sizes)[1])
        return out, None, grad_u, grad_scale, None


def stack(primal: Tensor, tangents: Tensor) -> Tensor:
    """(B, *D) and (K, m, *D) in one matrix, each sample flat: (B + K m, d)."""
    return torch.cat([primal.flatten(1), tangents.flatten(2).flatten(0, 1)])


def parts(stack: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Views of a stack: the primals (B, w) and the tangents (K, m, w)."""
    return stack[: sizes[0]], stack[sizes[0] :].view(-1, sizes[1], stack.shape[1])


def split(layer: nn.Linear, stack: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, *D), J v (K, m, *D)) of the last layer."""
    primal, tangents = parts(F.linear(stack, layer.weight), (len(x), v.shape[1]))
    return (primal + layer.bias).reshape(x.shape), tangents.reshape(v.shape)


def activation(name: Activation, stack: Tensor, sizes: Sizes, shift: Tensor, scale: Tensor | None = None) -> Tensor:
    """f(scale (u + shift)) and its tangents; shift (w,) or (B, w), scale (B, w)."""
    return Activate.apply(stack, sizes, shift.expand(sizes[0], -1), scale, name)


def value(name: Activation, u: Tensor) -> Tensor:
    """f(u) alone."""
    if name == "softplus":
        return F.softplus(u, threshold=40.0)  # at torch's 20 it would leave its own derivative by 1e-9
    return torch.tanh(u) if name == "tanh" else getattr(F, name)(u)


def refuse(network: nn.Module, loss: str, second_order: bool) -> None:
    """Raise ScoreSDEError where a loss that pushes tangents would be wrong on a network without saying so."""
    activation = getattr(network, "activation", None)
    flat = [type(m).__name__ for m in network.modules() if isinstance(m, PIECEWISE_LINEAR_MODULES)]
    if second_order and (activation in PIECEWISE_LINEAR or flat):
        raise ScoreSDEError(
            f"network.activation={activation or flat[0]} with loss={loss}: piecewise linear, so the gradient of tr J is "
            "silently wrong (its second derivative is zero almost everywhere); take silu, gelu, tanh, or loss=dsm or fd_ssm"
        )
    mixing = [type(m).__name__ for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if mixing:
        raise ScoreSDEError(
            f"the network holds {mixing[0]}: it mixes the samples of a batch, so tr J of a single sample is wrong under "
            f"loss={loss}; take LayerNorm or GroupNorm, or loss=dsm"
        )
