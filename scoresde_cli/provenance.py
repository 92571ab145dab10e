"""Where a run comes from: command line, time, versions, git commit."""

import platform
import subprocess
import sys
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
