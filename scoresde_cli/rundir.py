"""The run directory: created once, locked while in use, true about its status after any crash, readable by strangers.

    run.json  config.yaml  data.safetensors  metrics.jsonl  checkpoints/step-N/  summary.json  samples.npz  figures/

Reading a run executes nothing that stands in it: classes come from the shipped configs alone (unless `trust`), weights
are safetensors, the optimiser's state is read with weights_only.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from scoresde_cli import __version__, processes
from scoresde_cli.compose import Parts
from scoresde_cli.configs import moved, refuse_foreign
from scoresde_cli.errors import ScoreSDEError, Unreadable, one_line
from scoresde_cli.networks.model import Gaussian
from scoresde_cli.provenance import git_state, identity, jsonable, now, science, versions
from scoresde_cli.stored import Stored, pack_data, unpack_data
from scoresde_cli.training.state import Checkpoint, checkpoints, step_of, write_durably

FORMAT = 3
STATUSES = ("running", "finished", "preempted", "failed", "diverged")


class RunDir:
    """A run directory on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def check_new(cls, chosen: str) -> "RunDir":
        """Raises ScoreSDEError where `chosen` is neither new nor an empty directory; creates nothing."""
        path = Path(chosen).expanduser()
        try:
            if path.exists() and not path.is_dir():
                raise ScoreSDEError(f"dir={chosen}: it is a file, expected a directory")
            occupied = path.is_dir() and any(path.iterdir())
        except OSError as problem:
            raise ScoreSDEError(f"dir={chosen}: cannot be used ({problem.strerror})") from None
        if occupied:
            hint = f"go on with it by resume={chosen}, or choose" if (path / "run.json").exists() else "choose"
            raise ScoreSDEError(f"dir={chosen}: the directory is not empty; {hint} another one")
        return cls(path)

    @classmethod
    def create(cls, config: Mapping[str, Any], chosen: str | None) -> "RunDir":
        """A new directory: `chosen` (new or empty), else outputs/DATE/TIME-HASH. Never reuses one that holds anything."""
        if chosen is not None:
            run = cls.check_new(chosen)
            try:
                run.path.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise ScoreSDEError(f"dir={chosen}: cannot be created ({problem.strerror})") from None
            return run
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
        if not str(path) or not run.path.is_dir():
            what = "a file, expected a directory" if str(path) and run.path.is_file() else "no such directory"
            raise ScoreSDEError(f"{key}={path}: {what}")
        if not (run.path / "run.json").is_file():
            inside = sorted(p.parent.name for p in run.path.glob("*/run.json"))
            hint = f"; it holds runs: {', '.join(inside[:5])}" if inside else ""
            raise ScoreSDEError(f"{key}={path}: not a run directory (it has no run.json){hint}")
        # Writing through a stranger's link would reach outside. W&B makes links inside the folders of its own sessions, and
        # never writes to an old one.
        found = [p.relative_to(run.path) for p in run.path.rglob("*") if p.is_symlink()]
        links = [str(p) for p in found if not (p.parts[0] == "wandb" and len(p.parts) > 2)]
        if links:
            raise ScoreSDEError(
                f"{key}={path}: it holds links ({', '.join(links[:3])}), which a run never makes; nothing was read"
            )
        facts = run.facts()
        if facts.get("format") != FORMAT:
            raise Unreadable(
                f"{key}={path}: made by scoresde {facts.get('scoresde', '?')} in format {facts.get('format')}, "
                f"this is scoresde {__version__}, which reads format {FORMAT}"
            )
        return run

    def facts(self) -> dict[str, Any]:
        """run.json."""
        found = self._json("run.json")
        if found.get("format") == FORMAT:
            kinds = {"status": str, "data": dict, "sessions": list, "seed": int, "host": str}
            for name, kind in kinds.items():
                if not isinstance(found.get(name), kind):
                    raise Unreadable(f"{self.path / 'run.json'}: damaged ({name} is {found.get(name)!r})")
        return found

    def summary(self) -> dict[str, Any]:
        """summary.json, empty where the run has not come so far."""
        found = self._json("summary.json") if (self.path / "summary.json").exists() else {}
        try:
            return {name: measured(entry) for name, entry in found.items()}
        except (TypeError, KeyError, ValueError):
            raise Unreadable(f"{self.path / 'summary.json'}: expected entries with a value each") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
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
            for left in range(10, -1, -1):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left:
                        file.seek(0)
                        raise ScoreSDEError(
                            f"{self.path}: another process works on this run ({file.read().strip()})"
                        ) from None
                    time.sleep(0.05)  # somebody may just be looking whether it is held
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def begin(self, config: Mapping[str, Any], parts: Parts, command: list[str]) -> None:
        """Write what identifies the run: config.yaml, the data's units, run.json; all of it at once, or nothing."""
        for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # by a process that was killed in here
            if (
                left.name.removeprefix(f".{self.path.name}.").removesuffix(".tmp").isdigit()
            ):  # not of lr=1.5 beside lr=1
                shutil.rmtree(left, ignore_errors=True)
        whole = RunDir(self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp"))
        whole.path.mkdir()
        try:
            whole._describe(config, parts, command)
            whole.path.rename(self.path)  # over the empty directory that `create` claimed
        except OSError as problem:
            raise ScoreSDEError(f"{self.path}: cannot be begun ({problem.strerror})") from None
        finally:
            shutil.rmtree(whole.path, ignore_errors=True)

    def _describe(self, config: Mapping[str, Any], parts: Parts, command: list[str]) -> None:
        self.write_config(config)
        write_durably(self.path / "data.safetensors", pack_data(parts.data, parts.model.gaussian, parts.sde.kept))
        (self.path / "figures").mkdir()
        (self.path / "lock").touch()
        self.write(
            "run.json",
            {
                "format": FORMAT, "id": identity(config), "science": science(config), "scoresde": __version__, "command": command,
                "status": "running",
                "seed": parts.settings.seed, "device": str(parts.device), "precision": parts.settings.precision,
                "data": parts.data.facts, "started": now(),
                "sessions": [{"started": now(), "pid": os.getpid(), "processes": processes.size()}],
                "versions": versions(), "git": git_state(), "host": socket.gethostname(), "threads": torch.get_num_threads(),
            },
        )  # fmt: skip

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml, whole or not at all."""
        import yaml

        class Plain(yaml.SafeDumper):
            def ignore_aliases(self, data: Any) -> bool:
                return True

        text = yaml.dump(dict(config), Dumper=Plain, sort_keys=False, allow_unicode=True)
        write_durably(self.path / "config.yaml", text.encode())

    def config(self, trust: bool) -> dict[str, Any]:
        """config.yaml, checked: no class but the shipped ones unless `trust`, no interpolation."""
        import yaml

        try:
            text = (self.path / "config.yaml").read_text(encoding="utf-8")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                raise ValueError("it holds aliases, which a run's config never does")
            config = moved(yaml.safe_load(text))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
            raise Unreadable(f"{self.path / 'config.yaml'}: not readable ({one_line(problem)[:120]})") from problem
        if not isinstance(config, dict):
            raise Unreadable(f"{self.path / 'config.yaml'}: expected keys and values")
        refuse_foreign(config, self.path / "config.yaml", "", trust)
        return config

    def altered(self) -> bool:
        """Whether config.yaml says another thing than when the run began, but for its budget."""
        import yaml

        now = science(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        return bool(self.facts().get("science", now) != now)

    def checkpoint(self, device: str | torch.device = "cpu", which: str | int = "last") -> Checkpoint:
        """A checkpoint, verified: `last`, `selected` (the one that was measured), `best` (least validation loss) or a step's."""
        found = {step_of(p): p for p in checkpoints(self.path / "checkpoints")}
        if not found:
            raise Unreadable(
                f"run={self.path}: no checkpoint yet (status {self.status()}); go on with resume={self.path}"
            )
        newest = max(found)
        if which == "selected":
            which = self.facts().get("selected", "last")
        if which == "best":
            which = Checkpoint.read(found[newest], device).facts["best_step"]
        step = newest if which == "last" else which
        if step not in found:
            kept = ", ".join(map(str, found))
            raise ScoreSDEError(f"checkpoint={which}: {self.path} keeps those of steps {kept}")
        try:
            return Checkpoint.read(found[step], device)
        except Unreadable as problem:
            older = [p.name for n, p in found.items() if n < step]
            hint = f"; an older one is {older[-1]}: move {found[step].name} away to use it" if older else ""
            raise Unreadable(f"{problem}{hint}") from problem

    def stored_data(self) -> tuple[Stored, Gaussian]:
        """Shape, names and units of the data, and its Gaussian part, without the data."""
        return unpack_data(self.path / "data.safetensors")


def measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a summary with all its fields; NaN and infinities stand as text in JSON. Raises where it is none."""
    whole = {"ci": None, "floor": None, "floor_high": None, "unit": "", "protocol": {}, **entry}
    if not isinstance(whole["unit"], str) or not isinstance(whole["protocol"], dict):
        raise TypeError
    high = whole["floor_high"]
    return whole | {"value": float(entry["value"]), "floor_high": None if high is None else float(high)}


def recent() -> list[RunDir]:
    """Run directories in this folder and in those that `train` and `ablate` make in it, by name."""
    places = ("*", "outputs/*/*", "multirun/*/*", "multirun/*/*/*", "studies/*/runs/*")
    found = {
        p.parent for place in places for p in Path().glob(f"{place}/run.json") if not p.parent.name.startswith(".")
    }
    return [RunDir(path) for path in sorted(found, key=str)]
