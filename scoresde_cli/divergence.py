"""The score and the trace of its Jacobian: the only doors to second derivatives.

`score_and_projections` pushes K directions through the field by forward-mode differentiation, with one primal pass
shared by all of them; `score_and_trace` pushes all d unit directions. Both are differentiable by autograd.
`finite_difference` takes two evaluations a direction instead, and is biased. A field is a callable (x, t) -> (B, *D).
It may implement

    forward_dual(x, t, v)                     -> (out (B, *D), J v (K, B, *D))       its own dual pass
    forward_projections(x, t, v, exact)       -> (out (B, *D), v_k^T J v_k (K, B))   cheaper than J v and a product
    forward_trace(x, t)                       -> (out (B, *D), tr J (B,))            a cheaper exact trace

and otherwise `torch.func` does the work (forward mode under vmap; forward over reverse where the field is itself a
gradient). No field may mix the samples of a batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Field = Callable[[Tensor, Tensor], Tensor]
ELEMENTS = 1 << 24  # numbers in a chunk of unit directions, where no chunk is given


def dual(field: Field, x: Tensor, t: Tensor, v: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The field and its Jacobian-vector products: (out (B, *D), J v (K, B, *D)) for v of shape (K, B, *D).

    At most `chunk` directions at a time, each chunk computed again in the backward pass, so that one is in memory.
    """
    if chunk is not None and chunk < len(v):
        out, pieces = in_chunks(lambda part: dual(field, x, t, v[part]), len(v), chunk)
        return out, torch.cat(pieces)
    if hasattr(field, "forward_dual"):
        return field.forward_dual(x, t, v)

    def push(tangent: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda y: field(y, t), (x,), (tangent,))

    out, jvp = torch.func.vmap(push, randomness="same")(v)
    return out[0], jvp


def in_chunks(
    push: Callable[[slice], tuple[Tensor, Tensor]], count: int, chunk: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(out, pieces): `push` over slices of at most `chunk` directions; more than one are checkpointed (Chen et al. 2016)."""
    slices = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    if len(slices) > 1 and torch.is_grad_enabled():
        push = partial(checkpoint, push, use_reentrant=False, preserve_rng_state=False)
    outs, pieces = zip(*[push(part) for part in slices], strict=True)
    return outs[0], pieces


def inner(a: Tensor, b: Tensor, axes: int) -> Tensor:
    """The inner product over all but the first `axes` axes."""
    return (a * b).flatten(axes).sum(-1)


def score_and_projections(field: Field, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    """(score (B, *D), v_k^T J v_k (K, B)) for directions v of shape (K, B, *D).

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

    out, pieces = in_chunks(push, d, chunk or max(1, ELEMENTS // max(1, x.numel())))
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
