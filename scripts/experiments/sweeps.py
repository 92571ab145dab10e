"""What a sweep of 24 jobs withstands and gains: killed (SIGKILL) three times at random it ends with the undisturbed table, bit for
bit; with two workers it takes how much less time than one job after the other.

usage: .venv/bin/python scripts/experiments/sweeps.py [FOLDER]     about 12 minutes on two cores
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GRID = ["n_proj=1,2,4", "loss=ssm,ssm_vr", "seed=0,1,2,3", "data=gmm", "data.d=8"]
REST = ["steps=1500", "checkpoint.every=200", "eval.n=2000", "eval.figures=false", "tracker.mode=disabled", "threads=1"]
CLOCK = ("train_seconds", "steps_per_second", "peak_memory_mb")


def command(folder: Path, launcher: str) -> list[str]:
    scoresde = str(Path(sys.executable).parent / "scoresde")
    return [scoresde, "train", "-m", *GRID, *REST, f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}"]


def table(folder: Path) -> str:
    """A digest of all numbers of all jobs, to the last bit."""
    lines = []
    for file in sorted(folder.glob("*/summary.json")):
        found = {k: v for k, v in json.loads(file.read_text()).items() if k not in CLOCK}
        lines.append(f"{file.parent.name} {json.dumps(found, sort_keys=True)}")
    return f"{len(lines)} jobs, {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def run(folder: Path, launcher: str) -> float:
    began = time.perf_counter()
    subprocess.run(command(folder, launcher), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def killed(folder: Path, launcher: str, seconds: float, seed: int) -> None:
    """Kill the whole sweep (parent alone, or with its workers) three times at random within its expected time; then let it end."""
    chance = random.Random(seed)
    for i in range(3):
        sweep = subprocess.Popen(
            command(folder, launcher), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait = chance.uniform(0.1, 0.4) * seconds
        time.sleep(wait)
        if i == 1:
            os.kill(sweep.pid, signal.SIGKILL)
        else:
            os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
        done = len(list(folder.glob("*/summary.json")))
        print(
            f"killed after {wait:.0f} s ({'the parent' if i == 1 else 'all processes'}), {done} jobs were done",
            flush=True,
        )
    run(folder, launcher)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sweeps").resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    two = run(root / "two", "joblib")
    one = run(root / "one", "basic")
    print(f"one after the other {one:.0f} s, two workers {two:.0f} s: {one / two:.2f} times faster", flush=True)
    killed(root / "killed", "joblib", two, 0)
    tables = {name: table(root / name) for name in ("one", "two", "killed")}
    for name, found in tables.items():
        print(f"{name:<8}{found}")
    print("equal bit for bit" if len(set(tables.values())) == 1 else "THEY DIFFER")


if __name__ == "__main__":
    main()
