"""`sample` and `evaluate` as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scoresde_cli.datasets.table import Table
from scoresde_cli.runs import load_run
from scoresde_cli.writers import write_samples


@pytest.fixture
def trained(trained, tmp_path_factory):
    """A copy, as `evaluate` writes into the run."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("copy") / "run"))


@pytest.fixture
def here(trained, cli):
    """The command line in an empty folder, with the small run's directory as its first argument."""
    return lambda command, *argv: cli(command, f"run={trained}", *argv)


def test_every_format_holds_the_same_samples_of_the_python_door(here, trained):
    for name in ("x.npz", "x.csv", "x.parquet"):
        assert here("sample", "n=2100", f"out={name}")[0] == 0  # three blocks
    x = np.load("x.npz")["x"]
    assert x.dtype == np.float32
    assert np.array_equal(x, load_run(trained).sample(2100).astype(np.float32))
    assert np.array_equal(pd.read_csv("x.csv").to_numpy(dtype=np.float32), x)
    assert np.array_equal(pd.read_parquet("x.parquet").to_numpy(dtype=np.float32), x)


def test_every_format_keeps_the_digits_of_a_column_far_from_zero(tmp_path):
    """Seconds since 1970 that vary by one: float32 holds them to 128, nine digits to 10."""
    u = np.random.default_rng(0).normal(size=(200, 2)) + np.array([1.7e9, 0.0])
    np.save(tmp_path / "u.npy", u)
    data = Table(str(tmp_path / "u.npy"))
    x = data.splits["test"]
    for name in ("x.npz", "x.csv", "x.parquet"):
        write_samples(tmp_path / name, data, [x[:20], x[20:]], len(x), overwrite=False)
    exact = data.units.to_user(x).numpy()
    assert np.abs(np.load(tmp_path / "x.npz")["x"] - exact).max() < 1e-6  # a float64 of that size has 2.4e-7
    assert np.abs(pd.read_parquet(tmp_path / "x.parquet").to_numpy() - exact).max() == 0
    assert np.abs(pd.read_csv(tmp_path / "x.csv").to_numpy() - exact).max() < 1e-5  # fifteen digits


def test_a_key_of_the_sampler_alone_changes_the_runs_own(here):
    code, out, _ = here("sample", "n=10", "sampler.steps=7", "out=a.npz")
    assert code == 0
    assert "DPMSolverPP, 8 evaluations" in out
    code, out, _ = here(
        "sample", "n=10", "sampler=heun_ode", "sampler.steps=7", "sampler.grid=[1,0.5,0.1]", "out=b.npz"
    )
    assert "HeunODE, 5 evaluations" in out  # two steps of two, and the denoising one


def test_the_path_is_kept_as_arrays_as_panels_and_as_a_film(here):
    assert here("sample", "n=50", "trajectory=5", "out=path.npz")[0] == 0
    found = np.load("path.npz")
    assert found["path"].shape == (5, 50, 2)
    assert found["times"][0] == 1.0
    assert found["times"][-1] == 0.0
    assert (np.diff(found["times"]) < 0).all()
    assert np.array_equal(found["path"][-1], found["x"])
    assert abs(found["path"][0].std() - 1.0) < 0.2  # it begins at the prior
    assert here("sample", "n=50", "trajectory=5", "out=path.png")[0] == 0
    assert here("sample", "n=50", "trajectory=6", "out=path.gif")[0] == 0
    with Image.open("path.gif") as film:
        assert film.n_frames == 6
    with Image.open("path.png") as panels:
        assert panels.width > 3 * panels.height


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("trajectory=5", "out=x.csv"), "a path goes into .npz, .png, .gif"),
        (("label=3",), "trained without labels"),
        (("guidance=2",), "say label=NAME too"),
        (("sampler.stps=3",), "did you mean 'steps'"),
        (("sampler.grid=edm_roh",), "edm_rho"),
        (("sampler.grid=[1,0.5,0.6]",), "decreasing"),
        (("sampler.grid=[0.9,0.1]",), "begins at the process's T"),
        (("sampler.grid=[1,0.5]", "t_min=0.1"), "says where the times end"),
        (("sampler.grid=[1,0.00001]",), "trained on t >= 0.001"),
        (("sampler.grid=uniform", "sampler.rho=3"), "exponent"),
        (("sampler.temperature=0",), "greater than 0"),
        (("sampler=langevin", "sampler.adjusted=true"), "network=energy_mlp"),
        (("sampler=predictor_corrector", "sampler.predictor=eulr_ode"), "euler_ode"),
        (("sampler.known={y: 1}",), "no such column"),
        (("sampler.known=nowhere.csv",), "does not exist"),
        (("sampler.known={x0: high}",), "expected a number"),
        (("sampler=dopri5", "sampler.rtol=1e-13", "sampler.atol=1e-13"), "take larger ones"),
        (("sampler=predictor_corrector", "sampler.predictor={_target_: scoresde_cli.sdes.vp.VP}"), "subclass of"),
        (("sampler=langevin", "sampler.grid=uniform"), "stays at one time"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else "",
)
def test_a_wish_that_cannot_be_is_one_line(here, argv, says):
    code, _, err = here("sample", "n=5", *argv)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_known_values_are_kept_in_the_users_units(here):
    code, out, _ = here("sample", "n=20", "sampler.known={x0: 0.75}", "sampler.repaint=1", "out=k.csv")
    assert code == 0
    assert "approximate" in out
    frame = pd.read_csv("k.csv")
    assert (frame["x0"] == 0.75).all()
    assert frame["x1"].std() > 0


@pytest.mark.parametrize(
    ("known", "says"),
    [("x0: 500", "x0=500 is far outside the training data"), ("x0: 0.5, x1: 0.5", "every value is known")],
    ids=["far", "all"],
)
def test_known_values_that_leave_nothing_to_learn_from_are_pointed_out(known, says, here):
    code, _, err = here(
        "sample", "n=4", f"sampler.known={{{known}}}", "sampler.repaint=1", "out=odd.csv", "overwrite=true"
    )
    assert code == 0
    assert says in err


def test_known_values_are_refused_where_the_whole_law_is_measured(here, cli):
    assert "for `scoresde sample`" in here("evaluate", "n=50", "sampler.known={x0: 1}")[2]
    assert "for `scoresde sample`" in cli("train", "sampler.known={x0: 1}", "tracker.mode=disabled")[2]


def test_evaluate_measures_what_is_asked_and_prints_the_unit(here, trained):
    code, out, _ = here("evaluate", "metrics=nll", "nll.rows=50", "nll.steps=10", "figures=false")
    assert code == 0
    assert "nats" in out
    assert "sliced_wasserstein" not in out
    code, out, _ = here(
        "evaluate", "metrics=nll", "nll.rows=50", "nll.steps=10", "projection=gaussian", "nll.repeats=4"
    )
    entry = json.loads((trained / "evaluation.json").read_text())[-1]["summary"]["nll"]
    assert entry["protocol"]["divergence"] == "Gaussian, 1 directions, 4 repeats"
    assert entry["detail"]["standard_error_of_the_directions"] > 0


def test_runs_are_compared_where_their_protocols_agree_and_nowhere_else(here, cli, trained):
    pair = f"run=[{trained},{trained}]"
    code, _, err = cli("evaluate", pair, "n=50", "metrics=[loss,sliced_wasserstein]", "figures=false")
    assert code == 0
    assert "not compared" not in err
    quick = ["steps=5", "data.n=500", "eval.n=50", "eval.figures=false", "tracker.mode=disabled"]
    assert cli("train", "loss=dsm", "sampler.steps=5", "dir=other", *quick)[0] == 0
    pair = f"run=[{trained},other]"
    code, _, err = cli(
        "evaluate", str(trained), "other", "n=50", "metrics=[score_error,sliced_wasserstein]", "figures=false"
    )
    assert code == 0
    assert "sliced_wasserstein is not compared, the protocols differ: steps 40 against 5" in " ".join(err.split())
    code, _, err = cli("evaluate", pair, "n=50", "metrics=sliced_wasserstein", "figures=false")
    assert code == 2
    assert "nothing to compare" in err
    code, _, err = cli("evaluate", pair, "n=50", "metrics=sliced_wasserstein", "figures=false", "sampler.steps=4")
    assert code == 0  # the same sampler for both


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("metrics=nil",), "did you mean 'nll'"),
        (("metrics=[loss,frechet_pca]",), "image"),
        (("metrics=nll", "nll.steps=0"), "nll.steps=0"),
        (("metrics=nll", "nll.stps=5"), "did you mean 'nll.steps'"),
        (("metrics=nll", "nll.method=rk5"), "rk4"),
        (("projection=gausian",), "gaussian"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else "",
)
def test_a_measure_that_cannot_be_is_one_line(here, argv, says):
    code, _, err = here("evaluate", "n=50", *argv)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_a_sweep_of_samples_writes_a_file_a_job(here, trained):
    code, _, err = here("sample", "-m", "seed=0,1", "n=5", "out=x.npz")
    assert code == 2
    assert "every job of a sweep" in err
    assert here("sample", "-m", "seed=0,1", "n=5")[0] == 0
    written = [np.load(trained / "samples" / f"DPMSolverPP-40-n5-seed{seed}.npz")["x"] for seed in (0, 1)]
    assert not np.array_equal(*written)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sample", "-m", "sede=0,1"], "did you mean 'seed'"),
        (["sample", "-m", "seed=0,1", "sampler=heun"], "heun_ode"),
        (["sample", "-m", "sampler=heun_ode,heum_ode"], "did you mean 'heun_ode'"),
        (["train", "-m", "n_proj=1,2", "hydra/launcher=joblb"], "did you mean 'joblib'"),
        (["train", "-m", "n_proj=1,2", "hydra.sweep.dr=x"], "unknown key"),
    ],
)
def test_a_sweep_that_is_misspelt_leaves_nothing_behind(cli, tmp_path, argv, says):
    code, _, err = cli(*argv, *(["run=nowhere"] if argv[0] == "sample" else []))
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_no_numbers_are_told(here):
    code, _, err = here("sample", "n=20", "sampler=langevin", "sampler.step_size=10", "sampler.steps=200", "out=x.csv")
    assert code == 0
    assert "20 of 20 samples are not finite" in " ".join(err.split())


def test_the_weights_that_are_asked_for_are_used(here):
    assert here("sample", "n=5", "out=a.npz")[0] == 0
    assert here("sample", "n=5", "average=false", "out=b.npz")[0] == 0
    assert not np.array_equal(np.load("a.npz")["x"], np.load("b.npz")["x"])


def test_nothing_is_left_of_a_file_that_could_not_be_finished(here, tmp_path):
    code, _, err = here("sample", "n=5", "sampler=dopri5", "sampler.rtol=1e-13", "sampler.atol=1e-13", "out=x.npz")
    assert code == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
