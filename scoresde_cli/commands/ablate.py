"""`scoresde ablate`: the grid of a study as jobs of `train`, by any launcher, and its report."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde_cli import sweeps
from scoresde_cli.checks import check_call
from scoresde_cli.claims import claim
from scoresde_cli.commands import report, train
from scoresde_cli.compose import build, check
from scoresde_cli.configs import quoted
from scoresde_cli.errors import ScoreSDEError, Stopped, in_words
from scoresde_cli.launching import launch
from scoresde_cli.provenance import command_line, difference, digest, git_state, now, versions
from scoresde_cli.rundir import RunDir
from scoresde_cli.studies.base import Job, Size, Study
from scoresde_cli.tracking import console
from scoresde_cli.training.stop import stop_requests

OWN = ("study", "size", "run", "dir")  # keys of the command, and not of the jobs


@dataclass(frozen=True)
class Keys:
    """The keys of `ablate` itself; the others are those of `train`."""

    size: Size
    run: str | None
    dir: str | None


@dataclass(frozen=True)
class Perform:
    """One job of a study, in whatever process the launcher puts it."""

    node: dict[str, Any]
    size: str
    run: str | None
    total: int

    def __call__(self, config: DictConfig) -> float:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        launcher = str(hydra.runtime.choices["hydra/launcher"])
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        folder, plain["dir"] = Path(plain["dir"]), None
        plain["tracker"]["group"] = plain["tracker"]["group"] or folder.parent.parent.name
        study: Study = build(self.node, "study", size=self.size, run=self.run)
        if study.trains_job(folder.name):
            return train.job(plain, list(hydra.overrides.task), folder, launcher, self.total)
        with sweeps.worker(folder, launcher, self.total), claim(folder, hydra.job.num):
            if not study.done(folder) and not sweeps.failed_meanwhile(folder):
                with sweeps.outcome(folder):
                    study.measure(plain, folder)
        return 0.0


def task(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        raise ScoreSDEError("ablate -m: a study is a sweep already; leave out -m")
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    node, size, run, place = (plain.pop(key) for key in OWN)
    plain["dir"] = None
    check_call(Keys, {"size": size, "run": run, "dir": place}, "")
    if plain["resume"] is not None:
        raise ScoreSDEError(f"resume={plain['resume']}: a study goes on by the same command")
    check(plain)
    study: Study = build(node, "study", size=size, run=run)
    if not isinstance(study, Study):
        raise ScoreSDEError(f"study._target_={node['_target_']}: it is no subclass of scoresde_cli.studies.base.Study")
    overrides = [o for o in hydra.overrides.task if key_of(o) not in OWN]
    study.check(overrides, plain)
    if plain["threads"] is None:  # as many for all jobs, whatever launches them
        overrides.append("threads=1")
    data = f"data={hydra.runtime.choices['data']}"  # this command's default is another than that of train
    jobs = study.jobs(plain, [data, *overrides], lambda: math.prod(build(plain["data"], "data").shape))
    about = {
        "study": str(hydra.runtime.choices["study"]), "size": size, "run": run,
        "node": {**node, "sizes": {size: node["sizes"][size]}},
        "overrides": sorted(o for o in [data, *overrides] if key_of(o) not in ("tracker", "log_every", "trust", "objective")),
    }  # fmt: skip
    launcher = str(hydra.runtime.choices["hydra/launcher"])
    if not study.trains and not any(o.startswith("hydra/launcher=") for o in hydra.overrides.hydra):
        launcher = "basic"  # what measures times wants the machine for itself
    chosen = [o for o in hydra.overrides.hydra if o.startswith(("hydra.launcher", "hydra.searchpath"))]
    mode = report.tracker_mode(plain["tracker"], hydra.overrides.task)
    if mode == "disabled" != plain["tracker"]["mode"]:
        console.note(
            "W&B has no credentials here, so the runs of the grid do without it (tracker.mode=offline keeps their logs)"
        )
    chosen = [f"hydra/launcher={launcher}", *chosen]
    known = checked(jobs, chosen)
    folder = begin(Path(place or f"studies/{about['study']}-{size}-{digest(about)}"), about, jobs)
    left = [job for job in jobs if not done(study, job, folder / "runs" / job.name, known)]
    console.note(f"study    {folder}: {len(jobs)} jobs, {len(jobs) - len(left)} of them done")
    one = Perform(node, size, run, len(jobs))
    perform(left, one, folder, chosen, [f"tracker.mode={mode}"])
    group = plain["tracker"]["group"] or folder.name
    report.publish(folder, build({**plain["tracker"], "mode": mode, "group": group}, "tracker"), study)
    sweeps.raise_failures(folder / "runs")


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].split(".")[0]


def begin(folder: Path, about: dict[str, Any], jobs: Sequence[Job]) -> Path:
    """The study's directory with its study.json; the one that is there already if it is the same study's."""
    plan = {"jobs": [{"overrides": list(j.overrides), "setting": j.setting, "seed": j.seed} for j in jobs]}
    facts = {
        **about, "command": command_line(), "started": now(), "versions": versions(), "git": git_state(), "seconds": 0.0, **plan,
    }  # fmt: skip
    try:
        with claim(folder.absolute()):
            if (folder / "study.json").is_file():
                before = report.read_study(folder)
                found = difference({key: before.get(key) for key in about}, about)
                if found:
                    raise ScoreSDEError(f"{folder}: holds another study ({found}); choose another directory with dir=")
                facts = before | plan
            elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ScoreSDEError(f"dir={folder}: neither new, nor empty, nor the directory of a study")
            folder.mkdir(parents=True, exist_ok=True)
            report.write_study(folder, facts)
    except OSError as problem:
        raise ScoreSDEError(f"{folder}: cannot be used ({problem.strerror})") from None
    return folder


def checked(jobs: Sequence[Job], hydra: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The config of each setting's first job, each checked, so that a wrong one shows now and not in the night."""
    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if repr(job.setting) not in found:
            found[repr(job.setting)] = sweeps.composed(job.overrides, hydra)
            check(found[repr(job.setting)])
    return found


def done(study: Study, job: Job, folder: Path, known: dict[str, dict[str, Any]]) -> bool:
    """Whether a job is done. Raises ScoreSDEError where what lies there was made from another config."""
    if study.done(folder) and study.trains_job(folder.name):
        sweeps.check_same(RunDir.open(folder), {**known[repr(job.setting)], "seed": job.seed})
    return study.done(folder)


def perform(jobs: Sequence[Job], one: Perform, folder: Path, hydra: Sequence[str], more: Sequence[str]) -> None:
    """Run jobs, each by its overrides and `more`, under these overrides of Hydra."""
    if not jobs:
        return
    began = time.monotonic()
    lists = [[*job.overrides, *more, f"dir={quoted(str(folder / 'runs' / job.name))}"] for job in jobs]
    with stop_requests():
        try:
            launch(lists, one, folder / "runs", hydra)
        except (Stopped, KeyboardInterrupt) as stop:
            words, code = in_words(stop) or ("", 130)
            raise Stopped(f"{words}; the same command goes on with the study in {folder}", code) from None
        finally:
            facts = report.read_study(folder)
            report.write_study(folder, {**facts, "seconds": facts["seconds"] + time.monotonic() - began})
