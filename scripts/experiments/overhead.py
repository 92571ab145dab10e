"""What launching costs: jobs of 5 seconds of training through joblib and through Slurm, as seconds a job beyond these.

usage: .venv/bin/python scripts/experiments/overhead.py [FOLDER] [JOBS=64] [joblib slurm]     (about 15 minutes on two idle cores)
Slurm: on a cluster, or after `. CLUSTER/env` of scripts/slurm/start CLUSTER 1 2. Jobs at a time: two.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

SECONDS, AT_A_TIME = 5, 2
REST = [
    "steps=10000000", f"max_seconds={SECONDS}", "data.n=500", "network.width=16", "eval.n=300", "eval.figures=false", "loss=dsm",
    "checkpoint.every=1000000", "tracker.mode=disabled", "threads=1", "eval.metrics=[energy_distance]",
]  # fmt: skip
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={AT_A_TIME}"],
    "slurm": ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1", f"hydra.launcher.array_parallelism={AT_A_TIME}"],
}
PARTS = {
    "python": "pass",
    "import torch": "import torch",
    "torch, and an optimizer (torch._dynamo)": "import torch; torch.optim.Adam([torch.zeros(1, requires_grad=True)])",
    "scipy.stats": "import scipy.stats",
    "torch, and all that scoresde train names": "import scoresde_cli.commands.train",
}


def imports() -> None:
    """Seconds of a process that does no more than these imports, medians of five in turns."""
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(5):
        for name, code in PARTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found[name].append(time.perf_counter() - began)
    for name, seconds in found.items():
        print(f"{name:<42}{statistics.median(seconds):6.2f} s", flush=True)


def measure(launcher: str, folder: Path, jobs: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    seeds = "seed=" + ",".join(map(str, range(jobs)))
    launch = [*LAUNCHERS[launcher], f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "scoresde_cli", "train", "-m", seeds, *REST, *launch]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    trained, within = [], []
    for file in folder.glob("*/run.json"):
        facts = json.loads(file.read_text())
        trained.append(json.loads(file.with_name("summary.json").read_text())["train_seconds"]["value"])
        spent = datetime.fromisoformat(facts["ended"]) - datetime.fromisoformat(facts["started"])
        within.append(spent.total_seconds() - trained[-1])
    beyond = whole * AT_A_TIME / jobs - statistics.mean(trained)
    print(
        f"{launcher:<8}{len(trained)} jobs, {whole:.0f} s: {beyond:.1f} s a job beyond {statistics.mean(trained):.1f} s of "
        f"training, of which {statistics.mean(within):.1f} s sampling, measuring and writing (whole seconds)", flush=True,
    )  # fmt: skip


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/overhead").resolve()
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    imports()
    for launcher in sys.argv[3:] or LAUNCHERS:
        measure(launcher, root / launcher, jobs)


if __name__ == "__main__":
    main()
