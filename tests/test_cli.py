"""The command line: help without torch, completion, and one clear line for every mistake."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from scoresde_cli import completion, configs
from scoresde_cli.cli import COMMANDS
from scoresde_cli.studies.base import Size
from tests.conftest import NO_FIGURES, SMALL

PACKAGE = Path(configs.__file__).parent
WITHOUT_TORCH = """
import sys
from scoresde_cli.cli import main
code = main(sys.argv[1:])
heavy = [m for m in ("torch", "numpy", "matplotlib", "wandb", "sklearn", "pandas", "scipy") if m in sys.modules]
print("HEAVY", heavy)
sys.exit(code)
"""


def light(*argv, **environment):
    """Run a command line in a fresh interpreter; its output and the heavy modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip
    out, _, heavy = done.stdout.rpartition("HEAVY ")
    return out, heavy.strip()


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["--version"], *([c, "--help"] for c in COMMANDS), ["list"], ["list", "loss"]], ids=str
)
def test_help_answers_without_anything_heavy(argv):
    out, heavy = light(*argv)
    assert heavy == "[]"
    assert out.strip()


def test_the_help_page_of_train_is_complete():
    out, _ = light("train", "--help")
    for key, _, what in configs.keys("train"):
        assert key in out
        assert what, f"{key} has no description in conf/train.yaml"
        assert what in out
    for group in configs.groups():
        for option in configs.options(group):
            assert option in out
    assert out.count("scoresde train ") >= 5


@pytest.mark.parametrize("group", configs.groups())
def test_every_option_says_what_it_is(group):
    for option in configs.options(group):
        assert configs.describe(configs.conf_dir() / group / f"{option}.yaml"), f"{group}/{option}.yaml"


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("scoresde tr", ["train"]),
        ("scoresde ", list(COMMANDS)),
        ("scoresde train lo", ["loss=", "log_every="]),
        ("scoresde train loss=", ["loss=ssm", "loss=dsm", "loss=ism", "loss=ssm_vr"]),
        ("scoresde train loss=ssm n_p", ["n_proj="]),
        ("scoresde train optimizer.l", ["optimizer.lr="]),
        ("scoresde sample sampler=h", ["sampler=heun_ode"]),
        ("scoresde list pro", ["projection"]),
        ("scoresde ablate size=", [f"size={size}" for size in get_args(Size)]),
        ("scoresde ablate study=loss size=q", ["size=quick"]),
        ("scoresde ablate study=", ["study=n_proj"]),
        (f"scoresde report {PACKAGE}/comm", [f"{PACKAGE}/commands/"]),
        (f"scoresde report {PACKAGE}/commands {PACKAGE}/", [f"{PACKAGE}/commands/", f"{PACKAGE}/losses/"]),
        (f"scoresde sample run={PACKAGE}/comm", [f"run={PACKAGE}/commands/"]),
        (f"scoresde report {PACKAGE} metr", ["metrics="]),
    ],
)
def test_completion_offers_commands_groups_options_and_keys(line, offers):
    out, heavy = light("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert set(offers) <= set(out.split())
    assert "torch" not in heavy
    assert "matplotlib" not in heavy


def test_completion_offers_no_hidden_folders_and_none_that_are_not_there(tmp_path, monkeypatch):
    for name in ("runs", ".git", "a b"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert completion.complete("scoresde report ") == ["runs/"]
    assert completion.complete("scoresde report .g") == [".git/"]
    assert completion.complete("scoresde report runs/") == []


def test_completion_installs_in_bash():
    out, _ = light("-sc", "install=bash")
    assert "complete -o nospace" in out


def wrong(*argv, code=2, says=""):
    return pytest.param(list(argv), code, says, id=" ".join(argv)[:60] or "empty")


WRONG = [
    wrong("trian", says="did you mean 'train'"),
    wrong("loss=ssm", says="scoresde train loss=ssm"),
    wrong("--verison", says="unknown command"),
    wrong("train", "n_prj=4", says="did you mean 'n_proj'"),
    wrong("train", "+n_prj=4", says="did you mean 'n_proj'"),
    wrong("train", "++n_prj=4", says="did you mean 'n_proj'"),
    wrong("train", "los=ssm", says="did you mean 'loss'"),
    wrong("train", "loss=smm", says="did you mean 'ssm'"),
    wrong("train", "data=eight_gausians", says="eight_gaussians"),
    wrong("train", "data=digits", "network=unet", "parameterisation.covariance=full", says="take auto or isotropic"),
    wrong("train", "data=digits", "network=unet", "network.attention=[3]", says="expected some of [8, 4, 2]"),
    wrong("train", "data=digits", "network=unet", "network.multipliers=[]", says="one number a level"),
    wrong("train", "sde=correlated", "sde.sigma=low_rank", "sde.rank=5", says="sde.rank=5: expected at most 2"),
    wrong("ablate", "study=correlation", "size=smoke", "data=moons", says="brings its own data"),
    wrong(
        "ablate", "study=jump", "size=smoke", "data=moons", "study.parts=[exact]", says="fields under jumps are known"
    ),
    wrong("train", "data=digits", "network=unet", "network.size=large", says="small"),
    wrong("train", "batch_size=256", "accumulate=3", says="a divisor of batch_size=256"),
    wrong("train", "sde=vpp", says="did you mean 'vp'"),
    wrong("train", "sde=correlated", "sde.sigma=ar2", says="did you mean 'ar1'"),
    wrong("train", "sde=correlated", "sde.rho=1", says="less than 1"),
    wrong("train", "sde=correlated", "sde.rank=2", says="unknown key sde.rank"),
    wrong("train", "sde=correlated", "sde.drift=reversible", "loss=dsm_cv", says="sde.drift=isotropic"),
    wrong("train", "sde=correlated", "sde.sigma=dense", says="sde.file is missing"),
    wrong("train", "sde=correlated", "sde.drift=isotropc", says="did you mean 'isotropic'"),
    wrong("train", "sde=correlated", "sde.shape=[2]", says="unknown key sde.shape"),
    wrong("train", "sde=kinetic", "sampler=dpm_solver_pp", says="sscs, euler_maruyama"),
    wrong("train", "sde=kinetic", "loss=dsm_cv", says="dsm and ssm_vr work"),
    wrong("train", "sde=kinetic", "loss=table_dsm", says="follows from the score in the velocity"),
    wrong("train", "sde=kinetic", "sampler.clip=true", says="acts on a velocity"),
    wrong("train", "sde=kinetic", "eval.metrics=[nll]", says="density of (x, v)"),
    wrong("train", "sde=kinetic", "sde.gamma=2", says="sde.gamma=2"),
    wrong("train", "sde=kinetic", "sde.beta=40", says="at most 30 sqrt(mass) = 15"),
    wrong("train", "sampler=sscs", says="it is for sde=kinetic"),
    wrong("train", "sde=jump_diffusion", "loss=ssm_vr", says="table_dsm, augmented_dsm, implicit_flux"),
    wrong("train", "loss=implicit_flux", says="is for a process that jumps"),
    wrong("train", "sde=jump_diffusion", "loss=augmented_dsm", "loss.flux=importance", says="infinite variance"),
    wrong("train", "sde=jump_diffusion", "sampler=dpm_solver_pp", says="takes the noise for Gaussian"),
    wrong(
        "train",
        "sde=jump_diffusion",
        "sampler=true_reversal",
        says="heun_ode, euler_ode, dopri5 and euler_maruyama work",
    ),
    wrong("train", "sde=jump_diffusion", "loss=jump_ratio", "network=mlp", says="network=energy_mlp"),
    wrong("train", "sde=jump_diffusion", "loss=jump_ratio", "sampler=heun_ode", says="true_reversal works"),
    wrong("train", "sde=jump_diffusion", "loss=scale_dsm", "sde.joint=false", says="sde.joint=true"),
    wrong("train", "sde=jump_diffusion", "parameterisation=x0", says="residual, eps and raw do"),
    wrong("train", "sde=jump_diffusion", "n_proj=auto", "loss=implicit_flux", says="auto is for loss=ssm and ssm_vr"),
    wrong("train", "sde=correlated", "loss=table_dsm", says="the same in all directions"),
    wrong("train", "sde=jump_diffusion", "loss=jump_ratio", "eval.metrics=[nll]", says="it takes the velocity"),
    wrong("train", "eval.metrics=[flux_error]", says="it takes the flux"),
    wrong("train", "sde=static", "sampler=heun_ode", says="sampler=langevin works"),
    wrong(
        "train",
        "sde=static",
        "sampler=langevin",
        "loss=dsm",
        says="has no noise to remove; ism, ssm, ssm_vr and fd_ssm work",
    ),
    wrong("train", "sde=static", "sampler=langevin", "eval.metrics=[nll]", says="nothing flows"),
    wrong("train", "sde=double_well", says="heun_ode, euler_ode, dopri5 and euler_maruyama work"),
    wrong("train", "sde=double_well", "loss=dsm", "sampler=heun_ode", says="ism, ssm, ssm_vr and fd_ssm work"),
    wrong("train", "sde=double_well", "loss=dsm_cv", "sampler=heun_ode", says="ism, ssm, ssm_vr and fd_ssm work"),
    wrong("train", "sde=custom", says="sde.drift is missing"),
    wrong("train", "sde=custom", "sde.drift=2", says="a class of your own with __call__"),
    wrong("train", "sde=custom", "sde.drift._target_=nowhere.Pull", says="no module named 'nowhere'"),
    wrong("train", "network=cnn", says="mlp"),
    wrong("train", "projection=rademaker", says="rademacher"),
    wrong("train", "sampler=heun", says="heun_ode"),
    wrong("train", "network.widht=64", says="network.width"),
    wrong("train", "+network.widht=64", says="width"),
    wrong("train", "+loss.gamma=1", says="loss.gamma"),
    wrong("train", "+data.foo=1", says="data.foo"),
    wrong("train", "optimiser.lr=1e-3", says="optimizer.lr"),
    wrong("train", "n_proj=0", says="n_proj=0"),
    wrong("train", "n_proj=-1", says="n_proj=-1"),
    wrong("train", "n_proj=1.5", says="integer"),
    wrong("train", "n_proj=true", says="integer"),
    wrong("train", "n_proj=four", says="integer"),
    wrong("train", "n_proj=auto", "loss=dsm", says="auto is for loss=ssm and ssm_vr"),
    wrong("train", "n_proj=auto", "projection=hutchpp", says="expected a number, or a law that knows nothing of it"),
    wrong("train", "n_proj=auto", "loss.n_proj=3", says="say one of them"),
    wrong("train", "loss=fd_ssm", "projection=xtrace", says="the law looks at the Jacobian"),
    wrong("train", "divergence.tangent_cost=0", says="divergence.tangent_cost=0"),
    wrong("train", "steps=-1", says="steps=-1"),
    wrong("train", "steps=abc", says="integer"),
    wrong("train", "steps=null", says="steps"),
    wrong("train", "steps=", says="steps"),
    wrong("train", "max_seconds=0", says="max_seconds"),
    wrong("train", "batch_size=0", says="batch_size"),
    wrong("train", "seed=-3", says="seed"),
    wrong("train", "t_min=0", says="t_min"),
    wrong("train", "t_min=2", says="t_min"),
    wrong("train", "times=loguniform", says="log_uniform"),
    wrong("train", "ema=1.5", says="ema"),
    wrong("train", "device=gpu", says="device=gpu"),
    wrong("train", "device=cuda:99", says="cuda"),
    wrong("train", "precision=fp16", says="fp32"),
    wrong("train", "precision=bf16", "loss=fd_ssm", says="take fp32"),
    wrong("train", "compile=maybe", says="expected a valid boolean or 'auto'"),
    wrong("train", "divergence.chunk=0", says="expected greater than 0 or 'auto'"),
    wrong("train", "divergence.chunks=2", says="did you mean 'divergence.chunk'"),
    wrong("train", "loss=fd_ssm", "loss.step=0", says="expected greater than 0"),
    wrong("train", "network=energy_mlp", "network.activation=relu", says="expected 'silu'"),
    wrong("train", "eval.n=1", says="eval.n"),
    wrong("train", "checkpoint.keep=0", says="checkpoint.keep"),
    wrong("train", "checkpoint=5", says="checkpoint"),
    wrong("train", "+eval.bar=5", says="eval.bar"),
    wrong("train", "optimizer.lr=-1", says="optimizer.lr"),
    wrong("train", "optimizer.lr=nan", says="optimizer.lr"),
    wrong("train", "optimizer.schedule=cosin", says="did you mean 'cosine'"),
    wrong("train", "network.width=0", says="network.width"),
    wrong("train", "network.activation=swish", says="silu"),
    wrong("train", "loss=ssm", "network.activation=relu", says="piecewise linear"),
    wrong("train", "loss=ism", "network.activation=leaky_relu", says="piecewise linear"),
    wrong("train", "loss.weighting=sigma", says="sigma2"),
    wrong("train", "data.weights=[1,2]", says="8 numbers"),
    wrong("train", "data=gmm", "data.std=1.5", says="data.std"),
    wrong("train", "sde.beta_max=0.01", says="beta_min"),
    wrong("train", "sde=ve", "sde.sigma_max=0.001", says="sigma_min"),
    wrong("train", "projection._target_=nowhere.Law", says="no module named 'nowhere'"),
    wrong("train", "projection._target_=scoresde_cli.projections.Gausian", says="Gaussian"),
    wrong("train", "~loss", says="loss"),
    wrong("train", "loss=null", says="loss"),
    wrong("train", "data=table", says="data.path"),
    wrong("train", "data=table", "data.path=absent.csv", says="does not exist"),
    wrong("train", "data=table", "data.path=empty.csv", code=4, says="empty"),
    wrong("train", "data=table", "data.path=one.csv", code=4, says="1 row"),
    wrong("help", "trian", says="did you mean 'train'"),
    wrong("train", "data=table", "data.path=text.csv", code=4, says="'name' does not hold numbers"),
    wrong("train", "data=table", "data.path=nan.csv", code=4, says="missing"),
    wrong("train", "data=table", "data.path=far.csv", code=4, says="'a' holds 1e+30"),
    wrong("train", "data=table", "data.path=good.csv", "data.columns=[alpha,gama]", says="did you mean 'gamma'"),
    wrong("train", "data=table", "data.path=good.csv", "data.columns=alpha", says="list"),
    wrong("train", "data=table", "data.path=garbage.npy", code=4, says="not an array"),
    wrong("train", "data=table", "data.path=garbage.parquet", code=4, says="not readable"),
    wrong("train", "data=table", "data.path=two.npz", says="data.key"),
    wrong("train", "data=table", "data.path=notes.doc", says=".csv"),
    wrong("train", "data=idx", says="data.path"),
    wrong("train", "data=idx", "data.path=absent", says="does not exist"),
    wrong("train", "data=idx", "data.path=full", code=4, says="no IDX files of images"),
    wrong("train", "data=idx", "data.path=good.csv", code=4, says="expected an IDX file of images"),
    wrong("train", "data=idx", "data.path=good.csv", "data.sise=8", says="did you mean 'data.size'"),
    wrong("train", "data=image_folder", "data.path=good.csv", says="expected a folder"),
    wrong("train", "data=image_folder", "data.path=full", code=4, says="no PNG or JPEG files"),
    wrong("train", "data=image_folder", "data.path=full", "data.fit=corp", "data.size=8", says="did you mean 'crop'"),
    wrong("train", "data=image_folder", "data.path=pictures", code=4, says="data.skip_broken=true"),
    wrong("train", "data=image_folder", "data.path=pictures", "data.channels=2", says="data.channels=2"),
    wrong("train", "dir=full", says="not empty"),
    wrong("train", "dir=/proc/scoresde", says="/proc/scoresde"),
    wrong("train", "dir=good.csv", says="good.csv"),
    wrong("train", "resume=nowhere", says="no such directory"),
    wrong("train", "resume=full", says="not a run directory"),
    wrong("train", "word", says="key=value"),
    wrong("train", "loss=[ssm", says="loss=[ssm"),
    wrong("train", "=4", says="=4"),
    wrong("train", "--config-dir", "/nowhere", says="/nowhere"),
    wrong("train", "--foo", says="--foo"),
    wrong("train", "--steps", "5", says="keys take no dashes: steps=..."),
    wrong("train", "--stesp=5", says="did you mean 'steps'"),
    wrong("train", "steps=[1", says="steps=[1"),
    wrong("train", "steps=1,2", says="needs -m"),
    wrong("train", "+n_proj=3", says="without the plus"),
    wrong("train", "data=digits", "data.n=5", says="data=digits has data.dequantise"),
    wrong("train", "projection._target_=builtins.dict", says="subclass of"),
    wrong("train", "projection._target_=scoresde_cli.projections.Frames", says="leaves"),
    wrong("train", "data=table", "data.path=good.csv", "data.key=a", says=".npz"),
    wrong("train", "dir=", says="dir"),
    wrong("-sc", "foo=bash", says="install=bash"),
    wrong("sample", says="run"),
    wrong("sample", "run=nowhere", says="no such directory"),
    wrong("sample", "run=full", "n=0", says="n=0"),
    wrong("sample", "run=full", "out=a.xyz", says=".npz"),
    wrong("evaluate", "run=full", says="not a run directory"),
    wrong("evaluate", "rnu=full", says="did you mean 'run'"),
    wrong("rerun", "nowhere", says="no such directory"),
    wrong("verify", "d=1", says="d=1"),
    wrong("verify", "projection=foo", says="rademacher"),
    wrong("list", "lossses", says="did you mean 'loss'"),
    wrong("list", "loss", "sde", says="expected one group"),
    wrong("doctor", "now", says="no arguments"),
    wrong("batch", "n_proj=1,2", says="no `train` among"),
]


@pytest.fixture
def odd_files(tmp_path):
    """A folder with everything that a user might point at by mistake."""
    rows = "\n".join(f"{i},{i * i % 7},{i % 3}" for i in range(40))
    (tmp_path / "good.csv").write_text("alpha,beta,gamma\n" + rows)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "one.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.csv").write_text("a,name\n" + "1,bob\n" * 40)
    (tmp_path / "nan.csv").write_text("a,b\n" + "1,2\n3,\n" * 40)
    (tmp_path / "far.csv").write_text("a,b\n1e30,1\n" + "".join(f"{i * i % 37},{i}\n" for i in range(60)))
    (tmp_path / "garbage.npy").write_bytes(os.urandom(200))
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1" + bytes(200))
    (tmp_path / "notes.doc").write_text("hello")
    np.savez(tmp_path / "two.npz", a=np.zeros((30, 2)), b=np.zeros((30, 2)))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    return tmp_path


@pytest.mark.parametrize(("argv", "code", "says"), WRONG)
def test_a_wrong_command_line_ends_in_one_clear_line(argv, code, says, odd_files, cli):
    before = {p: p.read_bytes() for p in odd_files.rglob("*") if p.is_file()}
    found, out, err = cli(*argv)
    lines = err.strip().splitlines()
    assert found == code, err
    assert len(lines) == 1, err
    assert lines[0].startswith("scoresde: ")
    assert says in lines[0]
    assert "internal error" not in err
    assert "Traceback" not in out + err
    assert {p: p.read_bytes() for p in odd_files.rglob("*") if p.is_file()} == before  # nothing written, nothing lost
    assert not (odd_files / "outputs").exists()


def test_a_read_only_folder_is_said_in_one_line(tmp_path, cli, monkeypatch):
    """Root may write anywhere, so the refusal of the system is put in its place."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = cli("train", *SMALL)
    assert code == 2
    assert "Permission denied" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["loss=ssm", "data=gmm", "data.d=10"], "loss=ssm_vr keeps the square exact"),
        (["loss=ssm", "projection=gaussian"], "three times the variance"),
        (["loss=ism", "data=gmm", "data.d=20"], "ssm_vr with 1 to 4"),
        (["parameterisation=raw"], "parameterisation raw"),
        (["parameterisation=eps"], "parameterisation eps"),
        (["parameterisation=x0"], "parameterisation x0"),
        (["ema=null", "optimizer.schedule=constant"], "constant learning rate without ema"),
        (["steps=60"], "under 2000 steps"),
        (["loss=dsm", "n_proj=8"], "n_proj=8 has no effect"),
        (["n_proj=4"], "the trace is exact"),
        (["loss=ssm", "n_proj=4"], "ssm draws as asked"),
    ],
)
def test_risky_settings_are_warned_of_in_a_line(argv, says, tmp_path, cli, monkeypatch):
    from scoresde_cli.commands import train

    monkeypatch.setattr(train, "session", lambda *args: None)  # the words come before the work
    code, out, err = cli("train", *SMALL, *argv)
    assert code == 0
    lines = [line for line in (out + err).splitlines() if says in line]
    assert len(lines) == 1


def test_dsm_takes_any_activation_and_the_default_needs_no_warning(tmp_path, cli, monkeypatch):
    from scoresde_cli.commands import train

    monkeypatch.setattr(train, "session", lambda *args: None)
    assert cli("train", "loss=dsm", "network.activation=relu", "data.n=500")[0] == 0
    code, _, err = cli("train", "data.n=500")
    assert code == 0
    assert err == ""


def test_paths_with_spaces_commas_and_brackets_are_taken_as_they_are(tmp_path, cli, odd_files):
    odd = odd_files / "a, [b] (c)='d'.csv"
    odd.write_bytes((odd_files / "good.csv").read_bytes())
    small = [a for a in SMALL if not a.startswith("data.n")]
    code, out, err = cli(
        "train", "data=table", f"data.path={odd}", f"dir={tmp_path}/my run, 1", *small, *NO_FIGURES, "eval.n=20"
    )
    assert code == 0, err
    assert cli("sample", f"{tmp_path}/my run, 1", "n=3", "out=x y.csv")[0] == 0
    assert (tmp_path / "x y.csv").exists()
    said = next(line for line in out.splitlines() if line.startswith("next"))  # it runs as it is printed
    assert shlex.split(said)[2:4] == ["sample", f"run={tmp_path}/my run, 1"]


def test_a_sweep_takes_neither_one_directory_nor_one_run(tmp_path, cli):
    for argv, says in ((["dir=x"], "hydra.sweep.dir"), (["resume=x"], "cannot be gone on with by a sweep")):
        code, _, err = cli("train", "-m", *argv, "n_proj=1,2")
        assert code == 2
        assert says in err
        assert len(err.strip().splitlines()) == 1


def test_flags_may_stand_anywhere(cli):
    for argv in (["--cfg", "job", "steps=7"], ["steps=7", "--cfg", "job"], ["steps=7", "-c", "job"]):
        code, out, _ = cli("train", *argv)
        assert code == 0
        assert "steps: 7" in out


def test_a_folder_of_a_stranger_is_not_imported_from(trained, tmp_path, cli, monkeypatch):
    """A pandas.py beside a run must not be taken for pandas."""
    for module in ("pandas", "scipy", "yaml", "matplotlib"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('owned')")
    out = subprocess.run(
        [str(Path(sys.executable).parent / "scoresde"), "sample", f"run={trained}", "n=5", "out=x.csv"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr


def test_a_reader_that_leaves_does_not_stop_the_training(tmp_path):
    """scoresde train ... | head -n 1"""
    scoresde = Path(sys.executable).parent / "scoresde"
    line = f"{scoresde} train {' '.join([*SMALL, *NO_FIGURES])} dir=run | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/summary.json").exists()


LAWS = """
import torch
from scoresde_cli.projections import Gaussian, Rademacher, Sphere
class Short(Sphere):
    def sample(self, shape, n, generator, dtype=torch.float32):
        return super().sample(shape, n, generator, dtype) / shape[-1] ** 0.5
class Raises(Gaussian):
    def sample(self, shape, n, generator, dtype=torch.float32):
        raise KeyError("oh")
class Shape(Gaussian):
    def sample(self, shape, n, generator, dtype=torch.float32):
        return super().sample(shape, n + 1, generator, dtype)
class Double(Gaussian):
    def sample(self, shape, n, generator, dtype=torch.float32):
        return super().sample(shape, n, generator, torch.float64)
class Refuses(Gaussian):
    def __init__(self):
        raise SystemExit(0)
class Fine(Rademacher):
    pass
class Duck:
    def sample(self, *args):
        return None
def function(): pass
"""


@pytest.mark.parametrize("command", ["train", "verify"])
@pytest.mark.parametrize(
    ("law", "says"),
    [
        ("Short", "scale the directions by"), ("Raises", "sample(...) failed"), ("Shape", "expected a tensor of shape"),
        ("Double", "float64"), ("Refuses", "cannot be made"), ("Duck", "not a subclass"), ("function", "not a subclass"),
        ("Nothing", "no class 'Nothing'"), ("Fine", None),
    ],
)  # fmt: skip
def test_a_users_own_law_is_checked_before_work_starts(law, says, command, tmp_path, cli, monkeypatch):
    (tmp_path / "user_laws.py").write_text(LAWS)
    monkeypatch.delitem(sys.modules, "user_laws", raising=False)
    more = [*SMALL, *NO_FIGURES, "loss=ssm"] if command == "train" else ["draws=1000", "network.width=8", "d=3"]
    code, _, err = cli(command, "projection=gaussian", f"projection._target_=user_laws.{law}", *more)
    if says is None:
        assert code == 0, err
        return
    assert code == 2
    assert says in err
    assert law in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_users_own_loss_in_a_folder_of_theirs(tmp_path, cli):
    """What the README promises: one class, one YAML, --config-dir."""
    (tmp_path / "mine_loss.py").write_text(
        "from scoresde_cli.losses.dsm import DSM\n\n\nclass Mine(DSM):\n    name = 'mine'\n    formula = 'half of DSM'\n\n"
        "    def value(self, *args):\n        return 0.5 * super().value(*args)\n"
    )
    (tmp_path / "conf/loss").mkdir(parents=True)
    (tmp_path / "conf/loss/mine.yaml").write_text(
        "# My own.\n_target_: mine_loss.Mine\nweighting: sigma2\nhalf: false\ntimes: ${times}\nt_min: ${t_min}\n"
    )
    code, out, err = cli("train", "--config-dir", "conf", "loss=mine", "dir=run", *SMALL, *NO_FIGURES)
    assert code == 0, err
    assert "half of DSM" in out
