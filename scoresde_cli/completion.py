"""Shell completion: our commands first, then Hydra's completion of groups, options and keys."""

import os
import sys

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError

SHELLS = ("bash", "zsh", "fish")


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
    return command, " ".join([words[0], *typed[1:]])
