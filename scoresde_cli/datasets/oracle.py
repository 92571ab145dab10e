"""Exact densities and scores of noised Gaussian mixtures, in float64: what a trained score is measured against."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE, GaussianKernel


class Mixture:
    """sum_k w_k N(mu_k, U_k diag(lam_k) U_k^T) in d dimensions.

    Args:
        weights: (K,), positive; normalised here.
        means: (K, d).
        lam: (K, d), variances in the components' principal coordinates.
        bases: (K, d, d), their principal directions; None where they are the axes.
    """

    def __init__(self, weights: Tensor, means: Tensor, lam: Tensor, bases: Tensor | None = None) -> None:
        self.weights = weights.double() / weights.double().sum()
        self.means, self.lam = means.double(), lam.double()
        self.bases = None if bases is None else bases.double()

    def components(self, n: int, generator: torch.Generator) -> Tensor:
        """The components of n draws, (n,) int64."""
        return torch.multinomial(self.weights, n, replacement=True, generator=generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, d), float64."""
        k = self.components(n, generator)
        y = normal((n, self.means.shape[1]), generator, torch.float64) * self.lam[k].sqrt()
        if self.bases is not None:
            y = torch.einsum("nij,nj->ni", self.bases[k], y)
        return self.means[k] + y

    def covariances(self) -> Tensor:
        """(K, d, d)."""
        if self.bases is None:
            return torch.diag_embed(self.lam)
        return (self.bases * self.lam.unsqueeze(1)) @ self.bases.mT

    def seen(self, view: Callable[[Tensor], Tensor]) -> "Mixture":
        """The law of view(x), linear in x (n, d)."""
        found = [torch.linalg.eigh(view(view(K).T)) for K in self.covariances()]
        lam, bases = (torch.stack(each) for each in zip(*found, strict=True))
        return Mixture(self.weights, view(self.means), lam.clamp_min(0.0), bases)


CLEAN = GaussianKernel(torch.ones_like, torch.zeros_like)  # x_t = x_0


class Oracle(FieldModel):
    """log p_t and its score for a mixture noised by a process with x_t = M x_0 + L eps.

    Component k of p_t is N(M mu_k, M K_k M^T + L L^T), so both are closed forms; with M = alpha I and L = sigma I its covariance is
    U_k (alpha^2 diag(lam_k) + sigma^2) U_k^T at all times. Where a process has white coordinates, x = W z, the law is taken there:
    log p(x) = log p(z) - log |det W|, score(x) = W^{-T} score(z). Where the state is more than the data, M is not square.
    """

    provides = FieldModel.provides | {"log_density"}

    def __init__(self, law: Mixture, sde: SDE) -> None:
        kernel, self.white = CLEAN if sde.still else sde.kernel(), sde.whitening()
        assert kernel is not None
        self.law, self.sde, self.kernel = law, sde, kernel
        self.plain = kernel.scalar and not sde.phase
        if self.white is not None:
            self.inner = Oracle(law.seen(self.white.into), self.white.sde)

    def whitened(self) -> "Oracle":
        return self if self.white is None else self.inner

    def _moving(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N_k(x) (B, K), L_k^{-1} (x - M mu_k) (B, K, d) and L_k, the Cholesky factors of the covariances (B, K, d, d)."""
        (n, d), count = x.flatten(1).shape, len(self.law.weights)

        def matrix(act: Callable[[Tensor, Tensor], Tensor], width: int) -> Tensor:
            units = torch.eye(width, dtype=torch.float64, device=x.device).repeat_interleave(n, 0)
            columns = act(units, t.double().repeat(width))  # act(e_j) is column j
            return columns.reshape(width, n, d).permute(1, 2, 0)

        M = matrix(self.kernel.mean, self.law.means.shape[1])
        C = matrix(lambda v, s: self.kernel.factor(s).cov(v), d)
        cov = M.unsqueeze(1) @ self.law.covariances() @ M.unsqueeze(1).mT + C.unsqueeze(1)
        L = torch.linalg.cholesky(0.5 * (cov + cov.mT))
        y = x.double().flatten(1).unsqueeze(1) - (self.law.means @ M.mT).reshape(n, count, d)
        y = torch.linalg.solve_triangular(L, y.unsqueeze(3), upper=False).squeeze(3)
        log = self.law.weights.log() - 0.5 * (y.square() + math.log(2 * math.pi)).sum(-1)
        return log - L.diagonal(dim1=2, dim2=3).log().sum(-1), y, L

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N_k(x) (B, K), U_k^T (x - alpha mu_k) (B, K, d) and the variances (B, K, d)."""
        t = t.double()
        alpha, sigma = self.kernel.alpha(t)[:, None, None], self.kernel.sigma(t)[:, None, None]
        y = x.double().flatten(1)[:, None] - alpha * self.law.means
        if self.law.bases is not None:
            y = torch.einsum("kij,bki->bkj", self.law.bases, y)
        var = alpha.square() * self.law.lam + sigma.square()
        log = self.law.weights.log() - 0.5 * (y.square() / var + var.log() + math.log(2 * math.pi)).sum(-1)
        return log, y, var

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) in nats, (B,), float64."""
        if self.white is not None:
            shift = self.white.factor.logdet(x[0].numel()).to(device=x.device, dtype=torch.float64)
            return self.inner.log_prob(self.white.into(x.double()), t) - shift
        if not self.plain:
            return torch.logsumexp(self._moving(x, t)[0], dim=1)
        return torch.logsumexp(self._parts(x, t)[0], dim=1)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.log_prob(x, t).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), shaped and typed like x, computed in float64."""
        if self.white is not None:
            return self.white.factor.solve_t(self.inner.score(self.white.into(x.double()), t)).to(x.dtype)
        if not self.plain:
            log, y, L = self._moving(x, t)
            pull = -torch.linalg.solve_triangular(L.mT, y.unsqueeze(3), upper=True).squeeze(3)
            return (torch.softmax(log, dim=1).unsqueeze(-1) * pull).sum(1).reshape(x.shape).to(x.dtype)
        log, y, var = self._parts(x, t)
        pull = -y / var
        if self.law.bases is not None:
            pull = torch.einsum("kij,bkj->bki", self.law.bases, pull)
        return (torch.softmax(log, dim=1).unsqueeze(-1) * pull).sum(1).reshape(x.shape).to(x.dtype)
