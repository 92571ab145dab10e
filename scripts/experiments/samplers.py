"""The README's table of samplers: exact score of eight Gaussians of unequal weight, samplers x grids x evaluations.

For each, the sliced W2 of n samples to fresh data as a multiple of floor_high, and, for the solvers of the ODE, the error of each
trajectory: the root mean square distance to where a high-accuracy solution from the same start ends.

usage: .venv/bin/python scripts/experiments/samplers.py [--sde vp] [--n 20000] [--seeds 3] [--learnt RUN] [--json FILE]
       about 10 minutes on one core
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from scoresde_cli.compose import build
from scoresde_cli.configs import conf_dir, load
from scoresde_cli.datasets.mixtures import EightGaussians
from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.metrics.sliced_wasserstein import sliced_wasserstein
from scoresde_cli.rng import generator
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.edm_stochastic import EDMStochastic
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.euler_ode import EulerODE
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.predictor_corrector import PredictorCorrector
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion

WEIGHTS = [1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0]
EVALUATIONS = (5, 10, 20, 40, 80)
GRIDS = ("uniform", "power", "edm_rho", "log_snr")
# sampler, evaluations a step, whether it solves the ODE
SAMPLERS = [
    (EulerODE, 1, True), (HeunODE, 2, True), (DPMSolverPP, 1, True), (EulerMaruyama, 1, False), (ReverseDiffusion, 1, False),
    (PredictorCorrector, 2, False), (EDMStochastic, 2, False),
]  # fmt: skip
T_MIN = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sde", default="vp", help="vp, subvp, ve")
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3, help="the median over these is shown")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sde = build(load(conf_dir() / "sde" / f"{given.sde}.yaml"), "sde")
    data = EightGaussians(weights=WEIGHTS, n=1000)
    exact = Oracle(data.law, sde)

    def fresh(*purpose: int | str) -> torch.Tensor:
        return data.draw(given.n, generator(0, *purpose))  # type: ignore[arg-type]

    floor = [sliced_wasserstein(fresh("a", i), fresh("b", i)) for i in range(20)]
    floor_high = float(np.quantile(floor, 0.95, method="weibull"))
    print(
        f"sde {given.sde}, n {given.n}, floor {np.mean(floor):.5f}, floor_high {floor_high:.5f}, median of {given.seeds} seeds\n"
    )

    def draw(sampler, seed):
        return sampler.sample(exact, sde, (2,), given.n, seed, dtype=torch.float64)

    # Within 3e-6 (root mean square) of dopri5 at a tolerance of 1e-8, a thousandth of the least error in the table.
    fine = HeunODE(steps=1000, grid="log_snr", t_min=T_MIN)
    truth = [draw(fine, seed).x for seed in range(given.seeds)]
    rows = []
    for make, per_step, ode in SAMPLERS:
        for grid in GRIDS:
            for nfe in EVALUATIONS:
                steps = (nfe - 1) // per_step  # one is for the last denoising step
                sampler = make(steps=steps, grid=grid, t_min=T_MIN)
                found = [draw(sampler, seed) for seed in range(given.seeds)]
                ratio = [
                    sliced_wasserstein(f.x, fresh("reference", i)) / floor_high
                    if f.x.isfinite().all()
                    else float("inf")
                    for i, f in enumerate(found)
                ]
                errors = [float((f.x - t).square().sum(1).mean().sqrt()) for f, t in zip(found, truth, strict=True)]
                rows.append(
                    {"sampler": make.__name__, "grid": grid, "nfe": nfe, "counted": found[0].nfe, "steps": steps,
                     "ratio": statistics.median(ratio), "error": statistics.median(errors) if ode else None}
                )  # fmt: skip
    for what, title in (("ratio", "sliced W2 / floor_high"), ("error", "error of a trajectory")):
        print(f"| {title}, NFE | " + " | ".join(map(str, EVALUATIONS)) + " |\n| --- |" + " --- |" * len(EVALUATIONS))
        for make, _, ode in SAMPLERS:
            for grid in GRIDS if ode or what == "ratio" else ():
                line = [r[what] for r in rows if (r["sampler"], r["grid"]) == (make.__name__, grid)]
                print(f"| {make.__name__} {grid} | " + " | ".join(f"{v:.3g}" for v in line) + " |", flush=True)
        print()
    if given.json:
        given.json.write_text(json.dumps({"floor_high": floor_high, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
