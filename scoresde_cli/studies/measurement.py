"""What the study `estimator` measures: what sliced score matching costs and how noisy it is, by loss, law and number of directions.

On one network, fitted for a while or trained already, and then left as it is:

    bias           of loss and gradient, against the exact trace                          closed_forms.py, gradients.py
    the loss       its variance by time, data part + projection part; closed forms        closed_forms.py
    the gradient   its variance, data part + projection part, r = their ratio             gradients.py
    the step       seconds a(1 + c n), and cost times variance                            costs.py
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from scoresde_cli.errors import Diverged
from scoresde_cli.losses.ssm import EXACT_UP_TO, SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.projections import Projection, Rademacher
from scoresde_cli.studies import closed_forms
from scoresde_cli.studies.closed_forms import Setting, exact_loss, log_times
from scoresde_cli.studies.costs import Costs, Work
from scoresde_cli.studies.gradients import gradients, ratio, z_of
from scoresde_cli.training import loop, variance
from scoresde_cli.training.loop import Plan

Progress = Callable[[str, float], None]
ROUNDING = 1e-7  # a projection part that is this little of the data part is zero


def settings(plan: Plan, laws: Mapping[str, Projection], counts: Sequence[int]) -> list[Setting]:
    """ssm_vr and ssm with n directions of each law; from n = d on ssm_vr is the exact trace, one setting.

    Below n = 4 a law that looks at the Jacobian has less than two products to look with, and is left out.
    """
    loss, d = plan.loss, plan.train[0].numel()
    rest = (loss.weighting, loss.half, loss.times, loss.t_min)
    found = [
        Setting(kind.name, name, n, kind(law, n, *rest))
        for kind in (SSMVR, SSM)
        for name, law in laws.items()
        for n in sorted(counts)
        if (kind is SSM or n < d) and not (law.adapted and n < 4)
    ]
    return [*found, Setting("ssm_vr", "exact", d, exact_loss(loss))] if d <= EXACT_UP_TO else found


def fitted(plan: Plan, steps: int, progress: Callable[[float], None]) -> Plan:
    """The plan on a copy of its network, after so many steps of ssm_vr with 4 directions; with 0, on the weights as they are.

    Raises Diverged.
    """
    model, field = copy.deepcopy((plan.model, plan.field))  # they share their weights, and so do the copies
    loss = SSMVR(Rademacher(), 4, plan.loss.weighting, plan.loss.half, plan.loss.times, plan.loss.t_min)
    trial = replace(plan, model=model, field=field, ema=None, loss=loss)
    state = loop.start(trial)
    for step in range(steps):
        loop.train_step(trial, state, plan.optimizer.rate(step, step / steps))
        progress((step + 1) / steps)
    if not loop.finite(state):
        raise Diverged(f"diverged: a weight is not finite after {steps} steps; a smaller optimizer.lr may do better")
    model.eval()
    return replace(trial, loss=plan.loss)


def adapted(setting: Setting) -> bool:
    """Whether the directions look at the Jacobian; then the projection part has no known law in n."""
    return isinstance(setting.value, SSM) and setting.value.projection.adapted


def quiet(stage: str, done: float) -> None:
    """No progress is shown."""


def measure(
    plan: Plan, laws: Mapping[str, Projection], counts: Sequence[int], *, replicates: int, fit_steps: int, times: int, rows: int,
    draws: int, turns: int = 7, progress: Progress = quiet,
) -> dict[str, Any]:  # fmt: skip
    """All that the study says of one network on one data set, as plain data.

    Args:
        plan: nothing of it is changed; its seed decides all draws.
        laws, counts: what is compared; the laws by name.
        replicates: batches R of the gradient's parts, half of them at each single time (4 at least).
        fit_steps: training steps on a copy of the network beforehand; 0 for weights that are trained already.
        times, rows, draws: as for `closed_forms.compare`.
        turns: of the timing, of which the least counts.
        progress: told the stage and the part of it that is done.
    """
    began = time.perf_counter()
    plan = fitted(plan, fit_steps, lambda done: progress("fit", done))
    d, chosen = plan.train[0].numel(), settings(plan, laws, counts)
    losses = closed_forms.compare(plan, chosen, times, rows, draws, lambda done: progress("loss", done))
    grads = gradients(plan, chosen, replicates, lambda done: progress("gradient", done))
    progress("cost", 0.0)
    work = Work(grads, Costs.measure(plan, chosen, turns))
    few = [setting for setting in chosen if setting.n == min(counts) and setting.law != "exact"]
    by_time: list[dict[str, Any]] = []
    for i, t in enumerate(log_times(plan, times).tolist()):
        progress("times", i / times)
        by_time += at_time(plan, few, max(4, replicates // 2), t)
    return {
        "d": d, "exact": d <= EXACT_UP_TO, "weighting": plan.loss.weighting, "batch_size": plan.batch_size, "seed": plan.seed,
        "fit_steps": fit_steps, "replicates": replicates, "times": times, "rows": rows, "draws": draws,
        "threads": torch.get_num_threads(), "turns": turns,
        "weights": sum(p.numel() for p in plan.model.parameters()), "adapted": [name for name, law in laws.items() if law.adapted],
        "settings": [row | gradient_row(work, chosen, laws, d, i) for i, row in enumerate(losses)],
        "by_time": by_time, "laws": law_rows(work, chosen), "best": best_rows(work, chosen),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def at_time(plan: Plan, chosen: Sequence[Setting], replicates: int, t: float) -> list[dict[str, Any]]:
    """r of each setting with all samples at time t."""
    grads = gradients(plan, chosen, replicates, lambda done: None, t)
    parts = zip(chosen, grads.projection, grads.data, strict=True)
    return [setting.name | {"t": t, "r": asdict(ratio(projection, data))} for setting, projection, data in parts]


def gradient_row(
    work: Work, chosen: Sequence[Setting], laws: Mapping[str, Projection], d: int, i: int
) -> dict[str, Any]:
    """Of one setting: r, the gradient's bias, seconds, work, variance over that of other laws with as many directions (`variance`),
    and projection part over that of its own law with the fewest (`share`)."""
    setting, grads, costs = chosen[i], work.grads, work.costs
    projection, first = grads.projection[i], next(j for j, other in enumerate(chosen) if other.group == setting.group)
    rivals = [j for j, other in enumerate(chosen) if (other.loss, other.n) == (setting.loss, setting.n)]
    zero = float(projection.mean()) < ROUNDING * float(grads.data[i].mean())
    found: dict[str, Any] = {
        "r": asdict(ratio(projection, grads.data[i])), "variance": asdict(work.variance(i, rivals)),
        "seconds": costs.seconds[i], "cost": costs.cost[i],
        "work": asdict(work.against(i, work.best(range(len(chosen))), len(chosen) - 1)), "share": None, "gradient_z": None,
    }  # fmt: skip
    if grads.along is not None:
        found["gradient_z"] = 0.0 if zero else max((z_of(way) for way in grads.along[i].T), key=abs)
    if i != first and laws[setting.law].variance(torch.eye(2), 1) is not None:
        one, many = variance.shares(laws[setting.law], d, [chosen[first].n, setting.n])
        z = 0.0 if zero else z_of(projection - many / one * grads.projection[first])
        found["share"] = {
            "measured": asdict(ratio(projection, grads.projection[first])), "predicted": many / one, "z": z
        }  # fmt: skip
    return found


def law_rows(work: Work, chosen: Sequence[Setting]) -> list[dict[str, Any]]:
    """Of each loss and law: c, sqrt(r_1 / c), the best count, those not told apart from it, and how the best law's compares."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, setting in enumerate(chosen):
        groups.setdefault(setting.group, []).append(i)
    found = []
    for (loss, law), group in groups.items():
        if law == "exact":
            continue
        best = work.best(group)
        rivals = [
            work.best(mine) for (other, name), mine in groups.items() if (other, name == "exact") == (loss, False)
        ]
        row: dict[str, Any] = {
            "loss": loss, "law": law, "n": chosen[best].n, "ties": [chosen[i].n for i in work.ties(group)],
            "against": asdict(work.against(best, work.best(rivals), len(rivals) - 1)), "c": None, "optimum": None,
        }  # fmt: skip
        line = work.costs.lines.get((loss, law)) or work.costs.lines.get(("ssm", law))
        if line is not None:
            c = line.c_interval(work.costs.s2, work.costs.df)
            best_n = None if adapted(chosen[best]) else work.optimum(group[0], chosen[group[0]].n, c)
            row |= {"c": asdict(c), "rest": line.rest, "optimum": None if best_n is None else asdict(best_n)}
        found.append(row)
    return found


def best_rows(work: Work, chosen: Sequence[Setting]) -> dict[str, Any]:
    """By loss, the setting of least work and those not told apart from it; and the one of ssm against that of ssm_vr."""
    groups = {loss: [i for i, each in enumerate(chosen) if each.loss == loss] for loss in ("ssm_vr", "ssm")}
    found: dict[str, Any] = {
        loss: {"best": chosen[work.best(group)].name, "ties": [chosen[i].name for i in work.ties(group)]}
        for loss, group in groups.items()
        if group
    }
    if all(groups.values()):
        found["plain"] = asdict(work.against(work.best(groups["ssm"]), work.best(groups["ssm_vr"]), 1))
    return found
