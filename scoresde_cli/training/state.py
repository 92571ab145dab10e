"""All that a resume needs, in one object: weights, their average, the optimiser's moments, counters.

Randomness is not among it: every step draws from a generator of (seed, step).
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scoresde_cli.errors import Unreadable, one_line

FORMAT = 3
COUNTERS = ("step", "samples", "seconds", "loss_count", "valid", "best", "best_step")


@dataclass
class TrainState:
    """Everything that changes while a run trains.

    Attributes:
        step: steps done. samples: training samples seen. seconds: of training, over all sessions.
        loss_sum, loss_count: the window since the last logging step; the sum stays on the device.
        valid: the validation loss at the last checkpoint. best: the least so far; best_step: the step of its checkpoint.
        choices: of n_proj=auto (directions.py) or dsm_cv (mixing.py), oldest first: step, what was chosen, what it rests on.
    """

    model: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    loss_sum: torch.Tensor
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss_count: int = 0
    valid: float = float("inf")
    best: float = float("inf")
    best_step: int = -1
    choices: list[dict[str, Any]] = field(default_factory=list)

    def evaluated(self) -> nn.Module:
        """The weights that are sampled and measured: the average where there is one."""
        return self.model if self.average is None else self.average

    def update_average(self, decay: float) -> None:
        """One step of the moving average, corrected for its bias as Adam's moments are (Kingma and Ba 2015, section 3).

        After n updates the weights are averaged with decay (decay - decay^(n+1)) / (1 - decay^(n+1)), so the untrained ones
        have no part: uncorrected, at 0.999, they would still count 5 percent after 3000 steps.
        """
        if self.average is not None:
            power = decay ** (self.step + 1)
            update = get_ema_multi_avg_fn((decay - power) / (1.0 - power))
            update(list(self.average.parameters()), list(self.model.parameters()), 0)
            # What a network keeps beside its weights (BatchNorm's statistics) is taken as it is.
            for kept, found in zip(network_of(self.average).buffers(), network_of(self.model).buffers(), strict=True):
                kept.copy_(found)


def network_of(model: nn.Module) -> nn.Module:
    """The network in a score model, whose own buffers are constants."""
    return getattr(model, "network", model)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as problem:  # a full disk does not say which file it was
        problem.filename = problem.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(state: TrainState, folder: Path, keep: int) -> Path:
    """Write folder/step-N whole or not at all; then drop all but the last `keep` and the best."""
    final = folder / f"step-{state.step:07d}"
    if final.exists():
        return final
    buffer = io.BytesIO()
    torch.save({"optimizer": state.optimizer.state_dict(), "loss_sum": state.loss_sum}, buffer)
    contents = {"model.safetensors": save(weights(state.model)), "optimizer.pt": buffer.getvalue()}
    if state.average is not None:
        contents["ema.safetensors"] = save(weights(state.average))
    facts = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in COUNTERS},
        **({"choices": state.choices} if state.choices else {}),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents["checkpoint.json"] = json.dumps(facts, indent=1).encode()
    folder.mkdir(exist_ok=True)
    temporary = folder / f".step-{state.step}-{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        for name, content in contents.items():
            write_durably(temporary / name, content)
        temporary.rename(final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) != state.best_step:
            old.rename(folder / f".{old.name}.tmp")  # so that a crash leaves no half of a checkpoint
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read and verified; nothing in it is executed."""

    facts: dict[str, Any]
    model: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: TrainState) -> "Checkpoint":
        """What a checkpoint of this state would hold."""
        facts = {name: getattr(state, name) for name in (*COUNTERS, "choices")}
        rest = {"optimizer": state.optimizer.state_dict(), "loss_sum": state.loss_sum}
        return cls(facts, weights(state.model), None if state.average is None else weights(state.average), rest)

    @classmethod
    def read(cls, folder: Path, device: str | torch.device = "cpu") -> "Checkpoint":
        """Raises Unreadable where a file is missing, altered or damaged, or of another format."""
        try:
            facts = json.loads((folder / "checkpoint.json").read_text())
            if facts["format"] != FORMAT:
                raise Unreadable(
                    f"checkpoint {folder}: format {facts['format']}, this version of scoresde reads format {FORMAT}"
                )
            for name, digest in facts["sha256"].items():
                if Path(name).name != name:
                    raise Unreadable(f"checkpoint {folder}: it names a file outside itself ({name!r})")
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise Unreadable(f"checkpoint {folder}: {name} is damaged (its checksum does not match)")
            for name in COUNTERS:
                if isinstance(facts[name], bool) or not isinstance(facts[name], int | float):
                    raise Unreadable(f"checkpoint {folder}: {name} is {facts[name]!r}, expected a number")
            if not all(is_choice(row) for row in facts.get("choices", [])):
                raise Unreadable(f"checkpoint {folder}: choices is not a list of what was chosen, and its reasons")
            tensors = {
                name: load_file(folder / f"{name}.safetensors", device=str(device))
                for name in ("model", "ema")
                if f"{name}.safetensors" in facts["sha256"]
            }
            for name, found in tensors.items():
                if not all(tensor.isfinite().all() for tensor in found.values()):
                    raise Unreadable(f"checkpoint {folder}: {name}.safetensors holds values that are not finite")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's remarks on a foreign pickle, which is refused below
                rest = torch.load(folder / "optimizer.pt", weights_only=True, map_location=device)
            return cls(facts, tensors["model"], tensors.get("ema"), rest)
        except Unreadable:
            raise
        except SafetensorError as problem:
            raise Unreadable(f"checkpoint {folder}: not a safetensors file ({one_line(problem)[:120]})") from problem
        except Exception as problem:  # every way in which foreign bytes can fail to be a checkpoint
            if "weights_only" in str(problem).lower() or "Unpickling" in type(problem).__name__:
                why = "optimizer.pt holds something else than tensors and numbers; it was not executed"
            else:
                why = f"{type(problem).__name__}: {one_line(problem)[:160]}"
            raise Unreadable(f"checkpoint {folder}: refused, {why}") from problem

    def restore(self, state: TrainState) -> None:
        """Put everything back into a state of the same shape."""
        load_weights(state.model, self.model)
        if state.average is not None and self.average is not None:
            load_weights(state.average, self.average)
        self.check_moments(state)
        state.optimizer.load_state_dict(self.optimizer["optimizer"])
        state.loss_sum = self.optimizer["loss_sum"].to(state.loss_sum.device)
        for name in COUNTERS:
            setattr(state, name, self.facts[name])
        state.choices = list(self.facts.get("choices", []))

    def check_moments(self, state: TrainState) -> None:
        """Refuse an optimiser's state that is not this network's: the fused kernels would read past its end."""
        shapes = {
            i: p.shape for i, p in enumerate(p for group in state.optimizer.param_groups for p in group["params"])
        }
        try:
            moments = self.optimizer["optimizer"]["state"]
            fits = moments.keys() <= shapes.keys() and all(
                one[name].shape == shapes[i] and one[name].is_floating_point()
                for i, one in moments.items()
                for name in ("exp_avg", "exp_avg_sq")
            )
            groups = [len(group["params"]) for group in self.optimizer["optimizer"]["param_groups"]]
            fits = fits and groups == [len(group["params"]) for group in state.optimizer.param_groups]
            fits = fits and self.optimizer["loss_sum"].shape == ()
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise Unreadable("the checkpoint does not fit the run's network: optimizer.pt is another one's")


CHOICES = (
    {"step", "n_proj", "r", "data", "projection"},
    {"step", "threshold", "w", "density", "cross", "square", "plain"},
)


def is_choice(row: Any) -> bool:
    """Whether a row of `choices` is one: of known names, with whole numbers, numbers and lists of numbers."""
    whole = all(type(row[name]) is int and row[name] >= 0 for name in ("step", "n_proj") if name in row)
    values = [v for value in row.values() for v in (value if isinstance(value, list) else [value])]
    return row.keys() in CHOICES and whole and all(type(v) in (int, float) for v in values)


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises Unreadable where the tensors are not this model's."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as problem:
        raise Unreadable(f"the checkpoint does not fit the run's network: {one_line(problem)[:200]}") from problem
