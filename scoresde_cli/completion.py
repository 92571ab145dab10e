"""Shell completion: our commands first, then Hydra's completion of groups, options and keys."""

import os
import sys

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError

SHELLS = ("bash", "zsh", "fish")
SIZES = ("smoke", "quick", "full")  # of a study (studies.base.Size, which is not imported here: it needs torch)
PATHS = ("run", "resume", "dir", "dirs")
TAKES_FOLDERS = ("sample", "evaluate", "rerun", "report")  # without a key


def main(arguments: list[str]) -> int:
    """`-sc install=bash` prints the script; `-sc query=bash` answers for COMP_LINE."""
    request = arguments[1] if len(arguments) == 2 else ""
    what, _, shell = request.partition("=")
    if what not in ("install", "uninstall", "query") or shell not in SHELLS:
        raise ScoreSDEError(
            f"-sc {request}: expected install, uninstall or query of {', '.join(SHELLS)}, as in -sc install=bash"
        )
    command = "train"
    if what == "query":
        found = complete(os.environ.get("COMP_LINE", ""))
        if isinstance(found, list):
            print(" ".join(found))
            return 0
        command, os.environ["COMP_LINE"] = found
    import hydra

    old = sys.argv
    sys.argv = [old[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(configs.conf_dir()), config_name=command)(lambda config: None)()
    finally:
        sys.argv = old
    return 0


def complete(line: str) -> list[str] | tuple[str, str]:
    """The words that fit, where we know them; else the command and the line as Hydra wants it, without the command."""
    from scoresde_cli.cli import COMMANDS

    words = line.split()
    typed = words[1:] + ([""] if not line or line[-1].isspace() or len(words) == 1 else [])
    if len(typed) <= 1:
        return [name for name in COMMANDS if name.startswith(typed[0] if typed else "")]
    command = typed[0]
    if command == "list":
        return [g for g in [*configs.groups("ablate"), "runs"] if g.startswith(typed[-1])]
    if command not in COMMANDS or not COMMANDS[command][1]:
        return []
    key, equals, value = typed[-1].partition("=")
    if command == "ablate" and key == "size" and equals:
        return [f"size={size}" for size in SIZES if size.startswith(value)]
    if equals and key in PATHS:
        return [f"{key}={folder}" for folder in folders(value)]
    overrides = [word for word in typed[1:-1] if "=" in word or command not in TAKES_FOLDERS]
    if command in TAKES_FOLDERS and not equals and not overrides:
        found = folders(key)
        if found or "/" in key:
            return found
    return command, " ".join([words[0], *overrides, typed[-1]])


def folders(begun: str) -> list[str]:
    """The directories whose path begins so, each with the slash behind it. A hidden one where its dot is typed."""
    tail = begun.rpartition("/")[2]
    above = begun[: len(begun) - len(tail)]
    try:
        names = [entry.name for entry in os.scandir(os.path.expanduser(above) or ".") if entry.is_dir()]
    except OSError:
        return []
    return sorted(
        f"{above}{name}/"
        for name in names
        if name.startswith(tail) and " " not in name and (tail.startswith(".") or not name.startswith("."))
    )
