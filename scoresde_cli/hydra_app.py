"""A command as a Hydra app, with Hydra's errors turned into one line each."""

import importlib
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError, Stopped, nearest, one_line

# Hydra's flags that make sense here, and what a value behind each may be.
FLAGS: dict[str, tuple[str, ...] | None] = {
    "-m": (), "--multirun": (), "--resolve": (), "--hydra-help": (), "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"), "--config-dir": None, "-cd": None,
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip


OWN = ("sde.drift.", "sde.diffusion.")  # a user's own classes stand below


def run(name: str, module: str, arguments: list[str]) -> int:
    """Compose conf/NAME.yaml with the overrides and hand it to `task(config)` of the command's module."""
    flags, overrides = sort_arguments(name, arguments)
    check_overrides(name, overrides)
    overrides = keys_alone(name, overrides)
    sweep = bool({"-m", "--multirun"} & set(flags))
    fixed = [o for o in overrides if o.startswith("out=") and "," not in o]
    if fixed and sweep:
        raise ScoreSDEError(
            f"{fixed[0]}: every job of a sweep would write this file; without out= each writes one of its own"
        )
    if sweep and name in ("ablate", "report"):
        raise ScoreSDEError(
            f"{name} -m: {'a study is a sweep already' if name == 'ablate' else 'one report at a time'}; leave out -m"
        )
    if sweep and name == "train":
        return run_sweep(name, module, flags, overrides, arguments)
    if sweep:
        check_values(name, flags, *split_sweep(name, overrides))
    return run_app(name, module, flags, overrides, arguments)


def run_sweep(name: str, module: str, flags: list[str], overrides: list[str], arguments: list[str]) -> int:
    """`train -m`: every value checked before the first job; a directory of its own; the failures at the end."""
    from scoresde_cli import launching, sweeps
    from scoresde_cli.training.stop import stop_requests

    varying, fixed = split_sweep(name, overrides)
    check_values(name, flags, varying, fixed)
    folder = sweep_place(overrides, varying, fixed)
    keys = ",".join(re.split("=", o.lstrip("+~"), maxsplit=1)[0] for o in fixed if not o.startswith("hydra"))
    own = [f"hydra.sweep.dir={configs.quoted(str(folder))}", f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"]
    began = time.time() - 1.0  # the clock of the file system may be coarser
    with stop_requests(), launching.workers():
        try:
            code = run_app(name, module, flags, [*overrides, *own], arguments)
        except Stopped as stop:
            raise Stopped(f"{stop}; the same command goes on with the sweep in {folder}", stop.exit_code) from None
    sweeps.conclude(folder, began)
    return code


def sweep_place(overrides: list[str], varying: dict[str, list[str]], fixed: list[str]) -> Path:
    """The directory of a sweep: the one that is named, or that of its settings."""
    from scoresde_cli import sweeps

    chosen = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("hydra.sweep.dir=")), None)
    if chosen and "${" in chosen:
        raise ScoreSDEError(f"hydra.sweep.dir={chosen}: expected a plain path, so that the same command finds it again")
    return Path(chosen.strip("'\"")) if chosen else Path(sweeps.sweep_folder(fixed, list(varying)))


def split_sweep(name: str, overrides: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({varying key: its values}, the other overrides). Raises ScoreSDEError where one is not readable.

    The values of a continuous search space, which a sweeper such as Optuna draws from, are left empty.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    varying: dict[str, list[str]] = {}
    fixed = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as problem:
            raise translate(problem, name, overrides) from problem
        if not parsed.is_sweep_override():
            fixed.append(override)
        elif parsed.is_discrete_sweep():
            varying[parsed.get_key_element()] = list(parsed.sweep_string_iterator())
        else:
            varying[parsed.get_key_element()] = []
    return varying, fixed


def check_values(name: str, flags: list[str], varying: dict[str, list[str]], fixed: list[str]) -> None:
    """Compose the first job, and each other value of each key beside the first of the others; check those of `train`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    first = {key: values[0] for key, values in varying.items() if values}
    picks = [first] + [{**first, key: value} for key, values in varying.items() for value in values[1:]]
    search = [flags[i + 1] for i, flag in enumerate(flags) if flag in ("--config-dir", "-cd")]
    own = (
        [f"hydra.searchpath=[{','.join(configs.quoted(f'file://{Path(d).resolve()}') for d in search)}]"]
        if search
        else []
    )
    plain = [o for o in fixed if not o.startswith("hydra")]
    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        for pick in picks:
            overrides = [*plain, *(f"{key}={value}" for key, value in pick.items())]
            try:
                config = compose(name, [*overrides, *own])
                if name == "train":
                    importlib.import_module("scoresde_cli.compose").check(OmegaConf.to_container(config, resolve=True))
            except ScoreSDEError:
                raise
            except Exception as problem:
                raise translate(problem, name, overrides) from problem


def run_app(name: str, module: str, flags: list[str], overrides: list[str], arguments: list[str]) -> int:
    """Hydra's own main on `task(config)` of the module, and its errors in our words."""
    import hydra

    failures: list[Exception] = []
    process = os.getpid()

    def task(config: Any) -> Any:
        """One job. A failure is kept, since Hydra would print it its own way; a sweep goes on with the next job."""
        try:
            return importlib.import_module(module).task(config)
        except Exception as problem:
            if os.getpid() != process:  # a worker of a parallel launcher, which hands it to its parent
                raise
            foreign = type(problem).__module__.startswith("hydra")  # of configs that the task composed itself
            failures.append(translate(problem, name, overrides) if foreign else problem)

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
    except ScoreSDEError:
        raise
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
    """Keys that no config holds yet, with the plus signs that Hydra wants for them.

    `sampler.steps=10` of a command that takes the run's own sampler unless one is named: the key changes that one; and what is said
    of a user's own classes, `sde.drift._target_=module.Class sde.drift.rate=2`.
    """
    overrides = [f"++{o}" if o.startswith(OWN) else o for o in overrides]
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
    option = re.search(r"Could not find '(.+)/([^'/]*)'", text)
    if option:
        group, given = option.groups()
        if given == "submitit_slurm" and not any(given in o for o in overrides):
            return ScoreSDEError("hydra/launcher=slurm needs submitit: pip install 'scoresde[slurm]'")
        choices = sorted({*configs.options(group), *re.findall(r"^\t(\S+)$", text, re.MULTILINE)})
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
    if name == "train" and any(o.startswith("resume=") for o in overrides):
        return ScoreSDEError(
            f"{given} with resume: the run keeps its own config; only steps, max_seconds and tracker.* can change"
        )
    groups = configs.groups(name)
    group = given.split(".")[0]
    if group in groups and "." in given:
        chosen = next((o.split("=")[1] for o in reversed(overrides) if o.startswith(f"{group}=")), groups[group])
        if chosen is None:
            return ScoreSDEError(
                f"{given}: choose the {group} first, as in {group}={configs.options(group)[0]} {given}=..."
            )
        if chosen in configs.options(group):
            found = configs.node(group, chosen)
            keys = [f"{group}.{k}" for k in found if not k.startswith("_")]
            shown = ", ".join(keys) or "no keys"
            return ScoreSDEError(f"unknown key {given}: {group}={chosen} has {shown}{nearest(given, keys)}")
    hint = nearest(given, configs.dotted_keys(name)) or f"; `scoresde {name} --help` lists them"
    return ScoreSDEError(f"unknown key {given!r} for `scoresde {name}`{hint}")
