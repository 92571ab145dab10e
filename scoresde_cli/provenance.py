"""Where a run comes from, and how its facts are written: identity, command line, time, versions, git commit."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "scipy", "hydra-core", "scikit-learn", "pandas", "wandb")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the folder the package lies in, if that is a checkout of it."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:

        def git(*args: str) -> str:
            return subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout

        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    """The command line as typed, in worker processes too."""
    typed = os.environ.get(TYPED)
    return json.loads(typed) if typed else [Path(sys.argv[0]).name, *sys.argv[1:]]


def remember_command(arguments: Sequence[str]) -> None:
    """Keep the command line: Hydra sets another one, and a worker process has one of its own."""
    os.environ[TYPED] = json.dumps(["scoresde", *arguments])


TYPED = "SCORESDE_COMMAND"  # in the environment: the command line

# Top-level keys that do not decide what a run learns: where it runs, and what is recorded of it.
ASIDE = (
    "dir", "resume", "trust", "tracker", "log_every", "checkpoint", "device", "eval", "threads", "compile", "divergence",
    "objective",
)  # fmt: skip


def digest(value: Any) -> str:
    """Eight hex digits of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def identity(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the science in a config and its seed: what decides the numbers that come out."""
    return digest({name: value for name, value in config.items() if name not in ASIDE})


def science(config: Mapping[str, Any]) -> str:
    """The same without the budget, which a resume may change."""
    return identity({name: value for name, value in config.items() if name not in ("steps", "max_seconds")})


def difference(before: Any, after: Any, where: str = "") -> str | None:
    """The first place where two plain configs differ, as `key: BEFORE against AFTER`; None where they are equal."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in [*before, *(n for n in after if n not in before)]:
            found = difference(before.get(name), after.get(name), f"{where}.{name}" if where else str(name))
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list):
        gone, new = ([x for x in one if x not in other] for one, other in ((before, after), (after, before)))
        before, after = (gone or "nothing", new or "nothing") if gone or new else (before, after)
    return None if before == after else f"{where}: {before} against {after}"


def jsonable(value: Any) -> Any:
    """Plain data with NaN and infinities as text, so that every line is JSON by the standard."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
