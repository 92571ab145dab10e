"""DPM-Solver++(2M), a multistep exponential integrator in log-SNR for the probability flow (Lu et al., arXiv 2211.01095, alg. 2).

With lambda = log(alpha / sigma) and D(x_t) = E[x_0 | x_t] the flow is exactly

    x_s = sigma_s / sigma_t x_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda D dlambda;

the linear part is integrated exactly, D extrapolated to the middle of the step from the last two evaluations.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde_cli.samplers.base import Sampler, Walk


@dataclass(kw_only=True)
class DPMSolverPP(Sampler):
    """x <- sigma_s / sigma_t x - alpha_s (e^-h - 1) [D + (D - D_before) h / (2 h_before)]; one evaluation a step, order 2."""

    needs: ClassVar[Set[str]] = frozenset({"x0"})
    needs_kernel: ClassVar[bool] = True

    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = walk.levels(x, t), walk.levels(x, s)
        h = torch.log(alpha_s / sigma_s) - torch.log(alpha_t / sigma_t)
        x0 = walk.field(x, t, "x0")
        guess = x0
        if walk.memory is not None:
            before, h_before = walk.memory
            guess = x0 + 0.5 * h / h_before * (x0 - before)
        walk.memory = x0, h
        return sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * guess
