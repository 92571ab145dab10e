"""The bias of finite differences and their rounding, by step: loss=fd_ssm against loss=ssm on the same draws.

usage: .venv/bin/python scripts/experiments/fd_bias.py [RUN]     a finished run; without one, the default is trained

Columns: the excess of the mean loss over ssm's with its standard error, the relative error of the gradient in the weights
(both float64, on 20,000 rows), and the rounding in float32 of the term 2 sigma^2 v^T J v of one sample, rms.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from scoresde_cli import divergence
from scoresde_cli.losses.fd_ssm import FDSSM
from scoresde_cli.losses.ssm import SSM
from scoresde_cli.projections import Rademacher
from scoresde_cli.rng import generator
from scoresde_cli.runs import load_run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            path = sys.argv[1]
        else:
            path = f"{folder}/run"
            command = [
                Path(sys.executable).parent / "scoresde",
                "train",
                "loss=ssm",
                f"dir={path}",
                "tracker.mode=disabled",
            ]
            subprocess.run([*command, "eval.figures=false"], check=True, capture_output=True)
        run = load_run(path, device="cpu")
    model, sde = run.model.double(), run.parts.sde
    x0 = run.dataset().splits["train"][:20_000].double()
    weights = list(model.network.parameters())

    def of(loss):
        """(values, gradient) on the same draws, whatever the loss."""
        values = loss(model, sde, x0, generator(0, "bias"))
        gradient = torch.autograd.grad(values.mean(), weights, allow_unused=True)
        return values.detach(), torch.cat([g.flatten() for g in gradient if g is not None])

    exact, direction = of(SSM(Rademacher(), 1))
    print(
        f"loss=ssm: {float(exact.mean()):.4f}, {len(x0)} rows of {run.config['data']['_target_'].rsplit('.', 1)[-1]}\n"
    )
    print(
        "| step | bias of the loss | relative error of the gradient | rounding in float32 |\n| --- | --- | --- | --- |"
    )
    for step in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001):
        loss = FDSSM(Rademacher(), 1, step=step)
        values, gradient = of(loss)
        excess = values - exact
        error = excess.std() / len(excess) ** 0.5
        off = (gradient - direction).norm() / direction.norm()
        rounding = rounding_of(model, sde, x0[:2000], step)
        print(f"| {step} | {float(excess.mean()):.2e} +- {float(error):.1e} | {float(off):.2e} | {rounding:.1e} |")


def rounding_of(model, sde, x0, step) -> float:
    """Between float32 and float64, at the same points and directions."""
    source = generator(1, "rounding")
    t = torch.rand(len(x0), generator=source, dtype=torch.float64) * 0.999 + 1e-3
    x = sde.perturb(x0, t, source).x_t
    v = Rademacher().sample(tuple(x.shape), 1, source, torch.float64)
    found = []
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32):
            field = model.to(dtype)
            h = step * sde.kernel().sigma(t)
            slope = divergence.finite_difference(field, x.to(dtype), t.to(dtype), v.to(dtype), h.to(dtype))[1]
            found.append(2.0 * divergence.inner(v, slope.double(), 2)[0] * sde.kernel().sigma(t).square())
    model.double()
    return float((found[1] - found[0]).square().mean().sqrt())


if __name__ == "__main__":
    main()
