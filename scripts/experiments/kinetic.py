"""docs/nonlinear.md, sde=kinetic against sde=vp: the same data, network, loss and steps; samples at equal numbers of evaluations.

Trains both with loss=dsm for each seed, and draws samples with each sampler: the sliced Wasserstein distance to fresh data as a
multiple of the floor (its mean between two fresh samples), mean and standard error over the seeds.

usage: .venv/bin/python scripts/experiments/kinetic.py DIR [--steps 4000] [--seeds 0 1 2 3 4] [--n 5000]
       DIR keeps the runs and the numbers: it goes on where it was cut, and seeds may be done side by side; the table holds all
       seeds that are there
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from scoresde_cli.cli import main as scoresde
from scoresde_cli.datasets.mixtures import EightGaussians
from scoresde_cli.metrics.sliced_wasserstein import sliced_wasserstein
from scoresde_cli.rng import generator
from scoresde_cli.runs import load_run
from scoresde_cli.samplers.base import Sampler
from scoresde_cli.samplers.dpm_solver_pp import DPMSolverPP
from scoresde_cli.samplers.euler_maruyama import EulerMaruyama
from scoresde_cli.samplers.heun_ode import HeunODE
from scoresde_cli.samplers.sscs import SSCS

EVALUATIONS = (10, 20, 50, 100, 200, 500)
SAMPLERS: dict[str, dict[type[Sampler], int]] = {  # of each process, with their evaluations a step
    "kinetic": {SSCS: 1, EulerMaruyama: 1, HeunODE: 2},
    "vp": {EulerMaruyama: 1, HeunODE: 2, DPMSolverPP: 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--n", type=int, default=5000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = EightGaussians(n=1000)
    given.folder.mkdir(parents=True, exist_ok=True)

    def fresh(*purpose: int | str) -> torch.Tensor:
        return data.draw(given.n, generator(0, *purpose)).float()  # type: ignore[arg-type]

    floor = statistics.mean(sliced_wasserstein(fresh("a", i), fresh("b", i)) for i in range(20))
    for seed in given.seeds:
        file = given.folder / f"trained-{given.n}-{seed}.json"
        found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        runs = {process: trained(given, process, seed) for process in SAMPLERS}
        for process, run in runs.items():
            for number in ("score_error", "score_error_baseline"):
                found[f"{process}/{number}/0"] = run.summary[number]["value"]
        for nfe, (process, samplers) in itertools.product(EVALUATIONS, SAMPLERS.items()):
            for make, each in samplers.items():
                key = f"{process}/{make.__name__}/{nfe}"
                if key not in found:
                    run, sampler = runs[process], make(steps=(nfe - 1) // each)  # one is for the last denoising step
                    x = sampler.sample(run.model, run.parts.sde, data.shape, given.n, seed).x
                    finite = x.isfinite().all()
                    found[key] = sliced_wasserstein(x, fresh("reference", seed)) / floor if finite else float("inf")
                    file.write_text(json.dumps(found, indent=1))
    show([json.loads(file.read_text()) for file in sorted(given.folder.glob(f"trained-{given.n}-*.json"))], floor)


def trained(given: argparse.Namespace, process: str, seed: int):  # type: ignore[no-untyped-def]
    """The run of a process and a seed, trained now where it is not there."""
    folder = given.folder / f"{process}-{given.steps}-{seed}"
    if not (folder / "summary.json").exists():
        keys = [f"sde={process}", "loss=dsm", f"steps={given.steps}", f"seed={seed}", f"dir={folder}"]
        more = ["eval.n=1000", "eval.figures=false", "tracker.mode=disabled", "compile=false", "threads=1"]
        assert scoresde(["train", *keys, *more]) == 0
    return load_run(folder)


def show(found: list[dict[str, float]], floor: float) -> None:
    """The table, in Markdown; only what all seeds have."""
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key in found[0]:
        process, what, nfe = key.split("/")
        if all(key in each for each in found):
            rows.setdefault((process, what), {})[int(nfe)] = [each[key] for each in found]

    def cell(values: list[float]) -> str:
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{np.mean(values):.3g} +- {error:.1g}"

    print(f"floor {floor:.4f}; distance / floor, mean and standard error over {len(found)} seeds\n")
    print("| process, sampler | " + " | ".join(map(str, EVALUATIONS)) + " |\n| " + "--- | " * (1 + len(EVALUATIONS)))
    for (process, what), cells in rows.items():
        if 0 in cells:
            print(f"{process} {what}: {cell(cells[0])}")
        else:
            print(
                f"| `{process}` {what} | "
                + " | ".join(cell(cells[nfe]) if nfe in cells else "" for nfe in EVALUATIONS)
                + " |"
            )


if __name__ == "__main__":
    main()
