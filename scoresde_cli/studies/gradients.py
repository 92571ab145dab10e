"""The variance of a gradient in two parts, of many settings on the same batches.

With e the gradient of the exact loss (ISM) on a batch D and g that of a sliced one, E_v g = e and

    tr Cov g = tr Cov_D e + E_D |g - e|^2              data part + projection part,   r = projection part / data part

R batches are drawn once, for all settings. They give R values |g - e|^2 of each setting and R values R/(R-1) |e - mean e|^2, so
that any two settings are compared on the same data, at half the gradients of `variance.split`. Where e is too dear
(d > EXACT_UP_TO), both parts are those of `variance.split`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from scoresde_cli.losses.ssm import EXACT_UP_TO, SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.rng import generator, normal
from scoresde_cli.studies.closed_forms import Setting, exact_loss
from scoresde_cli.studies.statistics import Estimate, of_logs
from scoresde_cli.training import variance
from scoresde_cli.training.loop import Plan
from scoresde_cli.training.variance import Batch

WAYS = 8  # directions in weight space along which the gradient's bias is looked for


@dataclass(frozen=True)
class Gradients:
    """By setting, R values of each part, and (R, WAYS) components of g - e where e is known; float64, on the host."""

    data: list[Tensor]
    projection: list[Tensor]
    along: list[Tensor] | None


def gradients(
    plan: Plan, chosen: Sequence[Setting], replicates: int, progress: Callable[[float], None], at: float | None = None
) -> Gradients:
    """Both parts of each setting; with `at`, all samples are at that time."""
    place = ("gradients",) if at is None else ("gradients", f"t={at:.6g}")
    if plan.train[0].numel() > EXACT_UP_TO:
        return split(plan, chosen, replicates, progress, place, at)
    exact, every_e = exact_loss(plan.loss), []
    projection: list[list[Tensor]] = [[] for _ in chosen]
    along: list[list[Tensor]] = [[] for _ in chosen]
    for i in range(replicates):
        batch = Batch.draw(plan, *place, i, at=at)
        e = batch.gradient(exact, "exact")
        every_e.append(e)
        ways = normal((WAYS, len(e)), generator(plan.seed, "ways", device=e.device), e.dtype)
        for setting, mine, components in zip(chosen, projection, along, strict=True):
            off = torch.zeros_like(e) if setting.law == "exact" else batch.gradient(setting.value, "a") - e
            mine.append(off.double().square().sum())
            components.append((ways @ off).double())
        progress((i + 1) / replicates)
    data = centred_squares(torch.stack(every_e).double()).cpu()
    return Gradients(
        [data] * len(chosen),
        [torch.stack(mine).cpu() for mine in projection],
        [torch.stack(mine).cpu() for mine in along],
    )


def centred_squares(e: Tensor) -> Tensor:
    """R values whose mean is the unbiased tr Cov of R vectors (R, P)."""
    return (e - e.mean(0)).square().sum(1) * len(e) / (len(e) - 1)


def split(
    plan: Plan, chosen: Sequence[Setting], replicates: int, progress: Callable[[float], None], place: tuple[str, ...],
    at: float | None,
) -> Gradients:  # fmt: skip
    """Both parts without the exact gradient; the data part of ssm is estimated with ssm_vr."""
    found = []
    for i, setting in enumerate(chosen):
        value = setting.value
        assert isinstance(value, SSM)
        calm = SSMVR(value.projection, value.n_proj, value.weighting, value.half, value.times, value.t_min)
        found.append(
            variance.split(plan, value, replicates, *place, at=at, calm=calm if setting.loss == "ssm" else None)
        )
        progress((i + 1) / len(chosen))
    return Gradients([each.data for each in found], [each.projection for each in found], None)


def ratio(a: Tensor, b: Tensor, scale: float = 1.0, noise: float = 0.0, comparisons: int = 1) -> Estimate:
    """scale mean(a) / mean(b) over the same R batches, with a Student interval on the log scale, from the R values

        a_i / mean(a) - b_i / mean(b)                       (delta method, paired).

    Args:
        noise: variance of log scale. comparisons: how many such intervals are to hold at once (Bonferroni).
    """
    n, value = len(a), scale * float(a.mean() / b.mean())
    if not value > 0.0:
        ends = (0.0, 0.0) if value == 0.0 else (math.nan, math.nan)
        return Estimate(value, math.nan, *ends, n)
    se = math.sqrt(float((a / a.mean() - b / b.mean()).var()) / n + noise)
    return of_logs(value, se, n, comparisons)


def z_of(values: Tensor) -> float:
    """The z-score as rare as the Student t of the mean of R values (R,)."""
    n = len(values)
    t = float(values.mean()) * math.sqrt(n) / max(float(values.std()), 1e-300)
    return math.copysign(float(stats.norm.isf(max(stats.t.sf(abs(t), n - 1), 1e-300))), t)
