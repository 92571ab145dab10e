"""Shell completion: our commands first, then Hydra's completion of groups, options and keys."""

import os
import sys

from scoresde_cli import configs


def main(arguments: list[str]) -> int:
    """`-sc install=bash` prints the script; `-sc query=bash` answers for COMP_LINE."""
    from scoresde_cli.cli import COMMANDS

    line = os.environ.get("COMP_LINE", "")
    if any(a.startswith("query=") for a in arguments) and line:
        words = line.split()
        typed = words[1:] + ([""] if line.endswith(" ") or len(words) == 1 else [])
        if len(typed) <= 1:
            print(" ".join(name for name in COMMANDS if name.startswith(typed[0] if typed else "")))
            return 0
        command = typed[0]
        if command == "list":
            print(" ".join(g for g in [*configs.groups(), "runs"] if g.startswith(typed[-1])))
            return 0
        if command not in COMMANDS or not COMMANDS[command][1]:
            return 0
        os.environ["COMP_LINE"] = (
            line.replace(f"{words[0]} {command}", words[0], 1) if f"{words[0]} {command}" in line else line
        )
    else:
        command = "train"
    import hydra

    old = sys.argv
    sys.argv = [old[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(configs.conf_dir()), config_name=command)(lambda config: None)()
    finally:
        sys.argv = old
    return 0
