"""`scoresde evaluate`: measure a run again and keep the numbers with their protocol."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt

from scoresde_cli import evaluation
from scoresde_cli.checks import check_call
from scoresde_cli.commands.sample import pick_sampler
from scoresde_cli.compose import compose
from scoresde_cli.errors import Unreadable
from scoresde_cli.provenance import command_line, jsonable, now
from scoresde_cli.rundir import RunDir
from scoresde_cli.runs import Run
from scoresde_cli.tracking import console
from scoresde_cli.training.state import write_durably


@dataclass(frozen=True)
class Keys:
    """The keys of `evaluate`."""

    run: str
    n: Annotated[int, Field(ge=20, le=10_000_000)]
    seed: NonNegativeInt
    checkpoint: Literal["selected", "last", "best"] | PositiveInt
    average: bool
    device: str
    t_min: Annotated[float, Field(gt=0, lt=1)] | None
    trust: bool


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
    chosen = keys.pop("sampler", None)
    check_call(Keys, keys, "")
    folder = RunDir.open(keys["run"])
    run = Run(folder, keys["trust"], keys["device"], keys["average"], keys["checkpoint"])
    file = run.path / "evaluation.json"
    earlier = read_earlier(file)
    parts = compose({**run.config, "device": keys["device"], "resume": None, "dir": None, "trust": False})
    if parts.data.facts.get("sha256") != folder.facts()["data"].get("sha256"):
        console.warn("the data file has changed since the run was trained: the numbers are for the file as it is now")
    if (parts.data.shape, parts.data.columns) != (run.shape, run.columns):
        raise Unreadable(f"run={run.path}: the data has changed shape or columns since the run was trained")
    sampler = pick_sampler(run, chosen, keys["t_min"])
    with console.counting("sampling", keys["n"]) as progress:
        summary, _, _ = evaluation.evaluate(
            parts,
            run.model,
            sampler,
            keys["n"],
            seed=keys["seed"],
            averaged=run.averaged,
            step=run.step,
            progress=progress,
        )
    entry = {"time": now(), "command": command_line(), "summary": jsonable(summary)}
    write_durably(file, (json.dumps([*earlier, entry], indent=1) + "\n").encode())
    console.panel(f"{run.path}, step {run.step}", summary, [f"written  {file} (entry {len(earlier) + 1})"])
    problem = evaluation.verdict(summary)
    if problem:
        console.warn(problem)
    return 0
