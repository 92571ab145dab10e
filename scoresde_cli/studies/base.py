"""The contract of every study: a question, a grid of jobs, and what is made of their results.

A study is one class in one file. Its YAML holds the grid by size; a key of the study that is given on the command line takes the
place of what the size says. Each job is a config of `train`: the study trains it (GridStudy), or measures something of it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from scoresde_cli.compose import locate
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.rundir import RunDir
from scoresde_cli.studies import analysis, charts
from scoresde_cli.studies.analysis import Cell
from scoresde_cli.studies.report import HOW_TO_READ, Figure, Table
from scoresde_cli.sweeps import failures, slug, status

Size = Literal["smoke", "quick", "full"]
Setting = dict[str, Any]
METRICS = (
    "score_error",
    "flux_error",
    "denoising_loss",
    "nll",
    "sliced_wasserstein",
    "energy_distance",
    "loss",
)  # what is compared, where it was measured


@dataclass(frozen=True)
class Job:
    """One job: the overrides of `train` that make it, what it varies (for the tables), its seed and its directory's name."""

    overrides: tuple[str, ...]
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return slug(
            ",".join(f"{key}={value}" for key, value in {**self.setting, "seed": self.seed}.items()).replace(" ", "")
        )


@dataclass(frozen=True)
class Findings:
    """What a report holds beside its protocol."""

    answers: list[str]
    tables: list[Table]
    figures: list[Figure]
    notes: list[str]
    how_to_read: dict[str, str] = field(default_factory=lambda: dict(HOW_TO_READ))


@dataclass(kw_only=True)
class Study(ABC):
    """
    Args:
        size: which of `sizes` the grid is taken from. run: a trained run, for a study that measures one.
        sizes: by size, the keys below and `overrides`, more overrides of `train`.
        dims: dimensions, for data that has a key `d`; the data's own else.
        seeds: how many, from 0 on.
    """

    size: Size
    run: str | None
    sizes: dict[str, dict[str, Any]]
    dims: list[PositiveInt] | None = None
    seeds: PositiveInt | None = None

    title: ClassVar[str]
    question: ClassVar[str]
    varies: ClassVar[tuple[str, ...]] = ("seed",)
    trains: ClassVar[bool] = True
    may_be_empty: ClassVar[tuple[str, ...]] = ()

    def of_size(self, name: str) -> Any:
        """A key of the study: as given, else what the size says."""
        given = getattr(self, name, None)
        return self.sizes[self.size].get(name) if given is None else given

    def check(self, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
        """Refuse overrides of what the study itself varies."""
        for override in overrides:
            key = re.split("=", override.lstrip("+~"), maxsplit=1)[0]
            if key in self.varies or (key == "data.d" and "d" in config["data"]):
                own = {
                    "seed": "seeds",
                    "max_seconds": "seconds",
                    "data.d": "dims",
                    "loss": "losses",
                    "projection": "laws",
                }
                raise ScoreSDEError(
                    f"{override}: the study varies {key}; study.{own.get(key, key)}=... changes its grid"
                )
        if self.run is not None and self.trains:
            raise ScoreSDEError(f"run={self.run}: this study trains runs of its own; study=estimator measures one")
        for name, given in vars(self).items():
            if isinstance(given, list) and len(given) != len({repr(value) for value in given}):
                raise ScoreSDEError(f"study.{name}={given}: expected each value once")
            if given == [] and name not in self.may_be_empty:
                raise ScoreSDEError(f"study.{name}=[]: expected at least one value")
        if self.dims is not None and "d" not in config["data"]:
            raise ScoreSDEError(f"study.dims={self.dims}: this data has the dimension that it has; leave the key out")

    def dimensions(self, config: Mapping[str, Any], own: Callable[[], int]) -> list[tuple[Setting, int]]:
        """({"data.d": d} or {}, d) for each dimension of the grid; `own` builds the data to see its dimension."""
        if "d" in config["data"]:
            return [({"data.d": d}, d) for d in self.of_size("dims")]
        return [({}, own())]

    def common(self, config: Mapping[str, Any]) -> list[str]:
        """What the size says of all jobs, but for what means nothing on this data."""
        said = [
            o for o in self.sizes[self.size].get("overrides", [])
            if not o.startswith("data.") or o.partition("=")[0].removeprefix("data.") in config["data"]
        ]  # fmt: skip
        known = locate(config["data"]["_target_"], "data").oracle is not Dataset.oracle
        return (
            said if known else [o.replace("score_error,", "").replace("score_error", "energy_distance") for o in said]
        )

    @abstractmethod
    def jobs(self, config: Mapping[str, Any], overrides: Sequence[str], own: Callable[[], int]) -> list[Job]:
        """The grid, on a resolved config of `train` and the user's overrides that made it."""

    @abstractmethod
    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        """What the jobs in `folder` came to, by these numbers of summary.json, with figures written to `out`."""

    def trains_job(self, name: str) -> bool:
        """Whether the job of this name is a run of `train`; `measure` does it otherwise."""
        return self.trains

    def done(self, folder: Path) -> bool:
        """Whether the job in this directory is done."""
        return (folder / "run.json").is_file() and status(RunDir(folder)) == "finished"

    def measure(self, config: Mapping[str, Any], folder: Path) -> None:
        """The work of a job of a study that does not train."""
        raise NotImplementedError


def merged(*groups: Sequence[str]) -> tuple[str, ...]:
    """Overrides of which a later one of a key takes the place of an earlier."""
    found = {o.lstrip("+").partition("=")[0]: o for group in groups for o in group}
    return tuple(found.values())


@dataclass(kw_only=True)
class GridStudy(Study):
    """Runs of `train` over settings x seeds, at equal steps and at equal wall time.

    Args:
        budgets: at equal steps, at equal time of training, or both. steps, seconds: how much of each.
    """

    budgets: list[Literal["steps", "seconds"]] | None = None

    steps: PositiveInt | None = None
    seconds: float | None = None

    varies: ClassVar[tuple[str, ...]] = ("seed", "steps", "max_seconds")

    @abstractmethod
    def settings(self, d: int, loss: str) -> list[Setting]:
        """What is compared, in d dimensions and with the config's loss: factors that are keys of `train`."""

    def shown(self, setting: Setting) -> Setting:
        """The setting as tables and figures show it."""
        return setting

    def limits(self) -> list[tuple[str, list[str]]]:
        """(its name, its overrides) for each budget."""
        steps, seconds = self.of_size("steps"), self.of_size("seconds")
        known = {
            "steps": (f"{steps} steps", [f"steps={steps}", "max_seconds=null"]),
            "seconds": (f"{seconds:g} s", ["steps=10000000", f"max_seconds={seconds}"]),
        }
        return [known[budget] for budget in self.of_size("budgets") or known]

    def jobs(self, config: Mapping[str, Any], overrides: Sequence[str], own: Callable[[], int]) -> list[Job]:
        found = []
        dims = self.dimensions(config, own)
        for seed in range(
            self.of_size("seeds")
        ):  # outermost, so that a busy hour of the machine meets all settings alike
            for where, d in dims:
                for setting in self.settings(d, str(config["loss"]["_target_"]).rsplit(".", 1)[-1]):
                    for name, budget in self.limits():
                        varied = [f"{key}={value}" for key, value in {**where, **setting}.items()]
                        every = merged(self.common(config), overrides, varied, budget, [f"seed={seed}"])
                        found.append(Job(every, {**where, "budget": name, **self.shown(setting)}, seed))
        return found

    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        return compare(collect(folder, jobs), metrics or METRICS, ("data.d", "budget"), out, self.conclude)

    def conclude(self, panel: analysis.Panel) -> list[str]:
        """More sentences on a panel than analysis.answers has."""
        return []


def cell(run: RunDir, setting: Setting) -> Cell:
    """A run as a cell of a comparison."""
    became = run.status()
    return Cell(setting, run.facts()["seed"], run.summary() if became == "finished" else {}, became, str(run.path))


def collect(folder: Path, jobs: Sequence[Job]) -> list[Cell]:
    """The jobs of a grid as cells, those without a run among them, or with one that is damaged."""
    failed = {failure.name for failure in failures(folder)}
    cells = []
    for job in jobs:
        path = folder / job.name
        if (path / "run.json").is_file():
            try:
                cells.append(cell(RunDir.open(path), job.setting))
            except Unreadable as problem:
                cells.append(Cell(job.setting, job.seed, {}, "unreadable", str(problem)))
        else:
            cells.append(Cell(job.setting, job.seed, {}, "failed" if job.name in failed else "not run", str(path)))
    return cells


def compare(
    cells: Sequence[Cell], metrics: Sequence[str], by: Sequence[str], out: Path,
    conclude: Callable[[analysis.Panel], list[str]] = lambda panel: [],
) -> Findings:  # fmt: skip
    """Tables, figures and sentences of cells, split into panels by the factors that are not compared across."""
    return conclusions(panels(cells, metrics, by), out, conclude)


Grouped = tuple[analysis.Panel, list[Cell]]


def panels(cells: Sequence[Cell], metrics: Sequence[str], by: Sequence[str]) -> list[Grouped]:
    """Each panel and its cells."""
    return [(analysis.analyse(name, group, metrics), group) for name, group in analysis.panels(cells, by).items()]


def conclusions(
    found: Sequence[Grouped], out: Path, conclude: Callable[[analysis.Panel], list[str]] = lambda panel: []
) -> Findings:
    """What panels say."""
    answers, tables, notes = [], [], []
    for panel, _ in found:
        answers += conclude(panel) + analysis.answers(panel)
        tables += analysis.tables(panel)
        notes += analysis.left_out(panel)
    told = [(panel, group) for panel, group in found if panel.measured]
    answers = answers or ["no run has a number that can be compared"]
    return Findings(answers, tables, draw(told, out), list(dict.fromkeys(notes)))


def draw(found: Sequence[Grouped], out: Path) -> list[Figure]:
    """A figure over the number of directions, where three make a curve; else one of dots for each panel."""
    counts = {c.setting.get("n_proj") for _, group in found for c in group if isinstance(c.setting.get("n_proj"), int)}
    figures: list[Figure] = []
    if len(counts) > 2:
        path = charts.by_number([panel for panel, _ in found], "n_proj", out / "n_proj.png")
        figures.append(Figure(path, "Each number against the directions a sample; bands are 95 % intervals."))
    else:
        for i, (panel, _) in enumerate(found):
            path = charts.dots(panel, out / f"comparison-{i}.png", panel.title)
            of = f" of {panel.title}" if panel.title else ""
            one = all(len(each.values) < 2 for measured in panel.measured for each in measured.rows)
            shown = (
                "one seed each, so without intervals"
                if one
                else "means with 95 % intervals; faint points are single seeds"
            )
            figures.append(Figure(path, f"Comparison{of}: {shown}."))
    return figures
