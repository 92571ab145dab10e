"""Four samplers under jumps with exact fields, and what is lost when the flux is ignored: docs/jumps.md's table.

1-D: W1 of n samples to fresh data, three modes. 2-D: W2 (exact transport, 1500 points) and energy distance, eight Gaussians of
unequal weight.
ODE: heun_ode, SDE: euler_maruyama, jumps: true_reversal, path: scale_path; no flux: the exact score with the flux left out;
matched: the flux replaced by -lambda E w / 2 score, a diffusion of equal variance. All end at t_min, without a denoising step.

usage: .venv/bin/python scripts/experiments/jumps.py [--n 8192] [--steps 300] [--d 1] [--rates 2,8,32] [--json FILE]
       about 10 minutes on one core for d = 1
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from scoresde_cli.datasets.jump_oracle import JumpOracle
from scoresde_cli.datasets.oracle import Mixture
from scoresde_cli.rng import generator
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.scale_path import ScalePath
from scoresde_cli.sdes.jump_diffusion import JumpDiffusion
from scoresde_cli.sdes.vp import VP
from scoresde_cli.studies.jump_exact import CountedReversal, Matched, Mistaken

F64 = torch.float64


def law(d: int) -> Mixture:
    if d == 1:
        return Mixture(torch.tensor([0.3, 0.5, 0.2]), torch.tensor([[-2.0], [0.5], [2.5]]), torch.full((3, 1), 0.04))
    angles = 2 * math.pi * torch.arange(8, dtype=F64) / 8
    weights = torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1])
    return Mixture(weights, 2 * torch.stack([angles.cos(), angles.sin()], 1), torch.full((8, 2), 0.15**2))


def distances(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    if x.shape[1] == 1:
        return {"W1": float((x.flatten().sort().values - y.flatten().sort().values).abs().mean())}
    import ot

    a, b = x[:1500].numpy(), y[:1500].numpy()
    w2 = math.sqrt(ot.emd2(np.full(1500, 1 / 1500), np.full(1500, 1 / 1500), ot.dist(a, b), numItermax=10**6))
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return {"W2": w2, "energy": float(2 * torch.cdist(x, y).mean() - within)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--d", type=int, default=1, choices=[1, 2])
    parser.add_argument("--rates", default="2,8,32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data, found = law(args.d), []
    true = data.sample(args.n, generator(99, "true"))
    floors = [distances(data.sample(args.n, generator(i, "fresh")), true) for i in range(8)]
    for key in floors[0]:
        values = [f[key] for f in floors]
        print(f"floor {key}: mean {np.mean(values):.4f}, largest of 8 {max(values):.4f}", flush=True)
    for amplitude in ("gaussian", "laplace"):
        for rate in map(float, args.rates.split(",")):
            sde = JumpDiffusion(VP(8.0, 8.0), rate, amplitude=amplitude)
            settings = {"steps": args.steps, "rho": 4.0, "t_min": 1e-5, "denoise": False}
            runs: list[tuple[str, Sampler, type[JumpOracle]]] = [
                ("ODE", HeunODE(**settings), JumpOracle), ("SDE", EulerMaruyama(**settings), JumpOracle),
                ("path", ScalePath(**settings), JumpOracle), ("ODE, no flux", HeunODE(**settings), Mistaken),
                ("SDE, no flux", EulerMaruyama(**settings), Mistaken), ("ODE, matched", HeunODE(**settings), Matched),
                ("jumps", CountedReversal(candidates=256, **settings), JumpOracle),
            ]  # fmt: skip
            for name, sampler, oracle in runs:
                start = time.perf_counter()
                x = sampler.sample(oracle(data, sde), sde, (args.d,), args.n, 0, dtype=F64).x
                row = {"law": amplitude, "rate": rate, "run": name} | distances(x, true)
                if isinstance(sampler, CountedReversal):
                    row["jumps a path"] = sampler.jumps / sampler.paths
                row["seconds"] = time.perf_counter() - start
                found.append(row)
                print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"floors": floors, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
