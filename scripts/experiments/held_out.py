"""The held-out DSM loss of the runs of a study by level of noise: dsm_cv less dsm, paired by seed, with Student's intervals (95 %).

python scripts/experiments/held_out.py DIR [ROWS=3000]      (DIR of scoresde ablate study=dsm_cv; 12 levels, even in log sigma)
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from scoresde_cli import load_run
from scoresde_cli.losses.dsm import DSM
from scoresde_cli.rng import generator

LEVELS = 12


@torch.no_grad()
def by_level(folder: Path, rows: int) -> tuple[str, int, np.ndarray, np.ndarray]:
    """(loss, seed, mean DSM loss (LEVELS,) of the same rows, times and noise for every run, sigma/alpha of the levels)."""
    run = load_run(folder)
    sde, x0 = run.parts.sde, run.dataset().splits["test"].to(run.parts.dtype)[:rows]
    grid = torch.linspace(run.parts.settings.t_min, sde.T, 100_001, dtype=torch.float64)
    ratio = (sde.levels().sigma(grid) / sde.levels().alpha(grid)).log()
    ends = np.linspace(float(ratio[0]), float(ratio[-1]), LEVELS + 1)
    middle = torch.tensor(np.interp((ends[1:] + ends[:-1]) / 2, ratio, grid), dtype=x0.dtype)
    means = np.zeros(LEVELS)
    for level in range(LEVELS):
        for k, part in enumerate(x0.split(200)):
            source, t = generator(0, "held-out", level, k), middle[level].expand(len(part))
            found = DSM().weighted(run.model, sde, part, sde.perturb(part, t, source), t, source)
            means[level] += float(found.double().sum()) / len(x0)
    name = run.config["loss"]["_target_"].rsplit(".", 1)[-1]
    if run.config["loss"].get("threshold") not in (None, "auto"):
        name += " with a threshold"
    return name, run.config["seed"], means, np.exp((ends[1:] + ends[:-1]) / 2)


def main(folder: Path, rows: int) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(p.parent for p in folder.glob("runs/*/summary.json")):
        loss, seed, means, ratios = by_level(path, rows)
        found.setdefault(loss, {})[seed] = means
    dsm, mixed = found["DSM"], found["DSMCV"]
    seeds = sorted(set(dsm) & set(mixed))
    gaps = np.array([mixed[s] - dsm[s] for s in seeds])
    every = np.array([dsm[s] for s in seeds])
    reach = stats.t.ppf(0.975, len(seeds) - 1) * gaps.std(0, ddof=1) / len(seeds) ** 0.5
    print(f"{len(seeds)} seeds\nsigma/alpha      dsm   dsm_cv less dsm")
    for ratio, mean, gap, half in zip(ratios, every.mean(0), gaps.mean(0), reach, strict=True):
        print(f"{ratio:11.3g} {mean:8.2f}   {gap:+.3f} ({gap - half:+.3f} to {gap + half:+.3f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
