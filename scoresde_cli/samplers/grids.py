"""The times at which a sampler evaluates the model, from T down to t_min.

With r(t) = sigma(t) / alpha(t), the noise-to-signal ratio, and u_i = i / steps:

    uniform   t_i = T + u_i (t_min - T)
    power     t_i = (T^(1/rho) + u_i (t_min^(1/rho) - T^(1/rho)))^rho
    edm_rho   the same in r: r_i = (r(T)^(1/rho) + u_i (r(t_min)^(1/rho) - r(T)^(1/rho)))^rho  (Karras et al., NeurIPS 2022, eq. 5)
    log_snr   log r even, the limit of edm_rho for rho to infinity (Lu et al., NeurIPS 2022, section 3)

or a list of times.
"""

import itertools
import math
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.base import SDE, Kernel

Grid = Literal["uniform", "power", "edm_rho", "log_snr"] | list[PositiveFloat]
RHO = {"power": 2.0, "edm_rho": 7.0}


def log_ratio(kernel: Kernel, t: Tensor) -> Tensor:
    """log r(t) = log(sigma / alpha), for t (B,)."""
    return kernel.sigma(t).log() - kernel.alpha(t).log()


def time_at(kernel: Kernel, target: Tensor, T: float) -> Tensor:
    """The times (B,) in [0, T] with log r(t) = target (B,), float64, by bisection (r increases)."""
    low = torch.zeros_like(target, dtype=torch.float64)
    high = torch.full_like(low, T)
    for _ in range(64):
        middle = 0.5 * (low + high)
        above = log_ratio(kernel, middle) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def times(grid: Grid, rho: float | None, steps: int, sde: SDE, t_min: float) -> Tensor:
    """The grid (steps + 1,), float64, decreasing from T to t_min. Raises ScoreSDEError where it does not exist."""
    T = sde.T
    if isinstance(grid, list):
        found = torch.tensor(grid, dtype=torch.float64)
        if not math.isclose(grid[0], T):
            raise ScoreSDEError(f"sampler.grid={grid}: expected a list that begins at the process's T={T}")
        return found
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    rho = RHO.get(grid, 1.0) if rho is None else rho
    if grid in ("uniform", "power"):
        p = 1.0 / (rho if grid == "power" else 1.0)
        found = (T**p + u * (t_min**p - T**p)) ** (1 / p)
    else:
        kernel = sde.kernel()
        if kernel is None:
            raise ScoreSDEError(
                f"sampler.grid={grid} is even in noise-to-signal ratio, which needs a process with a closed-form kernel; take "
                "uniform, power or a list"
            )
        ends = log_ratio(kernel, torch.tensor([T, t_min], dtype=torch.float64))
        if grid == "edm_rho":
            first, last = (ends / rho).exp()
            found = time_at(kernel, rho * (first + u * (last - first)).log(), T)
        else:
            found = time_at(kernel, ends[0] + u * (ends[1] - ends[0]), T)
    found[0], found[-1] = T, t_min
    if not (found.diff() < 0).all():  # an exponent beyond what floating point holds, or more steps than it tells apart
        raise ScoreSDEError(f"sampler.grid={grid} with rho={rho:g} and {steps} steps: its times do not decrease")
    return found


def check(grid: Grid, rho: float | None) -> None:
    """Refuse a list that does not decrease, and an exponent where there is none."""
    if isinstance(grid, list) and (
        len(grid) < 2 or any(later >= earlier for earlier, later in itertools.pairwise(grid))
    ):
        raise ScoreSDEError(f"sampler.grid={grid}: expected at least two times, decreasing from T")
    if rho is not None and (isinstance(grid, list) or grid not in RHO):
        raise ScoreSDEError(f"sampler.rho={rho}: only the grids {' and '.join(RHO)} have an exponent")
