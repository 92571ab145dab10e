"""The weights of dsm_cv that leave the least variance, estimated while training.

With g the gradient in the weights of one sample's DSM and delta that of SSM less it, E[delta | t] = 0, so at each t

    E|g + w delta|^2 = E|g|^2 + 2 w E<g, delta> + w^2 E|delta|^2        is least at        w* = -E<g, delta> / E|delta|^2

Both means are taken over the samples in each of BINS bins of log(sigma/alpha), as many of the training times in each, from
gradients sample by sample (vmap), and over the estimates since a quarter of the steps. w is linear between the bins' centres.
What noise is left says how often the times of each bin are drawn (`allocation`).

No bias comes of it: an estimate draws its own samples, and w at a step is a function of the weights and of draws that this step
does not see, so that the step's gradient has the mean of DSM's given w.

128 samples twice, and 64 at steps 200, 400, 800 and then every eighth of the budget, each worth about a fifth of a training step;
where batches are smaller, and their samples dearer, one batch and half of one, but no fewer than two a bin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vmap

from scoresde_cli import processes
from scoresde_cli.losses.base import draw_times, in_white
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.losses.dsm_cv import DSMCV, THIN, ByLevel, ratio_of, sparse
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rng import generator, seed_global
from scoresde_cli.sdes.base import SDE
from scoresde_cli.training.directions import due
from scoresde_cli.training.loop import Plan
from scoresde_cli.training.state import TrainState
from scoresde_cli.training.variance import Batch

BINS = 16
FIRST, LATER = 128, 64  # samples of the first two estimates, and of each later one
BYTES = 1 << 26  # for the gradients that are held at a time


def moments(batch: Batch, v: Tensor) -> Tensor:
    """(B, 2, 2), the inner products of g and delta of each sample, for directions v (K, B, *D); float64."""
    plan = batch.plan
    model, sde, x0, noised = in_white(batch.field, plan.sde, batch.x0, batch.noised, batch.t)
    kernel = sde.kernel()
    assert isinstance(model, ScoreModel)
    assert kernel is not None
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    target = kernel.targets(x0, noised, batch.t, {"score"})["score"]
    scale = plan.loss.weight(plan.sde, batch.t, batch.x0[0].numel())
    labels = torch.full_like(batch.t, -1) if model.labels is None else model.labels.to(batch.t)

    def both(weights: Any, x: Tensor, t: Tensor, target: Tensor, v: Tensor, scale: Tensor, label: Tensor) -> Tensor:
        """A sample's DSM, and its SSM-VR less that, (2,)."""
        view = model.labelled(label.unsqueeze(0))

        def score(y: Tensor) -> Tensor:
            return functional_call(view, weights, (y.unsqueeze(0), t.unsqueeze(0))).squeeze(0)

        def push(w: Tensor) -> tuple[Tensor, ...]:
            return jvp(score, (x,), (w,))

        s, pushed = vmap(push, randomness="same")(v)
        dsm = s[0].square().sum() - 2.0 * (s[0] * target).sum()
        ssm = s[0].square().sum() + 2.0 * (v * pushed).flatten(1).sum(1).mean()
        return scale * torch.stack([dsm, ssm - dsm])

    def products(*sample: Tensor) -> Tensor:
        rows = torch.cat([g.flatten(1) for g in jacrev(both)(weights, *sample).values()], dim=1).double()
        return rows @ rows.T

    held = 3 * 8 * sum(p.numel() for p in weights.values())  # bytes for one sample, the last product in float64
    each = vmap(products, in_dims=(0, 0, 0, 1, 0, 0), randomness="different", chunk_size=max(1, BYTES // held))
    found: Tensor = each(noised.x_t, batch.t, target, v, scale, labels)
    return found


class Mixer:
    """Keeps w at its least variance; the plan of the next step.

    Args:
        loss: dsm_cv with threshold=auto. sde: a process with a kernel.
    """

    name, unit = "threshold", "sigma/alpha"
    reasons: tuple[str, ...] = ("w", "density", "cross", "square", "plain")

    def __init__(self, loss: DSMCV, sde: SDE) -> None:
        t = draw_times(loss.times, 256 * BINS, loss.t_min, sde.T, generator(0, "mixing")).double()
        bins = log_ratio(sde, t).sort().values.reshape(BINS, -1)
        self.nodes, self.edges = bins.mean(1), bins[1:, 0].contiguous()
        self.facts = {"levels": self.nodes.exp().tolist()}

    def __call__(self, plan: Plan, state: TrainState) -> tuple[Plan, str | None]:
        """The plan of the next step, and a line where w has changed much."""
        rows, loss, said = state.choices, plan.loss, None
        assert isinstance(loss, DSMCV)
        if not rows or state.step >= due(rows[-1]["step"], plan.steps):

            def decide() -> dict[str, Any]:
                most = (FIRST, plan.batch_size) if len(rows) < 2 else (LATER, plan.batch_size // 2)
                row = self.measure(plan, state.step, max(2 * BINS, min(most)))
                recent = [*(r for r in rows if 4 * r["step"] >= state.step), row]
                row["w"] = optimum(recent)
                row["density"] = allocation(recent, row["w"], loss.n_proj)
                row["threshold"] = self.threshold(row["w"])
                return row

            row = processes.decided(decide)
            if not rows or not 0.67 < row["threshold"] / rows[-1]["threshold"] < 1.5:
                said = f"sliced and denoising score matching weigh the same at sigma/alpha = {row['threshold']:.2g}"
            rows.append(row)
        if loss.weights is None or loss.weights.values.tolist() != rows[-1]["w"]:
            w, density = (torch.tensor(rows[-1][name], dtype=torch.float64) for name in ("w", "density"))
            plan = replace(plan, loss=loss.weighing(ByLevel(self.nodes, w), ByLevel(self.nodes, density)))
        return plan, said

    def measure(self, plan: Plan, step: int, samples: int) -> dict[str, Any]:
        """By bin, the sums of -<g, delta>, of |delta|^2 and of |g|^2."""
        drawn = generator(plan.seed, "mixing", step, device=plan.train.device)
        seed_global(drawn)
        loss = plan.loss
        assert isinstance(loss, DSMCV)
        every = DSM(loss.weighting, loss.half, loss.times, loss.t_min)  # its times are not thinned out
        batch = Batch.draw(
            replace(plan, loss=every, field=plan.model, batch_size=samples, accumulate=1), "mixing", step
        )
        v = loss.frame(batch.field, batch.noised.x_t, batch.t, samples, drawn)
        found = moments(batch, v.detach()).cpu()
        where = torch.searchsorted(self.edges, log_ratio(plan.sde, batch.t).double().cpu(), right=True)
        zero = torch.zeros(BINS, dtype=torch.float64)
        return {
            "step": step,
            "cross": zero.index_add(0, where, -found[:, 0, 1]).tolist(),
            "square": zero.index_add(0, where, found[:, 1, 1]).tolist(),
            "plain": zero.index_add(0, where, found[:, 0, 0]).tolist(),
        }

    def threshold(self, w: Sequence[float]) -> float:
        """sigma/alpha where w first falls below 1/2 (an end of the range where it does not)."""
        i = next((i for i, value in enumerate(w) if value < 0.5), BINS)
        if i in (0, BINS):
            return math.exp(float(self.nodes[min(i, BINS - 1)]))
        part = (w[i - 1] - 0.5) / (w[i - 1] - w[i])
        return math.exp(float(torch.lerp(self.nodes[i - 1], self.nodes[i], part)))


def optimum(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """w of each bin, in [0, 1], from the sums of several estimates, which count alike; where nothing was seen, 0."""
    cross, square = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("cross", "square"))
    sizes = square.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    below = (square / sizes).sum(0)
    return torch.where(below > 0, (cross / sizes).sum(0) / below, 0.0).clamp(0.0, 1.0).tolist()


def allocation(rows: Sequence[Mapping[str, Any]], w: Sequence[float], n_proj: int) -> list[float]:
    """How often a time of each level is drawn, relative to the loss's own law p, at least 1 / THIN.

    The noise of all times is the mean of E|g_w|^2 p / q over p, its cost that of c q / p, with c = 1 + n_proj where directions are
    pushed (a tangent costs about what a sample does) and 1 elsewhere: their product is least for q ~ p sqrt(E|g_w|^2 / c)
    (Neyman 1934; Cochran, Sampling techniques, 1977, section 5.5). Smoothed over neighbours.
    """
    names = ("cross", "square", "plain")
    cross, square, plain = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names)
    at = sparse(torch.tensor(w, dtype=torch.float64))
    noise = (plain - 2.0 * at * cross + at.square() * square).clamp_min(0.0)
    share = (noise / noise.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).sum(0)
    root = (share / torch.where(at > 0, 1.0 + n_proj, 1.0)).sqrt()
    beside = torch.cat([root[:1], root, root[-1:]])
    smooth = (beside[:-2] + 2.0 * root + beside[2:]) / 4.0
    return (smooth / smooth.mean().clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(1.0 / THIN).tolist()


def log_ratio(sde: SDE, t: Tensor) -> Tensor:
    """log(sigma/alpha), (B,)."""
    return ratio_of(sde, t).log()
