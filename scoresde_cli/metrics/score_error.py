"""The error of a score, and of a flux, against the exact one, where the law is known."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli import processes
from scoresde_cli.fields import FieldModel, GivenPosition
from scoresde_cli.losses.base import draw_times
from scoresde_cli.rng import generator
from scoresde_cli.sdes.base import SDE
from scoresde_cli.sdes.phase import split


def squared_gap(
    model: FieldModel, exact: FieldModel, sde: SDE, x: Tensor, t: Tensor, name: str = "score"
) -> Tensor:  # fmt: skip
    """|L^T (s - s_exact)|^2, (n,), float64, L L^T the covariance of x_t given x_0: sigma^2 |s - s_exact|^2 for isotropic noise.

    On clean data (SDE.still), |s - s_exact|^2. Under jumps a field is in units of its own size given x_0,
    |u - u_exact|^2 d / E|u given x_0|^2, u the score or the flux. Of states with a velocity (SDE.phase), of the score in that.
    """
    kernel = sde.kernel()
    if sde.phase:
        position, x = split(x)
        model, exact = GivenPosition(model, position), GivenPosition(exact, position)
    if name == "flux":
        gap = model.fields(x, t, {name})[name].double() - exact.fields(x.double(), t, {name})[name]
        return gap.square().flatten(1).sum(1) / sde.scales(t.double(), x[0].numel())[name].power
    gap = model.score(x, t).double() - exact.score(x.double(), t)
    if kernel is None:
        return gap.square().flatten(1).sum(1)
    if kernel.scalar:
        return gap.square().flatten(1).sum(1) * kernel.unit(t.double(), x[0].numel())
    return kernel.factor(t.double()).mul_t(gap).square().flatten(1).sum(1)


@torch.no_grad()
def squared_errors(
    model: FieldModel, exact: FieldModel, sde: SDE, x0: Tensor, t_min: float, seed: int, name: str = "score"
) -> tuple[Tensor, Tensor]:
    """(t, sigma(t)^2 |s - s_exact|^2), each (n,), at one noised copy of each x0; t stratified uniform on [t_min, T]."""
    source = generator(seed, "score_error", device=x0.device)
    t = draw_times("uniform", len(x0), t_min, sde.T, source).to(x0.dtype)
    x = sde.perturb(x0, t, source).x_t
    pieces = list(zip(x.split(4096), t.split(4096), strict=True))
    parts = processes.shared(len(pieces), lambda i: (squared_gap(model, exact, sde, *pieces[i], name),))
    return t, torch.cat([values for (values,) in parts])


@torch.no_grad()
def curve(
    model: FieldModel,
    exact: FieldModel,
    sde: SDE,
    x0: Tensor,
    t_min: float,
    seed: int,
    name: str = "score",
    points: int = 24,
) -> dict[str, list[float]]:
    """The error by time: t (points,), log-spaced, with the mean at each and its 95 percent interval, from 1000 rows each."""
    times = np.geomspace(t_min, sde.T, points)
    found: dict[str, list[float]] = {"t": times.tolist(), "value": [], "low": [], "high": []}

    def at(i: int) -> tuple[float, float, float]:
        now = times[i]
        source = generator(seed, "score_curve", i, device=x0.device)
        rows = x0[torch.randint(len(x0), (1000,), generator=source, device=x0.device)]
        t = torch.full((1000,), min(float(now), sde.T), device=x0.device, dtype=x0.dtype)
        x = sde.perturb(rows, t, source).x_t
        values = squared_gap(model, exact, sde, x, t, name).cpu().numpy()
        low, high = bootstrap_mean(values, seed, 300)
        return float(values.mean()), low, high

    for numbers in processes.shared(points, at):
        for key, number in zip(("value", "low", "high"), numbers, strict=True):
            found[key].append(number)
    return found


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int = 1000) -> list[float]:
    """The 95 percent percentile interval of a mean (scipy's bootstrap)."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=50, method="percentile", rng=np.random.default_rng(seed)
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def score_error(
    model: FieldModel, exact: FieldModel, sde: SDE, x0: Tensor, t_min: float, seed: int, name: str = "score"
) -> dict[str, Any]:
    """F = E_t sigma^2 |s - s_exact|^2, summed over coordinates, t uniform on [t_min, T], x0 held-out data (n, *D).

    With correlated noise C in place of sigma^2 I: (s - s_exact)^T C (s - s_exact); under jumps, and of the flux, as squared_gap
    says. With the same by time, as `curve`. Of a process that stands still: E|s - s_exact|^2 on the clean data.
    """
    _, errors = squared_errors(model, exact, sde, x0, t_min, seed, name)
    values = errors.cpu().numpy()
    plain = "|s - s*|^2" if sde.still else "sigma^2 |s - s*|^2"
    unit = plain if sde.jumps is None else "|u - u*|^2 d / E|u given x_0|^2"
    return {
        "value": float(values.mean()), "ci": bootstrap_mean(values, seed), "floor": 0.0, "floor_high": 0.0,
        "unit": unit,
        "protocol": {"n": len(values), "t": [t_min, sde.T], "times": "uniform", "summed_over": "coordinates"},
        "curve": curve(model, exact, sde, x0, t_min, seed, name),
    }  # fmt: skip
