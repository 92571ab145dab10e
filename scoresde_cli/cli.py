"""The command table and its dispatch. Nothing heavy is imported before the command is known to need it."""

import contextlib
import importlib
import itertools
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from scoresde_cli import __version__, processes
from scoresde_cli.configs import quoted
from scoresde_cli.errors import Diverged, ScoreSDEError, Stopped, in_words, nearest, one_line

# name: (what it does, whether it is a Hydra command with conf/NAME.yaml)
COMMANDS: dict[str, tuple[str, bool]] = {
    "train": ("train a score model, sample from it, measure both and draw the figures", True),
    "sample": ("draw samples from a run, in the data's own units and column names", True),
    "evaluate": ("measure runs again, one or several: likelihood, score error, distances, each against chance", True),
    "ablate": ("answer a question by a grid of runs: tables with intervals, figures, a report", True),
    "report": ("tables, figures and a report of a study, a sweep, or any runs", True),
    "verify": ("show the identity L_ISM = E L_SSM as numbers, for a network, a dimension and a law", True),
    "rerun": ("train a run's config again in a new directory and compare the numbers", True),
    "list": ("the options of a group, or of all; `list runs` shows the runs below this folder", False),
    "batch": ("a sweep as a file for sbatch: `scoresde batch time=4:00:00 mem=4G train -m n_proj=1,2,4`", False),
    "doctor": ("check this installation and this machine", False),
}
PATH_KEYS = ("run", "resume", "dir", "dirs", "out", "data.path")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit code (errors.py)."""
    arguments = sys.argv[1:] if argv is None else argv
    if argv is None and not processes.placed() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)
    if argv is None and not os.environ.get("SCORESDE_DEBUG"):
        warnings.simplefilter("ignore")  # other libraries' remarks are not the user's; ours are lines of our own
    return processes.leave(carried_out(arguments))


def terminated(signum: int, frame: object) -> None:
    """Where nothing has to be saved, before and after the work (training/stop.py): the end by this signal, but not in silence."""
    signal.signal(signum, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.write(2, b"scoresde: stopped by SIGTERM\n")
    os.kill(os.getpid(), signum)


def carried_out(arguments: list[str]) -> int:
    """Run a command line; the exit code, after a line on stderr where it is not zero."""
    try:
        return dispatch(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Stopped, KeyboardInterrupt) as problem:
        found = in_words(problem)
        if found and processes.rank() and (isinstance(problem, Stopped | Diverged) or processes.mourned()):
            return found[1]  # the first process says it
        return fail(*found) if found else unexpected(problem)


def unexpected(problem: BaseException) -> int:
    """What is left is a bug of ours: say so in a line, keep the traceback."""
    return fail(f"internal error: {type(problem).__name__}: {one_line(problem)[:300]}{keep_traceback()}", 1)


def fail(message: str, code: int) -> int:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # stderr may be closed
        print(f"scoresde: {one_line(message)}", file=sys.stderr)
    return code


def keep_traceback() -> str:
    """Write the traceback to a file; where, for the message."""
    import tempfile

    if os.environ.get("SCORESDE_DEBUG"):
        traceback.print_exc()
    try:
        with tempfile.NamedTemporaryFile("w", prefix="scoresde-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f" (the traceback is in {file.name}; please report it)"


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from scoresde_cli import pages

        if len(arguments) > 1 and arguments[1] not in COMMANDS:
            raise unknown_command(arguments[1])
        print(pages.command(arguments[1]) if len(arguments) > 1 else pages.overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"scoresde {__version__}")
        return 0
    if arguments[0] in ("-sc", "--shell-completion", "--shell_completion"):
        from scoresde_cli import completion

        return completion.main(arguments)
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise unknown_command(name)
    if any(a in ("-h", "--help") for a in rest):
        from scoresde_cli import pages

        print(pages.command(name))
        return 0
    # Waiting OpenMP threads spin for a short while, then sleep: full speed on an idle machine, and half the loss of the
    # unlimited spinning where two runs share its cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if processes.placed():
        refuse_together(name, rest)
        processes.join()
        if processes.rank():
            importlib.import_module("scoresde_cli.together").follow()
            return 0
    # `batch` writes what other commands do, so it stands above them.
    module = "scoresde_cli.batch" if name == "batch" else f"scoresde_cli.commands.{name}"
    if not COMMANDS[name][1]:
        return importlib.import_module(module).main(rest)
    from scoresde_cli import hydra_app, provenance

    provenance.remember_command(arguments)
    return hydra_app.run(
        name, module, [quote(a, sweep="-m" in rest or "--multirun" in rest) for a in positional(name, rest)]
    )


def refuse_together(name: str, rest: list[str]) -> None:
    """Raise ScoreSDEError for what several processes do not do, in the first of them."""
    sweep = any(word in ("-m", "--multirun") for word in rest)
    if name == "train" and not sweep:
        return
    if processes.placed().rank:  # type: ignore[union-attr]
        sys.exit(ScoreSDEError.exit_code)
    what = "a sweep" if sweep else f"`scoresde {name}`"
    raise ScoreSDEError(
        f"{what} under torchrun or srun: several processes train one run; start it as one process"
        + ("; hydra/launcher=slurm hydra.launcher.tasks_per_node=N gives each job N" if sweep else "")
    )


def unknown_command(name: str) -> ScoreSDEError:
    hint = f"; a command comes first: scoresde train {name}" if "=" in name else nearest(name, COMMANDS)
    return ScoreSDEError(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}{hint}")


def positional(name: str, rest: list[str]) -> list[str]:
    """`scoresde rerun DIR` means `run=DIR`, for the commands that read a run; `evaluate` and `report` take several."""
    if name not in ("sample", "evaluate", "rerun", "report"):
        return rest
    folders = list(
        itertools.takewhile(lambda word: ("=" not in word and not word.startswith("-")) or Path(word).is_dir(), rest)
    )
    if len(folders) == 1 and rest[0].startswith("[") and not Path(rest[0]).exists():
        return [f"{'dirs' if name == 'report' else 'run'}={rest[0]}", *rest[1:]]  # a list, in Hydra's words
    if folders and name == "report":
        return [f"dirs=[{','.join(map(quoted, folders))}]", *rest[len(folders) :]]
    if len(folders) > 1 and name == "evaluate":
        return [f"run=[{','.join(map(quoted, folders))}]", *rest[len(folders) :]]
    return [f"run={rest[0]}", *rest[1:]] if folders else rest


def quote(argument: str, sweep: bool = False) -> str:
    """Quote the value of a path, so that Hydra's grammar reads nothing into it (a sweep's commas stay commas)."""
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or not value or value[0] in "'\"" or value == "null":
        return argument
    if key in ("run", "dirs") and value[0] == "[" and value[-1] == "]" and not Path(value).exists():
        return argument  # a list of runs
    if all(c.isascii() and (c.isalnum() or c in "/._-") for c in value) or (sweep and "," in value):
        return argument
    return f"{key}={quoted(value)}"
