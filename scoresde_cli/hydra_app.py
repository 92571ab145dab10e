"""A command as a Hydra app, with Hydra's errors turned into one line each."""

import importlib
import os
import re
import sys
import warnings
from typing import Any

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError, nearest, one_line

# Hydra's flags that make sense here, and what a value behind each may be.
FLAGS: dict[str, tuple[str, ...] | None] = {
    "-m": (), "--multirun": (), "--resolve": (), "--hydra-help": (), "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"), "--config-dir": None, "-cd": None,
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip


def run(name: str, module: str, arguments: list[str]) -> int:
    """Compose conf/NAME.yaml with the overrides and hand it to `task(config)` of the command's module."""
    flags, overrides = sort_arguments(name, arguments)
    check_overrides(name, overrides)
    overrides = keys_alone(name, overrides)
    fixed = [o for o in overrides if o.startswith("out=") and "," not in o]
    if fixed and {"-m", "--multirun"} & set(flags):
        raise ScoreSDEError(
            f"{fixed[0]}: every job of a sweep would write this file; without out= each writes one of its own"
        )
    import hydra

    failures: list[Exception] = []

    def task(config: Any) -> None:
        """One job. A failure is kept, since Hydra would print it its own way; a sweep goes on with the next job."""
        try:
            importlib.import_module(module).task(config)
        except Exception as problem:
            failures.append(problem)

    old_argv, old_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [old_argv[0], *flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="hydra")
            hydra.main(version_base="1.3", config_path=str(configs.conf_dir()), config_name=name)(task)()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ScoreSDEError(f"{name}: Hydra stopped with {stop.code} at {' '.join(arguments)}") from None
    except OSError as problem:
        if not type(problem).__module__.startswith("hydra"):
            raise
        raise translate(problem, name, overrides) from problem
    except Exception as problem:  # the task's own are kept in `failures`: what comes here is about the command line
        raise translate(problem, name, overrides) from problem
    finally:
        sys.argv = old_argv
        if old_full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_full
    last = one_line(failures[-1]) if failures else ""
    for line in dict.fromkeys(map(one_line, failures)):
        if line != last:
            print(f"scoresde: {line}", file=sys.stderr)
    if failures:
        raise failures[-1]
    return 0


def sort_arguments(name: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides), whatever their order was. Raises ScoreSDEError for a flag that is none."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            key, known = flag.lstrip("-").replace("-", "_"), configs.dotted_keys(name)
            hint = f"; keys take no dashes: {key}=..." if key in known else nearest(key, [*known, *FLAGS])
            raise ScoreSDEError(f"{name}: unknown flag {flag}; expected key=value or one of {', '.join(FLAGS)}{hint}")
        choices = FLAGS[flag]
        flags.append(flag)
        if choices == ():
            continue
        if not equals:
            if not rest or (choices is not None and rest[0] not in choices):
                given = f" {rest[0]}" if rest else ""
                raise ScoreSDEError(
                    f"{name}: {flag}{given}: expected {' or '.join(choices) if choices else 'a folder'} behind it"
                )
            value = rest.pop(0)
        flags.append(value)
    return flags, overrides


def keys_alone(name: str, overrides: list[str]) -> list[str]:
    """`sampler.steps=10` of a command that takes the run's own sampler unless one is named: the key changes that one."""
    if configs.groups(name).get("sampler", "") is not None or any(o.startswith("sampler=") for o in overrides):
        return overrides
    return [f"++{o}" if o.startswith("sampler.") else o for o in overrides]


def check_overrides(name: str, overrides: list[str]) -> None:
    """What Hydra's own messages would not say well: nothing chosen for a group, or several values without -m."""
    groups = configs.groups(name)
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not key and equals:
            raise ScoreSDEError(f"{override!r}: expected key=value")
        if key in groups and (override.startswith("~") or value in ("null", "", "{}", "[]")):
            raise ScoreSDEError(f"{override}: expected one of {', '.join(configs.options(key))}")


def unreadable_override(overrides: list[str]) -> str | None:
    """The first override that Hydra's grammar cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            return override
    return None


def translate(problem: Exception, name: str, overrides: list[str]) -> ScoreSDEError:
    """What the user should read instead of Hydra's message."""
    text = str(problem)
    culprit = unreadable_override(overrides)
    if culprit is not None:
        if "=" not in culprit:
            return ScoreSDEError(f"{culprit!r}: expected key=value{nearest(culprit, configs.dotted_keys(name))}")
        return ScoreSDEError(
            f"{culprit!r}: not readable as key=value; a value with odd characters goes in quotes: \"key='a b'\""
        )
    option = re.search(r"Could not find '([^/]+)/([^']*)'", text)
    if option:
        group, given = option.groups()
        choices = configs.options(group)
        if choices:
            return ScoreSDEError(
                f"{group}={given}: no such option; expected one of {', '.join(choices)}{nearest(given, choices)}"
            )
        return ScoreSDEError(f"unknown group {group}{nearest(group, configs.dotted_keys(name))}")
    several = re.search(r"Ambiguous value for argument '([^']*)'", text)
    if several:
        return ScoreSDEError(f"{several.group(1)}: several values make a sweep, which needs -m; a list is [a,b]")
    known = re.search(r"Could not append to config. An item is already at '([^']+)'", text)
    if known:
        return ScoreSDEError(f"{known.group(1)} exists already: say {known.group(1)}=... without the plus sign")
    key = re.search(r"(?:Could not override|Key) '([^']+)'", text) or re.search(r"'([^']+)' is not in struct", text)
    if key:
        return unknown_key(key.group(1), name, overrides)
    return ScoreSDEError(one_line(text)[:300])


def unknown_key(given: str, name: str, overrides: list[str]) -> ScoreSDEError:
    """The nearest right key; for a key of a group, those of the option that is chosen."""
    groups = configs.groups(name)
    group = given.split(".")[0]
    if group in groups and "." in given:
        chosen = next((o.split("=")[1] for o in reversed(overrides) if o.startswith(f"{group}=")), groups[group])
        if chosen is None:
            return ScoreSDEError(
                f"{given}: choose the {group} first, as in {group}={configs.options(group)[0]} {given}=..."
            )
        if chosen in configs.options(group):
            found = configs.load(configs.conf_dir() / group / f"{chosen}.yaml")
            keys = [f"{group}.{k}" for k in found if not k.startswith("_")]
            shown = ", ".join(keys) or "no keys"
            return ScoreSDEError(f"unknown key {given}: {group}={chosen} has {shown}{nearest(given, keys)}")
    hint = nearest(given, configs.dotted_keys(name)) or f"; `scoresde {name} --help` lists them"
    return ScoreSDEError(f"unknown key {given!r} for `scoresde {name}`{hint}")
