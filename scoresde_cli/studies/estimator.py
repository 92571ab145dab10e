"""What do directions cost and how noisy are they? One measurement a dimension, no runs of train."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from scoresde_cli import configs
from scoresde_cli.compose import Parts, build, compose
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rundir import RunDir
from scoresde_cli.runs import Run
from scoresde_cli.studies.base import Findings, Job, Study, merged
from scoresde_cli.studies.estimator_report import report_parts
from scoresde_cli.studies.measurement import measure
from scoresde_cli.sweeps import composed
from scoresde_cli.tracking import console
from scoresde_cli.training.state import load_weights, write_durably
from scoresde_cli.tuning import pick_threads

RESULT = "estimates.json"


@dataclass(kw_only=True)
class Estimator(Study):
    """
    Args:
        laws: options of the group `projection`; all, and the config's own, by null.
        n_proj: numbers of directions.
        fit_steps: of the network beforehand, so that its last layer is not zero; none with run=.
        replicates, times, rows, draws, turns: how closely it is looked at, as for `measurement.measure`.
    """

    laws: list[str] | None = None
    n_proj: list[PositiveInt] | None = None
    fit_steps: NonNegativeInt | None = None
    replicates: PositiveInt | None = None
    times: PositiveInt | None = None
    rows: PositiveInt | None = None
    draws: PositiveInt | None = None
    turns: PositiveInt | None = None

    title = "What do random directions cost, and how noisy are they?"
    question = (
        "For each law and number of directions: is the sliced loss unbiased, how much noise do the directions add to that of the "
        "data in the loss and in its gradient, what do they cost, and so how many of which law learn most in the time?"
    )
    varies: ClassVar[tuple[str, ...]] = ("n_proj",)
    trains: ClassVar[bool] = False

    def check(self, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
        super().check(overrides, config)
        mine = [o for o in overrides if not o.startswith("tracker")]
        if self.run is not None and (mine or self.dims is not None):
            raise ScoreSDEError(
                f"run={self.run}: its own data and network are measured; leave out {(*mine, 'study.dims')[0]}"
            )

    def jobs(self, config: Mapping[str, Any], overrides: Sequence[str], own: Callable[[], int]) -> list[Job]:
        if self.run is not None:
            RunDir.open(self.run)
            return [Job((), {"run": str(self.run)}, 0)]
        return [
            Job(
                merged(self.common(config), overrides, [f"{k}={v}" for k, v in where.items()]),
                where,
                int(config["seed"]),
            )
            for where, _ in self.dimensions(config, own)
        ]

    def done(self, folder: Path) -> bool:
        return (folder / RESULT).is_file()

    def measure(self, config: Mapping[str, Any], folder: Path) -> None:
        parts, fit_steps = self.subject(config)
        names = self.of_size("laws") or configs.options("projection")
        nodes = {name: composed([f"projection={name}"])["projection"] for name in names}
        if config["projection"] not in nodes.values():
            nodes["projection"] = dict(config["projection"])
        laws = {name: build(node, "projection") for name, node in nodes.items()}
        stages = ["fit", "loss", "gradient", "cost", "times"]
        plan = parts.plan()
        with console.counting("measuring", len(stages) * 100) as progress:
            found = measure(
                plan, laws, self.of_size("n_proj"), fit_steps=fit_steps,
                progress=lambda stage, part: progress(int(100 * (stages.index(stage) + part))),
                **{name: self.of_size(name) for name in ("replicates", "times", "rows", "draws", "turns")},
            )  # fmt: skip
        found["data"] = type(parts.data).__name__.lower()
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / RESULT, (json.dumps(found, indent=1) + "\n").encode())

    def subject(self, config: Mapping[str, Any]) -> tuple[Parts, int]:
        """The parts of which is measured and how long they are to be fitted: the config's, or those of a trained run."""
        import torch

        if self.run is None:
            parts, steps = compose(config), self.of_size("fit_steps")
        else:
            run = Run(RunDir.open(self.run), bool(config["trust"]))
            parts, steps = compose({**run.config, "resume": None, "dir": None, "trust": False}), 0
            load_weights(parts.model, run.model.state_dict())
        torch.set_num_threads(parts.settings.threads or pick_threads(parts))
        return parts, steps

    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        if metrics is not None:
            raise ScoreSDEError(
                f"metrics={list(metrics)}: a study of the estimator has no runs whose numbers could be chosen"
            )
        found, missing = [], []
        for job in jobs:
            file = folder / job.name / RESULT
            if not self.done(file.parent):
                missing.append(f"{job.name} is not measured yet")
                continue
            try:
                found.append(json.loads(file.read_text()))
            except (OSError, ValueError) as problem:
                missing.append(f"{file} is not readable ({problem}): remove it, and the same study measures it again")
        if not found:
            return Findings([], [], [], missing)
        answers, tables, figures, notes = report_parts(found, out)
        return Findings(answers, tables, figures, notes + missing, HOW_TO_READ)


HOW_TO_READ = {
    "data part, projection part": "Of the variance of the gradient of a batch's mean loss, the trace of its covariance over all "
    "weights: what the batch, its times and its noise bring, and what the directions bring (law of total variance).",
    "r": "Projection part over data part. n independent directions bring 1/n of what one brings.",
    "cost times variance": "Seconds of a whole training step times the variance of its gradient: over a fixed time the noise of "
    "what is learnt goes with it. As a multiple of the least.",
    "intervals": "95 percent, over batches; those of a comparison of several settings hold at once (Bonferroni).",
    "closed form": "The variance of v^T A v by the law's formula, from the Jacobians of the rows that were measured.",
}
