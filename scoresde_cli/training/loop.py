"""The training loop. Every step draws from a generator of (seed, step); the loss is read back on logging steps only."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde_cli import processes
from scoresde_cli.errors import Diverged
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import Loss
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator, seed_global, uniform
from scoresde_cli.sdes.base import SDE
from scoresde_cli.training import rows
from scoresde_cli.training.optimizer import Adam
from scoresde_cli.training.paths import Paths
from scoresde_cli.training.state import TrainState
from scoresde_cli.training.stop import StopRequest

VALIDATION_ROWS = 2000


@dataclass(frozen=True)
class Plan:
    """What the loop needs to know: parts and budgets.

    `field` is the model as the training loss sees it: itself, or of lower precision, or compiled, on the same weights.
    """

    model: ScoreModel
    field: FieldModel
    sde: SDE
    loss: Loss
    optimizer: Adam
    train: Tensor
    valid: Tensor
    baseline: ScoreModel
    seed: int
    steps: int
    max_seconds: float | None
    batch_size: int
    ema: float | None
    log_every: int
    save_every: int
    labels: Tensor | None = None  # (n,) of the training rows
    label_dropout: float = 0.0
    chooser: "Chooser | None" = None
    accumulate: int = 1  # parts of a batch, one after the other, whose mean gradient is the step's
    paths: Paths | None = None  # where x_t is known by simulation alone


class Chooser(Protocol):
    """What a loss leaves open to be chosen while training, as a function of the weights, the seed and the step."""

    name: str  # of what is chosen: a key of the rows of TrainState.choices, and a column of metrics.jsonl
    unit: str
    reasons: tuple[str, ...]  # other keys of the rows that the summary keeps
    facts: dict[str, Any]  # what a reader of the rows should know

    def __call__(self, plan: Plan, state: TrainState) -> tuple[Plan, str | None]:
        """The plan of the next step, and a line where it is another one; what it rests on is added to state.choices."""


@dataclass
class Watch:
    """What the loop tells the world: a row on logging steps, the state when it is to be saved, a line now and then."""

    log: Callable[[dict[str, Any]], None]
    save: Callable[[TrainState], Any]
    stop: StopRequest = field(default_factory=StopRequest)
    say: Callable[[str], None] = lambda line: None


def start(plan: Plan) -> TrainState:
    """The state before the first step."""
    average = None if plan.ema is None else copy.deepcopy(plan.model)
    zero = torch.zeros((), dtype=torch.float32, device=plan.train.device)
    return TrainState(plan.model, average, plan.optimizer.build(plan.model.network.parameters()), zero)


@torch.no_grad()
def mean_loss(loss: Loss, model: FieldModel, sde: SDE, x0: Tensor, seed: int, purpose: str) -> Tensor:
    """The loss of each row of x0 (B, *D), in parts of a size that fits memory; the draws depend on seed and purpose alone."""
    parts = x0.split(500)

    def of_part(i: int) -> tuple[Tensor]:
        return (loss(model, sde, parts[i], generator(seed, purpose, i, device=x0.device)),)

    return torch.cat([values for (values,) in processes.shared(len(parts), of_part)]).to(x0.device).double()


def validation_loss(plan: Plan, state: TrainState) -> float:
    """The loss on held-out data with the evaluated weights, relative to the Gaussian part on the same draws."""
    reference = plan.loss.reference(plan.valid[0].numel())
    x0 = plan.valid[:VALIDATION_ROWS]
    model = state.evaluated()
    training = model.training
    values = mean_loss(reference, model.eval(), plan.sde, x0, plan.seed, "valid")  # type: ignore[arg-type]
    model.train(training)
    baseline = mean_loss(reference, plan.baseline, plan.sde, x0, plan.seed, "valid")
    return float((values - baseline).mean())


def draw_batch(plan: Plan, source: torch.Generator) -> tuple[FieldModel, Tensor]:
    """The field, given the labels where there are any, and a part of the batch (batch_size / accumulate, *D)."""
    size = plan.batch_size // plan.accumulate
    picked = torch.randint(len(plan.train), (size,), generator=source, device=plan.train.device)
    return take(plan, picked, source)


def take(plan: Plan, picked: Tensor, source: torch.Generator) -> tuple[FieldModel, Tensor]:
    """The field, given the labels of these training rows where there are any, and the rows."""
    field = plan.field
    if plan.labels is not None:
        hidden = uniform((len(picked),), source) < plan.label_dropout
        field = field.labelled(torch.where(hidden, -1, plan.labels[picked]))
    return field, plan.train[picked]


def batch_losses(plan: Plan, step: int, source: torch.Generator) -> Tensor:
    """The loss of each sample of a part of a step's batch, (batch_size / accumulate,); of several processes, in this one's rows."""
    if plan.paths is None:
        field, x0 = draw_batch(plan, source)
        return plan.loss(rows.share(field), plan.sde, x0, source)
    picked, t, noised = plan.paths.draw(step, plan.batch_size // plan.accumulate, source)
    field, x0 = take(plan, picked, source)
    return plan.loss.weighted(rows.share(field), plan.sde, x0, noised, t, source)


def train_step(plan: Plan, state: TrainState, rate: float) -> Tensor:
    """One step in place at a learning rate; the mean loss of the batch, on the device."""
    source = generator(plan.seed, "train", state.step, device=plan.train.device)
    seed_global(source, processes.rank())
    parts = []
    for _ in range(plan.accumulate):
        part = rows.mean(batch_losses(plan, state.step, source)) / plan.accumulate
        part.backward()
        parts.append(part.detach())
    loss = torch.stack(parts).sum()
    processes.add_up([*(p.grad for p in plan.model.network.parameters() if p.grad is not None), loss])
    plan.optimizer.apply(state.optimizer, rate)
    if plan.ema is not None:
        state.update_average(plan.ema)
    state.step += 1
    state.samples += plan.batch_size
    return loss


def finite(state: TrainState) -> bool:
    """Whether every weight is a number."""
    return bool(torch.stack([p.detach().isfinite().all() for p in state.model.parameters()]).all())


def train(plan: Plan, state: TrainState, watch: Watch) -> None:
    """From `state` to the end of the budget, in place.

    Raises Diverged where the loss or a weight is not finite (nothing is saved then), Stopped after saving where a signal
    asked for it.
    """
    session = time.perf_counter() - state.seconds
    asked: int | None = None  # the signal that has come to one of the processes

    def progress() -> float:
        by_time = 0.0 if plan.max_seconds is None else state.seconds / plan.max_seconds
        return max(state.step / plan.steps, by_time)

    def save(validate: bool) -> None:
        if not finite(state):
            raise Diverged(f"diverged: a weight is not finite at step {state.step}")
        if validate:
            state.valid = validation_loss(plan, state)
            if state.valid < state.best:
                state.best, state.best_step = state.valid, state.step
        watch.save(state)
        agree()  # the others wait for the one that writes

    def agree() -> None:
        """One clock, and one answer to whether a signal has come, for all processes."""
        nonlocal asked
        state.seconds, signum = processes.largest(state.seconds, watch.stop.signum or 0)
        if signum:
            asked = watch.stop.signum = int(signum)

    watch.stop.deferred = True
    try:
        while progress() < 1.0 or state.step == 0:  # what came before the first step may have taken all of max_seconds
            if plan.chooser is not None:
                plan, why = plan.chooser(plan, state)
                if why is not None:
                    watch.say(why)
            rate = plan.optimizer.rate(state.step, progress())
            state.loss_sum += train_step(plan, state, rate)
            state.loss_count += 1
            state.seconds = time.perf_counter() - session
            agree()
            paused = time.perf_counter()
            if state.step % plan.log_every == 0 or progress() >= 1.0:
                value = float(state.loss_sum) / state.loss_count
                if not math.isfinite(value):
                    raise Diverged(f"diverged: the loss is {value} at step {state.step}")
                row = {
                    "step": state.step,
                    "samples": state.samples,
                    "seconds": state.seconds,
                    "loss": value,
                    "lr": rate,
                }
                watch.log(row | ({plan.chooser.name: state.choices[-1][plan.chooser.name]} if plan.chooser else {}))
                state.loss_sum.zero_()
                state.loss_count = 0
            if asked is not None:
                save(validate=state.step % plan.save_every == 0)
                raise watch.stop.stopped(f"the state is saved at step {state.step}")
            if state.step % plan.save_every == 0 or progress() >= 1.0:
                save(validate=True)
            session += time.perf_counter() - paused  # logging and saving are not training
        if asked is not None:  # it came while the last checkpoint was written
            raise watch.stop.stopped("training is done and saved")
    finally:
        watch.stop.deferred = False
