"""Sweeps: where the jobs of a grid lie, and how they end.

A sweep's directory is named after what its jobs share, a job's after what varies: the same command finds both again. Each job
leaves either a finished run, or a file JOB.failed.json beside it with its last line, which the end of the sweep lists whatever
process the job ran in. (Hydra itself shows the first failure of a parallel launcher only, facebookresearch/hydra#2284.)
"""

import json
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from scoresde_cli.claims import BEGAN, PATIENCE, TASK, follow_parent
from scoresde_cli.errors import ScoreSDEError, Unreadable, in_words, one_line
from scoresde_cli.provenance import ASIDE, difference, digest
from scoresde_cli.rundir import RunDir
from scoresde_cli.tracking import console
from scoresde_cli.training.state import write_durably

LONGEST = 100  # characters of a name


def slug(text: str) -> str:
    """A name for a directory; with a hash where the text was too long or held what a path or a shell reads something into."""
    name = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", text)[:LONGEST].strip(".")
    return name if name == text else f"{name}-{digest(text)}"


def sweep_folder(fixed: Sequence[str], varying: Sequence[str]) -> str:
    """The directory of `train -m` with these overrides and varying keys. More values of the same keys go to the same one."""
    science = [o for o in fixed if re.split(r"[=.@/]", o.lstrip("+~"))[0] not in (*set(ASIDE) - {"eval"}, "hydra")]
    name = slug(",".join(science) or "train")[:LONGEST]
    return f"multirun/{name}-{digest([sorted(science), sorted(varying)])}"


@dataclass(frozen=True)
class Failure:
    """How a job ended that did not end well."""

    name: str
    line: str
    code: int


def failure_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.failed.json")


@contextmanager
def worker(folder: Path, launcher: str, total: int | None = None) -> Iterator[None]:
    """A job of a sweep. Where several run beside each other, what each says goes to logs/JOB.txt, and a line to the terminal."""
    if launcher == "basic":
        yield
        return
    if launcher == "joblib":
        follow_parent()
    began = time.monotonic()
    log = folder.parent / "logs" / f"{folder.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield
    done = len(list(folder.parent.glob("*/summary.json"))) + len(list(folder.parent.glob("*.failed.json")))
    of = f" of {total}" if total else ""
    word = "failed  " if failure_file(folder).exists() else ""
    console.note(f"{done:4d}{of}  {word}{folder.name}  {time.monotonic() - began:.0f} s")


@contextmanager
def outcome(folder: Path) -> Iterator[None]:
    """A job: what it fails with is shown, kept beside its directory and goes no further, so that the next one has its turn."""
    file = failure_file(folder)
    file.unlink(missing_ok=True)
    try:
        yield
    except Exception as problem:
        line, code = in_words(problem) or (f"internal error: {type(problem).__name__}: {problem}", 1)
        if type(problem).__name__ == "UncompletedJobError":  # of submitit
            line = "came to the end of its time too often (hydra.launcher.timeout_min, max_num_timeout); what it did is saved"
        give_up(folder, one_line(line), code, traceback.format_exc())


def give_up(folder: Path, line: str, code: int = ScoreSDEError.exit_code, trace: str = "") -> None:
    """Say that a job failed, and keep it beside its directory."""
    console.warn(f"{folder.name} failed: {line}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    entry = {"line": line, "code": code, "traceback": trace, "pid": os.getpid()}
    write_durably(failure_file(folder), (json.dumps(entry, indent=1) + "\n").encode())


def failed_meanwhile(folder: Path) -> bool:
    """Whether a job has failed since this sweep began: in another one of the same jobs, or before a worker was lost."""
    began, file = os.environ.get(BEGAN), failure_file(folder)
    return began is not None and file.is_file() and file.stat().st_mtime >= float(began)


def failures(folder: Path, since: float = 0.0) -> list[Failure]:
    """The jobs in a sweep's directory that failed at or after a time (of the files)."""
    found = []
    for file in sorted(folder.glob("*.failed.json")):
        written, summary = file.stat().st_mtime, folder / file.name.removesuffix(".failed.json") / "summary.json"
        overtaken = summary.is_file() and summary.stat().st_mtime > written  # another process has done it meanwhile
        if written >= since and not overtaken:
            try:
                entry = json.loads(file.read_text())
                line, code = str(entry["line"]), int(entry["code"])
            except (OSError, ValueError, KeyError, TypeError):
                entry, line, code = {}, f"{file} is not readable", Unreadable.exit_code
            if TASK in os.environ and entry.get("pid") != os.getpid():
                continue  # another task's
            found.append(Failure(file.name.removesuffix(".failed.json"), line, code))
    return found


class JobsFailed(ScoreSDEError):
    """Some jobs of a sweep failed; the exit code is that of the last of them."""

    def __init__(self, found: Sequence[Failure]) -> None:
        names = ", ".join(f.name for f in found[:8]) + (", .." if len(found) > 8 else "")
        super().__init__(f"{len(found)} job{'s' * (len(found) > 1)} failed ({names}); the same command tries again")
        self.exit_code = found[-1].code


def conclude(folder: Path, since: float = 0.0) -> None:
    """Say what the jobs of a sweep came to. Raises JobsFailed where any of them failed, after a line for each."""
    files = [file for file in folder.glob("*/run.json") if not file.parent.name.startswith(".")]
    count = Counter(status(RunDir(file.parent)) for file in files)
    if count:
        console.note(f"sweep    {folder}: {', '.join(f'{n} {status}' for status, n in count.most_common())}")
    raise_failures(folder, since)
    if count:
        console.note(f"next     scoresde report {quote(str(folder))}")


def status(run: RunDir) -> str:
    """What became of a run, damaged ones among them."""
    try:
        return run.status()
    except Unreadable:
        return "unreadable"


def raise_failures(folder: Path, since: float = 0.0) -> None:
    """JobsFailed where any job failed, after a line for each."""
    found = failures(folder, since)
    for failure in found:
        console.err.print(f"scoresde: {failure.name}: {failure.line}")
    if found:
        raise JobsFailed(found)


def check_same(run: RunDir, config: Mapping[str, Any]) -> None:
    """Refuse to take a run for a job that it is not: same science, same seed, same measurements."""
    aside = set(ASIDE) - {"eval", "checkpoint"} - ({"threads"} if config["threads"] else set())
    before, after = ({k: v for k, v in c.items() if k not in aside} for c in (run.config(trust=True), config))
    found = difference(before, after)
    if found:
        raise ScoreSDEError(
            f"{run.path}: made from another config ({found}); choose another directory with hydra.sweep.dir=, or move this one away"
        )


def await_release(run: RunDir) -> None:
    """Give a process that is ending the time to end."""
    limit = time.monotonic() + PATIENCE
    while run.locked() and time.monotonic() < limit:
        time.sleep(0.2)


def composed(overrides: Sequence[str], hydra_overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved config of `train` with these overrides. Inside a Hydra app."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    loader = GlobalHydra.instance().config_loader()
    config = loader.load_configuration("train", [*overrides, *hydra_overrides], run_mode=RunMode.RUN)
    with open_dict(config):
        del config["hydra"]
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
