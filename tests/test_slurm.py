"""Against a real Slurm on this machine: what is cut, cancelled, requeued or lost ends as if nothing had been.

The cluster is made by scripts/slurm/start: two nodes of two CPUs, no accounting. Where Slurm cannot be installed these tests skip.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from scoresde_cli import claims, slurm
from scoresde_cli.rundir import RunDir
from scoresde_cli.training.state import checkpoints, step_of
from tests.conftest import NO_FIGURES, SMALL
from tests.test_sweeps import numbers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "slurm"
SCORESDE = [sys.executable, "-m", "scoresde_cli"]
# A few seconds of training, with a checkpoint every few tenths.
LONG = [
    *SMALL, *NO_FIGURES, "loss=dsm", "network.width=16", "batch_size=64", "steps=1000", "checkpoint.every=40", "threads=1",
    "eval.metrics=[energy_distance]",
]  # fmt: skip
LIMITS = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.timeout_min=5"]


@pytest.fixture(scope="session")
def slurm_here() -> Iterator[dict[str, str]]:
    """The environment of a test cluster."""
    pytest.importorskip("submitit", reason="scoresde[slurm] is not installed")
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"no test cluster: {', '.join(missing)} not installed" if missing else "no test cluster: not root")
    folder = Path(tempfile.mkdtemp(prefix="scoresde-slurm-"))
    folder.chmod(0o755)  # munge's socket is for all, as pytest's own folders are not
    try:
        subprocess.run([SCRIPTS / "start", folder], check=True, timeout=120)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield dict(os.environ)
    finally:
        subprocess.run([SCRIPTS / "stop", folder], check=False, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def until(what: Callable[[], object], seconds: float = 300) -> None:  # on a machine that others use as well
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.1)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def busy(sweep: Path, but: Sequence[str] = (), before: int = 500) -> tuple[str, str]:
    """Slurm id and name of a job of a sweep, none of these, that trains: with a checkpoint, of an earlier step than this."""
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        there = slurm.queued() or {}
        for file in sweep.glob(".slurm/*.json"):
            names = json.loads(file.read_text())["jobs"]
            for job, (array, state, _) in there.items():
                name = names[int(job.partition("_")[2] or 0)] if array == file.stem else None
                folder = sweep / str(name)
                steps = [step_of(checkpoint) for checkpoint in checkpoints(folder / "checkpoints")]
                if name not in (None, *but) and state == "RUNNING" and steps and steps[-1] < before:
                    return job, str(name)
        time.sleep(0.05)
    raise AssertionError("no job was training")


def send(name: str, job: str, *flags: str) -> subprocess.Popen:
    """A signal to a job, once: scancel would send it again and again for a minute, once the job is requeued to its new life too.
    It holds on for these 2 seconds, in which a short job ends: whoever has more to do does it before waiting for the process."""
    return subprocess.Popen(["timeout", "2", "scancel", f"--signal={name}", *flags, job], stderr=subprocess.DEVNULL)


def begun_again(job: str) -> bool:
    """Slurm has taken a job back to the queue; a node that was down for a moment only is easily missed."""
    return "Restarts=0 " not in ask("scontrol", "show", "job", job)


def final(folder: Path) -> dict[str, torch.Tensor]:
    found = RunDir(folder).checkpoint()
    return {**found.model, **{f"ema.{name}": value for name, value in (found.average or {}).items()}}


def assert_same(one: Path, other: Path) -> None:
    """The same final weights, bit for bit, and the same numbers."""
    names = sorted(p.parent.name for p in one.glob("*/summary.json"))
    assert names
    assert names == sorted(p.parent.name for p in other.glob("*/summary.json"))
    for name in names:
        a, b = final(one / name), final(other / name)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert numbers(one) == numbers(other)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six jobs, one after the other, in this process."""
    from scoresde_cli.cli import main

    folder = tmp_path_factory.mktemp("undisturbed") / "runs"
    threads = torch.get_num_threads()
    assert main(["train", "-m", "seed=0,1,2,3,4,5", *LONG, f"hydra.sweep.dir={folder}"]) == 0
    torch.set_num_threads(threads)
    return folder


def start(folder: Path, *argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*SCORESDE, *argv], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def test_preemption_requeue_time_outs_and_the_loss_of_a_node_change_no_bit(slurm_here, undisturbed, tmp_path, cli):
    argv = ["train", "-m", "seed=0,1,2,3,4,5", *LONG, *LIMITS, "hydra.sweep.dir=cut"]
    parent, cut = start(tmp_path, *argv), []
    job, name = busy(tmp_path / "cut")
    send("USR2", job).wait()  # with less than 10 minutes submitit takes it for the end of its time
    cut.append(name)
    job, name = busy(tmp_path / "cut", cut)
    ask("scontrol", "requeue", job)
    cut.append(name)
    job, name = busy(tmp_path / "cut", cut)
    node = ask("squeue", "-h", "-j", job, "-o", "%N").strip()
    ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cut.append(name)
    until(lambda: begun_again(job))
    subprocess.run(
        ["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False
    )  # refused where it came by itself
    until(lambda: "down" not in ask("sinfo", "-h", "-N", "-n", node, "-o", "%T"))
    # The parent may be killed, and the same command finds its jobs.
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    parent = start(tmp_path, *argv)
    said, _ = parent.communicate(timeout=400)
    assert parent.returncode == 0, said
    assert "jobs of an earlier call are in the queue" in said
    for name in cut:  # they were cut indeed
        assert "going on with" in (tmp_path / "cut/logs" / f"{name}.txt").read_text()
    assert_same(tmp_path / "cut", undisturbed)
    assert not list(tmp_path.glob("cut/*.failed.json"))
    code, _, err = cli("report", str(tmp_path / "cut"))
    assert code == 0, err
    assert list(tmp_path.rglob("report.html"))


def test_failed_and_cancelled_jobs_are_named_and_nobody_waits_for_them(slurm_here, tmp_path):
    argv = ["train", "-m", "optimizer.lr=1e-3,1e30", "steps=100000", *[a for a in LONG if not a.startswith("steps")]]
    parent = start(tmp_path, *argv, *LIMITS, "hydra.sweep.dir=bad")
    cancelled, _ = busy(tmp_path / "bad", ["optimizer.lr=1e+30"], before=100000)
    ask("scancel", cancelled)
    gone = time.time()
    said, _ = parent.communicate(timeout=400)
    assert (tmp_path / "bad/optimizer.lr=0.001.failed.json").stat().st_mtime - gone < 60
    assert parent.returncode not in (0, 2)
    lines = [line for line in said.splitlines() if line.startswith("scoresde: ")]
    assert any(line.startswith("scoresde: optimizer.lr=1e+30: diverged") for line in lines), said
    (line,) = [line for line in lines if line.startswith("scoresde: optimizer.lr=0.001: ")]
    assert "was cancelled" in line
    assert "its last lines: loss dsm" in line or "steps/s" in line
    assert "2 jobs failed" in lines[-1]
    # The words for it, by sacct where there is one, and where nobody remembers the job.
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'CANCELLED by 0'\n")
    (tmp_path / "sacct").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert slurm.ended("999") == "CANCELLED"
    assert slurm.ended("999") == ""
    assert slurm.ended(cancelled) == "CANCELLED"  # by scontrol


def test_a_plain_array_needs_no_parent(slurm_here, undisturbed, tmp_path, cli):
    sweep = ["train", "-m", "seed=0,1,2", *LONG, "hydra.sweep.dir=array"]
    code, _, err = cli("batch", "mem=1G", "time=5", "grace=30", *sweep)
    assert code == 0, err
    number = ask("sbatch", "--parsable", "array/batch.sbatch").strip()
    folders = [tmp_path / "array" / f"seed={i}" for i in range(3)]
    until(lambda: list(folders[0].glob("checkpoints/step-*")))
    signalled = send("USR1", f"{number}_0", "--batch")
    until(lambda: list(folders[1].glob("checkpoints/step-*")))
    ask("scontrol", "requeue", f"{number}_1")
    signalled.wait()

    def over() -> bool:
        there = slurm.queued()
        return there is not None and not any(job.startswith(number) for job in there)

    until(over)
    logs = [next((tmp_path / "array/logs").glob(f"*_{i}.txt")).read_text() for i in range(3)]
    assert all("going on with" in logs[i] for i in range(2)), logs
    for i in range(3):
        a, b = final(folders[i]), final(undisturbed / f"seed={i}")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_tasks_of_srun_train_one_run(slurm_here, tmp_path, cli):
    argv = ["train", *SMALL, *NO_FIGURES, "precision=fp64", "loss=dsm", "network.width=16", "threads=1"]
    assert cli(*argv, "dir=one")[0] == 0
    ask("srun", "--ntasks=2", "--mem=1G", "--chdir", str(tmp_path), *SCORESDE, *argv, "dir=two")
    a, b = final(tmp_path / "one"), final(tmp_path / "two")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-11)  # sums in another order
    assert RunDir(tmp_path / "two").facts()["sessions"][0]["processes"] == 2


def test_the_claim_of_a_machine_that_is_no_more_is_taken_over(tmp_path, monkeypatch):
    """As left by a dead client of a network file system: locked for ever, and silent."""
    file = tmp_path / ".job.claim"
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "lock").touch()
    file.write_text('{"sweep": "1 on elsewhere", "pid": 1, "job": 0, "host": "elsewhere"}')
    with claims.acquire(file):  # type: ignore[union-attr]
        assert claims.taken(file) is None  # it was touched just now
        os.utime(file, (time.time() - 2 * claims.STALE,) * 2)
        took = claims.taken(file)
        assert took is not None
        took.close()
    assert not (tmp_path / "job" / "lock").exists()
    # A file system that gives the lock to both: the owner elsewhere still touches it.
    file.write_text('{"sweep": "1 on elsewhere", "pid": 1, "job": 0, "host": "elsewhere"}')
    assert claims.taken(file) is None
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    took = claims.taken(file)
    assert took is not None
    took.close()
