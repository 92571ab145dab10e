"""docs/nonlinear.md, sde=kinetic against sde=vp: the same data, network, loss and steps; samples at equal numbers of evaluations.

Trains both with loss=dsm for each seed, and draws samples with each sampler: the sliced Wasserstein distance to fresh data as a
multiple of the floor (its mean between two fresh samples), mean and standard error over the seeds.

usage: .venv/bin/python scripts/experiments/kinetic.py DIR [--steps 4000] [--seeds 5] [--n 5000] [--exact]
       DIR keeps the runs and the numbers: it goes on where it was cut; --exact takes the exact score in place of trained ones
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scoresde_cli.cli import main as scoresde
from scoresde_cli.compose import build
from scoresde_cli.configs import conf_dir, load
from scoresde_cli.datasets.mixtures import EightGaussians
from scoresde_cli.metrics.sliced_wasserstein import sliced_wasserstein
from scoresde_cli.rng import generator
from scoresde_cli.runs import load_run
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.reverse_diffusion import ReverseDiffusion
from scoresde_cli.samplers.sscs import SSCS

EVALUATIONS = (10, 20, 50, 100, 200, 500)
SAMPLERS: dict[str, dict[str, tuple[Callable[..., Sampler], int]]] = {  # of each process: how it is made, evaluations a step
    "kinetic": {
        "SSCS": (lambda **k: SSCS(exponential=False, **k), 1), "SSCS, exponential": (SSCS, 1),
        "EulerMaruyama": (EulerMaruyama, 1), "HeunODE": (HeunODE, 2),
    },
    "vp": {
        "EulerMaruyama": (EulerMaruyama, 1), "ReverseDiffusion": (ReverseDiffusion, 1), "HeunODE": (HeunODE, 2),
        "DPMSolverPP": (DPMSolverPP, 1),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--exact", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = EightGaussians(n=1000)
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / f"{'exact' if given.exact else 'trained'}-{given.n}.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def fresh(*purpose: int | str) -> torch.Tensor:
        return data.draw(given.n, generator(0, *purpose)).float()  # type: ignore[arg-type]

    floor = statistics.mean(sliced_wasserstein(fresh("a", i), fresh("b", i)) for i in range(20))
    for seed in range(given.seeds):
        for process, samplers in SAMPLERS.items():
            if given.exact:
                sde = build(load(conf_dir() / "sde" / f"{process}.yaml"), "sde")
                model, dtype = data.oracle(sde), torch.float64
            else:
                run = trained(given, process, seed)
                found[f"{process}/score_error/0/{seed}"] = run.summary["score_error"]["value"]
                found[f"{process}/score_error_baseline/0/{seed}"] = run.summary["score_error_baseline"]["value"]
                model, sde, dtype = run.model, run.parts.sde, torch.float32
            for name, (make, each) in samplers.items():
                for nfe in EVALUATIONS:
                    key = f"{process}/{name}/{nfe}/{seed}"
                    if key not in found:
                        steps = (nfe - 1) // each  # one is for the last denoising step
                        x = make(steps=steps).sample(model, sde, data.shape, given.n, seed, dtype=dtype).x.float()
                        known = x.isfinite().all()
                        found[key] = sliced_wasserstein(x, fresh("reference", seed)) / floor if known else float("inf")
                        file.write_text(json.dumps(found, indent=1))
    show(found, floor)


def trained(given: argparse.Namespace, process: str, seed: int):  # type: ignore[no-untyped-def]
    """The run of a process and a seed, trained now where it is not there."""
    folder = given.folder / f"{process}-{given.steps}-{seed}"
    if not (folder / "summary.json").exists():
        keys = [f"sde={process}", "loss=dsm", f"steps={given.steps}", f"seed={seed}", f"dir={folder}"]
        more = ["eval.n=1000", "eval.figures=false", "tracker.mode=disabled", "compile=false", "threads=1"]
        assert scoresde(["train", *keys, *more]) == 0
    return load_run(folder)


def show(found: dict[str, float], floor: float) -> None:
    """The table, in Markdown."""
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key, value in found.items():
        process, what, nfe, _ = key.split("/")
        rows.setdefault((process, what), {}).setdefault(int(nfe), []).append(value)

    def cell(values: list[float]) -> str:
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{np.mean(values):.3g} +- {error:.1g}"

    print(f"floor {floor:.4f}; distance / floor, mean and standard error over seeds\n")
    print("| process, sampler | " + " | ".join(map(str, EVALUATIONS)) + " |\n| " + "--- | " * (1 + len(EVALUATIONS)))
    for (process, what), cells in rows.items():
        if 0 in cells:
            print(f"{process} {what}: {cell(cells[0])}")
        else:
            print(f"| `{process}` {what} | " + " | ".join(cell(cells[nfe]) for nfe in EVALUATIONS) + " |")


if __name__ == "__main__":
    main()
