"""A study on paper: question, answers, tables, figures and what was left out, as one HTML file and as Markdown.

report.html needs nothing beside itself: figures are embedded, no script, no address outside. report.md shows the same strings,
with figures by relative path. All text is escaped in both; only the templates beside this module hold markup.
"""

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scoresde_cli.errors import one_line
from scoresde_cli.training.state import write_durably

HOW_TO_READ = {
    "95% interval": "For the mean over training seeds, on the same data and protocol. From 6 seeds on by the expanded percentile "
    "bootstrap (Hesterberg, Am. Stat. 69, 2015); with 2 to 5 Student's, as so few values cannot be resampled to that level (of 5, "
    "the bootstrap covers in 92 percent of cases); with one there is none.",
    "to the best": "A ratio of geometric means, or a difference of means where the number has no natural zero or is not always "
    "positive. The settings ran with the same seeds, so what a seed does to all alike drops out; the interval holds for all "
    "pairs of settings at once, in 95 percent of cases (Tukey's studentized range on the residuals of the complete block "
    "design, or on the pair's own where they vary more). Two or three seeds say little of how much a setting varies: where one "
    "varies far more than the others, that is 90 percent.",
    "not told apart": "The simultaneous interval holds 1 (of a ratio) or 0 (of a difference): these seeds do not show a "
    "difference. That is no proof that there is none. Whether the intervals of two means overlap says less, as it ignores pairing.",
    "SE": "Standard error of the mean over seeds.",
    "k of n finished": "Some runs failed or diverged. Such a setting is not compared: the runs that finished are the lucky ones.",
}


@dataclass(frozen=True)
class Table:
    """Strings as they are shown; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """By column, whether all that stands in it are numbers: aligned to the right."""
        filled = [[cell for cell in column if cell] for column in zip(*self.rows, strict=True)] or [[]] * len(
            self.columns
        )
        return [
            bool(cells) and all(re.match(r"[-+]?\.?\d", cell) for cell in cells) and i > 0
            for i, cells in enumerate(filled)
        ]


@dataclass(frozen=True)
class Figure:
    """A PNG and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Report:
    """What a study found.

    Attributes:
        protocol: what all numbers share, by name. command: what makes the report again. seconds: what it took.
        notes: what was left out, failed runs among them. how_to_read: what the words in the tables mean.
    """

    title: str
    question: str
    answers: list[str]
    tables: list[Table]
    figures: list[Figure]
    protocol: dict[str, str]
    command: str
    versions: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)
    how_to_read: dict[str, str] = field(default_factory=lambda: dict(HOW_TO_READ))


class Verbatim(str):
    """Text that stands in Markdown as it is."""


def markdown(value: object) -> str:
    """Text on one line, with what Markdown or HTML would read as markup escaped."""
    if isinstance(value, Verbatim):
        return value
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def environment(html: bool) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=html, finalize=None if html else markdown,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["code"] = lambda text: Verbatim("\n".join(f"    {line}" for line in str(text).splitlines()))
    return made


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into a folder, each whole or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    embedded = [base64.b64encode(figure.path.read_bytes()).decode() for figure in report.figures]
    linked = [Verbatim(quote(os.path.relpath(figure.path, folder).replace(os.sep, "/"))) for figure in report.figures]
    paths = (folder / "report.html", folder / "report.md")
    for path in paths:
        template = environment(path.suffix == ".html").get_template(f"{path.name}.j2")
        page = template.render(report=report, embedded=embedded, linked=linked, duration=duration(report.seconds))
        write_durably(path, page.encode())
    return paths


def text(report: Report) -> list[str]:
    """The lines for a terminal: the question, what was found, what was left out."""
    return [
        report.question, *(f"  {answer}" for answer in report.answers), *(f"note: {note}" for note in report.notes)
    ]  # fmt: skip
