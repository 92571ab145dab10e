"""What depends on the machine, settled before a run begins and kept in its config: threads, chunk, compilation, costs.

They decide speed, memory and the last bits of the numbers, so a resumed or repeated run takes what the first one found.
"""

import contextlib
import dataclasses
import math
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from scoresde_cli import divergence, processes
from scoresde_cli.compose import ALL_THREADS, Parts
from scoresde_cli.errors import ScoreSDEError, one_line
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator, normal
from scoresde_cli.tracking import console
from scoresde_cli.training import directions, rows

# Seen on two CPU cores, perceptrons of 0.05 to 5 million weights: 7 to 30 s to compile forward and backward, and a step
# that is 0 to 30 percent shorter. `auto` compiles where a gain of GAIN would repay the wait, and keeps what is faster.
COMPILE_SECONDS, GAIN = 20.0, 0.1
AGREE = 0.5  # of a weight's gradient: what bfloat16 rounds away stays below 0.2, and what is lost is 1
LONG = 60.0  # seconds of training from which on it is said beforehand
MOST_BYTES = 2 << 30  # for the tangents that the backward pass needs, and never more than a quarter of the free memory


def settle(parts: Parts, config: dict[str, Any], done: int = 0) -> tuple[Parts, dict[str, Any]]:
    """The parts as they will run, `field` compiled or not, and the config with `auto` and null replaced by what was found."""
    threads = parts.settings.threads or pick_threads(parts)
    torch.set_num_threads(threads)
    chunk = parts.settings.divergence["chunk"]
    plain = parts.field
    assert isinstance(plain, ScoreModel)
    with undisturbed(parts):
        try:
            plain.chunk = pick_chunk(parts) if chunk == "auto" else chunk
            field = pick_field(parts, plain, done)
            say_how_long(parts, field, done)
            divergences = {**parts.settings.divergence, "chunk": plain.chunk, **pick_costs(parts)}
        except (ScoreSDEError, OSError, MemoryError):
            raise
        except Exception as problem:
            raise ScoreSDEError(
                f"a training step of {type(plain.network).__name__} with loss={parts.loss.name} fails on a batch of "
                f"{tuple(batch(parts).shape)}: {type(problem).__name__}: {one_line(problem)[:200]}"
            ) from problem
    found = {"threads": threads, "divergence": divergences, "compile": field is not plain}
    kept = dataclasses.replace(parts.settings, divergence=divergences)
    return dataclasses.replace(parts, field=field, settings=kept), {**config, **found}


def settle_together(parts: Parts, config: dict[str, Any], done: int = 0) -> tuple[Parts, dict[str, Any]]:
    """`settle` for this process's part of a batch: the first one measures, alone on the machine, and the others take what it finds.

    The parts are then those of the whole batch.
    """
    rows.check(parts.model.network, parts.settings.batch_size, parts.settings.accumulate)
    if processes.size() == 1:
        return settle(parts, config, done)
    part = parts.settings.batch_size // processes.size()
    mine = dataclasses.replace(parts, settings=dataclasses.replace(parts.settings, batch_size=part))
    with processes.alone():
        mine, config = settle(mine, config, done)
    whole = dataclasses.replace(mine.settings, batch_size=parts.settings.batch_size)
    return dataclasses.replace(mine, settings=whole), config


def pick_threads(parts: Parts) -> int:
    """One thread for a step of under 1 GFlop, where a second one gains little and loses much on a busy machine."""
    passes = 1 + parts.loss.tangents(parts.d)
    small = 3 * work(parts) * parts.settings.batch_size * passes < 1e9
    return 1 if small else max(1, ALL_THREADS // processes.local_size())


def work(parts: Parts) -> float:
    """Floating-point operations of the network for one sample: two for each weight, more where one serves many pixels."""
    if not getattr(parts.model.network, "spatial", False):
        return 2.0 * sum(p.numel() for p in parts.model.parameters())
    x = torch.zeros(1, *parts.sde.state(parts.data.shape), device=parts.device, dtype=parts.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        parts.model.score(x, torch.full((1,), 0.5 * parts.sde.T, device=x.device, dtype=x.dtype))
    return float(counted.get_total_flops())


def say_how_long(parts: Parts, field: FieldModel, done: int) -> None:
    """Time and memory of a step and the estimate of the whole, in a line, where it is more than LONG seconds."""
    s = parts.settings
    each = s.accumulate * seconds_of(parts, [field], 1)[0]
    whole = min((s.steps - done) * each, s.max_seconds or math.inf)
    if whole <= LONG:
        return
    if parts.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(parts.device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    minutes = round(whole / 60)
    console.note(
        f"about {each:.2g} s a step, {minutes} minute{'s' * (minutes > 1)} for {min(s.steps - done, round(whole / each))} steps; "
        f"memory {peak:.0f} MB so far"
    )


def batch(parts: Parts) -> Tensor:
    """Training rows enough for one step (one part of it with `accumulate`), on the device."""
    picked = torch.arange(parts.settings.batch_size // parts.settings.accumulate) % len(parts.data.splits["train"])
    return parts.data.splits["train"][picked].to(device=parts.device, dtype=parts.dtype)


def available_memory(device: torch.device) -> int:
    """Free bytes on the device; on the host, what the kernel and the control group leave to this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file"))
        found.append(int(limit) - int(used) + cached)  # where there is no limit it says "max"
    return max(1, min(found))


class Created(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on: at least what the backward pass keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def bytes_of(field: FieldModel, x: Tensor, t: Tensor, directions: int) -> int:
    """Bytes that are made to push this many directions."""
    v = normal((directions, *x.shape), generator(0, "chunk", device=x.device), x.dtype)
    with Created() as made:
        divergence.score_and_projections(field, x, t, v)
    return made.bytes


def pick_chunk(parts: Parts) -> int | None:
    """Directions at a time, all where their activations fit; None for a loss that pushes none."""
    loss = parts.loss
    count = directions.most(loss, parts.d) if isinstance(loss, SSM) and loss.automatic else loss.tangents(parts.d)
    if not parts.loss.second_order or count == 0:
        return None
    x = batch(parts)
    x = x.new_zeros(len(x), *parts.sde.state(parts.data.shape))
    t = torch.full((len(x),), 0.5 * parts.sde.T, device=x.device, dtype=x.dtype)
    one, two = (bytes_of(parts.field, x, t, directions) for directions in (1, 2))
    budget = min(MOST_BYTES, available_memory(parts.device) // 4)
    fit = max(1, 1 + (budget - one) // max(1, two - one))
    chunks = -(-count // fit)
    return -(-count // chunks)


def pick_costs(parts: Parts) -> dict[str, float]:
    """What n_proj=auto chooses by: the costs of a tangent and of the exact trace, in units of a step without tangents."""
    loss, known = parts.loss, parts.settings.divergence
    names = ("tangent_cost", "exact_cost")
    if not isinstance(loss, SSM) or not loss.automatic or all(known.get(name, "auto") != "auto" for name in names):
        return {}
    began = time.perf_counter()
    measured = directions.cost_of_a_tangent(parts.plan(), loss, parts.d)
    found = {name: cost for name, cost in zip(names, measured, strict=True) if known.get(name, "auto") == "auto"}
    return found | {"cost_seconds": round(time.perf_counter() - began, 3)}


def pick_field(parts: Parts, plain: ScoreModel, done: int) -> FieldModel:
    """The field of the training loss: compiled where that is asked for, or pays in the steps that are left."""
    wanted, s = parts.settings.compile, parts.settings
    if wanted is False:
        return plain
    if s.n_proj == "auto" or parts.loss.varying:
        if wanted is True:
            what = "n_proj=auto" if s.n_proj == "auto" else f"loss={parts.loss.name}"
            console.note(f"compile=true has no effect with {what}: each number of directions would be compiled anew")
        return plain
    count = parts.loss.tangents(parts.d)
    if parts.loss.second_order and plain.chunk is not None and plain.chunk < count:
        if wanted is True:
            console.note(f"compile=true has no effect with {plain.chunk} of {count} directions at a time")
        return plain
    if wanted == "auto":
        expected = (s.steps - done) * seconds_of(parts, [plain])[0]
        if GAIN * min(expected, s.max_seconds or expected) < COMPILE_SECONDS:
            return plain
    from scoresde_cli.training.compiled import Compiled

    console.note("compiling the training step (compile=false leaves it as it is)")
    began = time.perf_counter()
    try:
        compiled = Compiled(plain)
        step(parts, compiled)
    except Exception as problem:
        console.warn(
            f"compile={wanted}: not possible with this network on this machine, going on without "
            f"({type(problem).__name__}: {one_line(problem)[:160]})"
        )
        return plain
    took = f"compiled in {time.perf_counter() - began:.0f} s"
    if wrong := astray(parts, plain, compiled):
        console.warn(f"compile={wanted}: the compiled step has another gradient ({wrong}), going on without")
        return plain
    if wanted is True:
        console.note(took)
        return compiled
    slow, fast = seconds_of(parts, [plain, compiled], 7)
    kept = "" if fast < slow else "; going on without"
    console.note(f"{took}: {1e3 * slow:.2f} ms a step without, {1e3 * fast:.2f} ms with{kept}")
    return compiled if fast < slow else plain


def step(parts: Parts, field: FieldModel) -> float:
    """Seconds of one loss and its gradient, on draws that are thrown away."""
    x0, source = batch(parts), generator(parts.settings.seed, "trial", device=parts.device)
    began = time.perf_counter()
    if parts.data.labels is not None:
        field = field.labelled(parts.data.labels["train"][:1].to(x0.device).expand(len(x0)))
    parts.loss(field, parts.sde, x0, source).mean().backward()
    if parts.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def astray(parts: Parts, plain: ScoreModel, compiled: FieldModel) -> str | None:
    """The weight whose gradient the compiled step has most wrong, where that is by more than AGREE; None otherwise.

    Compilers err: bfloat16 gradients of a U-Net's coarse levels were seen to vanish. The weights are moved for the while, as those
    of a fresh network that starts at zero have no gradient to compare. A network that draws random numbers is not compared.
    """
    weights = dict(plain.named_parameters())
    kept = {name: p.detach().clone() for name, p in weights.items()}
    source = generator(parts.settings.seed, "astray", device=parts.device)

    def gradients(field: FieldModel, seed: int) -> dict[str, Tensor]:
        plain.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        step(parts, field)
        return {name: p.grad.double() for name, p in weights.items() if p.grad is not None}

    try:
        with torch.no_grad():
            for p in weights.values():
                p.add_(
                    normal(tuple(p.shape), source, p.dtype),
                    alpha=0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1,
                )
        first, again, found = gradients(plain, 0), gradients(plain, 1), gradients(compiled, 0)
    finally:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(kept[name])
    sizes = {name: float(g.norm()) for name, g in first.items()}
    floor = 1e-3 * max(sizes.values(), default=0.0)
    apart = {
        name: float((first[name] - found.get(name, 0.0)).norm()) / size for name, size in sizes.items() if size > floor
    }
    if any(float((first[name] - again[name]).norm()) > 0.01 * sizes[name] for name in apart):
        return None
    worst = max(apart, key=lambda name: apart[name], default=None)
    return None if worst is None or apart[worst] <= AGREE else f"of {worst}, by {apart[worst]:.2g} of its size"


def seconds_of(parts: Parts, fields: list[FieldModel], repeats: int = 3) -> list[float]:
    """The median seconds of a step with each field, taken in turns, after one that warms up."""
    for field in fields:
        step(parts, field)
    times = [[step(parts, field) for field in fields] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@contextlib.contextmanager
def undisturbed(parts: Parts) -> Iterator[None]:
    """Steps in here leave no trace: no gradient, no moved buffer, no random number of the global generator."""
    buffers = {name: buffer.clone() for name, buffer in parts.model.named_buffers()}
    with torch.random.fork_rng([parts.device] if parts.device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in parts.model.named_buffers():
                    buffer.copy_(buffers[name])
            parts.model.zero_grad(set_to_none=True)
