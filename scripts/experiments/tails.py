"""Errors of the tails of a study's runs with their sign: means over seeds, Student's 95 percent intervals, and what jumps change.

python scripts/experiments/tails.py DIR          (DIR of scoresde ablate study=jump 'study.parts=[tails]')
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

MEASURED = ("radial_q99_error", "radial_q999_error", "radial_q9999_error", "tail_index_error")


def mean(values: np.ndarray) -> str:
    """Values (seeds, measured) as the cells of a row of a table."""
    middle = values.mean(0)
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
    return " | ".join(f"{m:+.2f} ({m - r:+.2f} to {m + r:+.2f})" for m, r in zip(middle, reach, strict=True))


def main(folder: Path) -> None:
    found: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(dict)
    high = defaultdict(list)
    for file in sorted(folder.glob("runs/*/summary.json")):
        summary, said = json.loads(file.read_text()), dict(part.split("=") for part in file.parent.name.split(","))
        signed = [summary[name]["detail"]["signed"] for name in MEASURED]
        found[said["data"], said["output"], said["noise"]][int(said["seed"])] = signed
        high[said["data"]].append([summary[name]["floor_high"] for name in MEASURED])
    values = {key: np.array([rows[seed] for seed in sorted(rows)]) for key, rows in found.items()}
    for data, floors in high.items():
        print(
            f"| {data}: `floor_high`, median of the runs | "
            + " | ".join(f"{value:.2f}" for value in np.median(floors, 0))
            + " |"
        )
        for (of, output, noise), rows in values.items():
            if of == data:
                print(f"| {noise}, {output} | {mean(rows)} |")
        print("less vp, of the size of the errors, seed by seed:")
        for (of, output, noise), rows in values.items():
            if of == data and noise != "vp":
                print(f"| {noise}, {output} | {mean(abs(rows) - abs(values[data, output, 'vp']))} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
