"""Options and fixtures: numerics on another device or in another precision (--device, --dtype), one small trained run for all."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
for key in ("WANDB_API_KEY", "SLURM_JOB_ID"):
    os.environ.pop(key, None)

import torch  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMALL = [
    "steps=60",
    "data.n=500",
    "eval.n=300",
    "log_every=10",
    "checkpoint.every=20",
    "tracker.mode=disabled",
    "device=cpu",
]
NO_FIGURES = ["eval.figures=false"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device for the tests of numerics: cpu, cuda, mps")
    parser.addoption("--dtype", default="float64", choices=["float64", "float32"], help="precision of these tests")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    from scoresde_cli.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of `train loss=ssm`, with figures. Tests copy it before they change anything."""
    from scoresde_cli.cli import main

    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", "loss=ssm", f"dir={folder}", *SMALL]) == 0
    return folder


@pytest.fixture
def wine() -> Path:
    path = SHARED / "winequality-red.csv"
    if not path.exists():
        pytest.skip(f"the red wine table is not at {path}")
    return path
