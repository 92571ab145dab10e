"""Run directories: readable, locked, true, and harmless in the hands of a stranger."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from scoresde_cli import load_run, sweeps
from scoresde_cli.commands.report import readable
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.rundir import FORMAT, RunDir
from scoresde_cli.studies.base import collect
from scoresde_cli.tracking.jsonl import read_rows
from scoresde_cli.training.state import checkpoints
from tests.conftest import NO_FIGURES, SMALL

READERS = {
    "sample": lambda run: ["sample", f"run={run}", "n=5"],
    "evaluate": lambda run: ["evaluate", f"run={run}", "n=50"],
    "rerun": lambda run: ["rerun", f"run={run}"],
    "resume": lambda run: ["train", f"resume={run}", "steps=70"],
}


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_directory_holds_what_the_contract_says(trained):
    names = {p.name for p in trained.iterdir()}
    assert {
        "run.json",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
        "samples.npz",
        "figures",
    } <= names
    assert {p.name for p in (trained / "figures").iterdir()} == {"samples.png", "loss.png", "field.png"}
    facts = json.loads((trained / "run.json").read_text())
    assert facts["status"] == "finished"
    assert {"command", "versions", "git", "seed", "device", "started", "ended", "id"} <= facts.keys()
    summary = json.loads((trained / "summary.json").read_text())
    for name in (
        "score_error",
        "sliced_wasserstein",
        "energy_distance",
        "loss",
        "loss_baseline",
        "train_seconds",
        "peak_memory_mb",
    ):
        assert {"value", "ci", "floor", "floor_high", "unit", "protocol"} <= summary[name].keys()
    assert "${" not in (trained / "config.yaml").read_text()


def test_a_run_answers_in_python(trained):
    run = load_run(trained)
    x = np.random.default_rng(0).normal(size=(6, 2))
    s = run.score(x, 0.3)
    assert s.shape == (6, 2)
    assert np.isfinite(s).all()
    assert np.array_equal(run.sample(5, seed=3), run.sample(9, seed=3)[:5])
    assert run.log_prob(x).shape == (6,)
    with pytest.raises(ScoreSDEError, match="expected a time"):
        run.score(x, 7)
    with pytest.raises(ScoreSDEError, match=r"expected \(n, 2\)"):
        run.score(x[:, :1], 0.3)
    assert run.summary["score_error"]["value"] > 0
    assert run.config["loss"]["_target_"].endswith("SSM")


def test_score_is_the_gradient_of_the_log_density_in_the_users_units(tmp_path, cli):
    """A table in odd units, a linear flow (untrained network): grad log p by differences against .score at t_min."""
    rng = np.random.default_rng(0)
    pd.DataFrame({"a": rng.normal(100, 30, 200), "b": rng.normal(0, 0.01, 200)}).to_csv(tmp_path / "t.csv", index=False)
    code, _, err = cli(
        "train", "data=table", "data.path=t.csv", "dir=run", "steps=1", "optimizer.lr=1e-30", "precision=fp64", "eval.n=30",
        *NO_FIGURES, "tracker.mode=disabled",
    )  # fmt: skip
    assert code == 0, err
    run = load_run(tmp_path / "run")
    x, h = np.array([[90.0, 0.003]]), np.array([0.3, 1e-4])
    gradient = [(run.log_prob(x + h * e)[0] - run.log_prob(x - h * e)[0]) / (2 * (h * e).sum()) for e in np.eye(2)]
    assert run.score(x, 1e-3)[0] == pytest.approx(gradient, rel=1e-3)


def test_samples_come_in_the_users_units_and_names(tmp_path, cli):
    rng = np.random.default_rng(0)
    pd.DataFrame({"big one": rng.normal(1000, 50, 300), "small": rng.normal(0, 0.01, 300)}).to_csv(
        tmp_path / "t.csv", index=False
    )
    small = [a for a in SMALL if not a.startswith("data.n")]
    code, _, err = cli("train", "data=table", "data.path=t.csv", "dir=run", *small)
    assert code == 0, err
    assert (tmp_path / "run/figures/samples.png").exists()
    os.remove(tmp_path / "t.csv")  # sampling does not need the data
    for out in ("s.csv", "s.parquet"):
        assert cli("sample", "run=run", "n=400", f"out={out}")[0] == 0
    a, b = pd.read_csv(tmp_path / "s.csv"), pd.read_parquet(tmp_path / "s.parquet")
    assert list(a.columns) == ["big one", "small"]
    assert np.allclose(a, b)
    assert abs(a["big one"].mean() - 1000) < 20
    assert a["small"].abs().max() < 0.1
    stored = np.load(tmp_path / "run/samples.npz")
    assert list(stored["columns"]) == ["big one", "small"]
    code, _, err = cli("evaluate", "run=run", "n=30")
    assert code == 2
    assert "t.csv" in err


def test_nothing_is_overwritten(copy, cli):
    assert cli("sample", f"run={copy}", "n=5", "out=s.npz")[0] == 0
    code, _, err = cli("sample", f"run={copy}", "n=6", "out=s.npz")
    assert code == 2
    assert "exists already" in err
    assert len(np.load("s.npz")["x"]) == 5
    assert cli("sample", f"run={copy}", "n=6", "out=s.npz", "overwrite=true")[0] == 0
    code, _, err = cli("train", f"dir={copy}", *SMALL)
    assert code == 2
    assert "not empty" in err


def test_evaluations_are_kept_beside_each_other(copy, cli):
    for n in (60, 70):
        code, _, err = cli("evaluate", f"run={copy}", f"n={n}")
        assert code == 0, err
    kept = json.loads((copy / "evaluation.json").read_text())
    assert [e["summary"]["sliced_wasserstein"]["protocol"]["n"] for e in kept] == [60, 70]


def test_checkpoints_can_be_chosen(copy, cli):
    assert cli("sample", f"run={copy}", "n=5", "checkpoint=best", "out=a.npz")[0] == 0
    assert cli("sample", f"run={copy}", "n=5", "checkpoint=40", "out=b.npz")[0] == 0
    code, _, err = cli("sample", f"run={copy}", "n=5", "checkpoint=17", "out=c.npz")
    assert code == 2
    assert "40, 60" in err


def edit_config(run, change):
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


FOREIGN = {
    "a foreign class": lambda c: c["network"].update(_target_="evil.Network"),
    "a function of the system": lambda c: c["sde"].update(_target_="os.system"),
    "through one of our modules": lambda c: c["sde"].update(_target_="scoresde_cli.rundir.subprocess.Popen"),
    "nested": lambda c: c["loss"]["projection"].update(_target_="evil.Law"),
    "inside a list": lambda c: c["tracker"].update(tags=[{"_target_": "evil.Tag"}]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_strangers_config_runs_no_code(kind, reader, copy, cli, monkeypatch):
    evil = "from pathlib import Path\nPath('owned').touch()\nclass Network: pass\nclass Law: pass\nclass Tag: pass\n"
    (copy.parent / "evil.py").write_text(evil)
    edit_config(copy, FOREIGN[kind])
    code, _, err = cli(*READERS[reader](copy))
    assert code in (2, 4)
    assert len(err.strip().splitlines()) == 1
    assert "was not run" in err
    assert "trust=true" in err
    assert not (copy.parent / "owned").exists()
    with pytest.raises(ScoreSDEError, match="was not run"):
        load_run(copy)


def test_a_class_that_moved_is_found_and_our_own_laws_are_not_checked_again(copy, monkeypatch):
    def rename(config):
        config["projection"]["_target_"] = config["loss"]["projection"]["_target_"] = "scoresde_cli.projections.XTrace"

    edit_config(copy, rename)
    monkeypatch.setattr("scoresde_cli.projections.check_law", None)
    assert type(load_run(copy).parts.loss.projection).__module__ == "scoresde_cli.sketching"


def test_trust_allows_a_class_of_ones_own(tmp_path, cli):
    (tmp_path / "mine_law.py").write_text(
        "from scoresde_cli.projections import Rademacher\nclass Law(Rademacher):\n    '''My own law.'''\n"
    )
    code, out, err = cli("train", "loss=ssm", "projection._target_=mine_law.Law", "dir=run", *SMALL, *NO_FIGURES)
    assert code == 0, err
    assert out.count("trust=true") == 3  # what it says may be done next
    code, _, err = cli("sample", "run=run", "n=5", "out=a.npz")
    assert code == 2
    assert "mine_law.Law" in err
    assert cli("sample", "run=run", "n=5", "out=a.npz", "trust=true")[0] == 0


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("key", ["_args_", "_partial_", "interpolation"])
def test_other_ways_into_a_config_are_closed(key, reader, copy, cli):
    if key == "interpolation":
        edit_config(copy, lambda c: c["tracker"].update(project="${oc.env:HOME}"))
    else:
        edit_config(copy, lambda c: c["network"].update({key: [1]}))
    code, _, err = cli(*READERS[reader](copy))
    assert code in (2, 4)
    assert len(err.strip().splitlines()) == 1


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch owned",))


@pytest.mark.parametrize("reader", [r for r in READERS if r != "rerun"])
@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused(file, how, reader, copy, cli):
    checkpoint = checkpoints(copy / "checkpoints")[-1]
    if how == "pickle":
        (checkpoint / file).write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"optimizer": Bomb()}, checkpoint / file)
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    facts["sha256"][file] = hashlib.sha256((checkpoint / file).read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(facts))
    code, _, err = cli(*READERS[reader](copy))
    assert code == 4
    assert len(err.strip().splitlines()) == 1
    assert "step-0000040" in err  # the older one that would serve
    assert not os.path.exists("owned")
    with pytest.raises(Unreadable):
        load_run(copy)


@pytest.mark.parametrize("reader", [r for r in READERS if r != "rerun"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "version", "not json", "path", "other network"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, reader, copy, cli):
    checkpoint = checkpoints(copy / "checkpoints")[-1]
    weights, facts = checkpoint / "ema.safetensors", checkpoint / "checkpoint.json"
    content = bytearray(weights.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            weights.write_bytes(content)
        case "truncate":
            weights.write_bytes(content[:100])
        case "remove":
            weights.unlink()
        case "version":
            facts.write_text(facts.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
        case "not json":
            facts.write_text("{")
        case "path":
            facts.write_text(facts.read_text().replace('"model.safetensors"', '"../../run.json"'))
        case "other network":
            for name in ("ema", "model"):
                save_file({"mean": torch.zeros(3)}, checkpoint / f"{name}.safetensors")
            found = json.loads(facts.read_text())
            for name in ("ema", "model"):
                digest = hashlib.sha256((checkpoint / f"{name}.safetensors").read_bytes()).hexdigest()
                found["sha256"][f"{name}.safetensors"] = digest
            facts.write_text(json.dumps(found))
    before = {
        p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name not in ("lock", "run.json", "config.yaml")
    }
    code, _, err = cli(*READERS[reader](copy))
    assert code == 4
    assert len(err.strip().splitlines()) == 1
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: (run / "run.json").unlink(), "not a run directory"),
        (lambda run: (run / "run.json").write_text("{"), "not readable"),
        (lambda run: (run / "run.json").write_text("[1]"), "expected an object"),
        (lambda run: (run / "run.json").write_text('{"format": 7}'), "format 7"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("just text"), "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: &a {b: *a}"), "config.yaml"),
        (lambda run: edit_config(run, lambda c: c.pop("loss")), "loss is missing"),
        (lambda run: edit_config(run, lambda c: c["sde"].update(_target_=["a"])), "was not run"),
        (lambda run: RunDir(run).update(status=None), "damaged"),
        (lambda run: RunDir(run).update(seed=None), "damaged"),
        (lambda run: RunDir(run).update(host=None), "damaged"),
        (lambda run: (run / "run.json").write_text("[" * 100_000), "not readable"),
        (lambda run: shutil.rmtree(run), "no such directory"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_directory_that_is_no_run_is_refused_in_one_line(change, says, reader, copy, cli):
    change(copy)
    code, _, err = cli(*READERS[reader](copy))
    assert code in (2, 4)
    assert len(err.strip().splitlines()) == 1
    assert says in err


def without(name):
    """run.json without one of its facts."""
    return lambda run: (run / "run.json").write_text(
        json.dumps({k: v for k, v in RunDir(run).facts().items() if k != name})
    )


def alter(entry):
    return lambda run: (run / "summary.json").write_text(json.dumps({"loss": entry}))


DAMAGES = {
    "no seed": without("seed"),
    "no host": without("host"),
    "cut summary": lambda run: (run / "summary.json").write_bytes((run / "summary.json").read_bytes()[:200]),
    "empty summary": lambda run: (run / "summary.json").write_text(""),
    "no value": alter({"unit": "loss"}),
    "strange protocol": alter({"value": 1.0, "protocol": "none"}),
    "strange unit": alter({"value": 1.0, "unit": []}),
    "cut config": lambda run: (run / "config.yaml").write_text("a: [1"),
    "binary": lambda run: (run / "run.json").write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_left_out_of_a_report_with_its_reason(damage, copy, cli, tmp_path):
    DAMAGES[damage](copy)
    code, _, err = cli("report", str(copy))
    assert code == 4
    assert len(err.strip().splitlines()) == 1
    runs, problems = readable([copy / "run.json"], trust=False)
    assert runs == []
    assert str(copy) in problems[0]
    if damage != "cut config":  # a study knows its jobs' settings, and reads no config
        (found,) = collect(tmp_path, [SimpleNamespace(name="copy", setting={}, seed=0)])
        assert found.status == "unreadable"


def test_what_may_be_missing_of_a_run_does_not_stop_a_report(trained, copy, cli, tmp_path, monkeypatch):
    """Two sound runs, one without metrics, one of them with a bare summary; a damaged one; links that lead nowhere."""
    (copy / "metrics.jsonl").write_text("")
    alter({"value": 1.0})(copy)
    shutil.copytree(trained, tmp_path / "damaged")
    without("seed")(tmp_path / "damaged")
    shutil.copytree(trained, tmp_path / "sound")
    edit_config(tmp_path / "sound", lambda c: c.update(batch_size=5))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.setattr("scoresde_cli.studies.charts.dots", lambda panel, path, title: path)
    monkeypatch.setattr("scoresde_cli.commands.report.show", lambda made, out, tracker: print(*made.notes, made.title))
    code, out, err = cli("report", str(tmp_path), "metrics=[loss]")
    assert code == 0, err
    assert "2 runs" in out
    assert f"left out: {tmp_path}/damaged/run.json: damaged (seed is None)" in out


def test_rows_that_are_none_are_left_out_of_the_metrics(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n7\n{"loss": 2}\n\xff\n{"step": 2, "lo')
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_failure_that_is_not_readable_is_a_failure(tmp_path):
    (tmp_path / "job.failed.json").write_text('{"line": "x"')
    (found,) = sweeps.failures(tmp_path)
    assert found.code == 4


def seal(checkpoint, name):
    """Make a checkpoint's checksum fit an altered file, as a stranger would."""
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    facts["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("how", ["moments of another shape", "no moments", "other groups"])
def test_an_optimizer_of_another_network_is_refused_before_anything_is_written(how, copy, cli):
    """torch's fused Adam would read past the end of moments that are too short."""
    checkpoint = checkpoints(copy / "checkpoints")[-1]
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    match how:
        case "moments of another shape":
            for one in stored["optimizer"]["state"].values():
                one["exp_avg"] = torch.zeros(3)
        case "no moments":
            stored = {"a": 1}
        case "other groups":
            stored["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(stored, checkpoint / "optimizer.pt")
    seal(checkpoint, "optimizer.pt")
    before = {n: (copy / n).read_bytes() for n in ("run.json", "config.yaml")}
    code, _, err = cli("train", f"resume={copy}", "steps=70")
    assert code == 4
    assert "optimizer.pt" in err
    assert {n: (copy / n).read_bytes() for n in before} == before


@pytest.mark.parametrize("reader", [r for r in READERS if r != "rerun"])
def test_weights_that_are_not_numbers_are_refused(reader, copy, cli):
    from safetensors.torch import load_file

    checkpoint = checkpoints(copy / "checkpoints")[-1]
    weights = {k: v * float("nan") for k, v in load_file(checkpoint / "ema.safetensors").items()}
    save_file(weights, checkpoint / "ema.safetensors")
    seal(checkpoint, "ema.safetensors")
    code, _, err = cli(*READERS[reader](copy))
    assert code == 4
    assert "not finite" in err


def test_an_altered_network_is_refused_and_nothing_is_written(copy, cli):
    edit_config(copy, lambda c: c["network"].update(width=64))
    before = {n: (copy / n).read_bytes() for n in ("run.json", "config.yaml")}
    for reader in ("sample", "evaluate", "resume"):
        code, _, err = cli(*READERS[reader](copy))
        assert code == 4
        assert "does not fit" in err
    assert {n: (copy / n).read_bytes() for n in before} == before


def test_a_config_that_was_changed_by_hand_is_not_gone_on_with(copy, cli):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name not in ("lock", "config.yaml")}
    for change in (lambda c: c.update(seed=5), lambda c: c["optimizer"].update(lr=0.5)):
        kept = (copy / "config.yaml").read_bytes()
        edit_config(copy, change)
        code, _, err = cli("train", f"resume={copy}", "steps=70")
        assert code == 2
        assert "config.yaml has been changed" in err
        (copy / "config.yaml").write_bytes(kept)
    assert {p: p.read_bytes() for p in before} == before
    edit_config(copy, lambda c: c.update(steps=66))  # the budget may be
    assert cli("train", f"resume={copy}")[0] == 0


def test_resume_takes_no_other_setting_in_any_spelling(copy, cli):
    for override in ("~steps", "++optimizer.lr=1", "tracker=wandb", "seed=3"):
        code, _, err = cli("train", f"resume={copy}", override)
        assert code == 2, override
        assert override in err
    assert cli("train", f"resume={copy}", "tracker.mode=foo")[0] == 2
    code, out, _ = cli("train", f"resume={copy}", "++steps=61")
    assert code == 0
    assert "step 60" in out


def test_data_that_changed_since_is_said(tmp_path, cli):
    rows = np.random.default_rng(0).normal(size=(200, 3))
    pd.DataFrame(rows[:, :2], columns=["a", "b"]).to_csv(tmp_path / "t.csv", index=False)
    small = [a for a in SMALL if not a.startswith("data.n")]
    assert cli("train", "data=table", "data.path=t.csv", "dir=run", *small, *NO_FIGURES, "eval.n=30")[0] == 0
    pd.DataFrame(rows[:, :2] + 1, columns=["a", "b"]).to_csv(tmp_path / "t.csv", index=False)
    code, _, err = cli("evaluate", "run=run", "n=30")  # the split is drawn anew, and rows of it were trained on
    assert code == 4
    assert "has changed" in err
    for argv in (["rerun", "run"], ["train", "resume=run", "steps=70"]):
        code, _, err = cli(*argv)
        assert code == 2
        assert "data file" in err
    pd.DataFrame(rows, columns=["a", "b", "c"]).to_csv(tmp_path / "t.csv", index=False)
    code, _, err = cli("evaluate", "run=run", "n=30")
    assert code == 4
    assert "shape or columns" in err


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["lock", "metrics.tmp", "figures/samples.png", "wandb", "wandb/debug.log", "checkpoints/link"]
)
def test_a_strangers_links_are_not_followed(name, reader, copy, cli):
    victim = copy.parent / "victim"
    victim.write_text("precious")
    link = copy / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    code, _, err = cli(*READERS[reader](copy))
    assert code == 2
    assert name in err
    assert victim.read_text() == "precious"


def test_a_begun_run_is_whole_or_not_there(tmp_path, cli, monkeypatch):
    """Cut while it is begun, a run leaves its directory empty, and the same command works the next time."""
    from scoresde_cli import rundir

    monkeypatch.setattr(rundir, "git_state", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("train", "dir=run", *SMALL, *NO_FIGURES)[0] == 130
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli("train", "dir=run", *SMALL, *NO_FIGURES)[0] == 0


def test_a_smaller_t_min_than_the_trained_one_is_refused(copy, cli):
    for argv in (["t_min=1e-5"], ["sampler=heun_ode", "sampler.t_min=1e-5"]):
        code, _, err = cli("sample", f"run={copy}", "n=5", "out=a.npz", *argv)
        assert code == 2
        assert "trained on t >= 0.001" in err
    assert cli("sample", f"run={copy}", "n=5", "out=a.npz", "t_min=0.01")[0] == 0


@pytest.mark.parametrize("content", ["garbage{", '{"a": 1}'])
def test_a_foreign_evaluation_file_is_left_alone(content, copy, cli):
    (copy / "evaluation.json").write_text(content)
    code, _, err = cli("evaluate", f"run={copy}", "n=30")
    assert code == 4
    assert "evaluation.json" in err
    assert (copy / "evaluation.json").read_text() == content


def test_damaged_units_are_refused(copy, cli):
    (copy / "data.safetensors").write_bytes(b"nonsense")
    code, _, err = cli("sample", f"run={copy}", "n=5")
    assert code == 4
    assert len(err.strip().splitlines()) == 1


def test_two_processes_cannot_work_on_one_run(copy, cli):
    holder = (
        "import sys, time\nfrom scoresde_cli.rundir import RunDir\nwith RunDir(sys.argv[1]).lock():\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(copy)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "held"
        RunDir(copy).update(status="running")
        assert RunDir(copy).status() == "running"
        code, _, err = cli("train", f"resume={copy}", "steps=70")
        assert code == 2
        assert f"pid {process.pid}" in err
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert RunDir(copy).status() == "killed"


def test_a_full_disk_loses_nothing(tmp_path, cli, monkeypatch):
    """The disk fills while the second checkpoint is written: one line, the first one kept, no half of a checkpoint."""
    from scoresde_cli.training import state

    write, calls = state.write_durably, 0

    def counted(path, content):
        nonlocal calls
        calls += "checkpoints" in str(path)
        write(path, content)

    def full(handle, sync=os.fsync):
        if calls > 6:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(state, "write_durably", counted)
    with monkeypatch.context() as filling:
        filling.setattr(os, "fsync", full)
        code, _, err = cli("train", "dir=run", *SMALL, *NO_FIGURES)
    assert code == 2
    assert "No space left on device" in err.strip().splitlines()[-1]
    assert "checkpoints" in err.strip().splitlines()[-1]  # where it was
    assert [c.name for c in checkpoints(tmp_path / "run/checkpoints")] == ["step-0000020"]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert RunDir(tmp_path / "run").status() == "killed"  # there was no room to say more
    assert cli("train", "resume=run")[0] == 0


def test_two_runs_in_one_second_get_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"seed": 0, "loss": {"_target_": "x"}}
    runs = [RunDir.create(config, None) for _ in range(3)]
    assert len({str(r.path) for r in runs}) == 3


def test_list_runs_shows_those_of_a_study_and_those_that_were_given_a_name(trained, tmp_path, cli):
    places = ("mine", "outputs/2026-01-01/10-00-00-abc", "studies/s/runs/n_proj=1,seed=0")
    for place in places:
        shutil.copytree(trained, tmp_path / place)
    code, out, _ = cli("list", "runs")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [[place, "finished"] for place in places]
