"""One interface for everything that records a run: console, JSON lines, Weights & Biases."""

from pathlib import Path
from typing import Any


class Tracker:
    """Records rows, figures and a summary; every method may be left as it is."""

    def log(self, row: dict[str, Any]) -> None:
        """A row of numbers of one logging step; `step` is among them."""

    def summary(self, values: dict[str, dict[str, Any]], figures: list[Path]) -> None:
        """The numbers and figures of the end."""

    def finish(self, exit_code: int) -> None:
        """No more will come. Never raises, never hangs."""
