"""Sweeps: every job finds its directory again; what is done, cut, failed or another's is told apart."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scoresde_cli import claims, launching, sweeps
from tests.conftest import NO_FIGURES, SMALL

TINY = [*SMALL, *NO_FIGURES]
CLOCK = ("train_seconds", "steps_per_second", "peak_memory_mb")


def numbers(folder: Path) -> dict[str, dict]:
    """What the jobs of a sweep measured, without what the clock decides."""
    return {
        file.parent.name: {k: v for k, v in json.loads(file.read_text()).items() if k not in CLOCK}
        for file in folder.glob("*/summary.json")
    }


def only_sweep(root: Path) -> Path:
    (folder,) = (p for p in (root / "multirun").iterdir())
    return folder


def test_a_job_is_named_after_what_it_varies_and_the_same_sweep_does_nothing_twice(tmp_path, cli):
    argv = ["train", "-m", "n_proj=1,3", "seed=0,1", "loss=ssm", *TINY]
    assert cli(*argv)[0] == 0
    folder = only_sweep(tmp_path)
    assert sorted(numbers(folder)) == ["n_proj=1,seed=0", "n_proj=1,seed=1", "n_proj=3,seed=0", "n_proj=3,seed=1"]
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "multirun.yaml"}
    code, out, _ = cli(*argv)
    assert code == 0
    assert out.count("is done") == 4
    assert {p: p.stat().st_mtime_ns for p in written} == written
    # More values of the same keys belong to the same sweep; another fixed key makes another one.
    assert cli(*[a.replace("seed=0,1", "seed=0,1,2") for a in argv])[1].count("is done") == 4
    assert len(numbers(folder)) == 6
    assert cli(*argv, "ema=0.9")[1].count("is done") == 0


def test_a_job_that_was_cut_goes_on_and_ends_with_the_numbers_of_an_undisturbed_one(tmp_path, cli):
    argv = ["train", "-m", "n_proj=1,3", "loss=ssm", *TINY]
    assert cli(*argv)[0] == 0
    folder = only_sweep(tmp_path)
    before = numbers(folder)
    cut = folder / "n_proj=3"
    (cut / "summary.json").unlink()
    for step in ("step-0000040", "step-0000060"):
        shutil.rmtree(cut / "checkpoints" / step, ignore_errors=True)
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "running"}))  # as SIGKILL leaves it
    code, out, _ = cli(*argv)
    assert code == 0
    assert "at step 0" in out or "at step 20" in out
    assert numbers(folder) == before


def test_a_failed_job_stops_no_other_is_listed_and_is_tried_again(tmp_path, cli):
    good = tmp_path / "a.csv"
    good.write_text("x,y\n" + "\n".join(f"{i % 17},{i * 7 % 23}.5" for i in range(200)))
    rest = [a for a in TINY if not a.startswith("data.n")]
    argv = ["train", "-m", "data=table", f"data.path={tmp_path}/b.csv,{good}", "seed=0,1", *rest, "eval.n=20"]
    code, _, err = cli(*argv)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("scoresde:")]
    assert len(lines) == 3
    assert "2 jobs failed" in lines[-1]
    assert all("b.csv" in line for line in lines[:2])
    folder = only_sweep(tmp_path)
    assert len(numbers(folder)) == 2
    shutil.copy(good, tmp_path / "b.csv")
    code, out, err = cli(*argv)
    assert code == 0, err
    assert out.count("is done") == 2
    assert len(numbers(folder)) == 4
    assert not list(folder.glob("*.failed.json"))


def test_a_diverged_job_gives_its_own_exit_code(tmp_path, cli):
    code, _, err = cli("train", "-m", "optimizer.lr=1e-3,1e30", *TINY)
    assert code == 3
    assert "diverged" in err.splitlines()[-2]
    assert len(numbers(only_sweep(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("network.width=8", "network.width: 128 against 8"),
        ("eval.n=40", "eval.n: 300 against 40"),
        ("steps=50", "steps: 60 against 50"),
    ],
)
def test_a_directory_of_another_config_is_refused(tmp_path, cli, change, says):
    argv = ["train", "-m", "n_proj=1,2", f"hydra.sweep.dir={tmp_path}/mine", *TINY]
    assert cli(*argv)[0] == 0
    before = numbers(tmp_path / "mine")
    code, _, err = cli(*argv, change)
    assert code == 2
    assert says in err
    assert numbers(tmp_path / "mine") == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["n_proj=1,0"], "n_proj=0: expected greater than 0"),
        (["loss=ssm,smm"], "did you mean 'ssm'"),
        (["n_proj=1,2", "lss=ssm"], "did you mean 'loss'"),
        (["sampler.steps=10,x"], "sampler.steps=x"),
        (["network.width=64,64.5"], "network.width=64.5"),
        (["data.d=2,3", "data=moons"], "unknown key data.d"),
        (["n_proj=1,2,"], "not readable"),
    ],
)
def test_a_wrong_value_ends_the_sweep_before_it_begins(tmp_path, cli, argv, says):
    code, _, err = cli("train", "-m", *argv, *TINY)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "multirun").exists()


def test_names_are_safe_and_tell_apart_what_they_were_made_from():
    texts = ["a=1", "a=/x/y", "a=_x_y", "a=[1,2]", "a=" + "x" * 300, "a=" + "x" * 301, "..", "a=ä"]
    names = [sweeps.slug(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert names[0] == "a=1"
    assert all(len(n.encode()) < 200 and "/" not in n and not n.startswith(".") for n in names)


def test_where_a_sweep_lies_does_not_depend_on_how_it_is_run():
    one = sweeps.sweep_folder(["data=gmm", "steps=10"], ["n_proj"])
    assert one == sweeps.sweep_folder(
        ["data=gmm", "steps=10", "hydra/launcher=joblib", "tracker.mode=offline"], ["n_proj"]
    )
    assert one.startswith("multirun/data=gmm,steps=10-")
    others = [(["steps=11"], ["n_proj"]), (["steps=10", "eval.n=50"], ["n_proj"]), (["steps=10"], ["n_proj", "seed"])]
    assert len({sweeps.sweep_folder(["data=gmm", *fixed], varying) for fixed, varying in others} | {one}) == 4


def test_workers_give_the_same_numbers_and_their_failures_reach_the_end(tmp_path, cli):
    argv = ["n_proj=1,2", "optimizer.lr=1e-3,1e30", "threads=1", *TINY]
    code, _, _ = cli("train", "-m", *argv, f"hydra.sweep.dir={tmp_path}/one")
    assert code == 3
    scoresde = Path(sys.executable).parent / "scoresde"
    done = subprocess.run(
        [scoresde, "train", "-m", *argv, "hydra/launcher=joblib", "hydra.sweep.dir=two"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert len([line for line in done.stderr.splitlines() if "diverged" in line]) == 2
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    assert "step 60/60" in (tmp_path / "two/logs/n_proj=1,optimizer.lr=0.001.txt").read_text()


def worker_of(folder: Path, parent: subprocess.Popen) -> int:
    """The pid of a process that works on a job for this parent."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        for file in folder.glob(".*.claim"):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(file.read_text())
                if facts["sweep"].startswith(f"{parent.pid} "):
                    return facts["pid"]
        time.sleep(0.05)
    raise AssertionError("no job was begun")


def test_killed_workers_and_parents_leave_a_sweep_that_goes_on(tmp_path, cli):
    """SIGKILL of the parent: its workers save and stop by themselves, and the same command ends with the undisturbed numbers.

    SIGKILL of a worker: the jobs of the pool go on in a fresh one, and nothing is said to have failed.
    """
    argv = [*TINY, "n_proj=1,2", "loss=ssm", "steps=240", "checkpoint.every=20", "threads=1"]
    scoresde = [Path(sys.executable).parent / "scoresde", "train", "-m"]
    command = [*scoresde, *argv, "hydra/launcher=joblib", "hydra.sweep.dir=cut"]
    cut = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("cut/*/checkpoints/step-*")) and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(cut.pid, signal.SIGKILL)
    cut.wait()
    assert not list(tmp_path.glob("cut/*/summary.json"))
    again = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    os.kill(worker_of(tmp_path / "cut", again), signal.SIGKILL)
    out, _ = again.communicate()
    assert again.returncode == 0, out
    assert "a worker was killed from outside" in out
    assert "2 finished" in out
    assert not list(tmp_path.glob("cut/.*.claim"))
    code, _, err = cli("train", "-m", *argv, f"hydra.sweep.dir={tmp_path}/whole")
    assert code == 0, err
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


class TerminatedWorkerError(Exception):
    """As joblib's is called."""


def test_a_job_that_kills_its_worker_again_and_again_is_given_up_and_the_others_go_on(tmp_path, monkeypatch):
    """Two jobs at a time, of which job 1 ends the pool whenever it is begun."""
    monkeypatch.setenv(claims.BEGAN, str(time.time()))
    rounds, done = [], set()

    def once(launcher, jobs, first):
        rounds.append([int(job[0]) for job in jobs])
        open_ = [n for n in rounds[-1] if n not in done and not sweeps.failed_meanwhile(tmp_path / f"job{n}")]
        while open_:
            pair, open_ = open_[:2], open_[2:]
            for n in pair:
                owner = {"sweep": claims.sweep(), "pid": 1, "job": first + rounds[-1].index(n)}
                (tmp_path / f".job{n}.claim").write_text(json.dumps(owner))
            if 1 in pair:
                raise TerminatedWorkerError
            for n in pair:
                (tmp_path / f".job{n}.claim").unlink()
                done.add(n)
        return "results"

    sweep = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(tmp_path))))
    launcher = SimpleNamespace(config=sweep, task_function=None)
    every = [0, 1, 2, 3]
    assert launching.patient(once)(launcher, [[str(n)] for n in every], 0) == "results"
    assert sorted(rounds[2:4]) == [[0], [1]]  # those that were lost twice, alone
    assert [rounds[i] for i in (0, 1, 4)] == [every] * 3
    assert done == {0, 2, 3}
    (failure,) = sweeps.failures(tmp_path)
    assert failure.name == "job1"
    assert "killed from outside (out of memory?) 3 times" in failure.line


def test_two_sweeps_of_the_same_jobs_do_each_of_them_once(tmp_path, cli):
    argv = ["train", "-m", *TINY, "n_proj=1,2", "loss=ssm", "hydra.sweep.dir=both", "steps=150"]
    scoresde = Path(sys.executable).parent / "scoresde"
    one = subprocess.Popen(
        [scoresde, *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    worker_of(tmp_path / "both", one)
    code, out, err = cli(*argv)
    first, _ = one.communicate()
    assert (code, one.returncode) == (0, 0), err + first
    assert "run by another sweep" in out + err
    assert (out + first).count("training done") == 2
    assert len(numbers(tmp_path / "both")) == 2
    assert not list(tmp_path.glob("both/*.failed.json"))


def test_a_failure_in_the_other_of_two_sweeps_is_told_and_not_tried_again(tmp_path, monkeypatch):
    sweeps.give_up(tmp_path / "job", "no such file")
    monkeypatch.setenv(claims.BEGAN, "0")
    assert sweeps.failed_meanwhile(tmp_path / "job")
    monkeypatch.setenv(claims.BEGAN, str(time.time() + 1))
    assert not sweeps.failed_meanwhile(tmp_path / "job")


def test_joblib_with_one_worker_stays_in_its_process(tmp_path, cli):
    code, _, err = cli("train", "-m", "n_proj=1", *TINY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert code == 0, err
