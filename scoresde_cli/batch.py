"""`scoresde batch`: a sweep as a file for sbatch, with no process of it left on the login node."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from scoresde_cli import configs, hydra_app
from scoresde_cli.checks import check_call
from scoresde_cli.errors import ScoreSDEError, nearest

USAGE = "scoresde batch [time=4:00:00 mem=4G cpus=1 ...] train -m KEY=A,B ..."
Text = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]


@dataclass(frozen=True)
class Keys:
    """What stands before `train`, as sbatch takes it.

    Args:
        time: of a task; what needs longer is requeued and goes on. mem: of a task. cpus: and threads. gpus: 0 for none.
        partition, account, qos: null for the cluster's own. parallel: tasks at a time. tries: how often one is requeued.
        grace: seconds before the end of its time in which a task saves.
    """

    time: Text = "4:00:00"
    mem: Text = "4G"
    cpus: PositiveInt = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    parallel: PositiveInt = 64
    tries: PositiveInt = 20
    grace: PositiveInt = 120


@dataclass(frozen=True)
class Plan:
    """A sweep to be written: its folder, how many jobs it has, the command of one of them."""

    folder: Path
    jobs: int
    command: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    if "train" not in arguments:
        raise ScoreSDEError(f"batch: no `train` among {' '.join(arguments) or 'nothing'}; expected {USAGE}")
    at = arguments.index("train")
    keys = read(arguments[:at])
    plan = planned(arguments[at + 1 :], keys)
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    file = plan.folder / "batch.sbatch"
    file.write_text(script(keys, plan))
    print(f"batch    {file}: {plan.jobs} jobs, {min(keys.parallel, plan.jobs)} at a time, {keys.time} each")
    print(f"next     sbatch {shlex.quote(str(file))}")
    print(f"         scoresde report {shlex.quote(str(plan.folder))}     (when squeue --me has none of it left)")
    return 0


def read(words: list[str]) -> Keys:
    """The keys before `train`. Raises ScoreSDEError for one that is none, or a value that is not of its kind."""
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in Keys.__dataclass_fields__ or not equals:
            known = list(Keys.__dataclass_fields__)
            raise ScoreSDEError(
                f"batch: {word}: expected one of {', '.join(f'{k}=' for k in known)}{nearest(name, known)}"
            )
        number = value.isdigit() and name not in ("time", "mem")
        given[name] = int(value) if number else None if value == "null" else value.strip("'\"")
    check_call(Keys, given, "batch")
    return Keys(**given)  # type: ignore[arg-type]


def planned(words: list[str], keys: Keys) -> Plan:
    """The sweep, every value of it checked. Raises ScoreSDEError where it is none."""
    flags, overrides = hydra_app.sort_arguments("train", words)
    hydra_app.check_overrides("train", overrides)
    if not {"-m", "--multirun"} & set(flags):
        raise ScoreSDEError(f"batch: `train` without -m is one run; expected {USAGE}")
    launcher = next((o for o in overrides if o.startswith("hydra/")), None)
    if launcher:
        raise ScoreSDEError(f"batch: {launcher}: the array itself launches the jobs; leave it out")
    varying, fixed = hydra_app.split_sweep("train", overrides)
    if not all(varying.values()):
        raise ScoreSDEError("batch: a continuous range needs a sweeper, which needs a parent: hydra/launcher=slurm")
    hydra_app.check_values("train", flags, varying, fixed)
    folder = hydra_app.sweep_place(overrides, varying, fixed).absolute()
    threads = [] if any(o.startswith("threads=") for o in overrides) else [f"threads={keys.cpus}"]
    own = [f"hydra.sweep.dir={configs.quoted(str(folder))}", *threads]
    words = [word for word in words if not word.startswith("hydra.sweep.dir=")]
    command = [sys.executable, "-m", "scoresde_cli", "train", *words, *own]
    return Plan(folder, prod(len(values) for values in varying.values()), command)


def template() -> Path:
    """In a wheel beside conf/train.yaml, else in scripts/slurm."""
    inside = configs.conf_dir() / "array.sbatch"
    return inside if inside.is_file() else configs.conf_dir().parent / "scripts" / "slurm" / "array.sbatch"


def script(keys: Keys, plan: Plan) -> str:
    """The file."""
    more = [
        f"#SBATCH --{name}={getattr(keys, name)}" for name in ("partition", "account", "qos") if getattr(keys, name)
    ]
    more += [f"#SBATCH --gpus-per-node={keys.gpus}"] if keys.gpus else []
    values: Mapping[str, object] = {
        "NAME": plan.folder.name[:40], "LAST": plan.jobs - 1, "PARALLEL": keys.parallel, "TIME": keys.time, "MEMORY": keys.mem,
        "CPUS": keys.cpus, "GRACE": keys.grace, "TRIES": keys.tries, "FOLDER": str(plan.folder),
        "HERE": shlex.quote(str(Path.cwd())), "COMMAND": shlex.join(plan.command), "MORE": "\n".join(more) or "#",
    }  # fmt: skip
    text = template().read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text
