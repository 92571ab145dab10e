"""What is measured of a trained model, each number with its protocol: used at the end of `train` and by `evaluate`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.compose import Parts
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.metrics.base import compare
from scoresde_cli.metrics.energy import EnergyDistance
from scoresde_cli.metrics.score_error import bootstrap_mean, score_error
from scoresde_cli.metrics.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import Sampler, Samples
from scoresde_cli.training.loop import mean_loss

MANY_PASSES = 30
Summary = dict[str, dict[str, Any]]


def held_out(parts: Parts) -> Tensor:
    """The test split on the run's device, in its precision."""
    return parts.data.splits["test"].to(device=parts.device, dtype=parts.dtype)


def losses(parts: Parts, model: ScoreModel, averaged: bool, step: int, seed: int) -> Summary:
    """The loss on held-out data, the baseline's, and their paired difference, with intervals.

    Few rows are noised several times; a row's mean is one observation, so the intervals are for fresh rows of data.
    """
    reference = parts.loss.reference(parts.d)
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
        "interval": "over rows, for this model (not over training seeds)",
    }  # fmt: skip

    def entry(numbers: np.ndarray) -> dict[str, Any]:
        ci = bootstrap_mean(numbers, seed)
        return {"value": float(numbers.mean()), "ci": ci, "floor": None, "floor_high": None,
                "unit": "loss", "protocol": protocol}  # fmt: skip

    return {
        "loss": entry(values), "loss_baseline": entry(baseline), "loss_gain": entry(baseline - values),
    }  # fmt: skip


def verdict(summary: Summary) -> str | None:
    """One line where the model does not beat a Gaussian with the data's mean and covariance, or hardly; else None.

    Held against it: the held-out loss (paired), the score error, and the sliced Wasserstein distance of its samples.
    """
    failed = []
    gain = summary["loss_gain"]
    if gain["ci"][0] <= 0:
        failed.append(f"held-out loss {summary['loss']['value']:.4g} against {summary['loss_baseline']['value']:.4g}")
    for name in ("score_error", "sliced_wasserstein"):
        if name not in summary:
            continue
        entry, of = summary[name], summary[f"{name}_baseline"]["value"]
        if entry["ci"][1] >= of and entry["value"] > entry["floor_high"]:
            failed.append(f"{name} {entry['value']:.3g} against {of:.3g}")
    if failed:
        return (
            "did not beat its baseline, a Gaussian with the data's mean and covariance (where the data is Gaussian, nothing "
            f"does): {'; '.join(failed)}"
        )
    if "score_error" in summary and summary["score_error"]["value"] > 0.5 * summary["score_error_baseline"]["value"]:
        error, of = (summary[name]["value"] for name in ("score_error", "score_error_baseline"))
        return (
            f"hardly learnt: score_error {error:.3g} against {of:.3g} of a Gaussian with the data's mean and covariance"
        )
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


def evaluate(
    parts: Parts, model: ScoreModel, sampler: Sampler, n: int, *, seed: int, averaged: bool, step: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Summary, Samples, Tensor]:  # fmt: skip
    """(summary, n samples, held-out data) for a model; see metrics/ for what the numbers mean."""
    model.eval()
    summary = losses(parts, model, averaged, step, seed)
    truth = parts.data.oracle(parts.sde)
    x_test = held_out(parts)
    common = {"split": "test", "averaged": averaged, "step": step, "seed": seed}
    if truth is not None:
        t_min = parts.settings.t_min
        for name, candidate in (("score_error", model), ("score_error_baseline", parts.baseline)):
            summary[name] = score_error(candidate, truth, parts.sde, x_test[:20_000], t_min, seed)
            summary[name]["protocol"] |= common
    samples = sampler.sample(
        model, parts.sde, parts.data.shape, n, seed, device=parts.device, dtype=parts.dtype, progress=progress
    )
    fresh = parts.data.fresh(n, generator(seed, "held-out"))
    reference = (x_test if fresh is None else fresh).float().cpu()
    m = min(n, len(reference))
    everything = torch.cat(list(parts.data.splits.values()))

    def pair(i: int) -> tuple[Tensor, Tensor]:
        """Two fresh samples of m rows; disjoint parts of the data where the law cannot be sampled."""
        source = generator(seed, "floor", i)
        drawn = parts.data.fresh(2 * m, source)
        if drawn is None:
            if len(everything) < 2 * m:
                raise ScoreSDEError(f"the floor needs {2 * m} rows of data, there are {len(everything)}")
            drawn = everything[torch.randperm(len(everything), generator=source)[: 2 * m]]
        return drawn[:m], drawn[m:]

    drawn = samples.x[:m].float().cpu()
    if torch.isfinite(drawn).all():
        for name, entry in compare(
            [SlicedWasserstein(parts.data), EnergyDistance(parts.data)], drawn, reference[:m], pair, seed
        ).items():
            entry["protocol"] |= sampler.protocol() | {"averaged": averaged, "step": step, "seed": seed} | {
                "nfe": samples.nfe, "reference": "test split" if fresh is None else "fresh draws",
            }  # fmt: skip
            summary[name] = entry
        gaussian = parts.baseline.gaussian.sample(m, generator(seed, "gaussian")).float()
        value = sliced_wasserstein(gaussian, reference[:m].flatten(1))
        summary["sliced_wasserstein_baseline"] = plain(
            value, "model units", n=m, of="a Gaussian with the data's moments"
        )
    return summary, samples, reference[:m]


def plain(value: float, unit: str, **protocol: Any) -> dict[str, Any]:
    """A number that is what it is: no interval, no floor."""
    return {"value": value, "ci": None, "floor": None, "floor_high": None, "unit": unit, "protocol": protocol}
