"""metrics.jsonl: one JSON object a logging step."""

import json
from pathlib import Path
from typing import Any

from scoresde_cli.tracking.base import Tracker


class JsonLines(Tracker):
    """Appends rows to a file. Rows after `step` are dropped first: a resumed run writes them again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)

    def log(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a last line that a crash cut is left out, and whatever else is no row."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
