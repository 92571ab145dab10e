"""What a person sees: a live line on a terminal, plain lines at sensible intervals in a log file, a panel at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scoresde_cli.tracking.base import Tracker


class Patient(Console):
    """A console whose reader may leave (`| head`): what is written afterwards goes nowhere, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        stream = sys.stderr if self.stderr else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console(stderr: bool = False) -> Console:
    """No markup, so that E[v] stays what it is; a log file gets room for the tables."""
    made = Patient(stderr=stderr, highlight=False, soft_wrap=True, markup=False)
    if not made.is_terminal:
        made.width = 120
    return made


out, err = console(), console(stderr=True)


def note(text: str) -> None:
    """A line of information on stdout."""
    out.print(text)


def warn(text: str) -> None:
    """A warning on stderr, one line."""
    err.print(f"warning: {text}", style="yellow")


class Training(Tracker):
    """Progress of training: loss relative to the baseline (negative is better), steps a second, time left.

    Args:
        steps, max_seconds: the budgets. step: where this session starts.
        baseline: the loss of the Gaussian part on the same loss.
    """

    def __init__(self, steps: int, max_seconds: float | None, step: int, baseline: float) -> None:
        self.steps, self.max_seconds, self.baseline = steps, max_seconds, baseline
        self.first, self.began, self.spoke = step, time.perf_counter(), time.perf_counter()
        self.next_line = step + max(1, (steps - step) // 10)
        self.live = out.is_terminal
        self.smooth: float | None = None
        if self.live:
            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=30),
                TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=out, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task("train", total=steps, completed=step, text="")
            self.bar.start()

    def log(self, row: dict[str, Any]) -> None:
        step, now = row["step"], time.perf_counter()
        relative = row["loss"] - self.baseline
        self.smooth = relative if self.smooth is None else 0.8 * self.smooth + 0.2 * relative
        rate = (step - self.first) / (now - self.began)
        text = f"loss - baseline {self.smooth:+.4f}  {rate:.{0 if rate >= 9.5 else 2 if rate < 1 else 1}f} steps/s"
        if self.live:
            total = self.steps
            if self.max_seconds is not None:
                total = min(total, int(step * self.max_seconds / max(row["seconds"], 1e-9)))
            self.bar.update(self.task, completed=step, total=max(total, step), text=text)
        elif step >= self.next_line or now - self.spoke > 30 or step >= self.steps:
            left = (self.steps - step) / rate
            if self.max_seconds is not None:
                left = min(left, max(self.max_seconds - row["seconds"], 0.0))
            note(f"step {step}/{self.steps}  {text}  {left:.0f} s left")
            self.spoke = now
            while self.next_line <= step:
                self.next_line += max(1, (self.steps - self.first) // 10)

    def finish(self, exit_code: int) -> None:
        if self.live:
            self.bar.stop()


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing in a log file; the callable takes how many are done."""
    if not out.is_terminal:
        yield lambda done: None
        return
    with Progress(console=out, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(summary: dict[str, dict[str, Any]]) -> Table:
    """The numbers with interval, floor and unit."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("", "left"),
        ("value", "right"),
        ("95% interval", "left"),
        ("floor, mean to 95%", "left"),
        ("unit", "left"),
    ):
        grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, entry in summary.items():
        ci = entry["ci"]
        shown = f"{number(ci[0])} to {number(ci[1])}" if ci else ""
        grid.add_row(name, number(entry["value"]), shown, floor_of(entry), entry["unit"])
    return grid


def comparison(titles: list[str], rows: dict[str, list[dict[str, Any]]]) -> None:
    """One number a row and one run a column, each above its interval; the floor, which they share, behind them."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("", no_wrap=True)
    for title in titles:
        grid.add_column(title, overflow="fold")
    grid.add_column("floor, mean to 95%", no_wrap=True)
    grid.add_column("unit")
    for name, entries in rows.items():
        cells = [
            number(e["value"]) + (f"\n{number(e['ci'][0])} to {number(e['ci'][1])}" if e["ci"] else "") for e in entries
        ]
        grid.add_row(name, *cells, floor_of(entries[0]), entries[0]["unit"])
    out.print(grid)


def floor_of(entry: dict[str, Any]) -> str:
    """What chance gives, in words."""
    if entry["floor_high"] in (None, 0.0):
        return ""
    if entry["floor"] == entry["floor_high"]:
        return f"{number(entry['floor'])} exact"
    return f"{number(entry['floor'])} to {number(entry['floor_high'])}"


def panel(title: str, summary: dict[str, dict[str, Any]], lines: list[str]) -> None:
    """The end: the numbers, and the lines below them (paths and commands, never broken)."""
    out.print(Panel(table(summary), title=title, title_align="left", expand=False))
    for line in lines:
        note(line)
