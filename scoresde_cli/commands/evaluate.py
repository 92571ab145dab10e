"""`scoresde evaluate`: measure runs again, keep the numbers with their protocol, and compare what may be compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt

from scoresde_cli import evaluation
from scoresde_cli.checks import check_call
from scoresde_cli.commands.sample import pick_sampler
from scoresde_cli.compose import build, compose
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.likelihood import Flow
from scoresde_cli.projections import check_law
from scoresde_cli.provenance import command_line, jsonable, now
from scoresde_cli.rundir import RunDir
from scoresde_cli.runs import Run
from scoresde_cli.tracking import console
from scoresde_cli.training.state import write_durably


@dataclass(frozen=True)
class Keys:
    """The keys of `evaluate`."""

    run: str | list[str]
    metrics: str | list[str] | None
    n: Annotated[int, Field(ge=20, le=10_000_000)]
    seed: NonNegativeInt
    n_proj: PositiveInt
    nll: dict[str, Any]
    figures: bool
    checkpoint: Literal["selected", "last", "best"] | PositiveInt
    average: bool
    device: str
    t_min: Annotated[float, Field(gt=0, lt=1)] | None
    trust: bool


@dataclass(frozen=True)
class Measured:
    """One run and what was found of it."""

    path: Path
    step: int
    summary: evaluation.Summary


def read_earlier(file: Path) -> list[Any]:
    """The entries of an evaluation.json."""
    try:
        found = json.loads(file.read_text()) if file.exists() else []
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise Unreadable(f"{file}: not a list of evaluations; move it away")
    return found


def task(config: DictConfig) -> int:
    keys: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    sampler, law = keys.pop("sampler", None), keys.pop("projection", None)
    check_call(Keys, keys, "")
    settings = dict(keys["nll"])
    check_call(evaluation.Rows, {"rows": settings.pop("rows", evaluation.NLL_ROWS)}, "nll")
    check_call(Flow, settings, "nll", ("projection", "n_proj"))
    flow = Flow(**settings, n_proj=keys["n_proj"], projection=None if law is None else build(law, "projection"))
    folders = [RunDir.open(path) for path in ([keys["run"]] if isinstance(keys["run"], str) else keys["run"])]
    if not folders:
        raise ScoreSDEError("run=[]: expected a run directory, or a list of them")
    found = [measure(folder, keys, sampler, flow) for folder in folders]
    return compare(found) if len(found) > 1 else 0


def measure(folder: RunDir, keys: dict[str, Any], chosen: dict[str, Any] | None, flow: Flow) -> Measured:
    """Measure one run, write its numbers and figures, and show them."""
    run = Run(folder, keys["trust"], keys["device"], keys["average"], keys["checkpoint"])
    file = run.path / "evaluation.json"
    earlier = read_earlier(file)
    parts = compose({**run.config, "device": keys["device"], "resume": None, "dir": None, "trust": False})
    if (parts.data.shape, parts.data.columns) != (run.shape, run.columns):
        raise Unreadable(f"run={run.path}: the data has changed shape or columns since the run was trained")
    if parts.data.facts.get("sha256") != folder.facts()["data"].get("sha256"):
        raise Unreadable(
            f"run={run.path}: the data file has changed since the run was trained, so which rows it has not seen is not known; put "
            "the file back as it was, or train anew"
        )
    asked = [keys["metrics"]] if isinstance(keys["metrics"], str) else keys["metrics"]
    if asked == []:
        raise ScoreSDEError("metrics=[]: expected one at least, or null for all that mean something on this data")
    metrics = evaluation.pick_metrics(asked, parts.data, parts.model)
    if flow.projection is not None and "nll" in metrics:
        check_law(flow.projection, parts.data.shape, flow.n_proj, 256, parts.dtype, type(flow.projection).__name__)
    sampler = pick_sampler(run, chosen, keys["t_min"])
    if sampler.known is not None:
        raise ScoreSDEError("sampler.known is for `scoresde sample`: samples of the whole law are measured here")
    with console.counting("sampling", keys["n"]) as progress:
        found = evaluation.evaluate(
            parts, run.model, sampler, keys["n"], metrics=metrics, seed=keys["seed"], averaged=run.averaged, step=run.step,
            flow=flow, nll_rows=keys["nll"]["rows"], progress=progress,
        )  # fmt: skip
    entry = {"time": now(), "command": command_line(), "summary": jsonable(found.summary)}
    write_durably(file, (json.dumps([*earlier, entry], indent=1) + "\n").encode())
    lines = [f"written  {file} (entry {len(earlier) + 1})"]
    if keys["figures"]:
        lines += [f"figure   {path}" for path in draw(run, parts.data, found)]
    console.panel(f"{run.path}, step {run.step}", found.summary, lines)
    if found.samples is not None and not any(name in found.summary for name in evaluation.of_samples()):
        console.warn("some samples are not finite: none of them was measured (more sampler.steps may help)")
    problem = evaluation.verdict(found.summary, evaluation.in_words(parts.baseline))
    if problem:
        console.warn(problem)
    return Measured(run.path, run.step, found.summary)


def draw(run: Run, data: Dataset, found: evaluation.Evaluation) -> list[Path]:
    from scoresde_cli import figures

    summary = found.summary
    folder, title = run.path / "figures", f"{run.path.name}, step {run.step}"
    paths = []
    for error in ("score_error", "flux_error"):
        if error in summary:
            curves = {name: summary[name]["curve"] for name in (error, f"{error}_baseline")}
            paths.append(figures.score_curves(curves, title, folder / f"{error}.png"))
    if any("better" in entry["protocol"] for entry in summary.values()):
        paths.append(figures.against_chance(summary, title, folder / "evaluation.png"))
    if found.of_classes is not None:
        paths.append(figures.class_grid(data, found.of_classes, title, folder / "classes.png"))
    return paths


def compare(found: list[Measured]) -> int:
    """One table of several runs; figures of unlike protocol are left out, with the reason."""
    names = [name for name in found[0].summary if all(name in each.summary for each in found)]
    reasons = {name: evaluation.unlike([each.summary[name] for each in found]) for name in names}
    names = [name for name in names if reasons.get(name.removesuffix("_baseline")) is None or "_baseline" not in name]
    shared = [name for name in names if reasons[name] is None]
    if shared:
        console.comparison(
            [f"{each.path}" for each in found], {name: [e.summary[name] for e in found] for name in shared}
        )
    for name in names:
        if reasons[name] is not None:
            console.warn(f"{name} is not compared, the protocols differ: {reasons[name]}")
    if not shared:
        raise ScoreSDEError("nothing to compare: no figure of these runs has the same protocol in all of them")
    return 0
