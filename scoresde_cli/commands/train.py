"""`scoresde train`: compose, train, measure, draw; or go on with a run that was cut."""

import contextlib
import os
import resource
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde_cli import evaluation, processes, sweeps, together
from scoresde_cli.advice import advice
from scoresde_cli.claims import claim
from scoresde_cli.compose import Parts, build, compose
from scoresde_cli.errors import Diverged, ScoreSDEError, Stopped
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.provenance import command_line, now, science
from scoresde_cli.rundir import RunDir
from scoresde_cli.tracking import console
from scoresde_cli.tracking.base import Tracker
from scoresde_cli.tracking.jsonl import JsonLines, read_rows
from scoresde_cli.tracking.wandb import WandB
from scoresde_cli.training import loop
from scoresde_cli.training.state import TrainState, checkpoints, load_weights, save_checkpoint
from scoresde_cli.training.stop import StopRequest, stop_requests
from scoresde_cli.tuning import settle_together
from scoresde_cli.writers import write_samples

MAY_CHANGE = ("steps", "max_seconds", "resume", "trust")


def task(config: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    overrides = list(hydra.overrides.task)
    if hydra.mode != RunMode.MULTIRUN:
        if plain.get("resume") is None:
            fresh(plain, overrides)
        else:
            resume(plain, overrides)
        return None
    if plain.get("resume") is not None:
        raise ScoreSDEError(f"resume={plain['resume']}: one run cannot be gone on with by a sweep")
    if plain.get("dir") is not None:
        raise ScoreSDEError(
            f"dir={plain['dir']}: the jobs of a sweep would share it; name the sweep's own by hydra.sweep.dir="
        )
    folder = Path(hydra.runtime.output_dir)
    if hydra.sweep.subdir == ".":
        folder = folder / (sweeps.slug(hydra.job.override_dirname) or "run")
    return job(plain, overrides, folder, hydra.runtime.choices["hydra/launcher"])


def job(config: dict[str, Any], overrides: list[str], folder: Path, launcher: str, total: int | None = None) -> float:
    """One job of a sweep: trained anew, gone on with where it was cut or failed, left alone where it is done.

    The number in its summary that a sweeper such as Optuna is to make small, `objective`; NaN where the job failed, whose last
    line is kept (sweeps.outcome).
    """
    from hydra.core.hydra_config import HydraConfig

    found = float("nan")
    processes.join()
    if processes.rank():
        together.follow()
        processes.part()
        return found
    with ExitStack() as stack:
        stack.callback(processes.part)
        stack.enter_context(sweeps.worker(folder, launcher, total))
        stack.enter_context(claim(folder, HydraConfig.get().job.num))
        if sweeps.failed_meanwhile(folder):
            return found
        stack.enter_context(sweeps.outcome(folder))
        if launcher != "basic":  # as many jobs as there are cores, or as many threads as Slurm has given it
            config = {**config, "threads": config["threads"] or int(os.environ.get("SLURM_CPUS_PER_TASK", 1))}
        tracker = {**config["tracker"], "group": config["tracker"].get("group") or folder.parent.name}
        if not (folder / "run.json").is_file():
            run = fresh({**config, "tracker": tracker}, overrides, str(folder))
        else:
            run = RunDir.open(folder)
            sweeps.check_same(run, config)
            sweeps.await_release(run)
            if run.status() == "finished":
                console.note(f"{folder} is done")
            else:
                go_on(run, bool(config["trust"]), {})
        found = objective(run.summary(), config["objective"])
    return found


def objective(summary: dict[str, Any], name: str | None) -> float:
    """The number of that name, or the held-out loss."""
    if (name or "loss") not in summary:
        raise ScoreSDEError(f"objective={name}: not measured; expected one of {', '.join(summary)}")
    return float(summary[name or "loss"]["value"])


def fresh(
    config: dict[str, Any], overrides: list[str], folder: str | None = None, expected_data: dict[str, Any] | None = None
) -> RunDir:
    """Train in a new directory, on data with these facts where they are given; the finished run."""
    if folder is None and isinstance(config.get("dir"), str):
        RunDir.check_new(config["dir"])
    parts = compose(config)
    if expected_data is not None and parts.data.facts.get("sha256") != expected_data.get("sha256"):
        raise ScoreSDEError(f"{parts.data.facts.get('path')}: the data file is not the one that the run was trained on")
    tracker = build(config["tracker"], "tracker")
    measured(parts)
    say(parts, overrides)
    parts, config = settle_together(parts, config)
    run = RunDir.create(config, folder or parts.settings.dir)
    run.begin(config, parts, command_line())
    with run.lock():
        session(run, config, parts, tracker, prepare(parts, None))
    return run


def resume(config: dict[str, Any], overrides: list[str]) -> None:
    """Go on with the run in `resume`, in the same directory, with the same config but for what the command line changes."""
    run = RunDir.open(str(config["resume"]), "resume")

    def key_of(override: str) -> str:
        return override.lstrip("+").split("=")[0]  # a deletion keeps its ~, and is foreign

    foreign = [o for o in overrides if key_of(o) not in MAY_CHANGE and not key_of(o).startswith("tracker.")]
    if foreign:
        raise ScoreSDEError(
            f"resume keeps the run's own config: {', '.join(foreign)} cannot change; only steps, max_seconds and tracker.* can"
        )
    keys = [key_of(o) for o in overrides]
    changes = {key: config[key] for key in keys if key in ("steps", "max_seconds")}
    tracker = {
        key.split(".", 1)[1]: config["tracker"].get(key.split(".", 1)[1]) for key in keys if key.startswith("tracker.")
    }
    go_on(run, bool(config["trust"]), changes | ({"tracker": tracker} if tracker else {}))


def go_on(run: RunDir, trust: bool, changes: dict[str, Any]) -> None:
    """Go on with a run from its last checkpoint, some keys of its config changed."""
    with run.lock():
        kept = run.config(trust)
        was_finished = run.facts()["status"] == "finished"
        kept |= {**changes, "tracker": kept["tracker"] | changes.get("tracker", {})}
        data = build(kept["data"], "data")
        data.kept = run.stored_data()[0].kept
        parts = compose(kept, data)
        tracker = build(kept["tracker"], "tracker")
        checkpoint = run.checkpoint(parts.device) if checkpoints(run.path / "checkpoints") else None
        done = 0 if checkpoint is None else int(checkpoint.facts["step"])
        if done > parts.settings.steps:
            raise ScoreSDEError(
                f"steps={parts.settings.steps}: the run is at step {done} already; say steps=N with N above that"
            )
        if was_finished and done == parts.settings.steps:
            console.note(f"{run.path}: finished at step {done}; go on with steps=N, N above that")
            return
        if parts.data.facts.get("sha256") != run.facts()["data"].get("sha256"):
            raise ScoreSDEError(f"resume={run.path}: the data file has changed since the run began")
        parts, kept = settle_together(parts, kept, done)
        state = prepare(parts, checkpoint)  # what does not fit is refused before anything is written
        if run.altered():
            raise ScoreSDEError(
                f"resume={run.path}: its config.yaml has been changed since the run began, so its steps would not be of one run; "
                "put it back as it was, or train anew"
            )
        if "steps" in changes and parts.optimizer.schedule == "cosine":
            console.note("the cosine schedule now ends at the new number of steps")
        run.write_config(kept)
        session_facts = {"started": now(), "step": done, "command": command_line(), "processes": processes.size()}
        sessions = [*run.facts()["sessions"], session_facts]
        run.update(status="running", sessions=sessions, science=science(kept))
        console.note(f"going on with {run.path} at step {done}")
        session(run, kept, parts, tracker, state)


def say(parts: Parts, overrides: list[str]) -> None:
    """What will run, and what the user should know of it."""
    notes, warnings = advice(parts, overrides)
    size = sum(p.numel() for p in parts.model.parameters())
    shape = "x".join(map(str, parts.data.shape))
    console.note(f"loss {parts.loss.convention(parts.d)}")
    console.note(
        f"data {len(parts.data.splits['train'])} x {shape}, network {size} weights, {parts.settings.precision} on {parts.device}"
    )
    for line in notes:
        console.note(f"note: {line}")
    for line in warnings:
        console.warn(line)


def session(run: RunDir, config: dict[str, Any], parts: Parts, tracker: WandB, state: TrainState) -> None:
    """From here to the end of the run, whatever the end is; its status is on disk afterwards."""
    trackers: list[Tracker] = []
    code = 1
    with stop_requests() as stop:
        try:
            together.announce(config, measured(parts), parts, state)
            baseline = together.gaussian_loss(parts)
            live = console.Training(parts.settings.steps, parts.settings.max_seconds, state.step, baseline)
            trackers = [JsonLines(run.path / "metrics.jsonl", state.step), live]
            optimise(run, config, parts, state, trackers, tracker, stop)
            live.finish(0)  # the live line ends before other output begins
            conclude(run, parts, state, trackers, baseline)
            run.update(status="finished", ended=now())
            code = 0
        except Stopped as problem:
            run.update(status="preempted", ended=now())
            code = problem.exit_code
            raise Stopped(f"{problem}; go on with: scoresde train {quote(f'resume={run.path}')}", code) from None
        except Diverged as problem:
            run.update(status="diverged", ended=now(), error=str(problem))
            code = problem.exit_code
            kept = checkpoints(run.path / "checkpoints")
            last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written before that"
            raise Diverged(
                f"{problem}; {last}; a new run with a smaller optimizer.lr or optimizer.clip may do better"
            ) from None
        except processes.Lost as problem:
            run.update(status="failed", ended=now(), error=str(problem))
            raise processes.Lost(
                f"{problem}; go on from the last checkpoint with: scoresde train {quote(f'resume={run.path}')}"
            ) from problem
        except OSError as problem:
            record_failure(run, problem)
            where = f"{problem.filename}: " if problem.filename else ""
            saved = (
                "what was saved before is kept" if checkpoints(run.path / "checkpoints") else "nothing was saved yet"
            )
            raise ScoreSDEError(
                f"{where}{problem.strerror or problem}; {saved}, go on with: scoresde train {quote(f'resume={run.path}')}"
            ) from problem
        except SystemExit:  # submitit has requeued the job
            run.update(status="preempted", ended=now())
            raise
        except BaseException as problem:
            record_failure(run, problem)
            raise
        finally:
            for each in (*trackers, tracker):
                each.finish(code)


def record_failure(run: RunDir, problem: BaseException) -> None:
    with contextlib.suppress(OSError):  # the disk may be what failed; a stale `running` is told by its lock
        run.update(status="failed", ended=now(), error=f"{type(problem).__name__}: {problem}")


def prepare(parts: Parts, checkpoint: Any) -> TrainState:
    state = loop.start(parts.plan())
    if checkpoint is None:
        state.seconds = parts.settings.divergence.get("cost_seconds", 0.0)
    else:
        checkpoint.restore(state)
    return state


def optimise(
    run: RunDir, config: dict[str, Any], parts: Parts, state: TrainState, trackers: list[Tracker], wandb: WandB,
    stop: StopRequest,
) -> None:  # fmt: skip
    """The training itself; W&B starts with the first row, so that the first step does not wait for it."""

    def join_wandb() -> None:
        if wandb not in trackers:
            trackers.append(wandb)
            known = run.facts().get("wandb")
            found = wandb.begin(run.path, config, known)
            if found != known:
                run.update(wandb=found)

    def log(row: dict[str, Any]) -> None:
        join_wandb()
        for each in trackers:
            each.log(row)

    def save(state: TrainState) -> Path:
        return save_checkpoint(state, run.path / "checkpoints", parts.settings.checkpoint["keep"])

    loop.train(parts.plan(), state, loop.Watch(log, save, stop, console.note))
    join_wandb()


def conclude(run: RunDir, parts: Parts, state: TrainState, trackers: list[Tracker], baseline: float) -> None:
    """Sample, measure, draw, write, and say what came out."""
    s = parts.settings
    model = state.evaluated()
    assert isinstance(model, ScoreModel)
    turned = evaluation.overfitted(
        state.best, state.best_step, state.valid, state.step, state.samples / len(parts.data.splits["train"])
    )
    step = state.step
    if state.best_step > 0 and (s.select == "best" or (s.select == "auto" and turned)):
        step = state.best_step
        chosen = run.checkpoint(parts.device, step)
        load_weights(model, chosen.model if chosen.average is None else chosen.average)
        console.note(f"the weights of step {step} are taken: the least validation loss (select={s.select})")
    run.update(selected=step)
    console.note(f"training done in {state.seconds:.1f} s; sampling and measuring")
    found = together.measure(parts, model, measured(parts), state.average is not None, step)
    summary, samples = found.summary, found.samples
    assert samples is not None  # one of the metrics is always of samples
    summary["train_seconds"] = evaluation.plain(
        state.seconds, "s", step=state.step, threads=torch.get_num_threads(), precision=s.precision,
        compiled=not isinstance(parts.field, ScoreModel),
        **({"processes": processes.size()} if processes.size() > 1 else {}),
    )  # fmt: skip
    summary["steps_per_second"] = evaluation.plain(state.step / max(state.seconds, 1e-9), "1/s", step=state.step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    summary["peak_memory_mb"] = evaluation.plain(peak, "MB", of="the process, host memory")
    if chooser := parts.chooser():
        curve = [{key: row[key] for key in ("step", chooser.name, *chooser.reasons)} for row in state.choices]
        last = evaluation.plain(curve[-1][chooser.name], chooser.unit, step=state.step)
        summary[chooser.name] = last | chooser.facts | {"curve": curve}
    write_samples(run.path / "samples.npz", parts.data, [samples.x], len(samples.x), overwrite=True)
    with processes.alone():  # the others are done
        figures = draw(run, parts, model, found, samples.x.cpu(), baseline) if s.eval["figures"] else []
    run.write("summary.json", summary)
    for each in trackers:
        each.summary(summary, figures)
    lines = [f"run      {run.path}", *(f"figure   {path}" for path in figures)]
    try:
        run.config(trust=False)
        ours = ""
    except ScoreSDEError:  # classes of the user's own
        ours = " trust=true"
    lines += [
        f"next     scoresde sample {quote(f'run={run.path}')} n=1000 out=samples.csv{ours}",
        f"         scoresde evaluate {quote(f'run={run.path}')}{ours}",
        f"         scoresde train {quote(f'resume={run.path}')} steps={2 * s.steps}{ours}",
    ]
    console.panel(f"{parts.loss.convention(parts.d)}", summary, lines)
    for problem in (evaluation.verdict(summary, evaluation.in_words(parts.baseline)), turned):
        if problem:
            console.warn(problem)
    if "sliced_wasserstein" not in summary:
        console.warn(
            "some samples are not finite: no distance was measured (more sampler.steps or a better score may help)"
        )


def measured(parts: Parts) -> list[str]:
    """The metrics of the end of the run. Raises ScoreSDEError where one of them means nothing on this data."""
    asked = parts.settings.eval["metrics"]
    if asked is None:
        asked = [name for name in evaluation.QUICK if evaluation.unfit(name, parts.data, parts.model) is None]
    return evaluation.pick_metrics([*asked, "loss", "sliced_wasserstein"], parts.data, parts.model)


def draw(
    run: RunDir, parts: Parts, model: ScoreModel, found: evaluation.Evaluation, drawn: torch.Tensor, baseline: float
) -> list[Path]:  # fmt: skip
    from scoresde_cli import figures

    folder, title = run.path / "figures", f"{parts.loss.convention(parts.d)}, seed {parts.settings.seed}"
    paths = [
        figures.samples(parts.data, drawn, found.reference, title, folder / "samples.png"),
        figures.loss_curve(read_rows(run.path / "metrics.jsonl"), baseline, title, folder / "loss.png"),
    ]
    if found.of_classes is not None:
        paths.append(figures.class_grid(parts.data, found.of_classes, title, folder / "classes.png"))
    if "threshold" in found.summary:
        paths.append(figures.mixing([found.summary["threshold"]], title, folder / "mixing.png"))
    seen = {"score", "log_density" if parts.sde.still else "velocity"} <= model.provides
    if tuple(parts.data.shape) == (2,) and seen and not parts.sde.phase:
        paths.append(figures.field(model, parts.data, parts.settings.t_min, title, folder / "field.png"))
    return paths
