"""What is measured of a trained model, each number with its protocol: used at the end of `train` and by `evaluate`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scoresde_cli.compose import Parts
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, nearest
from scoresde_cli.fields import FieldModel
from scoresde_cli.likelihood import Flow
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.metrics.base import Metric, compare
from scoresde_cli.metrics.c2st import C2ST
from scoresde_cli.metrics.classifier import Classifier
from scoresde_cli.metrics.columns import Columns
from scoresde_cli.metrics.energy import EnergyDistance
from scoresde_cli.metrics.frechet import FrechetPCA
from scoresde_cli.metrics.inception import FID, KID
from scoresde_cli.metrics.mmd import MMD
from scoresde_cli.metrics.mode_weights import ModeWeights
from scoresde_cli.metrics.nll import nll
from scoresde_cli.metrics.prdc import PRDC
from scoresde_cli.metrics.radial_tails import RadialTails
from scoresde_cli.metrics.score_error import bootstrap_mean, score_error
from scoresde_cli.metrics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from scoresde_cli.metrics.tails import Tails
from scoresde_cli.metrics.wasserstein import Wasserstein
from scoresde_cli.metrics.whitened import WhitenedSlicedWasserstein
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import Sampler, Samples
from scoresde_cli.training.loop import mean_loss

MANY_PASSES = 30
NLL_ROWS = 2000
Summary = dict[str, dict[str, Any]]

OF_SAMPLES: dict[str, type[Metric]] = {
    "sliced_wasserstein": SlicedWasserstein, "whitened_sliced_wasserstein": WhitenedSlicedWasserstein, "wasserstein": Wasserstein,
    "energy_distance": EnergyDistance, "mmd": MMD, "c2st": C2ST, "prdc": PRDC, "mode_weights": ModeWeights,
    "columns": Columns, "tails": Tails, "radial_tails": RadialTails,
    "frechet_pca": FrechetPCA, "classifier": Classifier, "fid": FID, "kid": KID,
}  # fmt: skip
OF_THE_MODEL = ("loss", "denoising_loss", "score_error", "flux_error", "nll")
FIELDS = {
    "denoising_loss": "score",
    "score_error": "score",
    "flux_error": "flux",
    "nll": "velocity",
}  # what of a model they take
EXTRA = ("fid", "kid")  # they need more than is installed
METRICS = (*OF_THE_MODEL, *OF_SAMPLES)
QUICK = ("loss", "score_error", "flux_error", "sliced_wasserstein", "energy_distance")  # at the end of `train`


def pick_metrics(asked: Sequence[str] | None, data: Dataset, model: FieldModel | None = None) -> list[str]:
    """The names of what is measured; None for all that mean something on this data, and of this model.

    Raises ScoreSDEError for a name that is none, or means nothing here.
    """
    if asked is None:
        return [name for name in METRICS if name not in EXTRA and unfit(name, data, model) is None]
    for name in asked:
        if name not in METRICS:
            raise ScoreSDEError(f"metrics={name}: expected one of {', '.join(METRICS)}{nearest(name, METRICS)}")
        reason = unfit(name, data, model)
        if reason is not None:
            raise ScoreSDEError(f"metrics={name}: {reason}")
    return [name for name in METRICS if name in asked]


def of_samples() -> set[str]:
    """The names of all numbers that are taken of samples."""
    return {number for metric in OF_SAMPLES.values() for number in metric.quantities}


def unfit(name: str, data: Dataset, model: FieldModel | None = None) -> str | None:
    """Why a metric means nothing on this data, or of this model and its process; None where it does."""
    if model is not None and name == "denoising_loss" and model.sde.kernel() is None:
        return f"it needs a closed-form kernel, which {type(model.sde).__name__} has not"
    if model is not None and name == "nll" and model.sde.still:
        return "nothing flows, so there is no way from the data to a known density"
    if model is not None and name == "nll" and model.sde.phase:
        return "the flow carries the density of (x, v), and that of x alone is an integral over v, which nobody knows"
    if name in OF_SAMPLES:
        return OF_SAMPLES[name].unfit(data)
    field = FIELDS.get(name)
    if model is not None and field is not None and field not in model.provides:
        return f"it takes the {field}, and the model has {', '.join(sorted(model.provides))}"
    sde = None if model is None else model.sde
    if name == "flux_error" and sde and sde.jumps and not sde.jumps.rate(torch.tensor([0.0, sde.T])).any():
        return "nothing jumps at sde.rate=0, so there is no flux"
    if name in ("score_error", "flux_error") and type(data).oracle is Dataset.oracle:
        return "the exact score of this data is not known"
    return None


def held_out(parts: Parts) -> Tensor:
    """The test split on the run's device, in its precision."""
    return parts.data.splits["test"].to(device=parts.device, dtype=parts.dtype)


def losses(
    parts: Parts, model: ScoreModel, averaged: bool, step: int, seed: int, name: str = "loss"
) -> Summary:  # fmt: skip
    """The loss on held-out data, the baseline's, and their paired difference, with intervals.

    `loss` is what the run has trained on, by its reference; `denoising_loss` is DSM, whatever the run. Few rows are noised
    several times; a row's mean is one observation, so the intervals are for fresh rows of data.
    """
    reference = parts.loss.reference(parts.d)
    if name == "denoising_loss":
        reference = DSM(times=reference.times, t_min=reference.t_min)
    x0 = held_out(parts)[:20_000]
    repeats = -(-4000 // len(x0))
    values, baseline = (np.zeros(len(x0)), np.zeros(len(x0)))
    for i in range(repeats):
        # The times of a batch are stratified in order: another order each time gives every row times of its own.
        order = torch.randperm(len(x0), generator=generator(seed, "test-order", i))
        for one, total in ((model, values), (parts.baseline, baseline)):
            found = mean_loss(reference, one, parts.sde, x0[order.to(x0.device)], seed, f"test-{i}").cpu().numpy()
            total[order.numpy()] += found / repeats
    protocol = {
        "n": len(x0), "repeats": repeats, "split": "test", "averaged": averaged, "step": step,
        "loss": reference.convention(parts.d), "trained_on": parts.loss.convention(parts.d), "seed": seed,
        "times": reference.times, "t_min": reference.t_min,
        "interval": "over rows, for this model (not over training seeds)",
    }  # fmt: skip

    def entry(numbers: np.ndarray) -> dict[str, Any]:
        ci = bootstrap_mean(numbers, seed)
        return {"value": float(numbers.mean()), "ci": ci, "floor": None, "floor_high": None,
                "unit": "loss", "protocol": protocol}  # fmt: skip

    return {
        name: entry(values), f"{name}_baseline": entry(baseline), f"{name}_gain": entry(baseline - values),
    }  # fmt: skip


def in_words(baseline: ScoreModel) -> str:
    """What the baseline is: of fewer than ten rows a dimension there is no covariance to be had (compose.py)."""
    return f"a Gaussian with the data's mean and {'covariance' if baseline.gaussian.basis is not None else 'mean variance'}"


def verdict(summary: Summary, gaussian: str = "a Gaussian with the data's mean and covariance") -> str | None:
    """One line where the model does not beat its baseline, the `gaussian`, or hardly; else None.

    Held against it: the held-out loss (paired), the score error, and the sliced Wasserstein distance of its samples.
    """
    failed = []
    gain = summary.get("loss_gain")
    if gain is not None and gain["ci"][0] <= 0:
        failed.append(f"held-out loss {summary['loss']['value']:.4g} against {summary['loss_baseline']['value']:.4g}")
    for name in ("score_error", "sliced_wasserstein"):
        if name not in summary:
            continue
        entry, of = summary[name], summary[f"{name}_baseline"]["value"]
        if entry["ci"][1] >= of and entry["value"] > entry["floor_high"]:
            failed.append(f"{name} {entry['value']:.3g} against {of:.3g}")
    if failed:
        return f"did not beat its baseline, {gaussian} (where the data is Gaussian, nothing does): {'; '.join(failed)}"
    if "score_error" in summary and summary["score_error"]["value"] > 0.5 * summary["score_error_baseline"]["value"]:
        error, of = (summary[name]["value"] for name in ("score_error", "score_error_baseline"))
        return f"hardly learnt: score_error {error:.3g} against {of:.3g} of {gaussian}"
    return None


def overfitted(best: float, best_step: int, last: float, step: int, passes: float) -> str | None:
    """One line where the validation loss (relative to the baseline's, so negative is good) has turned and risen; else None.

    Only after MANY_PASSES passes over the training rows: before that, what goes up and down is the optimiser's noise, and to
    pick the best of it would flatter the noisiest method.
    """
    if passes >= MANY_PASSES and best_step < step and best < 0 and last > 0.9 * best:
        return (
            f"overfitted in {passes:.0f} passes over the data: the held-out loss gained {-best:.3g} on the baseline at step "
            f"{best_step}, {-last:.3g} at the end; fewer steps or more data would use the training better"
        )
    return None


@dataclass(frozen=True)
class Rows:
    """How many held-out rows the likelihood is taken of."""

    rows: Annotated[int, Field(ge=10, le=1_000_000)] = NLL_ROWS


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what: samples, where any were drawn, and the held-out rows beside them (m, *D).

    `of_classes` (classes, k, *D) are samples drawn for each class, where the model is given labels and `classifier` is asked for.
    """

    summary: Summary
    samples: Samples | None
    reference: Tensor
    of_classes: Tensor | None = None


def evaluate(
    parts: Parts, model: ScoreModel, sampler: Sampler, n: int, *, metrics: Sequence[str], seed: int, averaged: bool,
    step: int, flow: Flow | None = None, nll_rows: int = NLL_ROWS, progress: Callable[[int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """The named metrics (pick_metrics) of a model, with n samples where they need any; see metrics/ for what the numbers mean."""
    model.eval()
    data = parts.data
    common = {"averaged": averaged, "step": step, "seed": seed, "data": fingerprint(data)}
    settings = {name: value for name, value in vars(parts.sde).items() if isinstance(value, int | float | str)}
    process = {"split": "test", "sde": {"class": type(parts.sde).__name__, **settings}}
    summary: Summary = {}
    for name in ("loss", "denoising_loss"):
        if name in metrics:
            summary |= losses(parts, model, averaged, step, seed, name)
    x_test, truth = held_out(parts), data.oracle(parts.sde)
    for field in ("score", "flux"):
        if f"{field}_error" in metrics and truth is not None and field in model.provides & truth.provides:
            for suffix, candidate in (("", model), ("_baseline", parts.baseline)):
                summary[f"{field}_error{suffix}"] = score_error(
                    candidate, truth, parts.sde, x_test[:20_000], parts.settings.t_min, seed, field
                )
    if "nll" in metrics:
        rows = x_test[:nll_rows]
        summary |= nll(model, parts.baseline, data, rows, parts.settings.t_min, flow or Flow(), seed)
    for entry in summary.values():
        entry["protocol"] |= common | process
    of_samples = [OF_SAMPLES[name](data) for name in metrics if name in OF_SAMPLES]
    fresh = data.fresh(n, generator(seed, "held-out"))
    reference = data.comparable((x_test if fresh is None else fresh).float().cpu()[:n])
    if not of_samples:
        return Evaluation(summary, None, reference)
    if all(metric.rows < n for metric in of_samples):  # rows that nobody looks at
        reference = reference[: max(metric.rows for metric in of_samples)]
    values = {} if data.quantum is None else {"values": "whole levels"}
    samples = sampler.sample(
        model, parts.sde, data.shape, n, seed, device=parts.device, dtype=parts.dtype, progress=progress
    )
    drawn = samples.x[: len(reference)].float().cpu()
    if torch.isfinite(drawn).all():
        drawn = data.comparable(drawn)
        found = compare(of_samples, drawn, reference, fresh_pairs(data, len(drawn), seed), seed)
        of: dict[str, Any] = {
            "nfe": samples.nfe,
            "reference": "test split" if fresh is None else "fresh draws",
        } | values
        if sampler.adaptive:
            del of["nfe"]  # the tolerances are what two figures share
        for entry in found.values():
            entry["protocol"] |= sampler.protocol() | common | of
        summary |= found
    of_classes = None
    if "classifier" in metrics and data.classes:
        count = max(8, n // len(data.classes))
        where: Any = {"device": parts.device, "dtype": parts.dtype}
        drawn_for = [
            sampler.sample(model.labelled(torch.tensor([k])), parts.sde, data.shape, count, seed, **where)
            for k in range(len(data.classes))
        ]
        of_classes = torch.stack([each.x.float().cpu() for each in drawn_for])
        judge = next(metric for metric in of_samples if isinstance(metric, Classifier))
        if torch.isfinite(of_classes).all():
            entry = judge.label_accuracy(data.comparable(of_classes.flatten(0, 1)).view_as(of_classes), seed)
            entry["protocol"] |= sampler.protocol() | common | {"nfe": drawn_for[0].nfe} | values
            summary["label_accuracy"] = entry
    if "sliced_wasserstein" in summary:
        gaussian = data.comparable(parts.baseline.moments.sample(len(drawn), generator(seed, "gaussian")).float())
        value = sliced_wasserstein(gaussian, reference.flatten(1))
        summary["sliced_wasserstein_baseline"] = plain(
            value, "model units", n=len(drawn), of="a Gaussian with the data's moments", **values
        )
    return Evaluation(summary, samples, reference, of_classes)


def fingerprint(data: Dataset) -> str:
    """Tells two data sets apart: 12 digits of BLAKE2b of the test split, the names of its columns and its units."""
    ends = data.units.to_user(data.splits["test"][:2], rounded=False)
    digest = hashlib.blake2b(repr(data.columns).encode(), digest_size=6)
    for part in (data.splits["test"], ends):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def fresh_pairs(data: Dataset, m: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """i -> two fresh samples of m rows; where the law cannot be sampled, disjoint parts of the data.

    As with the splits, equal rows are on the same side: copies of one row on both would look like a perfect model.
    """
    everything = data.comparable(data.everything())
    group = None
    if data.fresh(1, generator(seed, "any")) is None:
        group = torch.unique(everything.flatten(1), dim=0, return_inverse=True)[1]

    def pair(i: int) -> tuple[Tensor, Tensor]:
        source = generator(seed, "floor", i)
        drawn = data.fresh(2 * m, source)
        if drawn is None:
            if len(everything) < 2 * m:
                raise ScoreSDEError(f"the floor needs {2 * m} rows of data, there are {len(everything)}")
            assert group is not None
            order = torch.argsort(torch.randperm(int(group.max()) + 1, generator=source)[group], stable=True)
            return everything[order[:m]], everything[order[-m:]]
        return drawn[:m], drawn[m:]

    return pair


UNLIKE = ("step", "trained_on")  # of a protocol, what two figures need not share


def unlike(entries: Sequence[dict[str, Any]]) -> str | None:
    """The first difference in protocol between entries of one name, in words; None where they may stand in one table."""
    first = entries[0]
    for other in entries[1:]:
        if first["unit"] != other["unit"]:
            return f"unit {first['unit']} against {other['unit']}"
        for key in {**first["protocol"], **other["protocol"]}:
            a, b = first["protocol"].get(key), other["protocol"].get(key)
            if a != b and key not in UNLIKE:
                return f"{key} {a} against {b}"
    return None


def plain(value: float, unit: str, **protocol: Any) -> dict[str, Any]:
    """A number that is what it is: no interval, no floor."""
    return {"value": value, "ci": None, "floor": None, "floor_high": None, "unit": unit, "protocol": protocol}
