"""The README's table of losses: eight Gaussians, seeds 0 to 2, medians of score_error and sliced_wasserstein.

usage: .venv/bin/python scripts/experiments/losses.py [FOLDER]     about 15 minutes on two cores; resumes where it was cut
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTINGS = {
    "loss=ssm n_proj=4": "",
    "loss=ssm_vr n_proj=4": "",
    "loss=ssm_vr n_proj=1": "",
    "loss=fd_ssm n_proj=4": "",
    "optimizer.lr=2e-3": "",
    "network=energy_mlp optimizer.lr=2e-3": "",
    "loss=dsm": "",
    "naive": "loss=ssm parameterisation=eps projection=gaussian n_proj=1 ema=null optimizer.schedule=constant",
    "naive, g2, t from 1e-5": "loss=ssm parameterisation=eps projection=gaussian n_proj=1 ema=null "
    "optimizer.schedule=constant loss.weighting=g2 times=uniform t_min=1e-5",
}
SEEDS = (0, 1, 2)


def trained(folder: Path, arguments: str, seed: int) -> tuple[dict, str]:
    """The summary and the warnings of one run, trained unless it is there."""
    run = folder / f"{arguments.replace(' ', '_').replace('=', '-')}-{seed}"
    if not (run / "summary.json").exists():
        start = (
            ["train", f"resume={run}"]
            if (run / "run.json").exists()
            else ["train", *arguments.split(), f"seed={seed}", f"dir={run}"]
        )
        command = [str(Path(sys.executable).parent / "scoresde"), *start]
        if not start[1].startswith("resume"):
            command += ["sampler=heun_ode", "eval.figures=false", "tracker.mode=disabled"]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
        )
        (run / "stderr.txt").write_text(done.stderr)
    return json.loads((run / "summary.json").read_text()), (run / "stderr.txt").read_text() if (
        run / "stderr.txt"
    ).exists() else ""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/losses")
    folder.mkdir(parents=True, exist_ok=True)
    print("| setting | score_error (median) | each seed | sliced_wasserstein / floor_high | seconds | says |")
    print("| --- | --- | --- | --- | --- | --- |")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each run takes one thread of its own process
        jobs = {n: [pool.submit(trained, folder, a or n, seed) for seed in SEEDS] for n, a in SETTINGS.items()}
    for name in SETTINGS:
        found = [job.result() for job in jobs[name]]
        errors = [s["score_error"]["value"] for s, _ in found]
        ratios = [s["sliced_wasserstein"]["value"] / s["sliced_wasserstein"]["floor_high"] for s, _ in found]
        seconds = statistics.median(s["train_seconds"]["value"] for s, _ in found)
        said = sum("did not beat its baseline" in text for _, text in found)
        print(
            f"| `{name}` | {statistics.median(errors):.4f} | {', '.join(f'{e:.4f}' for e in errors)} "
            f"| {', '.join(f'{r:.2f}' for r in ratios)} | {seconds:.0f} | "
            f"{f'did not beat its baseline ({said} of 3)' if said else ''} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
