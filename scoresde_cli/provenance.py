"""Where a run comes from, and how its facts are written: identity, command line, time, versions, git commit."""

import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
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
    """The command line as typed."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def identity(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the science in a config and its seed: what decides the numbers that come out."""
    aside = (
        "dir",
        "resume",
        "trust",
        "tracker",
        "log_every",
        "checkpoint",
        "device",
        "eval",
        "threads",
        "compile",
        "divergence",
    )
    science = {name: value for name, value in config.items() if name not in aside}
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:8]


def jsonable(value: Any) -> Any:
    """Plain data with NaN and infinities as text, so that every line is JSON by the standard."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
