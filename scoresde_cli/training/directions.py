"""n_proj=auto: the number of directions that learns most in a given time, chosen again as training goes.

A step with n directions takes 1 + c n (in units of the rest of a step), and its gradient has 1 + r s(n) times the variance that
the data alone gives it: r is the directions' part at n = 1 over the data's, s(n) the law's share (variance.py). What is learnt in
a fixed time has a noise that goes with

    work(n) = (1 + c n)(1 + r s(n)),          work(d) = the cost of the exact trace, where the loss takes it

so n is the argmin. c is measured once, before the run, and kept in its config (tuning.py); r changes as the network learns, and
is a function of the weights, the seed and the step. So a resumed or repeated run makes the same choices.

An estimate takes `batches` of two gradients at one direction each (four for ssm, whose data part is that of ssm_vr), 40 (80) in
all for the first five and then two (four) for every hundred steps: less than 3 percent of the time from about 2000 steps on.
"""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from scoresde_cli import processes
from scoresde_cli.losses.base import Loss
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator, seed_global
from scoresde_cli.training import variance
from scoresde_cli.training.loop import Plan
from scoresde_cli.training.state import TrainState

MOST = 64  # directions that are considered, and dimensions up to which the exact trace is
BETTER = 0.02  # what a change has to gain
DEAR = 6.0  # times the cost of a step without tangents: the exact trace is not worth more where r < 5, and not tried
TRIAL = 0.005  # of the run's time, for each of two measurements of costs
FIRST = 100  # steps to the second estimate
SELDOM, PART = 400, 8  # steps between later ones: so great a part of the budget, at least SELDOM
FEWEST, MANY = 4, 16  # batches of an estimate


def with_directions(loss: SSM, n: int) -> SSM:
    """The same loss with n directions."""
    found = copy.copy(loss)
    found.n_proj = n
    return found


def takes_exact(loss: SSM, d: int) -> bool:
    """Whether the largest number that is considered is d, and means the exact trace."""
    return isinstance(loss, SSMVR) and d <= MOST


def most(loss: SSM, d: int) -> int:
    """The largest number of directions that is considered."""
    return min(d, MOST) if isinstance(loss, SSMVR) else MOST


def due(last: int, steps: int) -> int:
    """The step of the next estimate after that of step `last`: 100, 200, 400, 800, and then every eighth of the budget."""
    return last + max(FIRST, min(last, max(SELDOM, steps // PART)))


def batches(gap: int) -> int:
    """Batches of an estimate that comes `gap` steps after the one before."""
    return max(FEWEST, min(MANY, gap // 100))


def cost_of_a_tangent(plan: Plan, loss: SSM, d: int) -> tuple[float, float]:
    """(c, cost of a step with the exact trace), both in units of a step without tangents.

    c is the slope of a robust line (Theil, 1950) through whole steps of 1, 2, 4 and 8 directions, each the fastest of its turns:
    on a busy machine others only add to them. The exact trace is measured where it may pay, and follows the line elsewhere.
    """
    counts, field = (1, 2, 4, 8), copy.copy(plan.field)
    if isinstance(field, ScoreModel) and field.chunk == most(
        loss, d
    ):  # all at once: then 8 are so here as well, in however few dimensions
        field.chunk = None
    plan = replace(plan, field=field)
    projected = [SSM(loss.projection, n, loss.weighting, loss.half, loss.times, loss.t_min) for n in counts]
    seconds = fastest(plan, projected)
    pairs = [(i, j) for i in range(len(counts)) for j in range(i)]
    slope = statistics.median((seconds[i] - seconds[j]) / (counts[i] - counts[j]) for i, j in pairs)
    rest = statistics.median(s - slope * n for s, n in zip(seconds, counts, strict=True))
    if min(slope, rest) <= 0.0:  # steps so short that the clock saw noise
        slope, rest = 0.01 * seconds[0], 0.99 * seconds[0]
    c = slope / rest
    exact = 1.0 + c * d
    if takes_exact(loss, d) and exact < DEAR:
        one, whole = fastest(plan, [projected[0], ISM(loss.weighting, loss.half, loss.times, loss.t_min)])
        exact = (1.0 + c) * whole / one
    return float(f"{c:.4g}"), float(f"{exact:.4g}")


def fastest(plan: Plan, losses: Sequence[Loss]) -> list[float]:
    """The least seconds of a training step with each loss, in as many of 30 turns as fit the part TRIAL of the run."""
    return variance.step_seconds(plan, losses, 30, TRIAL)


def pooled(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(r, its standard error) of the batches of several estimates, as a ratio of means (delta method); 0 of none."""
    if not any(row["data"] for row in rows):
        return 0.0, 0.0
    p = torch.tensor([value for row in rows for value in row["projection"]], dtype=torch.float64)
    q = torch.tensor([value for row in rows for value in row["data"]], dtype=torch.float64)
    scale = max(float(q.mean()), 1e-3 * float(p.mean()))  # few batches can bring the data part below zero
    if scale <= 0.0:
        return 0.0, 0.0
    r = float(p.mean()) / scale
    return r, float((p - r * q).std()) / scale / math.sqrt(len(p))


class Directions:
    """Which n, and why; the plan of the next step.

    Args:
        loss: ssm or ssm_vr. d: dimension.
        cost, exact: of a tangent, and of a step with the exact trace, in units of a step without tangents.
    """

    name, unit = "n_proj", "directions"
    reasons: tuple[str, ...] = ("r",)

    def __init__(self, loss: SSM, d: int, cost: float, exact: float) -> None:
        self.d, self.cost, self.facts = d, cost, {"tangent_cost": cost, "exact_cost": exact}
        self.counts = range(1, most(loss, d) + 1)
        self.costs = [1.0 + cost * n for n in self.counts]
        self.shares = variance.shares(loss.projection, d, self.counts)
        self.ends_exact = takes_exact(loss, d)
        if self.ends_exact:
            self.costs[-1], self.shares[-1] = exact, 0.0

    def work(self, r: float) -> list[float]:
        """(1 + c n)(1 + r s(n)) for each n."""
        return [cost * (1.0 + r * share) for cost, share in zip(self.costs, self.shares, strict=True)]

    def best(self, r: float, now: int | None = None) -> int:
        """The n of least work; the present one where no other is better by more than BETTER."""
        work = self.work(r)
        least = min(self.counts, key=lambda n: work[n - 1])
        return now if now is not None and work[now - 1] <= (1.0 + BETTER) * work[least - 1] else least

    def __call__(self, plan: Plan, state: TrainState) -> tuple[Plan, str | None]:
        """The plan of the next step, and a line where the choice is another one than before."""
        rows, said = state.choices, None
        if not rows or (len(self.counts) > 1 and state.step >= due(rows[-1]["step"], plan.steps)):
            now = rows[-1]["n_proj"] if rows else None
            count = batches(state.step - rows[-1]["step"] if rows else 0)

            def decide() -> tuple[dict[str, Any], float]:
                row = self.measure(plan, state.step, count)
                row["r"], error = pooled([*(r for r in rows if 2 * r["step"] >= state.step), row])
                row["n_proj"] = self.best(row["r"], now)
                return row, error

            row, error = processes.decided(decide)
            rows.append(row)
            if row["n_proj"] != now:
                said = self.why(row["n_proj"], row["r"], error)
        n = rows[-1]["n_proj"]
        assert isinstance(plan.loss, SSM)
        return (plan if plan.loss.n_proj == n else replace(plan, loss=with_directions(plan.loss, n))), said

    def measure(self, plan: Plan, step: int, count: int) -> dict[str, Any]:
        """Both parts of the gradient's variance with one direction, batch by batch; empty where there is nothing to choose."""
        row: dict[str, Any] = {"step": step, "data": [], "projection": []}
        if len(self.counts) == 1:
            return row
        assert isinstance(plan.loss, SSM)
        seed_global(generator(plan.seed, "choice", step))
        loss = with_directions(plan.loss, 1)
        calm = SSMVR(loss.projection, 1, loss.weighting, loss.half, loss.times, loss.t_min)
        found = variance.paired(plan, loss, count, "choice", step, calm=calm if type(loss) is SSM else None)
        return row | {"data": found.data.tolist(), "projection": found.projection.tolist()}

    def why(self, n: int, r: float, error: float) -> str:
        """The reasons for n in a line."""
        if len(self.counts) == 1:
            return f"n_proj={n}: in one dimension the trace is exact"
        work = self.work(r)
        others = [m for m in (1, 2, 4, 8, 16, 32) if m in self.counts and m != n and m in (1, *neighbours(n))]
        beside = [f"{work[m - 1] / work[n - 1]:.2f} at {m}" for m in others if not (self.ends_exact and m == self.d)]
        if self.ends_exact and n != self.d:
            beside.append(f"{work[-1] / work[n - 1]:.2f} exact")
        which = f"n_proj={n} (exact)" if self.ends_exact and n == self.d else f"n_proj={n}"
        interval = f"{max(0.0, r - 2 * error):.2f} to {r + 2 * error:.2f}"
        return (
            f"{which}: one direction adds {r:.2f} ({interval}) of the noise that the data has in a gradient, and takes "
            f"{self.cost:.2f} of the rest of a step; time to equal noise: 1 here, {', '.join(beside)}"
        )


def neighbours(n: int) -> tuple[int, int]:
    """The powers of two next to n, below and above."""
    return 1 << max(0, (n - 1).bit_length() - 1), 1 << n.bit_length()
