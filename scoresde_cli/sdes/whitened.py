"""Linear processes under white noise, dz = -1/2 beta(t) A z dt + sqrt(beta(t)) dW: correlated noise in whitened coordinates.

With s = 1/2 int_0^t beta and A constant, z_t given z_0 is normal with mean M z_0 and covariance C,

    M = exp(-A s),    C = 2 int_0^s exp(-A u) exp(-A^T u) du.

A diagonal: coordinate by coordinate, alpha = exp(-lam s) and sigma^2 = (1 - exp(-2 lam s)) / lam. Else by Van Loan's block
exponential over s / 2^k, then k doublings, M <- M M and C <- C + M C M^T: exp(A^T s), which overflows, is never formed.

Source: Van Loan, "Computing integrals involving the matrix exponential", IEEE Trans. Automat. Contr. 23, 1978.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE, GaussianKernel
from scoresde_cli.sdes.operators import Diagonal, LinearOperator, Matrix, Scalar, expand
from scoresde_cli.sdes.vp import VP


class MatrixKernel(GaussianKernel):
    """x_t = M(t) x_0 + L(t) eps; alpha = |det M|^(1/d) and sigma^2 = tr(L L^T) / d are the level of the whole."""

    scalar = False

    def __init__(self, process: "WhiteLinear") -> None:
        self.process, self.diagonal = process, isinstance(process, Modes)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.process.clock(t) * (self.process.rate / self.process.d))

    def sigma(self, t: Tensor) -> Tensor:
        return (self.factor(t).trace_cov(self.process.d) / self.process.d).sqrt()

    def decay(self, t: Tensor) -> Diagonal | Matrix:
        """M(t)."""
        return self.process.solution(t)[0]

    def factor(self, t: Tensor) -> Diagonal | Matrix:
        return self.process.solution(t)[1]

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.decay(t).mul(x0)

    def origin(self, mean: Tensor, t: Tensor) -> Tensor:
        return self.decay(t).solve(mean)

    def levels(self, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), (B, d) each, by coordinate: alpha^2 lam and sigma^2 are its signal's and its noise's variance.

        Args:
            lam: (d,), the variances of x_0, taken to be uncorrelated.
        """
        lam = lam.clamp_min(1e-12)
        return self.decay(t).rms(lam) / lam.sqrt(), self.factor(t).rms(torch.ones_like(lam))


class WhiteLinear(SDE):
    """The process of the module's head; a subclass solves it.

    Attributes:
        d: dimensions. rate: tr A.
    """

    d: int
    rate: float

    def __init__(self, schedule: VP) -> None:
        self.schedule, self.T = schedule, schedule.T

    def clock(self, t: Tensor) -> Tensor:
        """s(t) = 1/2 int_0^t beta, (B,)."""
        return 0.5 * self.schedule.integral(t)

    @abstractmethod
    def solution(self, t: Tensor) -> tuple[Diagonal, Diagonal] | tuple[Matrix, Matrix]:
        """(M, L) with L L^T = C at t (B,)."""

    @abstractmethod
    def pull(self, z: Tensor) -> Tensor:
        """A z for z (B, *D)."""

    @abstractmethod
    def prior(self, like: Tensor) -> LinearOperator:
        """A factor of the covariance that generation starts from: the stationary one, C(T) where there is none."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return expand(-self.schedule.a(t), x) * self.pull(x)

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        return Scalar(self.schedule.g(t))

    def kernel(self) -> MatrixKernel:
        return MatrixKernel(self)

    def known_divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.rate * self.schedule.a(t)

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        z = normal(shape, generator, dtype)
        return self.prior(z).mul(z)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        factor = self.prior(x)
        z = factor.solve(x).flatten(1)
        return -0.5 * z.square().sum(1) - factor.logdet(self.d) - 0.5 * self.d * math.log(2 * math.pi)


class Modes(WhiteLinear):
    """A = diag(lam), lam (d,) nonnegative."""

    def __init__(self, schedule: VP, lam: Tensor) -> None:
        super().__init__(schedule)
        self.lam, self.d, self.rate = lam, len(lam), float(lam.sum())

    def solution(self, t: Tensor) -> tuple[Diagonal, Diagonal]:
        lam = self.lam.to(t)
        s = self.clock(t).unsqueeze(1)
        var = torch.where(lam > 0, -torch.expm1(-2.0 * lam * s) / lam.clamp_min(1e-30), 2.0 * s)
        return Diagonal(torch.exp(-lam * s)), Diagonal(var.sqrt())

    def pull(self, z: Tensor) -> Tensor:
        return self.lam.to(z).reshape(z.shape[1:]) * z

    def prior(self, like: Tensor) -> Diagonal:
        return Diagonal(self.lam.to(like).rsqrt().expand(len(like), -1))


class General(WhiteLinear):
    """Any constant A (d, d)."""

    def __init__(self, schedule: VP, A: Tensor) -> None:
        super().__init__(schedule)
        self.A, self.d, self.rate = A.double(), len(A), float(A.diagonal().sum())
        self.stable = bool((torch.linalg.eigvals(self.A).real > 0).all())
        self.last: tuple[Tensor, tuple[Matrix, Matrix]] | None = None
        if self.stable:
            from scipy.linalg import solve_continuous_lyapunov

            stationary = torch.from_numpy(
                solve_continuous_lyapunov(self.A.numpy(), 2.0 * torch.eye(self.d).double().numpy())
            )
            self.end = torch.linalg.cholesky(0.5 * (stationary + stationary.T))
        else:
            self.end = torch.linalg.cholesky(self.moments(torch.tensor([self.T], dtype=torch.float64))[1][0])

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(M, C), (B, d, d) each, in float64."""
        d, s = self.d, self.clock(t.double())
        size = float(torch.linalg.matrix_norm(self.A, 1)) * float(s.detach().max())
        doublings = max(0, math.ceil(math.log2(max(size, 1e-300))) + 1)
        block = self.A.new_zeros(2 * d, 2 * d)
        block[:d, :d], block[d:, d:] = -self.A, self.A.T
        block[:d, d:] = 2.0 * torch.eye(d)
        whole = torch.linalg.matrix_exp((s / 2**doublings).reshape(-1, 1, 1) * block.to(t.device))
        M = whole[:, :d, :d]
        C = whole[:, :d, d:] @ M.mT
        for _ in range(doublings):
            M, C = M @ M, C + M @ C @ M.mT
        return M, 0.5 * (C + C.mT)

    def solution(self, t: Tensor) -> tuple[Matrix, Matrix]:
        if self.last is not None and self.last[0] is t:
            return self.last[1]
        if t.requires_grad:
            M, C = self.moments(t)
        else:  # a sampler has one time for all rows
            times, index = torch.unique(t, return_inverse=True)
            M, C = (each[index] for each in self.moments(times))
        factor = torch.where((t > 0).reshape(-1, 1, 1), torch.linalg.cholesky_ex(C)[0], 0.0)  # at t = 0, C = 0
        found = Matrix(M.to(t.dtype)), Matrix(factor.to(t.dtype))
        if not t.requires_grad:
            self.last = t, found
        return found

    def pull(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.A.to(z).T).reshape(z.shape)

    def prior(self, like: Tensor) -> Matrix:
        return Matrix(self.end.to(like).expand(len(like), -1, -1))
