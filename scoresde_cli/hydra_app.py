"""A command as a Hydra app, with Hydra's errors turned into one line each."""

import difflib
import importlib
import os
import re
import sys
import warnings
from typing import Any

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError, Stopped, nearest, one_line


def run(name: str, module: str, arguments: list[str]) -> int:
    """Compose conf/NAME.yaml with the overrides and hand it to `task(config)` of the command's module."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    failures: list[Exception] = []

    def task(config: Any) -> None:
        """One job. A failure is kept, since Hydra would print it its own way; a sweep goes on with the next job."""
        try:
            importlib.import_module(module).task(config)
        except Stopped as problem:
            raise KeyboardInterrupt from problem  # no Exception: it ends a sweep, too
        except Exception as problem:
            failures.append(problem)

    old_argv, old_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [old_argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="hydra")
            hydra.main(version_base="1.3", config_path=str(configs.conf_dir()), config_name=name)(task)()
    except KeyboardInterrupt as problem:
        raise (problem.__cause__ if isinstance(problem.__cause__, Stopped) else problem) from None
    except (HydraException, OmegaConfBaseException) as problem:
        raise translate(problem, name, arguments) from problem
    except ValueError as problem:
        if "can only be used" in str(problem) or "Only one of" in str(problem):
            raise ScoreSDEError(one_line(problem)) from problem
        raise
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ScoreSDEError(
                f"{name}: wrong flags in {' '.join(arguments)}; `scoresde {name} --help` shows what there is"
            ) from None
        return 0
    finally:
        sys.argv = old_argv
        if old_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_full
    for problem in failures[:-1]:
        print(f"scoresde: {one_line(problem)}", file=sys.stderr)
    if failures:
        raise failures[-1]
    return 0


def translate(problem: Exception, name: str, arguments: list[str]) -> ScoreSDEError:
    """What the user should read instead of Hydra's message."""
    text = str(problem)
    known = configs.dotted_keys(name)
    option = re.search(r"Could not find '([^/']+)/([^']*)'", text)
    if option:
        group, given = option.groups()
        choices = configs.options(group)
        if choices:
            return ScoreSDEError(
                f"{group}={given}: no such option; expected one of {', '.join(choices)}{nearest(given, choices)}"
            )
        return ScoreSDEError(f"unknown group {group}{nearest(group, known)}")
    key = re.search(r"(?:Could not override|Key) '([^']+)'", text) or re.search(
        r"Could not append to config.*'([^']+)'", text
    )
    if key and "no such" not in text.lower().split("key")[0]:
        given = key.group(1)
        if "already at" in text or "Could not append" in text:
            return ScoreSDEError(f"{given} exists already: say {given}=... without the plus sign")
        group = given.split(".")[0]
        if group in configs.groups(name) and "." in given and configs.groups(name)[group] is None:
            chosen = [a for a in arguments if a.startswith(f"{group}=")]
            if not chosen:
                return ScoreSDEError(
                    f"{given}: choose the {group} first, as in {group}={configs.options(group)[0]} {given}=..."
                )
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; `scoresde {name} --help` lists them"
        return ScoreSDEError(f"unknown key {given!r} for `scoresde {name}`{hint}")
    parse = re.search(
        r"mismatched input|extraneous input|token recognition|no viable|missing EQUAL|LexerNoViable", text
    )
    if parse or "OverrideParse" in type(problem).__name__:
        culprit = next((a for a in arguments if a in text), arguments[0] if arguments else "")
        if "=" not in culprit:
            return ScoreSDEError(f"{culprit!r}: expected key=value{nearest(culprit, known)}")
        return ScoreSDEError(
            f"{culprit!r}: not readable as key=value; put values with spaces or brackets in quotes: \"key='a b'\""
        )
    return ScoreSDEError(f"{one_line(text)[:300]}")
