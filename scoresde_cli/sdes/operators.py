"""Linear operators on batches: diffusion matrices G(t) and factors L of covariances C = L L^T.

An operator acts on tensors of shape (B, *D); a d x d matrix is formed only where the user gave one. `mul` and
`mul_t` are mandatory; `solve` exists for invertible operators only. Those of a fixed structure are in structured.py.
"""

from abc import ABC, abstractmethod

import torch
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

    def logdet(self, d: int) -> Tensor:
        """log |det L| in d dimensions, shape (B,). Raises NotImplementedError where L is not invertible."""
        raise NotImplementedError(f"{type(self).__name__} has no determinant")


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

    def logdet(self, d: int) -> Tensor:
        return d * self.c.log()


class Diagonal(LinearOperator):
    """diag(values), of its own for each sample: `values` has shape (B, d)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def mul(self, z: Tensor) -> Tensor:
        return self.values.reshape(z.shape) * z

    def mul_t(self, v: Tensor) -> Tensor:
        return self.mul(v)

    def solve(self, v: Tensor) -> Tensor:
        return v / self.values.reshape(v.shape)

    def solve_t(self, v: Tensor) -> Tensor:
        return self.solve(v)

    def trace_cov(self, d: int) -> Tensor:
        return self.values.square().sum(1)

    def logdet(self, d: int) -> Tensor:
        return self.values.log().sum(1)

    def rms(self, weights: Tensor) -> Tensor:
        """Root of sum_j L_ij^2 w_j, (B, d), for w (d,)."""
        return self.values * weights.sqrt()


class Matrix(LinearOperator):
    """A matrix of its own for each sample: `values` has shape (B, d, d)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def mul(self, z: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", self.values, z.flatten(1)).reshape(z.shape)

    def mul_t(self, v: Tensor) -> Tensor:
        return torch.einsum("bji,bj->bi", self.values, v.flatten(1)).reshape(v.shape)

    def solve(self, v: Tensor) -> Tensor:
        return torch.linalg.solve(self.values, v.flatten(1).unsqueeze(2)).reshape(v.shape)

    def solve_t(self, v: Tensor) -> Tensor:
        return torch.linalg.solve(self.values.mT, v.flatten(1).unsqueeze(2)).reshape(v.shape)

    def trace_cov(self, d: int) -> Tensor:
        return self.values.square().sum((1, 2))

    def logdet(self, d: int) -> Tensor:
        return torch.linalg.slogdet(self.values)[1]

    def rms(self, weights: Tensor) -> Tensor:
        """Root of sum_j L_ij^2 w_j, (B, d), for w (d,)."""
        return (self.values.square() @ weights).sqrt()


class Product(LinearOperator):
    """L = first second."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first, self.second = first, second

    def mul(self, z: Tensor) -> Tensor:
        return self.first.mul(self.second.mul(z))

    def mul_t(self, v: Tensor) -> Tensor:
        return self.second.mul_t(self.first.mul_t(v))

    def solve(self, v: Tensor) -> Tensor:
        return self.second.solve(self.first.solve(v))

    def solve_t(self, v: Tensor) -> Tensor:
        return self.first.solve_t(self.second.solve_t(v))

    def logdet(self, d: int) -> Tensor:
        return self.first.logdet(d) + self.second.logdet(d)

    def trace_cov(self, d: int) -> Tensor:
        raise NotImplementedError("the trace of a product needs the matrix")


class Inverse(LinearOperator):
    """The inverse of an operator."""

    def __init__(self, of: LinearOperator) -> None:
        self.of = of

    def mul(self, z: Tensor) -> Tensor:
        return self.of.solve(z)

    def mul_t(self, v: Tensor) -> Tensor:
        return self.of.solve_t(v)

    def solve(self, v: Tensor) -> Tensor:
        return self.of.mul(v)

    def solve_t(self, v: Tensor) -> Tensor:
        return self.of.mul_t(v)

    def logdet(self, d: int) -> Tensor:
        return -self.of.logdet(d)

    def trace_cov(self, d: int) -> Tensor:
        raise NotImplementedError("the trace of an inverse needs the matrix")
