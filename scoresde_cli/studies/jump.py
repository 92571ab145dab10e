"""What becomes of the model when the process jumps? With exact fields, with trained ones, and on data with heavy tails."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat

from scoresde_cli.compose import build, locate
from scoresde_cli.datasets.base import SampledMixture
from scoresde_cli.datasets.jump_oracle import covers
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rundir import RunDir
from scoresde_cli.studies import analysis
from scoresde_cli.studies.analysis import Cell
from scoresde_cli.studies.base import Findings, GridStudy, Job, Setting, collect, compare, merged
from scoresde_cli.studies.jump_exact import EXACT, IGNORED, MATCHED, ways_back
from scoresde_cli.studies.report import Table
from scoresde_cli.training.state import write_durably

RESULT = "ways_back.json"
Part = Literal["exact", "trained", "tails"]
NOISES: dict[str, list[str]] = {
    "vp": ["sde=vp", "loss=table_dsm"],
    "gaussian jumps": ["sde=jump_diffusion", "sde.amplitude=gaussian"],
    "laplace jumps": ["sde=jump_diffusion", "sde.amplitude=laplace"],
}
OUTPUTS: dict[str, list[str]] = {
    "velocity": ["loss.scale=residual", "parameterisation=residual"],
    "eps": ["loss.scale=power", "parameterisation=eps"],
}
NUMBERS = (
    "score_error", "flux_error", "sliced_wasserstein", "radial_q99_error", "radial_q999_error", "radial_q9999_error",
    "tail_index_error",
)  # fmt: skip


def any_way(cell: Cell) -> Cell:
    """Of the trained part, where the way back is a factor: without what the sampler adds to the protocols."""
    if cell.setting["part"] != "trained" or not cell.summary:
        return cell
    own = {"sampler", "nfe", *RunDir.open(cell.path).config(trust=False)["sampler"]}
    summary = {
        name: entry | {"protocol": {key: value for key, value in entry["protocol"].items() if key not in own}}
        for name, entry in cell.summary.items()
    }
    return replace(cell, summary=summary)


OF_KNOWN_FIELDS = (
    "expected data whose fields under jumps are known (eight_gaussians, gaussian, gmm); trained and tails take any"
)


@dataclass(kw_only=True)
class JumpStudy(GridStudy):
    """
    Args:
        parts: exact (known fields, no training), trained (losses and samplers on the data), tails (heavy-tailed data).
        rates, laws: of the jumps; the trained part takes the config's rate, and fewer laws unless they are given.
        losses: of the trained part, each with its own sampler, and those of the flow with `samplers`.
        samplers: of losses that have a velocity.
        tails: data of the tails part; heavy tails are drawn with `network`.
        network: of the tails part.
    """

    parts: list[Part] | None = None
    rates: list[NonNegativeFloat] | None = None
    laws: list[str] | None = None
    losses: list[str] | None = None
    samplers: list[str] | None = None
    tails: list[str] | None = None
    network: str = "log_mlp"

    title = "What becomes of the model when the process jumps?"
    question = (
        "With jumps in the forward process, what does it cost to leave their flux out, which way back is best, what does "
        "training reach of it, and does jump noise help on data with heavy tails at equal budget?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "sde", "loss", "sampler", "parameterisation")

    def settings(self, d: int, loss: str) -> list[Setting]:
        return []  # `jobs` has three kinds of them

    def jobs(self, config: Mapping[str, Any], overrides: Sequence[str], own: Callable[[], int]) -> list[Job]:
        found = []
        cls = locate(config["data"]["_target_"], "data")
        known = isinstance(cls, type) and issubclass(cls, SampledMixture)
        parts = self.parts or ["exact", "trained", "tails"][not known :]
        if "exact" in parts and not known:
            raise ScoreSDEError(f"study.parts=[exact]: {OF_KNOWN_FIELDS}")
        common, losses, ways = self.common(config), self.of_size("losses"), self.of_size("samplers")
        for seed in range(self.of_size("seeds")):
            more = [f"seed={seed}", "network.activation=silu"]
            if "exact" in parts and seed == 0:
                for law in self.of_size("laws"):
                    for rate in self.of_size("rates"):
                        own_keys = ["sde=jump_diffusion", f"sde.amplitude={law}", f"sde.rate={rate}"]
                        setting = {"part": "exact", "law": law, "rate": rate}
                        found.append(Job(merged(common, overrides, own_keys, [f"seed={seed}"]), setting, seed))
            if "trained" in parts:
                for law in self.laws or self.of_size("trained_laws"):
                    for loss in losses:
                        flows = loss in ("table_dsm", "augmented_dsm", "implicit_flux")
                        for way in ways if flows else [None]:
                            keys = ["sde=jump_diffusion", f"sde.amplitude={law}", f"loss={loss}"]
                            keys += [] if way is None else [f"sampler={way}"]
                            keys += self.of_size("reversal") if loss == "jump_ratio" else []
                            for name, budget in self.limits():
                                setting = {"part": "trained", "law": law, "loss": loss, "sampler": way, "budget": name}
                                found.append(Job(merged(common, overrides, keys, budget, more[:1]), setting, seed))
            if "tails" in parts:
                for data in self.of_size("tails"):
                    for noise, process in NOISES.items():
                        for output, how in OUTPUTS.items():
                            keys = [
                                f"data={data}",
                                *process,
                                *how,
                                f"network={self.network}",
                                *self.of_size("tail_overrides"),
                            ]
                            kept = [o for o in merged(common, overrides) if not o.startswith("data")]
                            for name, budget in self.limits():
                                setting = {
                                    "part": "tails",
                                    "data": data,
                                    "noise": noise,
                                    "output": output,
                                    "budget": name,
                                }
                                found.append(Job(merged(kept, keys, budget, more[:1]), setting, seed))
        return found

    def trains_job(self, name: str) -> bool:
        return not name.startswith("part=exact")

    def done(self, folder: Path) -> bool:
        return (folder / RESULT).is_file() if not self.trains_job(folder.name) else super().done(folder)

    def measure(self, config: Mapping[str, Any], folder: Path) -> None:
        data, sde = build(config["data"], "data"), build(config["sde"], "sde")
        if not isinstance(data, SampledMixture) or not covers(data.law, sde):
            raise ScoreSDEError(f"study.parts=[exact]: {OF_KNOWN_FIELDS}")
        rows, facts = ways_back(data.law, sde, self.of_size("n"), self.of_size("walk"), int(config["seed"]))
        facts |= {"n": self.of_size("n"), "steps": self.of_size("walk")}
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / RESULT, json.dumps({"rows": rows, "facts": facts}, indent=1).encode())

    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        trained = [job for job in jobs if self.trains_job(job.name)]
        found = Findings([], [], [], [])
        if trained:
            cells = [any_way(cell) for cell in collect(folder, trained)]
            found = compare(cells, metrics or NUMBERS, ("part", "data", "law", "budget"), out, self.conclude)
        answers, tables, notes = self.exact(folder, [job for job in jobs if not self.trains_job(job.name)])
        return Findings(
            [*answers, *found.answers],
            [*tables, *found.tables],
            found.figures,
            [*notes, *found.notes],
            found.how_to_read,
        )

    def exact(self, folder: Path, jobs: Sequence[Job]) -> tuple[list[str], list[Table], list[str]]:
        """Sentences, a table and notes of the part without training."""
        read, notes = [], []
        for job in jobs:
            try:
                read.append((job.setting, json.loads((folder / job.name / RESULT).read_text())))
            except (OSError, ValueError):
                notes.append(f"{job.name} is not measured yet")
        if not read:
            return [], [], notes
        columns = [(row["way"], row["field"]) for row in read[0][1]["rows"]]
        names = [way if field == EXACT else f"{way}, {field}" for way, field in columns]
        rows = []
        for setting, each in read:
            shown = [f"{row['value'] / each['facts']['floor_high']:.2f}" for row in each["rows"]]
            jumps = f"{each['rows'][2]['jumps']:.2f} of {each['facts']['expected_jumps']:g}"
            rows.append([f"{setting['law']}, rate {setting['rate']:g}", *shown, jumps])
        facts = read[0][1]["facts"]
        table = Table(
            "Known fields: sliced Wasserstein distance over floor_high", ["jumps", *names, "reverse jumps a path"], rows,
            f"{facts['n']} samples, {facts['steps']} steps; 95 percent of fresh data are below 1. A step takes one reverse jump at "
            "most, so of many some are missed.",
        )  # fmt: skip

        def worst(field: str, least: bool = False) -> float:
            jumping = [(e["facts"]["floor_high"], e["rows"]) for setting, e in read if setting["rate"] > 0]
            values = [row["value"] / high for high, found in jumping for row in found if row["field"] == field]
            return float(np.min(values) if least else np.max(values)) if values else float("nan")

        answers = [
            f"With exact fields all four ways back end within {worst(EXACT):.2f} times floor_high, whatever the law and the rate",
            f"Leaving the flux out costs {worst(IGNORED, True):.1f} to {worst(IGNORED):.0f} times floor_high",
            f"A diffusion of equal variance in its place costs {worst(MATCHED, True):.1f} to {worst(MATCHED):.0f} times floor_high",
        ]
        return answers, [table], notes

    def conclude(self, panel: analysis.Panel) -> list[str]:
        """Of the tails: vp against jumps with the same output, and one output against the other, by the quantiles measured."""
        found = []
        for measured in panel.measured:
            c = measured.comparison
            if c is None or c.n < 2 or not measured.metric.startswith(("radial", "tail", "sliced")):
                continue
            names = {row.label for row in measured.rows if row.against is not None}
            pairs = [(f"{a} {o}", f"vp {o}") for o in OUTPUTS for a in NOISES if a != "vp"]
            pairs += [(f"{a} eps", f"{a} velocity") for a in NOISES]
            how = "ratio" if c.log else "difference"
            found += [
                f"{panel.title}: {a} against {b}: {how} {analysis.gap(c.against(a, b))} in {measured.metric}"
                for a, b in pairs
                if {a, b} <= names
            ]
        return found
