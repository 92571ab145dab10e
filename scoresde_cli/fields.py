"""What a model returns: fields of (x, t), and the conversions between them.

With x_t = alpha x_0 + L eps, C = L L^T and the score s of p_t:

    E[x_0 | x_t] = (x_t + C s) / alpha        (Robbins 1956, Tweedie's formula; M^{-1} where the mean is M x_0)
                 = x_t - t (f - Sigma s - div Sigma) + O(t^2)      where there is no kernel
    E[eps | x_t] = -L^T s
    velocity     = f - 1/2 Sigma s - 1/2 div Sigma

In coordinates u, x = Q u, the score is Q^T s(Q u) and its Jacobian Q^T J Q.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set

import torch
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import LinearOperator, expand
from scoresde_cli.sdes.phase import join, split


class FieldModel(ABC):
    """A score, and every field that follows from it for the process `sde`."""

    sde: SDE
    provides: Set[str] = frozenset({"score", "eps", "x0", "velocity"})
    evaluations: int = 1  # of a network, for one of the score
    own_flow: bool = False  # the velocity is a field of its own, not a function of the score
    variance: float = 1.0  # of the data, the mean over coordinates
    bounds: tuple[Tensor, Tensor] | None = (
        None  # the range of the data, least and largest value of each coordinate, (d,) each
    )

    @abstractmethod
    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of p_t at x, shape (B, *D), for x (B, *D) and t (B,)."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the probability flow, (B, *D)."""
        return self.fields(x, t, {"velocity"})["velocity"]

    def labelled(self, labels: Tensor | None) -> "FieldModel":
        """The model given labels (B,) or (1,), -1 for none; itself where it knows none."""
        return self

    def whitened(self) -> "FieldModel":
        """The same law in the process's white coordinates (SDE.whitening); itself where x is white already."""
        white = self.sde.whitening()
        return self if white is None else Within(self, white.sde, lambda t: white.factor)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) up to a constant that depends on t, shape (B,); where `provides` names it."""
        raise NotImplementedError

    def gaussian_denoiser(self, y: Tensor, noise: Tensor) -> Tensor:
        """E[x_0 | x_0 + noise eps = y], shaped like y (B, *D), for levels (B,); where `provides` names it."""
        raise NotImplementedError

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score(x, t)

    def fields(self, x: Tensor, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        """The named fields, each (B, *D), from one evaluation of the score. Raises ScoreSDEError for an unknown name.

        `log_density` (B,) is one of them where the model has it.
        """
        missing = names - self.provides
        if missing:
            raise ScoreSDEError(f"the model provides {sorted(self.provides)}, asked for {sorted(missing)}")
        s = self.score(x, t)
        known: dict[str, Callable[[], Tensor]] = {
            "score": lambda: s,
            "log_density": lambda: self.log_density(x, t),
            "velocity": lambda: self.sde.velocity(x, t, s),
            "eps": lambda: -self._kernel().factor(t).mul_t(s),
            "x0": lambda: self._origin(x, t, s),
        }
        return {name: known[name]() for name in names}

    def _origin(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """E[x_0 | x_t]; without a kernel to first order in t, by one step of the reverse SDE's drift."""
        kernel = self.sde.kernel()
        if kernel is None:
            return x - expand(t, x) * self.sde.reverse_drift(x, t, s)
        return kernel.denoised(x, t, s)

    def _kernel(self):  # type: ignore[no-untyped-def]
        kernel = self.sde.kernel()
        if kernel is None:
            raise ScoreSDEError("eps needs a process with a closed-form kernel; this one has none")
        return kernel


class Within(FieldModel):
    """A field model in coordinates u, x = Q(t) u, in which the process is `sde`.

    Args:
        Q: t (B,) -> the operator.
    """

    def __init__(self, model: FieldModel, sde: SDE, Q: Callable[[Tensor], LinearOperator]) -> None:
        self.model, self.sde, self.Q = model, sde, Q
        self.provides, self.evaluations = model.provides, model.evaluations
        self.variance, self.bounds = model.variance, model.bounds

    def labelled(self, labels: Tensor | None) -> "Within":
        return Within(self.model.labelled(labels), self.sde, self.Q)

    def whitened(self) -> "Within":
        return self

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        Q = self.Q(t)
        return Q.mul_t(self.model.score(Q.mul(x), t))

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.log_density(self.Q(t).mul(x), t)

    def forward_dual(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), J v (K, B, *D)) for directions v of shape (K, B, *D)."""
        Q = self.Q(t)
        score, jvp = divergence.dual(self.model, Q.mul(x), t, torch.stack([Q.mul(each) for each in v]))
        return Q.mul_t(score), torch.stack([Q.mul_t(each) for each in jvp])

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(score (B, *D), v_k^T J v_k (K, B)); the trace of a linear part is not known in these coordinates."""
        Q = self.Q(t)
        w = torch.stack([Q.mul(each) for each in v])
        score, products = divergence.score_and_projections(self.model, Q.mul(x), t, w)
        return Q.mul_t(score), products


class GivenPosition(FieldModel):
    """The score in v at fixed positions: grad_v log p_t(x, v) = grad_v log p_t(v | x), as a field of v (B, *D).

    For each x it is the score of a law of v, so every loss of a score is one of it: E|s_v|^2 + 2 tr (d s_v / d v) among them, by
    integration by parts in v.

    Args:
        model: a field model of states (x, v).
        position: x (B, *D); of several batches of v one after the other, that of each.
    """

    provides = frozenset({"score"})
    partial = True

    def __init__(self, model: FieldModel, position: Tensor) -> None:
        self.model, self.sde, self.position = model, model.sde, position

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return split(self.model.score(self._states(x), t))[1]

    def _states(self, v: Tensor) -> Tensor:
        batches = len(v) // len(self.position)
        return join(self.position if batches == 1 else torch.cat([self.position] * batches), v)

    def _directions(self, v: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(v), v], dim=2)

    def forward_dual(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(score (B, *D), J v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        score, jvp = divergence.dual(self.model, self._states(x), t, self._directions(v))
        return split(score)[1], jvp.chunk(2, dim=2)[1]

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(score (B, *D), v_k^T J v_k (K, m))."""
        score, products = divergence.score_and_projections(self.model, self._states(x), t, self._directions(v), exact)
        return split(score)[1], products
