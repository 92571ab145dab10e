"""Linear operators on batches: diffusion matrices G(t) and factors L of covariances C = L L^T.

An operator acts on tensors of shape (B, *D); a d x d matrix is formed only where the user gave one. `mul` and
`mul_t` are mandatory; `solve` exists for invertible operators only.
"""

from abc import ABC, abstractmethod

from torch import Tensor


def expand(c: Tensor, x: Tensor) -> Tensor:
    """`c` of shape (B,) with trailing axes of length one, so that it broadcasts against `x` of shape (B, *D)."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


class LinearOperator(ABC):
    """A linear map on each sample of a batch."""

    @abstractmethod
    def mul(self, z: Tensor) -> Tensor:
        """L z, for z of shape (B, *D)."""

    @abstractmethod
    def mul_t(self, v: Tensor) -> Tensor:
        """L^T v, for v of shape (B, *D)."""

    def cov(self, v: Tensor) -> Tensor:
        """L L^T v, for v of shape (B, *D)."""
        return self.mul(self.mul_t(v))

    def solve(self, v: Tensor) -> Tensor:
        """L^{-1} v, for v of shape (B, *D). Raises NotImplementedError where L is not invertible."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def solve_t(self, v: Tensor) -> Tensor:
        """L^{-T} v, for v of shape (B, *D). Raises NotImplementedError where L is not invertible."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def scale(self) -> Tensor | None:
        """c (B,) where the operator is c I, else None."""
        return None

    @abstractmethod
    def trace_cov(self, d: int) -> Tensor:
        """tr(L L^T) in d dimensions, shape (B,)."""


class Scalar(LinearOperator):
    """c I, with one number c a sample: `c` has shape (B,)."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def scale(self) -> Tensor:
        return self.c

    def mul(self, z: Tensor) -> Tensor:
        return expand(self.c, z) * z

    def mul_t(self, v: Tensor) -> Tensor:
        return self.mul(v)

    def cov(self, v: Tensor) -> Tensor:
        return expand(self.c.square(), v) * v

    def solve(self, v: Tensor) -> Tensor:
        return v / expand(self.c, v)

    def solve_t(self, v: Tensor) -> Tensor:
        return self.solve(v)

    def trace_cov(self, d: int) -> Tensor:
        return d * self.c.square()
