"""The variance of a sliced loss, split into what the data and what the directions bring, against the closed forms.

At one time t, with l_k(x) the weighted loss of a sample x under the k-th of m independent draws of its directions, l(x) and s^2(x)
their mean and variance over the draws, both parts are estimated without bias:

    Var l_1 = Var_x E_v l  +  E_x Var_v l              data part + projection part (law of total variance)
    projection part        mean of s^2(x)              that is, of 1/2 (l_j - l_k)^2 over all pairs of draws
    data part              Var of l(x) less mean of s^2(x)/m, that is, the covariance over x of l_j and l_k, j != k

Given x, a sliced loss is a constant and the mean of v^T M v over the directions, with S and J the score and its Jacobian, J_0 the
Jacobian of the model's linear part, which ssm_vr takes by its exact trace, and lambda the weight:

    ssm       M = lambda (S S^T + 2 J)             ssm_vr    M = 2 lambda (J - J_0)

so its variance is `Projection.variance(M, n)`, sample by sample. All of this is in float64.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde_cli import divergence
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.identity import z_score
from scoresde_cli.losses.base import Loss
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm import EXACT_UP_TO
from scoresde_cli.networks.model import ScoreModel, Zero
from scoresde_cli.projections import Projection
from scoresde_cli.rng import generator
from scoresde_cli.sdes.base import Noised
from scoresde_cli.studies.statistics import Estimate, of_logs, student
from scoresde_cli.training import loop
from scoresde_cli.training.loop import Plan
from scoresde_cli.training.variance import Batch

AT_ONCE = 2048  # rows whose losses are taken at a time
ROUNDING = 1e-20  # a variance that is this little of the mean square of the loss is zero


@dataclass(frozen=True)
class Setting:
    """A loss by name, ssm or ssm_vr, with n directions of a law; ISM is the `exact` law of ssm_vr, with n = d."""

    loss: str
    law: str
    n: int
    value: Loss

    @property
    def name(self) -> dict[str, Any]:
        return {"loss": self.loss, "law": self.law, "n": self.n}

    @property
    def group(self) -> tuple[str, str]:
        return self.loss, self.law


def exact_loss(loss: Loss) -> ISM:
    """The exact trace, in the convention of a loss."""
    return ISM(loss.weighting, loss.half, loss.times, loss.t_min)


def log_times(plan: Plan, count: int) -> Tensor:
    """Times from t_min to T, even in the logarithm, (count,), float64."""
    return torch.logspace(math.log10(plan.loss.t_min), math.log10(plan.sde.T), count, dtype=torch.float64)


def wide(plan: Plan) -> Plan:
    """The plan in float64 on the host, on a copy of its weights, neither compiled nor of lower precision."""
    old = plan.model
    network = copy.deepcopy(old.network).cpu()
    # Made anew, so that its principal directions are orthogonal to the last digit.
    model = ScoreModel(network, old.sde, old.parameterisation, old.gaussian).double()
    labels = None if plan.labels is None else plan.labels.cpu()
    return replace(plan, model=model, field=model, train=plan.train.cpu().double(), labels=labels)


def batch_at(plan: Plan, times: Tensor, rows: int) -> Batch:
    """The same number of rows at each time, time by time."""
    source = generator(plan.seed, "closed forms", rows, device=plan.train.device)
    field, x0 = loop.draw_batch(replace(plan, batch_size=rows * len(times), accumulate=1), source)
    t = times.repeat_interleave(rows).to(x0)
    return Batch(plan, ("closed forms",), field, x0, t, plan.sde.perturb(x0, t, source))


@torch.no_grad()
def quadratic_forms(batch: Batch) -> dict[str, Tensor]:
    """M of each sample, (B, d, d), by loss."""
    plan, x, t, sde = batch.plan, batch.noised.x_t, batch.t, batch.plan.sde
    model = ScoreModel(Zero(), sde, plan.model.parameterisation, plan.model.gaussian).to(x)
    field, linear, white, d = batch.field, model, sde.whitening(), x[0].numel()
    if white is not None:  # where the losses are taken
        field, linear, sde, x = field.whitened(), linear.whitened(), white.sde, white.into(x)
    kernel = sde.kernel()
    if kernel is not None and not kernel.scalar:
        raise ScoreSDEError(
            "study=estimator needs one noise level for all directions, which sde.drift=isotropic has and others have not"
        )
    units = torch.eye(d, dtype=x.dtype).unsqueeze(1).expand(d, len(x), d).reshape(d, *x.shape)
    score, columns = divergence.dual(field, x, t, units)
    _, known = divergence.dual(linear, x, t, units)
    s = score.flatten(1)
    jacobian, known = (each.flatten(2).permute(1, 2, 0) for each in (columns, known))
    scale = ((0.5 if plan.loss.half else 1.0) * plan.loss.weight(plan.sde, t, d)).reshape(-1, 1, 1)
    return {
        "ssm": scale * (s.unsqueeze(2) * s.unsqueeze(1) + 2.0 * jacobian),
        "ssm_vr": scale * 2.0 * (jacobian - known),
    }  # fmt: skip


def predict(law: Projection, forms: Tensor, n: int) -> Tensor | None:
    """The closed form for each sample, (B,), or None where the law has none."""
    found = [law.variance(M, n) for M in forms]
    return None if any(each is None for each in found) else torch.stack(found)  # type: ignore[arg-type]


def interval(values: Tensor) -> Estimate:
    """The mean of independent values, Student's."""
    return student(float(values.mean()), float(values.std()) / math.sqrt(values.numel()), values.numel())


def relative_variance(within: Tensor, predicted: Tensor) -> float:
    """Of s^2(x) over its closed form, from all samples: the few that make up most of a mean do not also decide its error."""
    found = torch.where(predicted > 0, within / predicted, torch.ones_like(within))
    return float(found.var() / found.mean().square())


def agreement(within: Tensor, predicted: Tensor, relative: float, square: float) -> dict[str, Any]:
    """The projection part over its closed form, and the z-score of its logarithm.

    Args:
        relative: `relative_variance`. square: the mean square of the loss, which tells what is zero to rounding.
    """
    expected, measured, n = float(predicted.mean()), float(within.mean()), within.numel()
    if min(expected, measured) <= ROUNDING * square:
        agree = max(expected, measured) <= ROUNDING * square
        return {"predicted": expected, "ratio": None, "z": 0.0 if agree else math.inf}
    se = math.sqrt(relative * float(predicted.square().sum())) / (n * expected)
    ratio = measured / expected
    return {"predicted": expected, "ratio": asdict(of_logs(ratio, se, n)), "z": math.log(ratio) / se}


@torch.no_grad()
def compare(
    plan: Plan, settings: Sequence[Setting], times: int, rows: int, draws: int, progress: Callable[[float], None]
) -> list[dict[str, Any]]:
    """For each setting, over all times and for each: both parts, the closed form, the bias against the exact loss.

    Args:
        times: how many, from t_min to T. rows: samples at each. draws: of the directions of each sample, m above.

    Beyond EXACT_UP_TO dimensions the Jacobians are too dear: then there is neither closed form nor bias.
    """
    plan = wide(plan)
    batch = batch_at(plan, log_times(plan, times), rows)
    d, exact, forms = batch.x0[0].numel(), None, {}
    if d <= EXACT_UP_TO:
        exact, forms = batch.losses(exact_loss(plan.loss), "exact"), quadratic_forms(batch)
    found = []
    for i, setting in enumerate(settings):
        values = drawn(batch, setting.value, draws)
        law = getattr(setting.value, "projection", None)
        predicted = None if law is None or not forms else predict(law, forms[setting.loss], setting.n)
        found.append(setting.name | parts(values.reshape(draws, times, rows), predicted, exact))
        progress((i + 1) / len(settings))
    return found


def drawn(batch: Batch, loss: Loss, draws: int) -> Tensor:
    """The losses (draws, B) of the samples under independent draws of their directions, AT_ONCE rows at a time."""
    copies = max(1, min(draws, AT_ONCE // len(batch.t)))
    x_t = Noised(tiled(batch.noised.x_t, copies))
    many = replace(batch, x0=tiled(batch.x0, copies), t=tiled(batch.t, copies), noised=x_t)
    found = [many.losses(loss, k).reshape(copies, -1) for k in range(-(-draws // copies))]
    return torch.cat(found)[:draws]


def tiled(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *[1] * (x.ndim - 1))


def parts(values: Tensor, predicted: Tensor | None, exact: Tensor | None) -> dict[str, Any]:
    """What `compare` says of one setting, from its losses (draws, times, rows)."""
    m, times, rows = values.shape
    within, mean = values.var(0), values.mean(0)
    between = (mean - mean.mean(1, keepdim=True)).square() * rows / (rows - 1) - within / m
    closed = None if predicted is None else predicted.reshape(times, rows)
    relative = math.nan if closed is None else relative_variance(within, closed)

    def of(at: slice) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: asdict(interval(part[at])) for name, part in (("data", between), ("projection", within))
        }
        square = float(values[:, at].square().mean())
        unknown = {"predicted": None, "ratio": None, "z": None}
        return found | (unknown if closed is None else agreement(within[at], closed[at], relative, square))

    off = None if exact is None else mean.flatten() - exact
    return of(slice(None)) | {
        "bias": None if off is None else asdict(interval(off)),
        "bias_z": None if off is None else float(z_score(off, 0.0)),
        "by_time": [of(slice(i, i + 1)) for i in range(times)],
    }
