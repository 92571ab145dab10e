"""The blocks of a network on images, each for a batch alone and for a batch with tangents.

A block maps (h, dh) to (h, dh): h (B, C, H, W), and dh (K, m, C, H, W), K tangents of each of the first m samples, or None. What is
linear (convolutions, padding, pooling, upsampling) is applied to both, its bias to h alone. Normalisation, its scale and shift and
the activation are one operation with its reverse pass written out (`Normalise`). With means over a group of channels, and

    u^ = r (u - mean u),   r = (var u + eps)^(-1/2),   a = s u^ + b,   h = silu(a)
    du^ = r (du - mean du - u^ mean(u^ du)),           dh = silu'(a) s du^

the reverse pass is, for gradients g of h and g_k of dh_k,

    g_a   = silu'(a) g + silu''(a) sum_k g_k s du^_k          y_k = s silu'(a) g_k
    g_du  = r (y - mean y - u^ p),  p = mean(u^ y)            g_u^ = s g_a - r sum_k (q_k y_k + p_k du_k),  q = mean(u^ du)
    g_u   = r (g_u^ - mean g_u^ - u^ (mean(u^ g_u^) + sum_k mean(y_k du^_k)))

where with S = sigmoid(a), silu = a S, silu' = silu + S - silu S and silu'' = S + silu' - 2 S silu'.

With tangents all of it is float32 where autocast gives lower precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor | None]
EPS = 1e-5


def grouped(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """The mean over each group of channels from sums over pixels (..., C), for every channel of the group, (..., C)."""
    size = sums.shape[-1] // groups
    means = sums.unflatten(-1, (groups, size)).sum(-1) / (size * pixels)
    return means.repeat_interleave(size, dim=-1)


def over_pixels(x: Tensor) -> Tensor:
    """The sum over pixels, (..., C, H, W) -> (..., C)."""
    return x.sum((-2, -1))


def wide(x: Tensor) -> Tensor:
    """(..., C) -> (..., C, 1, 1)."""
    return x[..., None, None]


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale x + shift, (..., C, H, W), by channel; twice as fast as addcmul with a shift that is broadcast."""
    return (x * wide(scale)).add_(wide(shift))


class Normalise(torch.autograd.Function):
    """(u (B, C, H, W), du (K, m, C, H, W), s (B, C), b (B, C)) -> (h, dh) as above, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, du: Tensor, s: Tensor, b: Tensor, groups: int, bent: bool
    ) -> tuple[Tensor, Tensor]:
        m, pixels = du.shape[1], u.shape[-2] * u.shape[-1]

        def mean(sums: Tensor) -> Tensor:
            return grouped(sums, groups, pixels)

        hat, _, r = torch.native_group_norm(u.contiguous(), None, None, len(u), u.shape[1], pixels, groups, EPS)
        r = r.repeat_interleave(u.shape[1] // groups, dim=-1)
        h = scaled(hat, s, b)
        sum_du, sum_hat_du = over_pixels(du), over_pixels(hat[:m] * du)
        mean_du, q = mean(sum_du), mean(sum_hat_du)
        rs = r[:m] * s[:m]
        t = scaled(du, rs, -mean_du * rs)
        t.addcmul_(hat[:m], wide(-q * rs))
        ctx.groups, ctx.bent = groups, bent
        if not bent:
            ctx.save_for_backward(hat, t, du, r, s, sum_du, sum_hat_du)
            return h, t
        sigmoid = torch.sigmoid(h)
        h.mul_(sigmoid)
        slope = torch.add(h, sigmoid).addcmul_(h, sigmoid, value=-1.0)
        ctx.save_for_backward(hat, t, du, r, s, sum_du, sum_hat_du, sigmoid, slope)
        return h, slope[:m] * t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        hat, t, du, r, s, sum_du, sum_hat_du, *bending = ctx.saved_tensors
        m, pixels = du.shape[1], hat.shape[-2] * hat.shape[-1]

        def mean(sums: Tensor) -> Tensor:
            return grouped(sums, ctx.groups, pixels)

        def front(part: Tensor) -> Tensor:
            """(m, C) of the samples with tangents as (B, C), zero for the others."""
            return part if m == len(hat) else F.pad(part, (0, 0, 0, len(hat) - m))

        r_m, s_m, hat_m = r[:m], s[:m], hat[:m]
        if ctx.bent:
            sigmoid, slope = bending
            g_a, g_t = g * slope, g_k * slope[:m]
            bend = torch.add(sigmoid[:m], slope[:m]).addcmul_(sigmoid[:m], slope[:m], value=-2.0)
            g_a[:m].addcmul_((g_k * t).sum(0) if len(t) > 1 else (g_k * t)[0], bend)
        else:
            g_a, g_t = g.clone(), g_k
        sum_a, sum_hat_a = over_pixels(g_a), over_pixels(g_a * hat)
        sum_t, sum_hat_t, sum_du_t = over_pixels(g_t), over_pixels(g_t * hat_m), over_pixels(g_t * du)
        mean_du, q, p = mean(sum_du), mean(sum_hat_du), mean(s_m * sum_hat_t)
        turned = r_m * (sum_du_t - mean_du * sum_t - q * sum_hat_t)  # sum over pixels of silu'(a) g_k du^_k
        rs = r * s
        g_du = scaled(g_t, rs[:m], -r_m * mean(s_m * sum_t))
        g_du.addcmul_(hat_m, wide(-r_m * p))
        level = s * sum_a - front((r_m * (q * s_m * sum_t + p * sum_du)).sum(0))  # sum over pixels of g_u^
        slope = s * sum_hat_a - front((r_m * (q * s_m * sum_hat_t + p * sum_hat_du)).sum(0))  # and of u^ g_u^
        slope = slope + front((s_m * turned).sum(0))
        g_u = g_a.mul_(wide(rs))
        g_u.addcmul_(hat, wide(-r * mean(slope))).sub_(wide(r * mean(level)))
        for k in range(len(du)):
            g_u[:m].addcmul_(g_t[k], wide(-r_m.square() * q[k] * s_m)).addcmul_(du[k], wide(-r_m.square() * p[k]))
        return g_u, g_du, sum_hat_a + front(turned.sum(0)), sum_a, None, None


def linear(f: Callable[[Tensor], Tensor], h: Tensor, dh: Tensor | None) -> Pair:
    """A linear map of images on a batch and on its tangents."""
    return f(h), None if dh is None else f(dh.flatten(0, 1)).unflatten(0, dh.shape[:2])


class Conv(nn.Conv2d):
    """A convolution that keeps the size, or divides it by `stride`."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, zero: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2)
        if zero:
            nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor, dh: Tensor | None = None) -> Pair:  # type: ignore[override]
        out = F.conv2d(h, self.weight, self.bias, self.stride, self.padding)
        if dh is None:
            return out, None
        tangents = F.conv2d(dh.flatten(0, 1), self.weight, None, self.stride, self.padding)
        return out, tangents.unflatten(0, dh.shape[:2])


class Norm(nn.Module):
    """Group normalisation (Wu and He, ECCV 2018), by 1 + scale and shift where a sample brings them, then SiLU where `bent`.

    Args:
        channels: C, in groups of at least 4 channels, at most 8 groups.
    """

    def __init__(self, channels: int, bent: bool = True) -> None:
        super().__init__()
        self.groups = next(g for g in (8, 4, 2, 1) if channels % g == 0 and (channels // g >= 4 or g == 1))
        self.bent = bent
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor, dh: Tensor | None = None, film: Tensor | None = None) -> Pair:
        """film (B, 2 C): the scale and the shift."""
        s, b = self.weight.expand(len(h), -1), self.bias.expand(len(h), -1)
        if film is not None:
            scale, shift = film.to(s.dtype).chunk(2, dim=1)
            s, b = s * (1.0 + scale), torch.addcmul(b, b, scale) + shift
        if dh is not None:
            h = h.to(s.dtype)
            return Normalise.apply(h, dh.to(s.dtype), s, b, self.groups, self.bent)
        if film is None:
            a = F.group_norm(h, self.groups, self.weight, self.bias, EPS)
        else:
            hat = F.group_norm(h, self.groups, eps=EPS)
            a = scaled(hat, s.to(hat.dtype), b.to(hat.dtype))
        return F.silu(a) if self.bent else a, None


class Residual(nn.Module):
    """h + W_2 silu(norm(W_1 silu(norm(h)); embedding)), both W convolutions, W_2 zero at first; h by W_3 where channels change."""

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.before, self.inner = Norm(inputs), Conv(inputs, outputs)
        self.film = nn.Linear(features, 2 * outputs)
        self.after, self.outer = Norm(outputs), Conv(outputs, outputs, zero=True)
        self.short = None if inputs == outputs else Conv(inputs, outputs, 1)

    def forward(self, h: Tensor, dh: Tensor | None, embedding: Tensor) -> Pair:
        u, du = self.outer(*self.after(*self.inner(*self.before(h, dh)), self.film(embedding)))
        h, dh = (h, dh) if self.short is None else self.short(h, dh)
        return h + u, None if dh is None else dh + du


class Attention(nn.Module):
    """h + W softmax(q^T k / sqrt(c)) v over the pixels, in heads of c channels, W zero at first (Vaswani et al., NeurIPS 2017).

    With P the softmax of L, dP = P (dL - sum(P dL)) and the tangent of P v is dP v + P dv.
    """

    def __init__(self, channels: int, head: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head) if channels % head == 0 else 1
        self.norm, self.mix = Norm(channels, bent=False), Conv(channels, 3 * channels, 1)
        self.last = Conv(channels, channels, 1, zero=True)

    def forward(self, h: Tensor, dh: Tensor | None = None) -> Pair:
        qkv, tangents = self.mix(*self.norm(h, dh))
        q, k, v = self._heads(qkv)
        scale = q.shape[-1] ** -0.5
        P = torch.softmax(q @ k.mT * scale, dim=-1)
        out, pushed = P @ v, None
        if dh is not None and tangents is not None:
            m = dh.shape[1]
            some, (dq, dk, dv) = P[:m], self._heads(tangents)
            dL = (dq @ k[:m].mT + q[:m] @ dk.mT) * scale
            dP = some * (dL - (some * dL).sum(-1, keepdim=True))
            pushed = self._image(dP @ v[:m] + some @ dv, tangents)
        u, du = self.last(self._image(out, qkv), pushed)
        return h + u, None if dh is None else dh + du

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(..., 3 C, H, W) -> three of (..., heads, H W, C / heads)."""
        return qkv.flatten(-2).unflatten(-2, (3, self.heads, -1)).mT.unbind(-4)

    def _image(self, out: Tensor, like: Tensor) -> Tensor:
        """(..., heads, H W, C / heads) -> (..., C, H, W)."""
        return out.mT.flatten(-3, -2).unflatten(-1, like.shape[-2:])


class Block(nn.Module):
    """A residual block, and attention after it where `attends`."""

    def __init__(self, inputs: int, outputs: int, features: int, attends: bool) -> None:
        super().__init__()
        self.residual, self.attention = Residual(inputs, outputs, features), Attention(outputs) if attends else None

    def forward(self, h: Tensor, dh: Tensor | None, embedding: Tensor) -> Pair:
        h, dh = self.residual(h, dh, embedding)
        return (h, dh) if self.attention is None else self.attention(h, dh)


class Up(nn.Module):
    """A convolution to the channels of the finer level, at a quarter of what it costs there, then twice the size by copies."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs)

    def forward(self, h: Tensor, dh: Tensor | None = None) -> Pair:
        return linear(lambda u: F.interpolate(u, scale_factor=2.0, mode="nearest"), *self.conv(h, dh))


def joined(a: Pair, b: Pair) -> Pair:
    """Two pairs, their channels one after the other's."""
    (h, dh), (g, dg) = a, b
    return torch.cat([h, g], 1), None if dh is None or dg is None else torch.cat([dh, dg], 2)
