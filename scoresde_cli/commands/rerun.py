"""`scoresde rerun`: train a run's config again and hold the numbers against each other."""

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde_cli.checks import check_call
from scoresde_cli.commands import train
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rundir import RunDir
from scoresde_cli.tracking import console

MEASURED = ("train_seconds", "steps_per_second", "peak_memory_mb")


@dataclass(frozen=True)
class Keys:
    """The keys of `rerun`."""

    run: str
    dir: str | None
    trust: bool


def task(config: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig

    keys: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    tracker = keys.pop("tracker")
    check_call(Keys, keys, "")
    first = RunDir.open(keys["run"])
    again = {**first.config(keys["trust"]), "resume": None, "dir": keys["dir"], "trust": False}
    if any(o.startswith("tracker") for o in HydraConfig.get().overrides.task):
        again["tracker"] = tracker
    before = first.summary()
    if not before:
        raise ScoreSDEError(f"run={keys['run']}: it has no summary.json to compare with (status {first.status()})")
    second = train.fresh(again, [], expected_data=first.facts()["data"])
    compare(before, second.summary(), keys["run"], str(second.path))
    return 0


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def compare(before: dict[str, Any], after: dict[str, Any], old: str, new: str) -> None:
    """A line a number: both values, and whether they are equal bit for bit."""
    console.note(f"{'':<22}{'first':>14}{'again':>14}")
    names = [name for name in before if name in after]
    for name in names:
        a, b = before[name]["value"], after[name]["value"]
        word = "" if name in MEASURED else "equal" if same(a, b) else f"differs by {abs(b - a):.2g}"
        console.note(f"{name:<22}{console.number(a):>14}{console.number(b):>14}  {word}")
    science = [name for name in names if name not in MEASURED]
    equal = sum(same(before[name]["value"], after[name]["value"]) for name in science)
    console.note(f"{equal} of {len(science)} numbers are equal bit for bit: {old} and {new}")
