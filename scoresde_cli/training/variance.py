"""The variance of a training step's gradient, split into what the data and what the directions bring, and its cost.

With g(D, v) the gradient of a batch's mean loss in all weights, D the batch, its times and its noise, v the directions:

    tr Cov[g] = tr Cov_D[ E_v g ] + E_D[ tr Cov_v g ]       data part + projection part (law of total variance)

and with v, v' independent given D, and D' another batch, both are estimated without bias from inner products alone:

    projection part    1/2 |g(D, v) - g(D, v')|^2
    data part          1/2 < g(D, v) - g(D', w), g(D, v') - g(D', w') >

One replicate takes two batches and four gradients. Of R batches with two gradients each (`paired`), the data part is the sample
covariance R/(R-1) mean_i < g(D_i, v_i) - mean, g(D_i, v'_i) - mean' >, which is known as well from half as many.

n independent directions bring 1/n of what one brings, and a step with n of them costs 1 + c n, where c is the cost of one tangent
as a part of the rest of the step. Over a fixed time the variance of what the steps add up to goes with

    cost times variance   (1 + c n)(1 + r/n),   r = projection part / data part at n = 1:   least at n = sqrt(r / c)
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss
from scoresde_cli.projections import Projection
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.base import Noised
from scoresde_cli.training import loop
from scoresde_cli.training.loop import Plan


@dataclass(frozen=True)
class Split:
    """Unbiased estimates of both parts, one a replicate: data (R,), projection (R,), float64."""

    data: Tensor
    projection: Tensor

    @property
    def ratio(self) -> float:
        """Projection part over data part."""
        return float(self.projection.mean() / self.data.mean())


@dataclass(frozen=True)
class Batch:
    """One draw of everything but the directions, given to any number of losses."""

    plan: Plan
    source: tuple[int | str, ...]
    field: FieldModel
    x0: Tensor
    t: Tensor
    noised: Noised

    @classmethod
    def draw(cls, plan: Plan, *source: int | str, at: float | None = None) -> "Batch":
        """The batch named by (seed, *source); at one time for all samples where `at` gives it."""
        drawn = generator(plan.seed, "variance", *source, device=plan.train.device)
        field, x0 = loop.draw_batch(plan, drawn)
        t, noised = plan.loss.noise(plan.sde, x0, drawn)
        if at is not None:
            t = torch.full_like(t, at)
            noised = plan.sde.perturb(x0, t, drawn)
        return cls(plan, source, field, x0, t, noised)

    def losses(self, loss: Loss, which: int | str) -> Tensor:
        """The weighted loss of each sample, (B,), with the directions named by `which`."""
        drawn = generator(self.plan.seed, "directions", *self.source, which, device=self.x0.device)
        return loss.weighted(self.field, self.plan.sde, self.x0, self.noised, self.t, drawn)

    def gradient(self, loss: Loss, which: int | str) -> Tensor:
        """The gradient of the mean loss in all weights, flat, (P,)."""
        weights = [p for p in self.plan.model.network.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.losses(loss, which).mean(), weights, allow_unused=True)
        return torch.cat([
            torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(weights, found, strict=True)
        ])  # fmt: skip


def split(
    plan: Plan, loss: Loss, replicates: int, *source: int | str, at: float | None = None, calm: Loss | None = None
) -> Split:
    """Both parts of the variance of the gradient of `loss`, on batches of the plan's size, in float64.

    The same (seed, source) give the same batches, so that two losses are compared on the same data. The data part is that
    of E_v g alone: where `calm` has the same one with less noise (ssm_vr for ssm), it is estimated with that.
    """
    data, projection = [], []
    for i in range(replicates):
        first, second = (Batch.draw(plan, *source, i, j, at=at) for j in (0, 1))
        a, b = first.gradient(loss, "a"), first.gradient(loss, "b")
        c, d = second.gradient(loss, "a"), second.gradient(loss, "b")
        projection.append(0.25 * ((a - b).double().square().sum() + (c - d).double().square().sum()))
        if calm is not None:
            a, b = first.gradient(calm, "a"), first.gradient(calm, "b")
            c, d = second.gradient(calm, "a"), second.gradient(calm, "b")
        data.append(0.5 * ((a - c).double() @ (b - d).double()))
    return Split(torch.stack(data).cpu(), torch.stack(projection).cpu())


def paired(plan: Plan, loss: Loss, batches: int, *source: int | str, calm: Loss | None = None) -> Split:
    """Both parts from R = `batches` >= 2 batches of the plan's size and two gradients each (four with `calm`, as in `split`).

    The values are what each batch brings to the unbiased mean; those of the data share their means, hardly dependent otherwise.
    """
    drawn = [Batch.draw(plan, *source, i) for i in range(batches)]
    a, b = ([batch.gradient(loss, which) for batch in drawn] for which in ("a", "b"))
    projection = [0.5 * (x - y).double().square().sum() for x, y in zip(a, b, strict=True)]
    if calm is not None:
        a, b = ([batch.gradient(calm, which) for batch in drawn] for which in ("a", "b"))
    mean_a, mean_b = torch.stack(a).mean(0), torch.stack(b).mean(0)
    data = [
        batches / (batches - 1) * ((x - mean_a).double() @ (y - mean_b).double()) for x, y in zip(a, b, strict=True)
    ]
    return Split(torch.stack(data).cpu(), torch.stack(projection).cpu())


def shares(law: Projection, d: int, counts: Sequence[int]) -> list[float]:
    """The projection part at n directions over that at one, for each n: 1/n, less for laws without replacement.

    A law without a closed form, and any in more than 1024 dimensions, counts as one of independent directions.
    """
    if d > 1024:
        return [1.0 / n for n in counts]
    A = normal((d, d), generator(0, "shares"), torch.float64)
    one = law.variance(A, 1)
    if one is None or float(one) <= 0.0:
        return [1.0 / n for n in counts]
    return [float(law.variance(A, n)) / float(one) for n in counts]  # type: ignore[arg-type]


def work(r: float, c: float, counts: Sequence[int], shares: Sequence[float]) -> list[float]:
    """Cost times variance (1 + c n)(1 + r share(n)) for each n."""
    return [(1.0 + c * n) * (1.0 + max(r, 0.0) * share) for n, share in zip(counts, shares, strict=True)]


def step_seconds(plan: Plan, losses: Sequence[Loss], turns: int, part: float = math.inf) -> list[float]:
    """The least seconds of a whole training step with each loss, on one copy of the weights, which the steps leave as they are.

    On a busy machine others only add to them. Each turn takes the losses in another order, so that no two share their
    disturbances, after a turn that warms up. Of the turns, 3 to all are made: as many as fit `part` of the plan's whole time.
    """
    model, field = copy.deepcopy((plan.model, plan.field))  # they share their weights, and so do the copies
    trial = replace(plan, model=model, field=field)
    state = loop.start(trial)
    least, start = [math.inf] * len(losses), 0.0
    for turn in range(turns + 1):
        if turn == 1:
            start = time.perf_counter()
        elif turn > 3 and time.perf_counter() - start > part * min(plan.steps * least[0], plan.max_seconds or math.inf):
            break
        for i in torch.randperm(len(losses), generator=generator(plan.seed, "turns", turn)).tolist():
            began = time.perf_counter()
            loop.train_step(replace(trial, loss=losses[i]), state, 0.0)
            if plan.train.device.type != "cpu":
                torch.accelerator.synchronize()
            if turn > 0:
                least[i] = min(least[i], time.perf_counter() - began)
    return least
