"""dsm_cv: the noise of its gradient at each level of sigma/alpha, over the lesser of DSM's and of SSM-VR's (never far above 1).

    python scripts/experiments/mixing_variance.py [SAMPLES]          (about 4 minutes with 512 samples a level)

On `gmm` in 2, 16 and 64 dimensions, after 20 steps (before the first, all but the last layer has no gradient) and after 2000 steps
of dsm_cv, with the w that the run itself has then, on samples that it has not seen. The three share their samples.
"""

import sys
from dataclasses import replace

import torch
from hydra import compose as by_hydra
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from scoresde_cli import configs
from scoresde_cli.compose import compose
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.rng import generator
from scoresde_cli.training import loop
from scoresde_cli.training.mixing import BINS, moments
from scoresde_cli.training.variance import Batch


def plan_of(d: int) -> loop.Plan:
    with initialize_config_dir(str(configs.conf_dir()), version_base="1.3"):
        config = by_hydra("train", overrides=["data=gmm", f"data.d={d}", "loss=dsm_cv", "n_proj=1", "steps=2000"])
    return compose(OmegaConf.to_container(config, resolve=True)).plan()


def ratios(plan: loop.Plan, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(E|g_w|^2 / min(E|g|^2, E|h|^2), its standard error), by level."""
    loss = plan.loss
    every = DSM(loss.weighting, loss.half, loss.times, loss.t_min)
    parts = []
    for i in range(samples // 64):
        batch = Batch.draw(replace(plan, loss=every, field=plan.model, batch_size=64 * BINS), "truth", i)
        order = batch.t.argsort()
        v = loss.frame(batch.field, batch.noised.x_t, batch.t, len(order), generator(i, "v"))
        w, m = loss.table(plan.sde, batch.t)(batch.t).double(), moments(batch, v)
        g, cross, square = m[:, 0, 0], m[:, 0, 1], m[:, 1, 1]
        values = torch.stack([g + 2 * w * cross + w * w * square, g, g + 2 * cross + square])[:, order]
        parts.append(values.reshape(3, BINS, -1))
    found, dsm, ssm = torch.cat(parts, dim=2)
    lesser = torch.where(dsm.mean(1, keepdim=True) < ssm.mean(1, keepdim=True), dsm, ssm)
    ratio = found.mean(1) / lesser.mean(1)
    error = (found - ratio[:, None] * lesser).std(1) / found.shape[1] ** 0.5 / lesser.mean(1)
    return ratio, error


def main(samples: int) -> None:
    torch.set_num_threads(1)
    for d in (2, 16, 64):
        plan = plan_of(d)
        state = loop.start(plan)
        for steps in (20, 2000):
            while state.step < steps:
                plan, _ = plan.chooser(plan, state)
                loop.train_step(plan, state, plan.optimizer.rate(state.step, state.step / 2000))
            ratio, error = ratios(plan, samples)
            at = int(ratio.argmax())
            shown = " ".join(f"{value:.2f}" for value in ratio)
            print(f"d={d:3d} step {steps:4d}: largest {ratio[at]:.3f} +- {error[at]:.3f}; by level {shown}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
