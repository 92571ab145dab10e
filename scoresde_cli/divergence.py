"""The score and the trace of its Jacobian: the only doors to second derivatives.

`score_and_projections` pushes K directions through the field by forward-mode differentiation, with one primal pass
shared by all of them; `score_and_trace` pushes all d unit directions, in chunks. Both are differentiable by autograd.
A field is a callable (x, t) -> (B, *D). It may implement

    forward_dual(x, t, v) -> (out (B, *D), jvp (K, B, *D))     its own dual pass
    forward_trace(x, t)   -> (out (B, *D), trace (B,))         a cheaper exact trace

and otherwise `torch.func` does the work. No field may mix the samples of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def dual(field: Field, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The field and its Jacobian-vector products: (out (B, *D), J v (K, B, *D)) for v of shape (K, B, *D)."""
    if hasattr(field, "forward_dual"):
        return field.forward_dual(x, t, v)

    def push(tangent: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda y: field(y, t), (x,), (tangent,))

    out, jvp = torch.func.vmap(push, randomness="same")(v)
    return out[0], jvp


def inner(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """The inner product over all but the first `axes` axes."""
    return (a * b).flatten(axes).sum(-1)


def score_and_projections(field: Field, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(score (B, *D), v_k^T J v_k (K, B)) for directions v of shape (K, B, *D)."""
    out, jvp = dual(field, x, t, v)
    return out, inner(v, jvp, 2)


def score_and_trace(field: Field, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(score (B, *D), tr J (B,)), exact."""
    if hasattr(field, "forward_trace"):
        return field.forward_trace(x, t)
    return weighted_trace(field, x, t, None)


def weighted_trace(
    field: Field, x: Tensor, t: Tensor, weight: Tensor | None, elements: int = 1 << 24
) -> tuple[Tensor, Tensor]:
    """(out (B, *D), sum_i w_i J_ii (B,)) with weights w (B, d), by unit directions in chunks.

    A chunk's directions hold at most `elements` numbers, so memory does not grow like d^2.
    """
    d = x[0].numel()
    chunk = max(1, min(d, elements // max(1, x.numel())))
    trace, out = torch.zeros(len(x), dtype=x.dtype, device=x.device), None
    for start in range(0, d, chunk):
        index = torch.arange(start, min(start + chunk, d), device=x.device)
        unit = torch.nn.functional.one_hot(index, d).to(x.dtype)
        v = unit.unsqueeze(1).expand(len(index), len(x), d).reshape(len(index), *x.shape)
        out, jvp = dual(field, x, t, v)
        diagonal = jvp.flatten(2).gather(2, index.view(-1, 1, 1).expand(-1, len(x), 1)).squeeze(-1)
        trace = trace + (diagonal if weight is None else diagonal * weight[:, index].T).sum(0)
    assert out is not None
    return out, trace
