"""Exact fields of a Gaussian mixture under jumps: density, score, flux, ratio and E[x_0 | x_t], in float64.

Component k is noised to a function of (rho, t) as in sdes/scale_table.py, with its own variance lam_k in the table, so that with
p_k, c_s, c_J of component k at y_k = x - alpha mu_k and the responsibilities pi_k = w_k p_k / p

    score = -sum_k pi_k c_s y_k,   flux = rate sum_k pi_k c_J y_k,   nu*p / p = sum_k pi_k (nu*p_k / p_k),
    E[x_0 | x] = sum_k pi_k (mu_k + alpha lam_k c_s y_k).

Covered: joint jumps with isotropic components; jumps by coordinate with components whose axes are the coordinates'. Not
covered: joint jumps with anisotropic components, whose law depends on more than one distance.
"""

from collections.abc import Callable, Set
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde_cli.datasets.oracle import Mixture, Oracle
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.scale_table import Read

MOST_TABLES = 32


class Parts(NamedTuple):
    """log w_k p_k (B, K), y_k (B, K, d), what the tables say: (B, K, 1) for joint jumps, (B, K, d) by coordinate."""

    log: Tensor
    y: Tensor
    read: Read


def covers(law: Mixture, sde: SDE) -> bool:
    """Whether the fields of this mixture under the jumps of this process are known here."""
    isotropic = bool((law.lam == law.lam[:, :1]).all())
    if sde.jumps is None or sde.jumps.table is None or law.lam.unique().numel() > MOST_TABLES:
        return False
    return isotropic if sde.jumps.joint else law.bases is None or isotropic


class JumpOracle(Oracle):
    """The exact fields; `gaussian_denoiser` besides, for the scale-path sampler."""

    provides = Oracle.provides | {"flux", "ratio", "gaussian_denoiser"}

    def __init__(self, law: Mixture, sde: SDE) -> None:
        if not covers(law, sde):
            raise ScoreSDEError(
                "the exact fields under jumps are known for isotropic components (by coordinate: axis-parallel)"
            )
        super().__init__(law, sde)
        assert sde.jumps is not None
        assert sde.jumps.table is not None
        self.jump, self.table = sde.jumps, sde.jumps.table

    def read(self, x: Tensor, t: Tensor) -> Parts:
        """Every component's part at x (B, *D), t (B,)."""
        t = t[:1].double().expand(len(t)) if t.stride(0) == 0 else t.double()
        y = x.double().flatten(1)[:, None] - self.kernel.alpha(t)[:, None, None] * self.law.means
        d = y.shape[2]
        rho2 = y.square().sum(2, keepdim=True) if self.jump.joint else y.square()
        lam = self.law.lam[:, : rho2.shape[2]]
        found = torch.empty(4, *rho2.shape, dtype=torch.float64, device=x.device)
        for value in lam.unique().tolist():
            k, i = (lam == value).nonzero(as_tuple=True)
            found[:, :, k, i] = torch.stack(self.table(d, value)(rho2[:, k, i], t))
        read = Read(*found)
        return Parts(self.law.weights.log() + read.log_p.sum(2), y, read)

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.logsumexp(self.read(x, t).log, dim=1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self.fields(x, t, {"score"})["score"]

    def fields(self, x: Tensor, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        """As for FieldModel; also flux (B, *D) and ratio, nu*p/p: (B,) for joint jumps, (B, *D) by coordinate."""
        missing = names - self.provides
        if missing:
            raise ScoreSDEError(f"the model provides {sorted(self.provides)}, asked for {sorted(missing)}")
        log, y, read = self.read(x, t)
        share = torch.softmax(log, dim=1)[..., None]
        rate, alpha = expand(self.jump.rate(t.double()), y[:, 0]), expand(self.kernel.alpha(t.double()), y[:, 0])
        score, flux = -(share * read.c_score * y).sum(1), rate * (share * read.c_flux * y).sum(1)
        ratio = (share * read.log_ratio.exp()).sum(1)
        pulled = self.law.means + alpha[:, None] * self.law.lam * read.c_score * y

        def shaped(field: Tensor) -> Tensor:
            return field.reshape(x.shape).to(x.dtype)

        known: dict[str, Callable[[], Tensor]] = {
            "score": lambda: shaped(score),
            "flux": lambda: shaped(flux),
            "ratio": lambda: ratio.squeeze(1).to(x.dtype) if self.jump.joint else shaped(ratio),
            "velocity": lambda: self.sde.velocity(x, t, shaped(score), shaped(flux)),
            "eps": lambda: -expand(self.kernel.sigma(t), x) * shaped(score),
            "x0": lambda: shaped((share * pulled).sum(1)),
            "log_density": lambda: torch.logsumexp(log, dim=1).to(x.dtype),
        }
        return {name: known[name]() for name in names}

    def gaussian_denoiser(self, y: Tensor, noise: Tensor) -> Tensor:
        """E[x_0 | x_0 + noise eps = y], shaped like y (B, *D), for noise levels (B,)."""
        gap = y.double().flatten(1)[:, None] - self.law.means
        var = self.law.lam + noise.double().square()[:, None, None]
        log = self.law.weights.log() - 0.5 * (gap.square() / var + var.log()).sum(2)
        means = self.law.means + self.law.lam / var * gap
        return (torch.softmax(log, 1)[..., None] * means).sum(1).reshape(y.shape).to(y.dtype)
