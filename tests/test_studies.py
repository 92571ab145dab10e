"""Every study, from its grid to its report, at the size of a smoke test; what it refuses; how it goes on."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from scoresde_cli import configs
from scoresde_cli.studies.base import Job, merged
from scoresde_cli.studies.loss import LossStudy
from scoresde_cli.studies.n_proj import NProj
from scoresde_cli.studies.projection import ProjectionLaw

STUDIES = configs.options("study")
HERE = ["hydra/launcher=basic", "device=cpu", "network.width=16"]
GRIDS = {"n_proj": NProj, "projection": ProjectionLaw, "loss": LossStudy}


def study(name: str, size: str = "full", **keys):
    return GRIDS[name](
        size=size, run=None, sizes=configs.load(configs.conf_dir() / "study" / f"{name}.yaml")["sizes"], **keys
    )


def the_study(root: Path) -> Path:
    (folder,) = (root / "studies").iterdir()
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_at_its_least_size_and_reports(name, tmp_path, cli):
    code, out, err = cli("ablate", f"study={name}", "size=smoke", *HERE)
    assert code == 0, err
    folder = the_study(tmp_path)
    facts = json.loads((folder / "study.json").read_text())
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert list((folder / "figures").glob("*.png"))
    assert html.count("data:image/png;base64,") == len(list((folder / "figures").glob("*.png")))
    assert "not finished" not in text
    assert shlex.join(facts["command"][1:]) in text  # as a shell takes it
    # Once more: nothing is left to do, and the report is the same.
    began = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()}
    code, out, err = cli("ablate", f"study={name}", "size=smoke", *HERE)
    assert code == 0, err
    jobs = len(facts["jobs"])
    assert f"{jobs} jobs, {jobs} of them done" in out
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file()} == began


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_the_three_sizes(name):
    node = configs.load(configs.conf_dir() / "study" / f"{name}.yaml")
    assert list(node["sizes"]) == ["smoke", "quick", "full"]
    assert len({frozenset(keys) for keys in node["sizes"].values()}) == 1


def test_a_study_that_was_cut_or_failed_goes_on_with_what_is_missing(tmp_path, cli):
    argv = ["ablate", "study=loss", "size=smoke", "study.losses=[ism,dsm]", "study.seeds=2", *HERE]
    assert cli(*argv)[0] == 0
    folder = the_study(tmp_path)
    before = {
        p.parent.name: json.loads(p.read_text())["score_error"] for p in folder.glob("runs/*40steps*/summary.json")
    }
    gone, cut = sorted(folder.glob("runs/*40steps*"))[::2]
    shutil.rmtree(gone)
    (cut / "summary.json").unlink()
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "preempted"}))
    # In this state the report says what is missing.
    assert cli("report", str(folder))[0] == 0
    assert "1 of 2 finished" in (folder / "report.md").read_text()
    code, out, err = cli(*argv)
    assert code == 0, err
    assert "8 jobs, 6 of them done" in out
    after = {
        p.parent.name: json.loads(p.read_text())["score_error"] for p in folder.glob("runs/*40steps*/summary.json")
    }
    assert after == before


def test_a_study_on_ones_own_table_needs_no_other_words(tmp_path, cli):
    path = tmp_path / "mine.csv"
    path.write_text("x,y,z\n" + "\n".join(f"{i % 17},{i * 7 % 23}.5,{i * i % 11}" for i in range(300)))
    argv = ["ablate", "study=loss", "size=smoke", "data=table", f"data.path={path}", "study.losses=[ssm_vr,dsm]"]
    code, _, err = cli(*argv, "study.seeds=1", *HERE, "eval.n=20")
    assert code == 0, err
    report = (the_study(tmp_path) / "report.md").read_text()
    assert "sliced_wasserstein" in report
    assert "score_error" not in report  # the law of a table is not known


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["study=n_prj"], "did you mean 'n_proj'"),
        (["study=n_proj", "size=large"], "size=large: expected 'smoke', 'quick' or 'full'"),
        (["study=n_proj", "n_proj=4"], "study.n_proj"),
        (["study=projection", "projection=sphere"], "study.laws"),
        (["study=loss", "loss=ssm"], "study.losses"),
        (["study=loss", "seed=3"], "study.seeds"),
        (["study=loss", "steps=30"], "study.steps"),
        (["study=loss", "data.d=3"], "study.dims"),
        (["study=loss", "data=moons", "study.dims=[2]"], "leave the key out"),
        (["study=loss", "study.losses=[ssm,smm]"], "did you mean 'ssm'"),
        (["study=projection", "study.laws=[foo]"], "projection=foo"),
        (["study=loss", "study.seeds=0"], "study.seeds=0: expected greater than 0"),
        (["study=loss", "study.foo=1"], "unknown key study.foo"),
        (["study=loss", "study.losses=[dsm,dsm]"], "each value once"),
        (["study=loss", "study.dims=[]"], "at least one"),
        (["study=projection", "loss=dsm"], "draws no directions"),
        (["study=loss", "run=somewhere"], "study=estimator"),
        (["study=loss", "resume=somewhere"], "the same command"),
        (["-m", "study=loss,n_proj"], "leave out -m"),
        (["study=loss", "network.width=0"], "network.width=0"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_it_begins(tmp_path, cli, argv, says):
    code, _, err = cli("ablate", *argv, *([] if "size=large" in argv else ["size=smoke"]), "hydra/launcher=basic")
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("studies/*"))


def test_the_estimator_takes_a_trained_run_as_it_is(trained, tmp_path, cli):
    code, _, err = cli("ablate", f"run={trained}", "size=smoke")
    assert code == 0, err
    (result,) = the_study(tmp_path).glob("runs/*/estimates.json")
    found = json.loads(result.read_text())
    assert (found["d"], found["fit_steps"], found["data"]) == (2, 0, "eightgaussians")
    code, _, err = cli("ablate", f"run={trained}", "size=smoke", "data=moons")
    assert (code, "leave out data=moons" in err) == (2, True)


def test_the_report_of_a_stranger_runs_nothing(tmp_path, cli):
    sizes = {"smoke": {"_target_": "subprocess.Popen", "args": ["touch", "owned"]}}
    facts = {"size": "smoke", "run": None, "command": ["x"], "seconds": 0.0, "jobs": []}
    for node in ({"_target_": "scoresde_cli.studies.loss.LossStudy", "sizes": sizes}, {"_target_": "os.system", "sizes": {}},
                 {"_target_": "scoresde_cli.studies.loss.LossStudy", "sizes": sizes["smoke"]}):  # fmt: skip
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs/study.json").write_text(json.dumps({**facts, "node": node}))
        code, _, err = cli("report", "theirs")
        assert code == 2
        assert "_target_" in err
        assert not (tmp_path / "owned").exists()
    for damaged in ("{}", "[1]", "{", json.dumps({**facts, "node": 3}), json.dumps({**facts, "node": {}, "jobs": [1]})):
        (tmp_path / "theirs/study.json").write_text(damaged)
        code, _, err = cli("report", "theirs")
        assert (code, len(err.strip().splitlines())) == (4, 1)


def test_a_run_that_is_not_the_jobs_own_is_not_taken_for_it(tmp_path, cli):
    argv = [
        "ablate",
        "study=loss",
        "size=smoke",
        "study.losses=[dsm,ism]",
        "study.seeds=1",
        "study.budgets=[steps]",
        *HERE,
    ]
    assert cli(*argv)[0] == 0
    runs = the_study(tmp_path) / "runs"
    mine, other = (runs / f"data.d=2,budget=40steps,loss={loss},seed=0" for loss in ("dsm", "ism"))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    code, _, err = cli(*argv)
    assert code == 2
    assert "made from another config (loss._target_" in err


def test_a_report_holds_auto_beside_numbers(tmp_path, cli):
    small = ["steps=40", "data.n=300", "eval.n=200", "eval.figures=false", "tracker.mode=disabled", "network.width=16"]
    assert cli("train", "-m", "n_proj=1,3,auto", "seed=0,1", "data=gmm", "data.d=4", *small)[0] == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    code, _, err = cli("report", str(folder))
    assert code == 0, err
    assert "directions=auto" in (folder / "report.md").read_text() or "| auto |" in (folder / "report.md").read_text()


def test_a_directory_of_another_study_is_refused(tmp_path, cli):
    argv = ["ablate", "study=loss", "size=smoke", "study.losses=[dsm]", "study.seeds=1", "dir=mine", *HERE]
    assert cli(*argv)[0] == 0
    code, _, err = cli(*argv, "ema=0.9")
    assert code == 2
    assert "holds another study" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "neither new" in cli(*[a.replace("mine", "full") for a in argv])[2]


def test_the_exact_trace_stands_in_a_grid_once():
    """ssm_vr with n_proj >= d is ism; plain ssm draws whatever n_proj is."""
    full = study("n_proj")
    at_2 = full.settings(2, "SSMVR")
    assert [s for s in at_2 if s["loss"] == "ssm_vr"] == [
        {"loss": "ssm_vr", "n_proj": 1},
        {"loss": "ssm_vr", "n_proj": "auto"},
    ]
    assert [s["n_proj"] for s in at_2 if s["loss"] == "ssm"] == [1, 2, 4, 8, 16, 32, 64]
    at_20 = [s["n_proj"] for s in full.settings(20, "SSMVR") if s["loss"] == "ssm"]
    assert at_20 == [1, 2, 4, 8, 16, 20, 32, 64]
    assert {"loss": "ism"} in at_2
    laws = study("projection").settings(16, "SSMVR")
    assert {"projection": "hutchpp", "n_proj": 1} not in laws
    assert {"projection": "hutchpp", "n_proj": 4} in laws


def test_seeds_stand_outermost_and_every_setting_meets_the_same_seeds_and_budgets():
    config = {"data": {"_target_": "scoresde_cli.datasets.mixtures.GMM", "d": 2}, "loss": {"_target_": "x.SSMVR"}}
    jobs = study("loss", dims=[2, 3], seeds=2, losses=["ism", "dsm"]).jobs(config, ["batch_size=32"], lambda: 2)
    assert [job.seed for job in jobs] == [0] * 8 + [1] * 8
    per_seed = [{json.dumps(job.setting) for job in jobs if job.seed == seed} for seed in (0, 1)]
    assert per_seed[0] == per_seed[1]
    assert all("batch_size=32" in job.overrides and f"seed={job.seed}" in job.overrides for job in jobs)
    assert len({job.name for job in jobs}) == len(jobs)


def test_a_later_override_takes_the_place_of_an_earlier():
    assert merged(["a=1", "b=2"], ["a=3"], ["+c=4"]) == ("a=3", "b=2", "+c=4")
    assert Job(("a=1",), {"data.d": 2, "budget": "20 s"}, 1).name == "data.d=2,budget=20s,seed=1"


def test_a_report_of_a_sweep_finds_what_varies(tmp_path, cli):
    small = ["steps=40", "data.n=300", "eval.n=200", "eval.figures=false", "tracker.mode=disabled", "network.width=16"]
    assert cli("train", "-m", "loss=ssm,dsm", "seed=0,1", *small)[0] == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    code, out, err = cli("report", str(folder))
    assert code == 0, err
    text = (folder / "report.md").read_text()
    assert "| ssm |" in text
    assert "| dsm |" in text
    assert "2 seeds" in out
    # Runs that were evaluated otherwise stand beside them; what depends on that is compared among its like alone.
    assert cli("train", "loss=ism", "dir=other", *small, "eval.n=150")[0] == 0
    assert cli("report", str(folder), "other", "out=both")[0] == 0
    text = (tmp_path / "both/report.md").read_text()
    errors = text.split("### score_error")[1].split("###")[0]
    assert re.search(r"\| ism \|.*\| not compared \|", errors)  # seed 1 is missing
    assert re.search(r"\| (ssm|dsm) \|.*told apart", errors)
    distances = text.split("### n = 200: sliced_wasserstein")[1].split("###")[0]
    assert re.search(r"\| (ssm|dsm) \|.*told apart", distances)
    assert "| ism |" not in distances
    assert cli("report", str(folder), "other", "out=distances", "metrics=[sliced_wasserstein]")[0] == 0
    assert "### n = 150: sliced_wasserstein" in (tmp_path / "distances/report.md").read_text()
    # The same run, evaluated once more, takes nothing away either.
    assert cli("train", "loss=dsm", "seed=0", "dir=again", *small, "eval.n=120")[0] == 0
    assert cli("report", str(folder), "again", "out=twice", "metrics=[score_error]")[0] == 0
    assert re.search(r"\| (ssm|dsm) \|.*told apart", (tmp_path / "twice/report.md").read_text())
    code, _, err = cli("report", "nowhere")
    assert (code, "no such directory" in err) == (2, True)
    (tmp_path / "empty").mkdir()
    assert "no runs in" in cli("report", "empty")[2]
