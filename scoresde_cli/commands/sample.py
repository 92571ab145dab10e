"""`scoresde sample`: draw samples from a run and write them in the user's units."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from scoresde_cli.checks import check_call
from scoresde_cli.compose import build
from scoresde_cli.datasets.base import label_name
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rundir import RunDir
from scoresde_cli.runs import Run
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.tracking import console
from scoresde_cli.training.stop import stop_requests
from scoresde_cli.writers import FILM_FRAMES, WITH_PATH, Track, check_folder, check_out, write_samples


@dataclass(frozen=True)
class Keys:
    """The keys of `sample`."""

    run: str
    n: Annotated[int, Field(ge=1, le=100_000_000)]
    seed: NonNegativeInt
    out: str | None
    label: str | int | float | bool | None
    guidance: Annotated[float, Field(ge=0, le=100)]
    trajectory: Annotated[int, Field(ge=2, le=1000)] | None
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
    sampler.check(run.given(keys["label"], keys["guidance"]), run.parts.sde)
    if keys["label"] is None and keys["guidance"] != 1:
        raise ScoreSDEError(f"guidance={keys['guidance']:g}: it is the weight of a label; say label=NAME too")
    if out is None:
        label = ""
        if keys["label"] is not None:
            label = f"-label{label_name(keys['label'])}-guidance{keys['guidance']:g}".replace("/", "_")
        name = f"{type(sampler).__name__}-{sampler.steps}-n{keys['n']}-seed{keys['seed']}{label}.npz"
        out = check_out(run.path / "samples" / name, keys["overwrite"])
        out.parent.mkdir(exist_ok=True)
        check_folder(out)
    track = pick_track(run, sampler, keys, out)
    watch = None if track is None else track.watch
    known = run.known(sampler)
    if known is not None and (far := known.beyond(run.parts.data)):
        console.warn(f"sampler.known: {far}, where the model knows nothing: what is drawn given it means nothing")
    drawn = run.blocks(keys["n"], keys["seed"], sampler, keys["label"], keys["guidance"], known, watch)
    evaluations, bad = 0.0, 0

    def blocks() -> Iterator[Tensor]:
        nonlocal evaluations, bad
        done = 0
        for block in drawn:
            done += len(block.x)
            evaluations += block.nfe * len(block.x) / keys["n"]
            bad += int((~block.x.isfinite().flatten(1).all(1)).sum())
            progress(done)
            yield block.x

    with stop_requests(), console.counting("sampling", keys["n"]) as progress:
        write_samples(out, run.parts.data, blocks(), keys["n"], keys["overwrite"], track, known)
    if bad:
        console.warn(
            f"{bad} of {keys['n']} samples are not finite numbers (more sampler.steps or smaller ones may help)"
        )
    weights = "averaged weights" if run.averaged else "last weights"
    given = "" if keys["label"] is None else f", given label {keys['label']} with guidance {keys['guidance']:g}"
    if known is not None and not known.value.isnan().any():
        console.warn("sampler.known: every value is known, so nothing was drawn")
    elif known is not None:
        console.note(
            f"note: the open values are drawn given the known ones by repainting (sampler.repaint={sampler.repaint}), which is "
            "approximate; more repeats are more exact"
        )
    console.note(
        f"{keys['n']} samples by {type(sampler).__name__}{given}, {evaluations:g} evaluations each, {weights} of step {run.step}"
    )
    console.note(f"written  {out}")
    return 0


def pick_track(run: Run, sampler: Sampler, keys: dict[str, Any], out: Path) -> Track | None:
    """What records the path, where one is asked for."""
    frames = keys["trajectory"] or (FILM_FRAMES if out.suffix.lower() == ".gif" else None)
    if frames is None:
        return None
    if out.suffix.lower() not in WITH_PATH:
        raise ScoreSDEError(f"trajectory={frames}: a path goes into {', '.join(WITH_PATH)}, not into out={out}")
    looks = len(sampler.times(run.parts.sde)) + sampler.denoise
    return Track(looks, frames, keys["n"], run.shape)


def pick_sampler(run: Run, chosen: dict[str, Any] | None, t_min: float | None) -> Sampler:
    """The sampler of the command line, else the run's own with the keys of the command line."""
    trained = run.parts.settings.t_min
    sampler = run.parts.sampler
    if chosen is not None:
        if "_target_" not in chosen:  # keys alone change the run's own
            chosen = {**run.config["sampler"], **chosen}
        sampler = build({**chosen, "t_min": chosen.get("t_min") or sampler.t_min}, "sampler")
    if t_min is not None:
        if isinstance(sampler.grid, list):
            raise ScoreSDEError(f"t_min={t_min}: the list sampler.grid={sampler.grid} says where the times end")
        sampler.t_min = t_min
    if sampler.t_min < trained:
        raise ScoreSDEError(f"t_min={sampler.t_min}: the run's score is trained on t >= {trained}")
    return sampler
