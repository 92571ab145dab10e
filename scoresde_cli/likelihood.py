"""log p through the probability-flow ODE: the instantaneous change of variables.

With dx/dt = velocity(x, t), log p_{t_min}(x) = log p_T(x_T) + int_{t_min}^T div velocity dt (Chen et al., NeurIPS 2018, theorem 1;
Song et al., ICLR 2021, eq. 39). p_T is taken to be the process's prior.
"""

import itertools
import math

import torch
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.fields import FieldModel
from scoresde_cli.sdes.base import SDE


@torch.no_grad()
def log_prob(model: FieldModel, sde: SDE, x: Tensor, t_min: float, steps: int) -> Tensor:
    """log p at t_min of x (n, *D) in model coordinates: (n,), nats, by the classical Runge-Kutta method with the exact divergence.

    The grid is even in sqrt(t). Needs a process with a Gaussian kernel and no jumps.
    """
    return torch.cat([_log_prob(model, sde, part, t_min, steps) for part in x.split(4096)])


def _log_prob(model: FieldModel, sde: SDE, x: Tensor, t_min: float, steps: int) -> Tensor:
    def velocity(y: Tensor, t: Tensor) -> Tensor:
        return model.fields(y, t, {"velocity"})["velocity"]

    def rates(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return divergence.score_and_trace(velocity, y, t)

    grid = torch.linspace(t_min**0.5, sde.T**0.5, steps + 1, dtype=torch.float64).square().to(x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t, s in itertools.pairwise(grid):
        h, middle = s - t, 0.5 * (t + s)
        v1, d1 = rates(x, t.expand(len(x)))
        v2, d2 = rates(x + 0.5 * h * v1, middle.expand(len(x)))
        v3, d3 = rates(x + 0.5 * h * v2, middle.expand(len(x)))
        v4, d4 = rates(x + h * v3, s.expand(len(x)))
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        total += float(h) / 6 * (d1 + 2 * d2 + 2 * d3 + d4).double()
    kernel = sde.kernel()
    assert kernel is not None
    sigma = kernel.sigma(torch.full((len(x),), sde.T, dtype=torch.float64, device=x.device))
    d = x[0].numel()
    z2 = x.double().flatten(1).square().sum(1) / sigma.square()
    return total - 0.5 * z2 - d * sigma.log() - 0.5 * d * math.log(2 * math.pi)
