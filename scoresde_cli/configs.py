"""Where conf/ is and what stands in it, read as text: help, completion and `list` use this and need nothing heavy."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from scoresde_cli.errors import ScoreSDEError

COMMANDS = ("train", "sample", "evaluate", "ablate", "report", "verify", "rerun")


@cache
def conf_dir() -> Path:
    """conf/ beside the package (a wheel) or at the repository's root (an editable install)."""
    inside = Path(__file__).parent / "conf"
    return inside if (inside / "train.yaml").is_file() else Path(__file__).parent.parent / "conf"


def load(path: Path) -> dict[str, Any]:
    """A YAML file as plain data."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def node(group: str, option: str) -> dict[str, Any]:
    """An option of a group as its constructor is told it, without the options of other groups that it brings."""
    return {k: v for k, v in load(conf_dir() / group / f"{option}.yaml").items() if k != "defaults"}


def describe(path: Path) -> str:
    """What a file says of itself: its first comment line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line[2:].strip()
    return ""


def groups(command: str = "train") -> dict[str, str | None]:
    """The groups that a command composes, with their default options; those of a command that it builds on among them."""
    found: dict[str, str | None] = {}
    for entry in load(conf_dir() / f"{command}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            [(group, option)] = entry.items()
            if not group.startswith(("override hydra/", "optional ")):
                found[group.removeprefix("override ")] = option
    for parent in parents(command):
        found = groups(parent) | found
    return found


def parents(command: str) -> list[str]:
    """The commands whose config this one's builds on."""
    entries = load(conf_dir() / f"{command}.yaml").get("defaults", [])
    return [entry for entry in entries if isinstance(entry, str) and entry != "_self_"]


def options(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def keys(command: str) -> list[tuple[str, Any, str]]:
    """The top-level keys of a command: dotted name, default, what it is (the comment behind it), in the file's order."""
    comments: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (conf_dir() / f"{command}.yaml").read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("  # ")
        if ":" not in code or code.lstrip().startswith(("#", "-")):
            continue
        indent = len(code) - len(code.lstrip())
        stack = [(i, name) for i, name in stack if i < indent] + [(indent, code.split(":")[0].strip())]
        comments[".".join(name for _, name in stack)] = comment.strip()

    def flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for name, value in data.items():
            found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
        return found

    data = {k: v for k, v in load(conf_dir() / f"{command}.yaml").items() if k not in ("defaults", "hydra")}
    return [(name, value, comments.get(name, "")) for name, value in flat(data)]


def dotted_keys(command: str) -> list[str]:
    """Every key that a command line may set: groups, top-level keys, and the keys of the groups' options."""
    found = {name for name, _, _ in keys(command)} | {name.split(".")[0] for name, _, _ in keys(command)}
    for parent in parents(command):
        found |= set(dotted_keys(parent))
    for group in groups(command):
        found.add(group)
        for option in options(group):
            found |= {f"{group}.{key}" for key in node(group, option) if not key.startswith("_")}
    return sorted(found)


@cache
def shipped_targets() -> frozenset[str]:
    """Every `_target_` in the shipped configs: what a stranger's config may construct."""
    found = set()
    for path in conf_dir().glob("*/*.yaml"):
        found.add(load(path).get("_target_", ""))
    return frozenset(found - {""})


def refuse_foreign(node: Any, file: Path, where: str, trust: bool) -> None:
    """Walk a stranger's config: raise at the first thing that could run code."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                if not trust and (not isinstance(value, str) or value not in shipped_targets()):
                    raise ScoreSDEError(
                        f"{file}: {name}={value} is not a part of scoresde; it was not run "
                        "(if you trust whoever made this run, say trust=true)"
                    )
            elif str(key).startswith("_"):
                raise ScoreSDEError(f"{file}: the key {name} is not allowed in a run's config")
            else:
                refuse_foreign(value, file, name, trust)
    elif isinstance(node, list):
        for value in node:
            refuse_foreign(value, file, where, trust)
    elif isinstance(node, str) and "${" in node:
        raise ScoreSDEError(f"{file}: {where} holds an interpolation, which a run's resolved config never does")


# Classes that have moved since runs were made with them: {what stands in the config of such a run: where they are now}.
MOVED = {f"scoresde_cli.projections.{name}": f"scoresde_cli.sketching.{name}" for name in ("HutchPP", "XTrace")}


def moved(node: Any) -> Any:
    """Plain data with each `_target_` that has moved as it is called now."""
    if isinstance(node, dict):
        return {key: MOVED.get(str(value), value) if key == "_target_" else moved(value) for key, value in node.items()}
    return [moved(value) for value in node] if isinstance(node, list) else node


def quoted(value: str) -> str:
    """In Hydra's quotes. A backslash is itself there, unless a quote follows; an interpolation is one even there."""
    escaped = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + "\\'", value).replace("${", "\\${")
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - tail :]}'"
