"""How the jobs of a grid are launched, and what becomes of them where a worker process is killed from outside.

With one of its workers joblib loses the whole pool, and the jobs of all of them. Those go on from their checkpoints in a fresh
pool, beside the ones that have not begun. A job that was lost twice may be what its workers die of (of memory, say): it runs
alone, and is given up where that is its worker's end too.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoresde_cli import slurm
from scoresde_cli.claims import BEGAN, PARENT, TASK, abandoned
from scoresde_cli.configs import quoted
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sweeps import give_up
from scoresde_cli.tracking import console

IDLE_LOSSES = 3  # of workers that were killed before they had begun a job
KILLED = "killed from outside (out of memory?)"

Launch = Callable[[Any, Sequence[Sequence[str]], int], Any]


def launch(
    jobs: Sequence[Sequence[str]], task: Callable[[Any], Any], folder: Path, hydra_overrides: Sequence[str]
) -> None:
    """Run jobs, each a list of overrides of `train`, by the launcher that the overrides of Hydra name. Inside a Hydra app."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    loader = GlobalHydra.instance().config_loader()
    overrides = [
        *hydra_overrides,
        "hydra.mode=MULTIRUN",
        f"hydra.sweep.dir={quoted(str(folder))}",
        "hydra.sweep.subdir=.",
    ]
    config = loader.load_configuration("train", overrides, run_mode=RunMode.MULTIRUN)
    context = HydraContext(config_loader=loader, callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    with workers():
        launcher.launch(jobs, initial_job_idx=0)


@contextmanager
def workers() -> Iterator[None]:
    """Jobs that are launched in here know their sweep, and outlive the loss of a worker of the joblib launcher."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    patches: dict[Any, Launch] = {
        JoblibLauncher: patient(JoblibLauncher.launch), BasicLauncher: selected(BasicLauncher.launch),
    }  # fmt: skip
    os.environ |= {PARENT: str(os.getpid()), BEGAN: str(time.time())}
    with suppress(ImportError):  # an extra
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        patches[SlurmLauncher] = on_slurm
    before = {launcher: launcher.launch for launcher in patches}
    for launcher, launch in patches.items():
        launcher.launch = launch
    try:
        yield
    except Exception as problem:
        if not lost_worker(problem):
            raise
        raise ScoreSDEError(f"a worker was {KILLED}; the same command goes on with the rest") from None
    finally:
        for launcher, launch in before.items():
            launcher.launch = launch
        for name in (PARENT, BEGAN):
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Since:
    """A task that knows when its sweep began, in whatever process it runs: a pool may be older than the sweep."""

    task: Callable[[Any], Any]
    began: str

    def __call__(self, config: Any) -> Any:
        os.environ[BEGAN] = self.began
        return self.task(config)


def on_slurm(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
    """The launcher of hydra/launcher=slurm."""
    launcher.task_function = Since(launcher.task_function, os.environ[BEGAN])
    return slurm.launch(launcher, job_overrides, initial_job_idx)


def selected(once: Launch) -> Launch:
    """A launcher's `launch` of one job of the sweep alone, where the environment names its number: a task of a batch array."""

    def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        number = os.environ.get(TASK)
        if number is None or len(job_overrides) == 1:
            return once(launcher, job_overrides, initial_job_idx)
        if not int(number) < len(job_overrides):
            raise ScoreSDEError(f"{TASK}={number}: the sweep has {len(job_overrides)} jobs, counted from 0")
        return once(launcher, [job_overrides[int(number)]], int(number))

    return launch


def lost_worker(problem: Exception) -> bool:
    return type(problem).__name__ in ("TerminatedWorkerError", "BrokenProcessPool")


def patient(once: Launch) -> Launch:
    """A launcher's `launch` that launches again after the loss of a worker. Jobs that are done, or have failed, end at once."""

    def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        if not isinstance(launcher.task_function, Since):
            launcher.task_function = Since(launcher.task_function, os.environ[BEGAN])
        folder = Path(launcher.config.hydra.sweep.dir)
        losses: Counter[int] = Counter()
        idle = 0
        while True:
            try:
                return once(launcher, job_overrides, initial_job_idx)
            except Exception as problem:
                if not lost_worker(problem):
                    raise
                lost = abandoned(folder)
                idle += not lost
                if idle == IDLE_LOSSES:
                    raise
            console.warn(f"a worker was {KILLED}; once more: {', '.join(p.name for p in lost.values()) or 'the rest'}")
            losses.update(lost.keys())
            for number, place in lost.items():
                if losses[number] > 1:
                    try:
                        once(launcher, [job_overrides[number - initial_job_idx]], number)
                    except Exception as problem:
                        if not lost_worker(problem):
                            raise
                        abandoned(folder)
                        give_up(place, f"its worker was {KILLED} {losses[number] + 1} times")

    return launch
