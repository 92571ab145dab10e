"""Correlated noise: dx = -1/2 beta(t) A x dt + sqrt(beta(t)) L dW with L L^T = Sigma, of trace d.

In z = L^{-1} x the noise is white, and

    drift              A in x     in z                                            stationary law of x
    isotropic          I          -1/2 beta z: VP itself, on whitened data        N(0, Sigma)
    reversible         Sigma      -1/2 beta lam z by eigenmode, L = V sqrt(lam)   N(0, I)
    a matrix (file)    A          -1/2 beta L^{-1} A L z                          by Lyapunov's equation, where A is stable

Scores, losses, samplers and densities work in z (`whitening`), so that the matrix is never replaced by its trace and Sigma^{-1} is
never formed: the loss is |L^T S + eps / sigma|^2 or its implicit twin S^T Sigma S + 2 tr(Sigma J).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.checks import check_call
from scoresde_cli.errors import ScoreSDEError, nearest
from scoresde_cli.sdes.base import SDE, GaussianKernel, Whitening
from scoresde_cli.sdes.covariances import KINDS, Covariance, read_matrix, square
from scoresde_cli.sdes.operators import LinearOperator, Product, expand
from scoresde_cli.sdes.structured import Structured
from scoresde_cli.sdes.vp import VP
from scoresde_cli.sdes.whitened import General, Modes

Kind = Literal["identity", "equi", "ar1", "circulant", "low_rank", "dense", "data"]
DRIFTS = ("isotropic", "reversible")


class ColouredKernel(GaussianKernel):
    """The kernel of z, seen in x = W z."""

    scalar, diagonal = False, False

    def __init__(self, white: Whitening) -> None:
        kernel = white.sde.kernel()
        assert isinstance(kernel, GaussianKernel)
        super().__init__(kernel.alpha, kernel.sigma)
        self.white, self.inner = white, kernel

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        return super().mean(x0, t) if self.inner.scalar else self.white.out(self.inner.mean(self.white.into(x0), t))

    def origin(self, mean: Tensor, t: Tensor) -> Tensor:
        return (
            super().origin(mean, t)
            if self.inner.scalar
            else self.white.out(self.inner.origin(self.white.into(mean), t))
        )

    def factor(self, t: Tensor) -> LinearOperator:
        W = self.white.factor
        assert isinstance(W, Structured)
        return W.scaled(self.sigma(t)) if self.inner.scalar else Product(W, self.inner.factor(t))


class Correlated(SDE):
    """VP with correlated noise; see the module's head.

    Args:
        sigma: the kind of Sigma (covariances.py), or one of one's own.
        rho: correlation of equi and ar1, share of the factors of low_rank; None for 0.5.
        length: of the correlation of circulant, in positions; None for 3.
        rank: of low_rank, its factors drawn with `law_seed`; None for 1.
        file: of dense, Sigma, and of low_rank, the factors: .npy, or .csv without a header.
        shrinkage: of data, towards the identity; None for Ledoit and Wolf's.
        drift: isotropic (-beta/2 x), reversible (-beta/2 Sigma x), or a file with a matrix A, for -beta/2 A x.
        beta_min, beta_max: as for VP.
        shape: D of the data. train: the training data, for sigma=data. kept: what a run remembers of the matrices, in place of
            files and data.
    """

    def __init__(
        self, sigma: Kind | Covariance = "ar1", rho: float | None = None, length: PositiveFloat | None = None,
        rank: PositiveInt | None = None, file: str | None = None, law_seed: Annotated[int, Field(ge=0)] | None = None,
        shrinkage: float | None = None, drift: str = "isotropic", beta_min: PositiveFloat = 0.1, beta_max: PositiveFloat = 20.0,
        *, shape: tuple[int, ...], train: Tensor | None = None, kept: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.schedule, self.rule, kept = VP(beta_min, beta_max), drift, dict(kept or {})
        self.beta_min, self.beta_max, self.T = beta_min, beta_max, self.schedule.T
        keys = {"rho": rho, "length": length, "rank": rank, "file": file, "law_seed": law_seed, "shrinkage": shrinkage}
        given = {name: value for name, value in keys.items() if value is not None}
        self.sigma = sigma if isinstance(sigma, str) else type(sigma).__name__
        for name, value in given.items():  # in the protocol of what is measured
            setattr(self, name, value)
        self.covariance = covariance_of(sigma, given)
        self.covariance.load(kept, train)
        self.kept = self.covariance.kept
        self.L, inner = self._whiten(drift, shape, kept)
        if not math.isfinite(self.L.log_det) or abs(self.L.trace / self.L.d - 1.0) > 1e-6:
            raise ScoreSDEError(
                f"sde.sigma={self.sigma}: expected a positive definite matrix of trace {self.L.d}, found {self.L.trace:.4g}"
            )
        self.white = Whitening(inner, self.L)

    def _whiten(self, drift: str, shape: tuple[int, ...], kept: dict[str, Tensor]) -> tuple[Structured, SDE]:
        if drift == "isotropic":
            return self.covariance.factor(shape), self.schedule
        if drift == "reversible":
            L, lam = self.covariance.modes(shape)
            return L, Modes(self.schedule, lam)
        if not drift.lower().endswith((".npy", ".csv")):
            raise ScoreSDEError(
                f"sde.drift={drift}: expected isotropic, reversible, or an .npy or .csv file with a matrix{nearest(drift, DRIFTS)}"
            )
        where, L = f"sde.drift={drift}", self.covariance.factor(shape)
        self.A = square(kept["A"] if "A" in kept else read_matrix(drift, where), L.d, where)
        self.kept = {**self.kept, "A": self.A}
        columns = L.mul(torch.eye(L.d, dtype=torch.float64).reshape(L.d, *shape)).flatten(1)  # row j: L e_j
        return L, General(self.schedule, L.solve((columns @ self.A.T).reshape(L.d, *shape)).flatten(1).T)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        if self.rule == "isotropic":
            pulled = x
        elif self.rule == "reversible":
            pulled = self.L.cov(x)
        else:
            pulled = (x.flatten(1) @ self.A.to(x).T).reshape(x.shape)
        return expand(-self.schedule.a(t), x) * pulled

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        return self.L.scaled(self.schedule.g(t))

    def kernel(self) -> ColouredKernel:
        return ColouredKernel(self.white)

    def whitening(self) -> Whitening:
        return self.white

    def known_divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return self.white.sde.known_divergence(x, t)  # a trace is the same in all coordinates

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.white.out(self.white.sde.sample_prior(shape, generator, dtype))

    def prior_log_prob(self, x: Tensor) -> Tensor:
        return self.white.sde.prior_log_prob(self.white.into(x)) - self.L.log_det


def covariance_of(sigma: str | Covariance, given: dict[str, Any]) -> Covariance:
    """The covariance of a kind, from the keys that are not null. Raises ScoreSDEError for a key that the kind has not."""
    if not isinstance(sigma, str):
        if given:
            raise ScoreSDEError(
                f"sde.{next(iter(given))}: it is for the kinds by name; give your own covariance its keys under sde.sigma"
            )
        return sigma
    cls = KINDS[sigma]
    try:
        check_call(cls, given, "sde")
    except ScoreSDEError as problem:
        raise ScoreSDEError(f"sde.sigma={sigma}: {problem}") from None
    return cls(**given)
