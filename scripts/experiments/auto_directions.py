"""n_proj=auto against every fixed number: cost times variance, and score_error at equal wall time, on data=gmm.

usage: .venv/bin/python scripts/experiments/auto_directions.py [FOLDER [SECONDS [SEEDS]]]     60 seconds a run, 5 seeds: an hour
and a half on two cores; resumes where it was cut

The variance is that of the weights at the end of the auto run of seed 0, 24 replicates; the cost is the fastest of 30 steps.
Targets: cost times variance at auto's number within 1.2 of the best, and the median score_error within 1.05.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from scoresde_cli.compose import compose
from scoresde_cli.losses.ism import ISM
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.projections import Rademacher
from scoresde_cli.rundir import RunDir
from scoresde_cli.training import variance
from scoresde_cli.training.state import load_weights


def numbers(d: int) -> list[int]:
    """The fixed numbers; d is the exact trace."""
    return sorted({n for n in (1, 2, 4, 8, 16, d) if n <= d})


def trained(folder: Path, d: int, n: int | str, seed: int, seconds: float) -> dict:
    """The summary of one run, trained unless it is there."""
    run = folder / f"d{d}-n{n}-{seed}"
    if not (run / "summary.json").exists():
        command = ["train", f"resume={run}"] if (run / "run.json").exists() else [
            "train", "data=gmm", f"data.d={d}", f"n_proj={n}", f"seed={seed}", f"max_seconds={seconds}", "steps=1000000",
            "compile=false", "eval.figures=false", "eval.n=1000", "tracker.mode=disabled", f"dir={run}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        scoresde = str(Path(sys.executable).parent / "scoresde")
        subprocess.run([scoresde, *command], env=environment, capture_output=True, text=True, check=True)
    return json.loads((run / "summary.json").read_text())


def work(folder: Path, d: int, chosen: int) -> dict[int, float]:
    """Cost times variance of each fixed number and of the one chosen, the best fixed as 1, at the end of the auto run of seed 0."""
    file = folder / f"work-d{d}.json"
    if not file.exists():
        run = RunDir.open(folder / f"d{d}-nauto-0")
        parts = compose({**run.config(trust=False), "device": "cpu", "dir": None})
        load_weights(parts.model, run.checkpoint(which="last").model)
        plan, counts = parts.plan(), sorted({*numbers(d), chosen})
        losses = [ISM() if n >= d else SSMVR(Rademacher(), n) for n in counts]
        data = float(variance.split(plan, ISM(), 24, "work").data.mean())
        parts_of = [float(variance.split(plan, one, 24, "work").projection.mean()) for one in losses]
        seconds = variance.step_seconds(plan, losses, 30)
        found = {n: s * (data + p) for n, s, p in zip(counts, seconds, parts_of, strict=True)}
        best = min(found[n] for n in numbers(d))
        file.write_text(json.dumps({n: value / best for n, value in found.items()}))
    return {int(n): value for n, value in json.loads(file.read_text()).items()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/auto_directions")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    seeds = range(int(sys.argv[3]) if len(sys.argv) > 3 else 5)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each run takes one thread of its own process
        jobs = {
            (d, n, seed): pool.submit(trained, folder, d, n, seed, seconds)
            for seed in seeds for d in (2, 16, 64) for n in ("auto", *numbers(d))
        }  # fmt: skip
        found = {key: job.result() for key, job in jobs.items()}
    print(
        "| d | n_proj | cost times variance | score_error, median | each seed | steps |\n| --- | --- | --- | --- | --- | --- |"
    )
    for d in (2, 16, 64):
        last = found[d, "auto", 0]["n_proj"]["value"]
        costs, medians = work(folder, d, last), {}
        for n in ("auto", *numbers(d)):
            runs = [found[d, n, seed] for seed in seeds]
            errors = [s["score_error"]["value"] for s in runs]
            medians[n] = statistics.median(errors)
            steps = statistics.median(s["train_seconds"]["protocol"]["step"] for s in runs)
            name, cost = (f"auto (ends at {last})", costs[last]) if n == "auto" else (n, costs[n])
            print(
                f"| {d} | {name} | {cost:.2f} | {medians[n]:.4g} | {', '.join(f'{e:.4g}' for e in errors)} | {steps} |"
            )
        best = min((value, n) for n, value in medians.items() if n != "auto")
        print(
            f"\nd={d}: auto's score_error is {medians['auto'] / best[0]:.3f} of that of n_proj={best[1]}, the best fixed one\n"
        )


if __name__ == "__main__":
    main()
