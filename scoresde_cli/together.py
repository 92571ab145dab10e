"""What all processes of a run do at the same time (processes.py), and the part of those that follow the first one.

The first one says what is to be done as an `Order`; from there on every process goes through the same calls.
"""

from dataclasses import dataclass
from typing import Any

from scoresde_cli import evaluation, processes
from scoresde_cli.compose import NLLKeys, Parts, build, compose
from scoresde_cli.likelihood import Flow
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.tracking import console
from scoresde_cli.training import loop
from scoresde_cli.training.state import Checkpoint, TrainState, load_weights, weights
from scoresde_cli.training.stop import stop_requests
from scoresde_cli.tuning import settle_together


@dataclass(frozen=True)
class Order:
    """A run as it is to be trained: its settled config, the metrics of its end, matrices of its process, its state."""

    config: dict[str, Any]
    metrics: list[str]
    kept: Any
    state: Checkpoint


def announce(config: dict[str, Any], metrics: list[str], parts: Parts, state: TrainState) -> None:
    """Tell the others what the first process is about to train."""
    if processes.size() > 1:
        processes.broadcast(Order(config, metrics, parts.data.kept, Checkpoint.of(state)))


def gaussian_loss(parts: Parts) -> float:
    """The training loss of the Gaussian part alone, on 20,000 training samples: the line that training has to cross."""
    x0 = parts.data.splits["train"][:20_000].to(device=parts.device, dtype=parts.dtype)
    reference = parts.loss.reference(x0[0].numel())
    return float(loop.mean_loss(reference, parts.baseline, parts.sde, x0, parts.settings.seed, "baseline").mean())


def measure(parts: Parts, model: ScoreModel, metrics: list[str], averaged: bool, step: int) -> evaluation.Evaluation:
    """The numbers of the end of a run, of the first process's weights."""
    if processes.size() > 1:
        load_weights(model, processes.broadcast(weights(model)))
    s = parts.settings
    nll = NLLKeys(**s.eval.get("nll", {}))
    step = int(processes.broadcast(step))
    return evaluation.evaluate(
        parts, model, parts.sampler, s.eval["n"], metrics=metrics, seed=s.seed, averaged=averaged, step=step,
        flow=Flow(steps=nll.steps), nll_rows=nll.rows,
    )  # fmt: skip


def follow() -> None:
    """The part of a process that is not the first one: nothing is written, and nothing said."""
    console.out.quiet = console.err.quiet = True
    order: Order = processes.broadcast(None)
    config = {**order.config, "resume": None, "dir": None}
    data = build(config["data"], "data")
    data.kept = order.kept
    parts, _ = settle_together(compose(config, data), config, int(order.state.facts["step"]))
    state = loop.start(parts.plan())
    order.state.restore(state)
    with stop_requests() as stop:
        gaussian_loss(parts)
        loop.train(parts.plan(), state, loop.Watch(lambda row: None, lambda state: None, stop))
        model = state.evaluated()
        assert isinstance(model, ScoreModel)
        measure(parts, model, order.metrics, state.average is not None, state.step)
