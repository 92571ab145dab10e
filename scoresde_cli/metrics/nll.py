"""The negative log-likelihood of held-out data, by the probability-flow ODE (likelihood.py).

In nats a row, of the density in the user's units. For images in bits per dimension of the grey levels: uniform noise of one
level is added (dequantisation), and by Jensen's inequality the number is an upper bound of -log2 P(levels) / d (Theis, van den
Oord and Bethge, ICLR 2016, section 3.1). Where the law is known, the exact density on the same rows stands beside it, and the
difference estimates KL(data | model).
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.likelihood import Flow, log_prob
from scoresde_cli.losses.ssm import EXACT_UP_TO
from scoresde_cli.metrics.score_error import bootstrap_mean
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator, uniform

FEW_REPEATS = 2  # the rows' own spread is far greater than that of the directions


def dequantised(data: Dataset, x: Tensor, seed: int) -> Tensor:
    """Rows x (n, *D) in model coordinates with uniform noise of one level, where the data has levels and no noise yet."""
    if data.quantum is None or data.units.resolution is not None:
        return x
    u = data.units.to_user(x.cpu()).flatten(1)
    noise = uniform(tuple(u.shape), generator(seed, "dequantise"), torch.float64) - 0.5
    return data.units.to_model((u + noise * data.quantum).reshape(x.shape)).to(x)


def nll(
    model: ScoreModel, baseline: ScoreModel, data: Dataset, x: Tensor, t_min: float, flow: Flow, seed: int
) -> dict[str, dict[str, Any]]:
    """nll, nll_baseline (of the Gaussian with the data's moments) and, where the law is known, nll_gap, as entries of a summary.

    Args:
        x: held-out rows (n, *D) in model coordinates.
        flow: with no law and d > EXACT_UP_TO, random signs take the place of the exact trace (which projection=coordinate
            n_proj=d still gives).
    """
    image = data.kind == "image"
    x = dequantised(data, x, seed)
    d = x[0].numel()
    if flow.projection is None and d > EXACT_UP_TO:
        flow = replace(flow, projection=Rademacher(), repeats=min(flow.repeats, FEW_REPEATS))
    # From nats in model coordinates to the unit that is printed: minus sign, units, levels, logarithm.
    shift = -data.units.log_det() - (float(data.quantum.log().sum()) if image and data.quantum is not None else 0.0)
    factor = 1.0 / (d * math.log(2)) if image else 1.0
    found = log_prob(model, model.sde, x, t_min, flow, seed)
    values = factor * (shift - found.value.cpu().numpy())
    law = type(flow.projection).__name__ if flow.projection is not None else None
    unit = "bits/dim" if image else "nats"
    protocol = {
        "n": len(x), "split": "test", "t_min": t_min, "method": flow.method, "density_in": "the user's units",
        "divergence": "exact" if law is None else f"{law}, {flow.n_proj} directions, {flow.repeats} repeats",
        **({"steps": flow.steps} if flow.method == "rk4" else {"rtol": flow.rtol, "atol": flow.atol}),
        **({"dequantised": "uniform"} if image else {}),
    }  # fmt: skip
    exact = data.oracle(model.sde)
    floor = None
    if exact is not None:
        truth = factor * (shift - exact.log_prob(x, torch.zeros(len(x), device=x.device)).cpu().numpy())
        floor = float(truth.mean())

    def entry(numbers: np.ndarray, floor: float | None, **more: Any) -> dict[str, Any]:
        ci = bootstrap_mean(numbers, seed)
        return {"value": float(numbers.mean()), "ci": ci, "floor": floor, "floor_high": floor, "unit": unit,
                "protocol": protocol, **more}  # fmt: skip

    detail: dict[str, Any] = {"nfe": found.nfe}
    if law is not None:
        errors = factor * found.standard_error.cpu().numpy()
        detail["standard_error_of_the_directions"] = float(np.sqrt(np.square(errors).sum()) / len(errors))
    moments = factor * (shift - baseline.moments.log_prob(x.cpu()).numpy())
    summary = {"nll": entry(values, floor, detail=detail)}
    if np.isfinite(moments).all():  # a pixel that is always white has no density
        summary["nll_baseline"] = entry(moments, floor)
    if exact is not None:
        summary["nll_gap"] = entry(values - truth, 0.0)
    return summary
