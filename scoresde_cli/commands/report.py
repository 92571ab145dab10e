"""`scoresde report`: tables, figures and a report of a study, a sweep, or any runs."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde_cli.checks import check_call
from scoresde_cli.compose import build
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest
from scoresde_cli.provenance import ASIDE, command_line, versions
from scoresde_cli.rundir import RunDir, refuse_foreign
from scoresde_cli.studies import report as pages
from scoresde_cli.studies.analysis import Cell, differing, identity
from scoresde_cli.studies.analysis import panels as grouped
from scoresde_cli.studies.base import METRICS, Findings, Job, Study, cell, conclusions, panels
from scoresde_cli.studies.report import Report
from scoresde_cli.tracking import console
from scoresde_cli.tracking.wandb import WandB, has_credentials
from scoresde_cli.training.state import write_durably


@dataclass(frozen=True)
class Keys:
    """The keys of `report`."""

    dirs: str | list[str]
    metrics: list[str] | None
    trust: bool
    out: str | None


def task(config: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    keys: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    node = keys.pop("tracker")
    tracker = build({**node, "mode": tracker_mode(node, HydraConfig.get().overrides.task)}, "tracker")
    check_call(Keys, keys, "")
    folders = [Path(d).expanduser() for d in ([keys["dirs"]] if isinstance(keys["dirs"], str) else keys["dirs"])]
    for folder in folders:
        if not folder.is_dir():
            raise ScoreSDEError(
                f"dirs={folder}: {'a file, expected a directory' if folder.is_file() else 'no such directory'}"
            )
    if not folders:
        raise ScoreSDEError("dirs=[]: expected directories of studies, sweeps or runs")
    out = Path(keys["out"]) if keys["out"] else folders[0]
    out.mkdir(parents=True, exist_ok=True)
    if len(folders) == 1 and (folders[0] / "study.json").is_file():
        publish(folders[0], tracker, None, out, keys["metrics"], keys["trust"])
        return
    runs, left_out = find_runs(folders, keys["trust"])
    known = dict.fromkeys(name for run in runs for name in run.summary())
    for name in keys["metrics"] or []:
        if name not in known:
            raise ScoreSDEError(
                f"metrics={name}: no run has measured it; expected of {', '.join(known)}{nearest(name, known)}"
            )
    found = of_runs(runs, keys["metrics"] or METRICS, out / "figures")
    found.notes.extend(left_out)
    made = as_report(f"{len(runs)} runs", "How do these runs compare?", found, protocol(runs), 0.0, command_line())
    show(made, out, tracker)


def tracker_mode(node: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """How a grid and its report go to W&B: as asked; where nothing was asked and there are no credentials, not at all."""
    asked = any(o.startswith("tracker") for o in overrides)
    return str(node["mode"]) if asked or has_credentials() else "disabled"


def read_study(folder: Path) -> dict[str, Any]:
    """study.json of a study's directory."""
    try:
        found = json.loads((folder / "study.json").read_text())
        kinds = {"node": dict, "size": str, "run": str | None, "command": list, "seconds": int | float, "jobs": list}
        for name, kind in kinds.items():
            if not isinstance(found[name], kind):
                raise ValueError(f"{name} is {found[name]!r}")
        for job in found["jobs"]:
            kinds = {"setting": dict, "overrides": list, "seed": int}
            if not all(isinstance(job[name], kind) for name, kind in kinds.items()):
                raise ValueError("a job is damaged")
        if not isinstance(found["node"].get("sizes"), dict):
            raise ValueError("node.sizes is missing")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise Unreadable(f"{folder / 'study.json'}: not readable ({problem})") from None
    return found


def write_study(folder: Path, facts: Mapping[str, Any]) -> None:
    write_durably(folder / "study.json", (json.dumps(facts, indent=1) + "\n").encode())


def publish(
    folder: Path, tracker: WandB, study: Study | None = None, out: Path | None = None, metrics: Sequence[str] | None = None,
    trust: bool = False,
) -> None:  # fmt: skip
    """The report of a study from its directory, as far as its jobs have come; a stranger's study.json runs nothing."""
    facts, out = read_study(folder), out or folder
    if study is None:
        refuse_foreign(facts["node"], folder / "study.json", "node", trust)
        if "_target_" in flat(facts["node"]["sizes"]):
            raise ScoreSDEError(f"{folder / 'study.json'}: node.sizes holds a _target_, which a study never does")
        study = build(facts["node"], "study", size=facts["size"], run=facts["run"])
    if not isinstance(study, Study):
        raise Unreadable(f"{folder / 'study.json'}: node._target_={facts['node']['_target_']} is no study")
    jobs = [Job(tuple(j["overrides"]), j["setting"], j["seed"]) for j in facts["jobs"]]
    found = study.findings(folder / "runs", jobs, out / "figures", metrics)
    runs, _ = readable(sorted((folder / "runs").glob("[!.]*/run.json")), trust=True)
    shared = {"size": facts["size"], "jobs": str(len(jobs)), **protocol(runs)}
    made = as_report(study.title, study.question, found, shared, facts["seconds"], facts["command"])
    show(made, out, tracker)


def as_report(
    title: str, question: str, found: Findings, shared: dict[str, str], seconds: float, command: Sequence[str]
) -> Report:
    return Report(
        title, question, found.answers, found.tables, found.figures, shared, shlex.join(command), versions(), seconds, found.notes,
        found.how_to_read,
    )  # fmt: skip


def show(made: Report, out: Path, tracker: WandB) -> None:
    """Write it, print its answers, log it."""
    html, markdown = pages.write(made, out)
    for line in pages.text(made):
        console.note(line)
    console.note(f"report   {html}\n         {markdown}")
    if tracker.mode != "disabled":
        tracker.begin(out, {"title": made.title, "command": made.command, **made.protocol}, None)
        tracker.summary({}, [figure.path for figure in made.figures])
        tracker.page(html)
        tracker.finish(0)


def find_runs(folders: Sequence[Path], trust: bool) -> tuple[list[RunDir], list[str]]:
    """All runs in these directories, each once; and of those that cannot be read, why."""
    files = [
        file for folder in folders for file in sorted(folder.rglob("run.json")) if not file.parent.name.startswith(".")
    ]
    if not files:
        raise ScoreSDEError(f"no runs in {', '.join(map(str, folders))}")
    runs, left_out = readable(files, trust)
    if not runs:
        raise Unreadable(left_out[0])
    return runs, [f"left out: {line}" for line in left_out]


def readable(files: Sequence[Path], trust: bool) -> tuple[list[RunDir], list[str]]:
    """The runs of these run.json, each once; and what is wrong with those that are damaged. A stranger's classes are refused."""
    runs: dict[Path, RunDir] = {}
    problems = []
    for file in files:
        try:
            run = RunDir.open(file.parent.resolve())
            run.config(trust)
            run.summary()
            runs[run.path] = run
        except Unreadable as problem:
            problems.append(str(problem))
    return list(runs.values()), problems


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def of_runs(runs: Sequence[RunDir], metrics: Sequence[str], out: Path) -> Findings:
    """Runs side by side by what varies between their configs; those on other data or dimensions are not compared."""
    aside = {*ASIDE, "seed"} - {"eval"}
    configs = [flat({k: v for k, v in run.config(trust=True).items() if k not in aside}) for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    varying = [name for name in names if len({json.dumps(config.get(name)) for config in configs}) > 1]
    # The law and the number of directions stand in the loss too, by interpolation.
    varying = [
        name
        for name in varying
        if name not in ("loss.n_proj", "loss.times", "loss.t_min") and "loss.projection" not in name
    ]
    trained = [name for name in varying if not name.startswith("eval.")]

    def cells(varying: Sequence[str]) -> list[Cell]:
        return [cell(run, setting(config, varying)) for run, config in zip(runs, configs, strict=True)]

    def split(name: str) -> bool:
        return name.split(".")[0] in ("data", "eval", "steps", "max_seconds")  # what is not compared across

    # Runs that were evaluated otherwise stand together under a metric whose protocol is one and the same; one run of each kind.
    firsts = {(identity(each.setting), each.seed): each for each in reversed(cells(trained))}
    together, by = list(reversed(firsts.values())), list(filter(split, setting(configs[0], trained)))
    joint = [metric for metric in metrics if trained != varying and comparable(together, metric, by)]
    found = panels(together, joint, by) if joint else []
    if rest := [metric for metric in metrics if metric not in joint]:
        found += panels(cells(varying), rest, list(filter(split, setting(configs[0], varying))))
    made = conclusions(found, out)
    if joint and len(together) < len(runs):
        made.notes.append(
            f"of runs that differ in their evaluation alone the first one stands under {', '.join(joint)}"
        )
    return made


def comparable(cells: Sequence[Cell], metric: str, by: Sequence[str]) -> bool:
    """Whether the numbers of this metric have one protocol in every panel."""
    having = [each for each in cells if each.number(metric) is not None]
    return all(differing(group, metric) is None for group in grouped(having, by).values())


def setting(config: Mapping[str, Any], varying: Sequence[str]) -> dict[str, Any]:
    """What varies, a class by its short name."""
    found = {}
    for name in varying:
        value = config.get(name)
        if name.endswith("._target_"):
            name, value = name.removesuffix("._target_"), str(value).rsplit(".", 1)[-1].lower()
        if name == "n_proj" and value == "auto":  # no number: a curve over n_proj has it as a band
            name = "directions"
        found[name] = value
    return found


def protocol(runs: Sequence[RunDir]) -> dict[str, str]:
    """What all the runs share, in words."""
    if not runs:
        return {}
    configs = [flat(run.config(trust=True)) for run in runs]
    shown = ("data", "network", "sde", "parameterisation", "optimizer", "sampler")
    found: dict[str, str] = {}
    for group in shown:
        names = [name for name in configs[0] if name.startswith(f"{group}.")]
        parts = [
            str(configs[0][name]).rsplit(".", 1)[-1] if name.endswith("_target_") else f"{name.split('.', 1)[1]}={configs[0][name]}"
            for name in names if len({json.dumps(config.get(name)) for config in configs}) == 1 and configs[0][name] is not None
        ]  # fmt: skip
        if parts:
            found[group] = ", ".join(parts)
    for name in ("batch_size", "steps", "max_seconds", "ema", "precision", "threads", "t_min", "times", "eval.n"):
        values = {json.dumps(config.get(name)) for config in configs}
        if len(values) == 1 and configs[0].get(name) is not None:
            found[name] = str(configs[0][name])
        elif name == "threads" and len(values) > 1:
            found[name] = f"{', '.join(sorted(values))}: NOT EQUAL, so times do not compare"
    found["seeds"] = ", ".join(map(str, sorted({run.facts()["seed"] for run in runs})))
    found["machine"] = ", ".join(sorted({run.facts()["host"] for run in runs}))
    return found
