"""What goes to a cluster as a file: the array of `scoresde batch`, the sweep of W&B."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from scoresde_cli import batch, hydra_app
from scoresde_cli.cli import main
from tests.conftest import NO_FIGURES, SMALL
from tests.test_sweeps import numbers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def test_the_tasks_of_an_array_are_the_jobs_of_the_sweep(tmp_path, cli, monkeypatch):
    sweep = ["train", "-m", "n_proj=1,2", "seed=0,1", *SMALL, *NO_FIGURES]
    code, out, err = cli("batch", "time=1:00:00", "mem=2G", "cpus=1", "parallel=3", "partition=short", *sweep)
    assert code == 0, err
    file = Path(next(line.split("sbatch ")[1] for line in out.splitlines() if line.startswith("next")))
    text = file.read_text()
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--array=0-3%3",
        "--time=1:00:00",
        "--mem=2G",
        "--partition=short",
        "--requeue",
        "--signal=B:USR1@120",
    ):
        assert f"#SBATCH {wanted}" in lines
    assert not any("gpu" in line for line in lines)
    command = shlex.split(next(line for line in text.splitlines() if line.endswith(" &")).removesuffix("&"))
    assert command[1:4] == ["-m", "scoresde_cli", "train"]
    # Each task does one of the four jobs, in the directory where the sweep itself would have looked for it.
    for task in (2, 1):
        monkeypatch.setenv("SCORESDE_TASK", str(task))
        assert main(command[3:]) == 0
    monkeypatch.delenv("SCORESDE_TASK")
    folder = file.parent
    assert sorted(numbers(folder)) == ["n_proj=1,seed=1", "n_proj=2,seed=0"]
    code, out, err = cli(*sweep, "threads=1")
    assert code == 0, err
    assert out.count("is done") == 2
    assert len(numbers(folder)) == 4


def test_a_task_that_the_sweep_has_not_is_refused(tmp_path, cli, monkeypatch):
    monkeypatch.setenv("SCORESDE_TASK", "4")
    code, _, err = cli("train", "-m", "seed=0,1", *SMALL, *NO_FIGURES)
    assert code == 2
    assert "SCORESDE_TASK=4: the sweep has 2 jobs" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["n_proj=1,2"], "no `train` among n_proj=1,2"),
        (["train", "n_proj=1"], "`train` without -m is one run"),
        (["tme=1:00:00", "train", "-m", "seed=0,1"], "did you mean 'time'"),
        (["cpus=0", "train", "-m", "seed=0,1"], "cpus=0: expected greater than 0"),
        (["time='4 h'", "train", "-m", "seed=0,1"], "batch.time"),
        (["train", "-m", "n_proj=1,0"], "n_proj=0: expected greater than 0"),
        (["train", "-m", "seed=0,1", "hydra/launcher=joblib"], "the array itself launches the jobs"),
    ],
)
def test_a_wrong_array_is_not_written(tmp_path, cli, argv, says):
    code, _, err = cli("batch", *argv)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.sbatch"))


def test_the_agents_of_the_wandb_sweep_run_what_train_understands():
    """The command line as W&B's agent puts it together, in the words of its own library; the values at the ends of the sweep."""
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((SCRIPTS / "wandb_sweep.yaml").read_text())
    for end in (0, -1):
        values = {
            name: {"value": law["values"][end] if "values" in law else (law["min"], law["max"])[end]}
            for name, law in sweep["parameters"].items()
        }
        words = utils.create_sweep_command(sweep["command"])
        known = utils.create_sweep_command_args({"args": values}) | {
            "program": [sweep["program"]],
            "env": ["/usr/bin/env"],
        }
        command = [w for word in words for w in (known[word[2:-1]] if word.startswith("${") else [word])]
        assert command[:3] == ["/usr/bin/env", "scoresde", "train"]
        flags, overrides = hydra_app.sort_arguments("train", command[3:])
        assert not flags
        hydra_app.check_values("train", [], *hydra_app.split_sweep("train", overrides))
    assert os.path.basename(command[1]) == sweep["program"]


def test_a_folder_with_a_space_is_one_word_to_sbatch():
    """sbatch reads the values of its lines as a shell does: a quoted one is whole, an open one ends at the space."""
    text = batch.script(batch.Keys(), batch.Plan(Path("/my data/sweep, 1"), 2, ["scoresde"]))
    words = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert ["--output=/my data/sweep, 1/logs/%A_%a.txt"] in words
    assert ["--job-name=sweep, 1"] in words
