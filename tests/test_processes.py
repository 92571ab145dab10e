"""Data-parallel training: several processes give the run of one, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scoresde_cli import processes
from scoresde_cli.errors import Stopped
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.rng import generator
from scoresde_cli.rundir import RunDir
from scoresde_cli.sketching import XTrace
from scoresde_cli.tracking.jsonl import read_rows
from scoresde_cli.training.rows import Rows
from scoresde_cli.training.stop import StopRequest
from tests.conftest import NO_FIGURES, SMALL
from tests.test_losses import MAKERS, SDE, data, model_of

SKETCHED = {"ssm, xtrace": lambda: SSM(XTrace(), 3), "ssm_vr, xtrace": lambda: SSMVR(XTrace(), 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", (MAKERS | SKETCHED).values(), ids=(MAKERS | SKETCHED))
def test_the_gradients_of_the_rows_add_up_to_that_of_the_batch(make, size):
    model, x0 = model_of(), data(12 * size)
    weights = list(model.network.parameters())

    def gradient(field, mine):
        losses = make()(field, SDE, x0, generator(0, "g"))
        found = torch.autograd.grad(losses[mine].sum() / len(x0), weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]

    whole = gradient(model, slice(None))
    parts = [gradient(Rows(model, rank, size), slice(rank, None, size)) for rank in range(size)]
    for full, *pieces in zip(whole, *parts, strict=True):
        # float64: the sum of the rows in another order; fd_ssm divides its rounding by a step of 1e-3.
        torch.testing.assert_close(sum(pieces), full, rtol=1e-8, atol=1e-9)


def test_a_process_without_any_of_the_samples_that_have_directions_adds_its_scores_alone():
    model, x0 = model_of(), data(4)
    v, t = torch.ones_like(x0[None, :1]), torch.full((4,), 0.5, dtype=x0.dtype)
    score, products = model.forward_projections(x0, t, v)
    parts = [Rows(model, rank, 2).forward_projections(x0, t, v) for rank in range(2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], score)
    torch.testing.assert_close(parts[0][1] + parts[1][1], products)


def places(size: int) -> list[dict[str, str]]:
    """The environments of that many processes of one run, as torchrun makes them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"} for r in range(size)]


def start(size: int, folder: Path, *argv: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "scoresde_cli", "train", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, cwd=folder, env=place, **pipes) for place in places(size)]


def weights(run: Path) -> torch.Tensor:
    found = RunDir(run).checkpoint()
    return torch.cat([w.flatten() for group in (found.model, found.average) for w in group.values()])


SUMS = """
import sys, torch
from scoresde_cli import processes
processes.join()
if sys.argv[1] == "gloo":
    processes.group.memory = None
ok = True
for size in (3, 40, 7):  # the memory grows, and serves the smaller one too
    def of(rank):
        source = torch.Generator().manual_seed(rank)
        image = torch.randn(2, 4, size, 5, generator=source).to(memory_format=torch.channels_last)
        return [image, torch.randn((), generator=source, dtype=torch.float64), torch.randn(0), torch.randn(size, generator=source)]
    mine = of(processes.rank())
    processes.add_up(mine)
    for found, *each in zip(mine, *map(of, range(3))):
        want = sum(part.double() for part in each).to(found.dtype)
        close = torch.allclose(found, want, rtol=0, atol=1e-15 if found.dtype.itemsize == 8 else 1e-6)
        ok &= close and found.stride() == each[0].stride()
ok &= (processes.group.memory is None) == (sys.argv[1] == "gloo")
print("equal" if ok else "differs")
processes.leave(0)
"""


@pytest.mark.parametrize("way", ["memory", "gloo"])
def test_sums_over_processes_are_those_of_one_and_leave_no_file(way):
    before = set(Path("/dev/shm").glob("scoresde-*"))
    command = [sys.executable, "-c", SUMS, way]
    running = [subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True) for place in places(3)]
    # Sums are made in float64, so that a float32 one is rounded once: half a unit in the last place of a number below 16 is 4.8e-7.
    assert [job.communicate(timeout=120)[0] for job in running] == ["equal\n"] * 3
    assert set(Path("/dev/shm").glob("scoresde-*")) <= before


def test_two_processes_give_the_run_of_one_and_when_one_is_killed_both_end_and_the_run_goes_on(tmp_path, cli):
    """dsm_cv, which decides from what it measures as it goes; one process is killed in the middle, then both go on."""
    argv = [
        *SMALL,
        *NO_FIGURES,
        "steps=300",
        "precision=fp64",
        "loss=dsm_cv",
        "log_every=1",
        "n_proj=1",
        "network.width=16",
    ]
    code, _, err = cli("train", *argv, "dir=one")
    assert code == 0, err
    first, other = start(2, tmp_path, *argv, "eval.figures=true", "dir=two")
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("two/checkpoints/step-*")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(other.pid, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = first.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    other.communicate()
    assert first.returncode == processes.Lost.exit_code, said
    assert "process 1 of the 2 of this run has ended" in said
    assert "train resume=two" in said
    assert json.loads((tmp_path / "two/run.json").read_text())["status"] == "failed"
    both = start(2, tmp_path, "resume=two")  # to the end, with the figures that the first process draws by itself
    said, silence = (process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], said + silence
    assert silence == ""
    one, two = (read_rows(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    assert [row["step"] for row in two] == list(range(1, 301))
    # Sums in another order: 1e-16 a step, which training carries on.
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-9)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-7, atol=1e-9)
    one, two = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    for name in set(one) - {"train_seconds", "steps_per_second", "peak_memory_mb"}:
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-5, abs=1e-7), name
    choices = [RunDir(tmp_path / run).checkpoint().facts["choices"] for run in ("one", "two")]
    assert [row["step"] for row in choices[0]] == [row["step"] for row in choices[1]]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "batch_size=255"], "batch_size=255 with 2 processes: expected a multiple of 2"),
        (["train", "-m", "seed=0,1"], "a sweep under torchrun or srun: several processes train one run"),
        (["train", "lss=dsm"], "did you mean 'loss'"),
    ],
)
def test_a_mistake_is_said_once_and_ends_all_processes(tmp_path, argv, says):
    command = [sys.executable, "-m", "scoresde_cli", *argv, *SMALL]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for place in places(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    (line,) = (line for line in errors[0].splitlines() if line.startswith("scoresde: "))
    assert says in line
    assert errors[1] == ""


def test_a_process_outside_torchrun_and_srun_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in a batch script, which is no task
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.placed() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x1)")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    found = processes.placed()
    assert found is not None
    assert (found.size, found.local_size, found.address) == (4, 4, "127.0.0.1")


def test_one_request_to_stop_that_comes_twice_is_one(monkeypatch):
    """As Slurm sends it to a batch script and to its program: the second must not cut the saving that the first has asked for."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    request = StopRequest()
    request.deferred = True
    request.receive(signal.SIGTERM, None)
    request.receive(signal.SIGTERM, None)
    now[0] += 10.0
    with pytest.raises(Stopped):
        request.receive(signal.SIGTERM, None)
