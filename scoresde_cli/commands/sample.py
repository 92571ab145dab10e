"""`scoresde sample`: draw samples from a run and write them in the user's units."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from scoresde_cli.checks import check_call
from scoresde_cli.compose import build
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, nearest
from scoresde_cli.rundir import RunDir
from scoresde_cli.runs import Run
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.tracking import console

SUFFIXES = (".npz", ".csv", ".parquet", ".png")


@dataclass(frozen=True)
class Keys:
    """The keys of `sample`."""

    run: str
    n: Annotated[int, Field(ge=1, le=100_000_000)]
    seed: NonNegativeInt
    out: str | None
    checkpoint: Literal["selected", "last", "best"] | PositiveInt
    average: bool
    device: str
    t_min: Annotated[float, Field(gt=0, lt=1)] | None
    overwrite: bool
    trust: bool


def task(config: DictConfig) -> int:
    keys: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    chosen = keys.pop("sampler", None)
    check_call(Keys, keys, "")
    out = None if keys["out"] is None else check_out(Path(keys["out"]).expanduser(), keys["overwrite"])
    if out is not None:
        check_folder(out)
    folder = RunDir.open(keys["run"])
    run = Run(folder, keys["trust"], keys["device"], keys["average"], keys["checkpoint"])
    sampler = pick_sampler(run, chosen, keys["t_min"])
    if out is None:
        name = f"{type(sampler).__name__}-{sampler.steps}-n{keys['n']}-seed{keys['seed']}.npz"
        out = check_out(run.path / "samples" / name, keys["overwrite"])
        out.parent.mkdir(exist_ok=True)
        check_folder(out)
    with console.counting("sampling", keys["n"]) as progress:
        samples = run.sample_model(keys["n"], keys["seed"], sampler, progress)
    write_samples(out, run.parts.data, samples.x.cpu(), keys["overwrite"])
    weights = "averaged weights" if run.averaged else "last weights"
    console.note(
        f"{keys['n']} samples by {type(sampler).__name__}, {samples.nfe} evaluations each, {weights} of step {run.step}"
    )
    console.note(f"written  {out}")
    return 0


def pick_sampler(run: Run, chosen: dict[str, Any] | None, t_min: float | None) -> Sampler:
    """The sampler of the command line, else the run's own."""
    trained = run.parts.settings.t_min
    sampler = run.parts.sampler
    if chosen is not None:
        sampler = build({**chosen, "t_min": chosen.get("t_min") or trained}, "sampler")
    if t_min is not None:
        sampler.t_min = t_min
    if sampler.t_min < trained:
        raise ScoreSDEError(f"t_min={sampler.t_min}: the run's score is trained on t >= {trained}")
    return sampler


def check_out(path: Path, overwrite: bool) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise ScoreSDEError(
            f"out={path}: expected a name ending in {', '.join(SUFFIXES)}{nearest(path.suffix, SUFFIXES)}"
        )
    if path.exists() and not overwrite:
        raise ScoreSDEError(f"{path} exists already; choose another out= or say overwrite=true")
    return path


def check_folder(path: Path) -> None:
    """Refuse, before any work, a file whose folder does not exist or cannot be written to."""
    if not path.parent.is_dir():
        raise ScoreSDEError(f"out={path}: the folder {path.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as problem:
        raise ScoreSDEError(f"out={path}: the folder {path.parent} cannot be written to ({problem.strerror})") from None


def write_samples(path: Path, data: Dataset, x: Tensor, overwrite: bool) -> None:
    """Write samples x (n, *D), given in model coordinates, in the user's units."""
    check_out(path, overwrite)
    u = data.units.to_user(x).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary, path.suffix.lower(), data, u, x)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, suffix: str, data: Dataset, u: np.ndarray, x: Tensor) -> None:
    if suffix == ".npz":
        arrays: dict[str, Any] = {"x": u.astype(np.float32)}
        if data.columns is not None:
            arrays["columns"] = np.array(data.columns)
        np.savez_compressed(path, **arrays)
        return
    if suffix == ".png":
        from scoresde_cli import figures

        figures.picture(data, u, path)
        return
    import pandas as pd

    flat = u.reshape(len(u), -1)
    frame = pd.DataFrame(flat, columns=data.columns or [f"x{i}" for i in range(flat.shape[1])])
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
