"""Training: a resumed run equals an uninterrupted one bit for bit, whatever cut it; divergence and budgets are honest."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from scoresde_cli.training.optimizer import Adam
from scoresde_cli.training.state import TrainState, checkpoints
from tests.conftest import NO_FIGURES, SMALL

ARGUMENTS = ["train", "loss=ssm", *SMALL, *NO_FIGURES]

# Runs a command line, and kills its own process hard at the k-th call of one function.
KILLER = """
import importlib, os, signal, sys
where, name, count, argv = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
import torch
torch.set_num_threads(1)
owner = importlib.import_module(where)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, calls = getattr(owner, last), 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, last, counted)
from scoresde_cli.cli import main
sys.exit(main(argv))
"""


def weights(run):
    newest = checkpoints(run / "checkpoints")[-1]
    return {f: load_file(newest / f"{f}.safetensors") for f in ("model", "ema")}, newest.name


def same(a, b):
    return all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f]) and a.keys() == b.keys()


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["lr"], r["samples"]) for r in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    from scoresde_cli.cli import main

    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*ARGUMENTS, f"dir={folder}"]) == 0
    return folder


MOMENTS = {
    "before the first checkpoint": ("scoresde_cli.training.loop", "train_step", 7),
    "between two checkpoints": ("scoresde_cli.training.loop", "train_step", 34),
    "while a file of a checkpoint is written": ("scoresde_cli.training.state", "os.fsync", 13),
    "just before the second checkpoint gets its name": ("pathlib", "Path.rename", 3),
    "while a file of the third checkpoint is written": ("scoresde_cli.training.state", "os.fsync", 33),
    "just before an old checkpoint is dropped": ("pathlib", "Path.rename", 5),
    "while an old checkpoint is dropped": ("scoresde_cli.training.state", "shutil.rmtree", 4),
    "while a row is logged": ("scoresde_cli.tracking.jsonl", "JsonLines.log", 5),
    "after training, while sampling": ("scoresde_cli.samplers.dpm_solver_pp", "DPMSolverPP.step", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(moment, whole, tmp_path, cli):
    run = tmp_path / "run"
    where, what, count = MOMENTS[moment]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, where, what, str(count), *ARGUMENTS, f"dir={run}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    from scoresde_cli.rundir import RunDir

    assert RunDir(run).status() == "killed"
    code, _, err = cli("train", f"resume={run}")
    assert code == 0, err
    assert RunDir(run).status() == "finished"
    (ours, name), (theirs, expected) = weights(run), weights(whole)
    assert name == expected
    assert same(ours, theirs)
    assert losses(run) == losses(whole)
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, whole)]
    for key in ("score_error", "sliced_wasserstein", "loss"):
        assert summaries[0][key]["value"] == summaries[1][key]["value"]
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_run_asked_to_stop_saves_and_resumes_to_the_same_bits(signum, code, tmp_path, cli):
    long = [a for a in ARGUMENTS if not a.startswith("steps=")] + ["steps=800", "checkpoint.every=500"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "scoresde_cli", *long, f"dir={run}"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.time() + 60
    while time.time() < deadline and not ((run / "metrics.jsonl").exists() and losses(run)):
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    last = err.strip().splitlines()[-1]
    assert "saved at step" in last
    assert f"resume={run}" in last
    assert json.loads((run / "run.json").read_text())["status"] == "preempted"
    assert cli("train", f"resume={run}")[0] == 0
    other = tmp_path / "other"
    assert cli(*long, f"dir={other}")[0] == 0
    assert same(weights(run)[0], weights(other)[0])
    assert losses(run) == losses(other)


def test_more_steps_go_on_in_the_same_directory(whole, tmp_path, cli):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    code, out, _ = cli("train", f"resume={run}", "steps=80")
    assert code == 0
    assert "cosine schedule now ends" in out
    assert weights(run)[1] == "step-0000080"
    facts = json.loads((run / "run.json").read_text())
    assert len(facts["sessions"]) == 2
    code, out, _ = cli("train", f"resume={run}")
    assert code == 0
    assert "finished at step 80" in out
    code, _, err = cli("train", f"resume={run}", "steps=70")
    assert code == 2
    assert "at step 80 already" in err
    code, _, err = cli("train", f"resume={run}", "optimizer.lr=1e-4", "steps=90")
    assert code == 2
    assert "optimizer.lr=1e-4" in err


def test_divergence_has_its_own_code_and_keeps_the_last_good_checkpoint(tmp_path, cli):
    run = tmp_path / "run"
    code, _, err = cli(
        *ARGUMENTS, f"dir={run}", "optimizer.lr=1e18", "optimizer.clip=null", "optimizer.warmup=0", "precision=fp32"
    )
    assert code == 3, err
    assert json.loads((run / "run.json").read_text())["status"] == "diverged"
    assert "checkpoint" in err
    for folder in checkpoints(run / "checkpoints"):
        assert all(w.isfinite().all() for w in load_file(folder / "model.safetensors").values())


def test_the_time_budget_ends_training(tmp_path, cli):
    run = tmp_path / "run"
    more = [a for a in ARGUMENTS if not a.startswith("steps=")]
    code, _, _ = cli(*more, "steps=1000000", "max_seconds=0.5", "checkpoint.every=100000", f"dir={run}")
    assert code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert 0.5 <= summary["train_seconds"]["value"] < 1.5
    rows = losses(run)
    assert rows[-1][2] < 0.05 * max(r[2] for r in rows)  # the cosine schedule ended with the budget


def test_rerun_gives_the_same_numbers(whole, tmp_path, cli):
    code, out, err = cli("rerun", str(whole), f"dir={tmp_path / 'again'}")
    assert code == 0, err
    assert same(weights(tmp_path / "again")[0], weights(whole)[0])
    count = next(line for line in out.splitlines() if "equal bit for bit" in line)
    first, _, total = count.split()[:3]
    assert first == total


def test_the_last_checkpoints_and_the_best_are_kept(whole):
    facts = [json.loads((c / "checkpoint.json").read_text()) for c in checkpoints(whole / "checkpoints")]
    steps = [f["step"] for f in facts]
    assert steps[-2:] == [40, 60]
    assert facts[-1]["best_step"] in steps


def test_the_learning_rate_warms_up_and_decays_to_zero():
    adam = Adam(lr=1.0, warmup=10)
    assert adam.rate(0, 0.0) == pytest.approx(0.1)
    assert adam.rate(9, 0.0) == 1.0
    assert adam.rate(500, 0.5) == pytest.approx(0.5)
    assert adam.rate(1000, 1.0) == 0.0
    assert Adam(lr=1.0, warmup=0, schedule="constant").rate(700, 0.9) == 1.0


def test_the_average_is_the_weighted_mean_of_all_weights_so_far():
    model = torch.nn.Linear(1, 1, bias=False).double()
    state = TrainState(model, copy.deepcopy(model), torch.optim.SGD(model.parameters()), torch.zeros(()))
    values, found = [float(n) ** 1.5 for n in range(50)], []
    for n in range(50):
        with torch.no_grad():
            model.weight.fill_(values[n])
        state.step = n
        state.update_average(0.9)
        found.append(float(state.evaluated().weight.detach()))
    for n in (0, 1, 7, 49):  # the weighted mean of all values so far, with weights 0.9^age
        weights = [0.9 ** (n - i) for i in range(n + 1)]
        expected = sum(w * v for w, v in zip(weights, values[: n + 1], strict=True)) / sum(weights)
        assert found[n] == pytest.approx(expected, rel=1e-10)


def test_small_steps_take_one_thread_and_the_choice_is_kept(whole, tmp_path, cli):
    import yaml

    assert yaml.safe_load((whole / "config.yaml").read_text())["threads"] == 1
    code, _, err = cli(*ARGUMENTS, "threads=2", "steps=5", f"dir={tmp_path / 'two'}")
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "two/config.yaml").read_text())["threads"] == 2
    torch.set_num_threads(1)


def test_an_overfitted_run_takes_its_best_weights_and_says_so(tmp_path, cli):
    """Twenty training points and a hard-driven network: the validation loss turns, and the best checkpoint is measured."""
    common = [a for a in ARGUMENTS if not a.startswith(("steps", "data", "loss"))] + [
        "data.n=20",
        "loss=dsm",
        "ema=null",
    ]
    code, out, err = cli(*common, "steps=1500", "optimizer.lr=0.01", "checkpoint.every=100", "dir=run")
    assert code == 0, err
    facts = json.loads((tmp_path / "run/run.json").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "overfitted" in err
    assert facts["selected"] < 1500
    assert f"weights of step {facts['selected']} are taken" in out
    assert summary["loss"]["protocol"]["step"] == facts["selected"]
    _, out, _ = cli("sample", "run=run", "n=5", "out=a.npz")
    assert f"of step {facts['selected']}" in out
    _, out, _ = cli("sample", "run=run", "n=5", "checkpoint=last", "out=b.npz")
    assert "of step 1500" in out
    for select in ("best", "last"):
        code, out, err = cli(*common, f"select={select}", "steps=60", f"dir={select}")
        assert code == 0, err
        newest = json.loads((tmp_path / select / "checkpoints/step-0000060/checkpoint.json").read_text())
        expected = newest["best_step"] if select == "best" else 60
        assert json.loads((tmp_path / select / "run.json").read_text())["selected"] == expected
