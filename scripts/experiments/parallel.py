"""Two processes of one thread each against one: samples a second of a training step, in turns within the same processes, and the
largest relative difference of the loss over 200 steps in float64.

usage: .venv/bin/torchrun --standalone --nproc-per-node=2 scripts/experiments/parallel.py [WIDTH=1024] [BATCH=512] [TURNS=9]
"""

import copy
import statistics
import sys
import time

import torch

from scoresde_cli import configs, processes
from scoresde_cli.compose import compose
from scoresde_cli.training import loop


def parts_of(*overrides: str):
    from hydra import compose as by_hydra
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        return compose(OmegaConf.to_container(by_hydra("train", [*overrides, "device=cpu"]), resolve=True))


def seconds(plan: loop.Plan, state, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        loop.train_step(plan, state, 0.0)
    return (time.perf_counter() - began) / steps


def main() -> None:
    width, batch, turns = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((1, 1024), (2, 512), (3, 9)))
    torch.set_num_threads(1)
    processes.join()
    first = processes.rank() == 0
    for loss in ("loss=ssm_vr", "loss=dsm"):
        plan = parts_of(
            "data=gmm", "data.d=64", f"network.width={width}", f"batch_size={batch}", "n_proj=1", loss
        ).plan()
        state = loop.start(plan)
        ratios, alone, both = [], [], []
        for turn in range(turns + 1):  # one that warms up
            one = 0.0
            if first:
                with processes.alone():
                    one = seconds(*copy.deepcopy((plan, state)), 4)  # together: the state holds the plan's weights
            processes.broadcast(None)  # the other one waits
            two = seconds(plan, state, 4)
            if turn and first:
                ratios.append(one / two)
                alone.append(batch / one)
                both.append(batch / two)
        if first:
            print(
                f"{loss} d 64 width {width} batch {batch}: {max(alone):.0f} samples/s by one process, {max(both):.0f} by "
                f"{processes.size()} (best); ratio of a turn: median {statistics.median(ratios):.2f}, "
                f"{min(ratios):.2f} to {max(ratios):.2f}; of the best {max(both) / max(alone):.2f}", flush=True,
            )  # fmt: skip
    plan = parts_of("precision=fp64", "network.width=64", "loss=ssm_vr", "steps=200").plan()
    curves = []
    for lonely in (True, False):
        own, curve = copy.deepcopy(plan), []
        state = loop.start(own)
        for step in range(200):
            rate = own.optimizer.rate(step, step / 200)
            if lonely:
                with processes.alone():
                    curve.append(float(loop.train_step(own, state, rate)))
            else:
                curve.append(float(loop.train_step(own, state, rate)))
        curves.append(curve)
    if first:
        worst = max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))
        print(f"200 steps in float64: largest relative difference of the loss {worst:.1e}")
    processes.leave(0)


if __name__ == "__main__":
    main()
