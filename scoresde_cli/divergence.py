"""The score and the trace of its Jacobian: the only doors to second derivatives.

`score_and_projections` pushes K directions through the field by forward-mode differentiation, with one primal pass
shared by all of them; `score_and_trace` pushes all d unit directions. Both are differentiable by autograd.
`finite_difference` takes two evaluations a direction instead, and is biased. A field is a callable (x, t) -> (B, *D).
It may implement

    forward_dual(x, t, v)                     -> (out (B, *D), J v (K, m, *D))       its own dual pass
    forward_projections(x, t, v, exact)       -> (out (B, *D), v_k^T J v_k (K, B))   cheaper than J v and a product
    forward_trace(x, t)                       -> (out (B, *D), tr J (B,))            a cheaper exact trace

and otherwise `torch.func` does the work (forward mode under vmap; forward over reverse where the field is itself a
gradient). Directions (K, m, *D) with m < B are of the first m samples alone: in one pass where the field says `partial`,
else in two. No field may mix the samples of a batch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Field = Callable[[Tensor, Tensor], Tensor]
ELEMENTS = 1 << 24  # numbers in a chunk of unit directions, where no chunk is given


def dual(field: Field, x: Tensor, t: Tensor, v: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The field and its Jacobian-vector products: (out (B, *D), J v (K, m, *D)) for v (K, m, *D) of the first m <= B samples.

    At most `chunk` directions at a time, each chunk computed again in the backward pass, so that memory holds one.
    """
    if chunk is not None and chunk < len(v):
        out, pieces = in_chunks(field, lambda part: dual(field, x, t, v[part]), len(v), chunk, x)
        return out, torch.cat(pieces)
    m = v.shape[1]
    if m < len(x) and not getattr(field, "partial", False):
        out, jvp = dual(field, x[:m], t[:m], v)
        return torch.cat([out, field(x[m:], t[m:])]), jvp
    if hasattr(field, "forward_dual"):
        return field.forward_dual(x, t, v)

    def push(tangent: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda y: field(y, t), (x,), (tangent,))

    out, jvp = torch.func.vmap(push, randomness="same")(v)
    return out[0], jvp


class Recomputed(torch.autograd.Function):
    """`push()` without a memory of it: computed again, under the same autocast, when its gradient in the weights is asked for.

    (Chen et al., arXiv 1604.06174. torch.utils.checkpoint does not work inside torch.func, which the fallback is.)
    """

    @staticmethod
    def forward(
        ctx: Any, push: Callable[[], tuple[Tensor, Tensor]], device: str, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.push, ctx.device = push, device
        ctx.low = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(*weights)
        return push()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        enabled, dtype = ctx.low
        gpus = [torch.cuda.current_device()] if ctx.device == "cuda" else []
        with (
            torch.random.fork_rng(gpus),
            torch.enable_grad(),
            torch.autocast(ctx.device, dtype, enabled) if enabled else nullcontext(),
        ):
            outputs = ctx.push()
        asked = [out for out in outputs if out.requires_grad]
        given = [grad for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        found = torch.autograd.grad(asked, ctx.saved_tensors, given, allow_unused=True)
        return (None, None, *found)


def in_chunks(
    field: Field, push: Callable[[slice], tuple[Tensor, Tensor]], count: int, chunk: int, x: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(out, pieces): `push` over slices of at most `chunk` directions; of several, the backward pass recomputes each.

    All of them start from one state of the global generator, so that a network with dropout is one network. Where x needs a
    gradient itself, nothing is recomputed.
    """
    slices = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    if len(slices) == 1:
        out, piece = push(slices[0])
        return out, (piece,)
    weights = [p for p in field.parameters() if p.requires_grad] if isinstance(field, nn.Module) else []
    gpu = x.device.type == "cuda"
    states = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if gpu else None

    def same(part: slice) -> tuple[Tensor, Tensor]:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], x.device)
        return push(part)

    if weights and torch.is_grad_enabled() and not x.requires_grad:
        found = [Recomputed.apply(partial(same, part), x.device.type, *weights) for part in slices]
    else:
        found = [same(part) for part in slices]
    outs, pieces = zip(*found, strict=True)
    return outs[0], pieces


def inner(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """The inner product over all but the first `axes` axes."""
    return (a * b).flatten(axes).sum(-1)


def score_and_projections(field: Field, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """(score (B, *D), v_k^T J v_k (K, m)) for directions v (K, m, *D) of the first m <= B samples.

    With `exact`, what the field knows of J in closed form enters by its trace instead of its projections: the same
    expectation and the same gradient, less noise.
    """
    if hasattr(field, "forward_projections"):
        return field.forward_projections(x, t, v, exact)
    out, jvp = dual(field, x, t, v)
    return out, inner(v, jvp, 2)


def score_and_trace(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(score (B, *D), tr J (B,)), exact."""
    if hasattr(field, "forward_trace"):
        return field.forward_trace(x, t)
    return weighted_trace(field, x, t, None)


def weighted_trace(
    field: Field, x: Tensor, t: Tensor, weight: Tensor | None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, *D), sum_i w_i J_ii (B,)) with weights w (B, d), by unit directions, at most `chunk` at a time."""
    d = x[0].numel()

    def push(part: slice) -> tuple[Tensor, Tensor]:
        index = torch.arange(part.start, part.stop, device=x.device)
        unit = torch.nn.functional.one_hot(index, d).to(x.dtype)
        v = unit.unsqueeze(1).expand(len(index), len(x), d).reshape(len(index), *x.shape)
        out, jvp = dual(field, x, t, v)
        diagonal = jvp.flatten(2).gather(2, index.view(-1, 1, 1).expand(-1, len(x), 1)).squeeze(-1)
        return out, (diagonal if weight is None else diagonal * weight[:, index].T).sum(0)

    out, pieces = in_chunks(field, push, d, chunk or max(1, ELEMENTS // max(1, x.numel())), x)
    return out, torch.stack(pieces).sum(0)


def finite_difference(field: Field, x: Tensor, t: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences over steps h (B,): ((S_+ + S_-) / 2 and (S_+ - S_-) / (2 h), both (K, B, *D)), S_+- = S(x +- h v).

    They are S and J v up to O(h^2), and exact where S is linear; rounding adds O(unit roundoff |S| / h). All 2 K points
    of a sample are one batch of evaluations.
    """
    step = h.reshape(-1, *[1] * (x.ndim - 1)) * v
    points = torch.cat([x + step, x - step])
    values = field(points.flatten(0, 1), t.repeat(len(points))).reshape(points.shape)
    plus, minus = values.split(len(v))
    return 0.5 * (plus + minus), (plus - minus) / (2.0 * h.reshape(-1, *[1] * (x.ndim - 1)))
