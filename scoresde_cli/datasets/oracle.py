"""Exact densities and scores of noised Gaussian mixtures, in float64: what a trained score is measured against."""

import math

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE


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


class Oracle(FieldModel):
    """log p_t and its score for a mixture noised by a process with x_t = alpha x_0 + sigma eps.

    Component k of p_t is N(alpha mu_k, U_k (alpha^2 diag(lam_k) + sigma^2) U_k^T), so both are closed forms.
    """

    provides = FieldModel.provides | {"log_density"}

    def __init__(self, law: Mixture, sde: SDE) -> None:
        kernel = sde.kernel()
        assert kernel is not None
        self.law, self.sde, self.kernel = law, sde, kernel

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
        return torch.logsumexp(self._parts(x, t)[0], dim=1)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.log_prob(x, t).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), shaped and typed like x, computed in float64."""
        log, y, var = self._parts(x, t)
        pull = -y / var
        if self.law.bases is not None:
            pull = torch.einsum("kij,bkj->bki", self.law.bases, pull)
        return (torch.softmax(log, dim=1).unsqueeze(-1) * pull).sum(1).reshape(x.shape).to(x.dtype)
