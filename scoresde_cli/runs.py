"""The run directory: created once, locked while in use, true about its status after any crash, readable by strangers.

    run.json  config.yaml  data.safetensors  metrics.jsonl  checkpoints/step-N/  summary.json  samples.npz  figures/

Reading a run executes nothing that stands in it: classes come from the shipped configs alone (unless `trust`), weights
are safetensors, the optimiser's state is read with weights_only.
"""

import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from scoresde_cli import __version__, likelihood
from scoresde_cli.compose import Parts, Stored, build, compose
from scoresde_cli.configs import shipped_targets
from scoresde_cli.datasets.base import Units
from scoresde_cli.errors import ScoreSDEError, Unreadable, one_line
from scoresde_cli.networks.model import Gaussian, ScoreModel
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.training.state import Checkpoint, checkpoints, load_weights, step_of, write_durably

FORMAT = 1
STATUSES = ("running", "finished", "preempted", "failed", "diverged")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def identity(config: Mapping[str, Any]) -> str:
    """Eight hex digits of the science in a config and its seed: what decides the numbers that come out."""
    aside = ("dir", "resume", "trust", "tracker", "log_every", "checkpoint", "device", "eval")
    science = {name: value for name, value in config.items() if name not in aside}
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:8]


def jsonable(value: Any) -> Any:
    """Plain data with NaN and infinities as text, so that every line is JSON by the standard."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


class RunDir:
    """A run directory on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, config: Mapping[str, Any], chosen: str | None) -> "RunDir":
        """A new directory: `chosen` (new or empty), else outputs/DATE/TIME-HASH. Never reuses one that holds anything."""
        if chosen is not None:
            path = Path(chosen).expanduser()
            try:
                path.mkdir(parents=True, exist_ok=True)
                occupied = any(path.iterdir())
            except OSError as problem:
                raise ScoreSDEError(f"dir={chosen}: cannot be created ({problem.strerror})") from None
            if occupied:
                hint = f"go on with it by resume={chosen}, or choose" if (path / "run.json").exists() else "choose"
                raise ScoreSDEError(f"dir={chosen}: the directory is not empty; {hint} another one")
            return cls(path)
        stamp = datetime.now()
        base = Path("outputs") / f"{stamp:%Y-%m-%d}" / f"{stamp:%H-%M-%S}-{identity(config)}"
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            for i in range(1000):
                path = base if i == 0 else base.with_name(f"{base.name}-{i}")
                try:
                    path.mkdir()
                    return cls(path)
                except FileExistsError:
                    continue
        except OSError as problem:
            raise ScoreSDEError(
                f"cannot create {base} ({problem.strerror}); choose a place that can be written to with dir=PATH"
            ) from None
        raise ScoreSDEError(f"a thousand runs named {base} exist already")

    @classmethod
    def open(cls, path: str | Path, key: str = "run") -> "RunDir":
        """An existing run directory. Raises ScoreSDEError where it is none."""
        run = cls(Path(path).expanduser())
        if not run.path.is_dir():
            raise ScoreSDEError(f"{key}={path}: no such directory")
        if not (run.path / "run.json").is_file():
            inside = sorted(p.parent.name for p in run.path.glob("*/run.json"))
            hint = f"; it holds runs: {', '.join(inside[:5])}" if inside else ""
            raise ScoreSDEError(f"{key}={path}: not a run directory (it has no run.json){hint}")
        facts = run.facts()
        if facts.get("format") != FORMAT:
            raise Unreadable(
                f"{key}={path}: made by scoresde {facts.get('scoresde', '?')} in format {facts.get('format')}, "
                f"this is scoresde {__version__}, which reads format {FORMAT}"
            )
        return run

    def facts(self) -> dict[str, Any]:
        """run.json."""
        return self._json("run.json")

    def summary(self) -> dict[str, Any]:
        """summary.json, empty where the run has not come so far."""
        return self._json("summary.json") if (self.path / "summary.json").exists() else {}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise Unreadable(f"{self.path / name}: not readable ({one_line(problem)[:120]})") from problem
        if not isinstance(found, dict):
            raise Unreadable(f"{self.path / name}: expected an object, found {type(found).__name__}")
        return found

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """A JSON file, whole or not at all."""
        write_durably(self.path / name, (json.dumps(jsonable(data), indent=1) + "\n").encode())

    def update(self, **changes: Any) -> None:
        """Change facts in run.json."""
        self.write("run.json", {**self.facts(), **changes})

    def status(self) -> str:
        """What became of the run; a `running` that nobody holds the lock of is `killed`."""
        status = str(self.facts().get("status"))
        return "killed" if status == "running" and not self.locked() else status

    def locked(self) -> bool:
        """Whether a living process works on this run."""
        try:
            with (self.path / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends, however it ends."""
        try:
            file = (self.path / "lock").open("a+")
        except OSError as problem:
            raise ScoreSDEError(f"{self.path}: cannot be written to ({problem.strerror})") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ScoreSDEError(f"{self.path}: another process works on this run ({file.read().strip()})") from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def begin(self, config: Mapping[str, Any], parts: Parts, command: list[str]) -> None:
        """Write what identifies the run: config.yaml, the data's units, run.json."""
        self.write_config(config)
        write_durably(self.path / "data.safetensors", pack_data(parts))
        (self.path / "figures").mkdir(exist_ok=True)
        self.write(
            "run.json",
            {
                "format": FORMAT, "id": identity(config), "scoresde": __version__, "command": command, "status": "running",
                "seed": parts.settings.seed, "device": str(parts.device), "precision": parts.settings.precision,
                "data": parts.data.facts, "started": now(), "sessions": [{"started": now(), "pid": os.getpid()}],
                "versions": versions(), "git": git_state(), "host": socket.gethostname(), "threads": torch.get_num_threads(),
            },
        )  # fmt: skip

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml, whole or not at all."""
        import yaml

        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_durably(self.path / "config.yaml", text.encode())

    def config(self, trust: bool) -> dict[str, Any]:
        """config.yaml, checked: no class but the shipped ones unless `trust`, no interpolation."""
        import yaml

        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as problem:
            raise Unreadable(f"{self.path / 'config.yaml'}: not readable ({one_line(problem)[:120]})") from problem
        if not isinstance(config, dict):
            raise Unreadable(f"{self.path / 'config.yaml'}: expected keys and values")
        refuse_foreign(config, self.path / "config.yaml", "", trust)
        return config

    def checkpoint(self, device: str | torch.device = "cpu", which: str | int = "last") -> Checkpoint:
        """A checkpoint, verified: `last`, `best` (least validation loss) or the one of a step."""
        found = checkpoints(self.path / "checkpoints")
        if which != "last" and found:
            step = Checkpoint.read(found[-1], device).facts["best_step"] if which == "best" else which
            chosen = [p for p in found if step_of(p) == step]
            if not chosen:
                raise ScoreSDEError(f"checkpoint={which}: {self.path} keeps those of steps {', '.join(str(step_of(p)) for p in found)}")
            return Checkpoint.read(chosen[0], device)
        if not found:
            raise Unreadable(
                f"run={self.path}: no checkpoint yet (status {self.status()}); go on with resume={self.path}"
            )
        try:
            return Checkpoint.read(found[-1], device)
        except Unreadable as problem:
            older = (
                f"; an older one is {found[-2].name}: move {found[-1].name} away to use it" if len(found) > 1 else ""
            )
            raise Unreadable(f"{problem}{older}") from problem

    def stored_data(self) -> tuple[Stored, Gaussian]:
        """Shape, names and units of the data, and its Gaussian part, without the data."""
        return unpack_data(self.path / "data.safetensors")


def refuse_foreign(node: Any, file: Path, where: str, trust: bool) -> None:
    """Walk a stranger's config: raise at the first thing that could run code."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            name = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                if not trust and value not in shipped_targets():
                    raise ScoreSDEError(
                        f"{file}: {name}={value} is not a part of scoresde; it was not run "
                        "(if you trust whoever made this run, say trust=true)"
                    )
            elif str(key).startswith("_"):
                raise ScoreSDEError(f"{file}: the key {name} is not allowed in a run's config")
            else:
                refuse_foreign(value, file, name, trust)
    elif isinstance(node, list):
        for value in node:
            refuse_foreign(value, file, where, trust)
    elif isinstance(node, str) and "${" in node:
        raise ScoreSDEError(f"{file}: {where} holds an interpolation, which a run's resolved config never does")


def pack_data(parts: Parts) -> bytes:
    """Units, names and Gaussian part as safetensors bytes."""
    units, gaussian = parts.data.units, parts.model.gaussian
    tensors = {
        "shift": units.shift, "scale": units.scale, "matrix": units.matrix, "resolution": units.resolution,
        "mean": gaussian.mean, "lam": gaussian.lam, "basis": gaussian.basis,
    }  # fmt: skip
    facts = {"shape": list(parts.data.shape), "kind": parts.data.kind, "columns": parts.data.columns}
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    return save(present, {"data": json.dumps(facts)})


def unpack_data(path: Path) -> tuple[Stored, Gaussian]:
    """The inverse of `pack_data`, from a file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["data"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = tuple(int(n) for n in facts["shape"])
        units = Units(shape, tensors["shift"], tensors.get("scale"), tensors.get("matrix"), tensors.get("resolution"))
        gaussian = Gaussian(tensors["mean"], tensors["lam"], tensors.get("basis"))
        return Stored(shape, facts["kind"], facts["columns"], units), gaussian
    except Exception as problem:  # every way in which foreign bytes can fail to be this file
        raise Unreadable(f"{path}: not readable ({one_line(problem)[:120]})") from problem


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "scipy", "hydra-core", "scikit-learn", "pandas", "wandb")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the folder the package lies in, if that is a checkout of it."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:

        def git(*args: str) -> str:
            return subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout

        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def recent(roots: tuple[str, ...] = ("outputs", "multirun")) -> list[RunDir]:
    """Run directories below the usual folders, oldest first."""
    found = [RunDir(p.parent) for root in roots for p in Path(root).glob("*/*/run.json")]
    found += [RunDir(p.parent) for p in Path("multirun").glob("*/*/*/run.json")]
    return sorted(found, key=lambda run: str(run.path))


class Run:
    """A trained run, in the user's units. Made by `load_run`.

    Attributes:
        path: the directory. config: its resolved config. summary: its summary.json. columns: names of a table's columns.
        step: training steps of the weights that are used.
    """

    def __init__(
        self, folder: RunDir, trust: bool = False, device: str | None = None, average: bool = True, which: str | int = "last",
    ) -> None:  # fmt: skip
        self.path, self.config, self.summary = folder.path, folder.config(trust), folder.summary()
        data, gaussian = folder.stored_data()
        checkpoint = folder.checkpoint(which=which)
        composed = {**self.config, "device": device or "auto", "resume": None, "dir": None, "trust": False}
        self.parts = compose(composed, data, gaussian)
        self.columns, self.units, self.shape = data.columns, data.units, data.shape
        self.step = int(checkpoint.facts["step"])
        self.averaged = average and checkpoint.average is not None
        chosen = checkpoint.average if self.averaged else checkpoint.model
        self.model: ScoreModel = self.parts.model.eval()
        load_weights(self.model, chosen or checkpoint.model)

    def _model_coordinates(self, u: Any) -> Tensor:
        u = torch.as_tensor(np.asarray(u, dtype=np.float64))
        if tuple(u.shape[1:]) != self.shape:
            raise ScoreSDEError(f"x has the shape {tuple(u.shape)}, expected (n, {', '.join(map(str, self.shape))})")
        return self.units.to_model(u).to(device=self.parts.device, dtype=self.parts.dtype)

    @torch.no_grad()
    def score(self, x: Any, t: float) -> np.ndarray:
        """grad_x log p_t(x) for x (n, *D) in the user's units and a time t in [t_min, T]: (n, *D), per user's unit.

        The noise acts in model coordinates z, x = F z + shift; the score in x is F^{-T} times the score in z.
        """
        sde = self.parts.sde
        if not self.parts.settings.t_min <= t <= sde.T:
            raise ScoreSDEError(f"t={t}: expected a time in [{self.parts.settings.t_min}, {sde.T}]")
        z = self._model_coordinates(x)
        s = (
            self.model.score(z, torch.full((len(z),), float(t), device=z.device, dtype=z.dtype))
            .cpu()
            .double()
            .flatten(1)
        )
        units = self.units
        s = s / units.scale if units.scale is not None else torch.linalg.solve(units.matrix.T, s.T).T  # type: ignore[union-attr]
        return s.reshape(-1, *self.shape).numpy()

    def sample_model(self, n: int, seed: int = 0, sampler: Sampler | None = None, progress: Any = None) -> Any:
        """n samples in model coordinates, with their NFE (samplers.base.Samples)."""
        chosen = sampler or self.parts.sampler
        return chosen.sample(
            self.model, self.parts.sde, self.shape, n, seed, device=self.parts.device, dtype=self.parts.dtype,
            progress=progress,
        )  # fmt: skip

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """n samples (n, *D) in the user's units, by the run's sampler."""
        return self.units.to_user(self.sample_model(n, seed).x.cpu()).numpy()

    def log_prob(self, x: Any, steps: int = 50) -> np.ndarray:
        """log p(x) in nats per sample, (n,), density in the user's units, for x (n, *D) in these units.

        By the probability-flow ODE with the exact trace and `steps` Runge-Kutta steps (likelihood.py): the density of the model at
        t_min, that is of data with that little noise.
        """
        z = self._model_coordinates(x)
        log = likelihood.log_prob(self.model, self.parts.sde, z, self.parts.settings.t_min, steps)
        return (log + self.units.log_det()).cpu().numpy()

    def dataset(self) -> Any:
        """The run's data set, built anew (a table is read from its file again)."""
        return build(self.config["data"], "data")


def load_run(path: str | Path, trust: bool = False, device: str | None = None) -> Run:
    """A trained run from its directory: `.score(x, t)`, `.sample(n)`, `.log_prob(x)`, `.config`, `.summary`.

    Args:
        path: the run directory.
        trust: allow classes from outside this package in its config. Leave it off for runs that are not your own.
        device: cpu, cuda, mps; None for the best there is.

    Raises ScoreSDEError where the directory is no run or asks for foreign classes, Unreadable where it is damaged.
    """
    return Run(RunDir.open(path), trust, device)


def command_line() -> list[str]:
    """The command line as typed."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
