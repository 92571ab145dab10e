"""From the runs of a study to tables and plain sentences: settings side by side, over the same seeds.

A cell is one run: a setting (its factors by name) and a seed. A panel holds the cells that are compared with each other. In a
panel each metric has a table of its own, provided that its entries share a protocol. A setting is compared where all of its
runs finished with a finite number; over seeds that all that are compared have. What is not compared is listed, with the reason.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.evaluation import unlike
from scoresde_cli.studies.report import Table
from scoresde_cli.studies.statistics import Comparison, Difference, Estimate, common, compare, mean

NO_NATURAL_ZERO = ("loss", "nats", "bits/dim")  # units of which a ratio means nothing
UNEVEN = 1.3  # the most over the fewest steps of one setting: a busy machine, not the spread of a quiet one
HIGHER = ("loss_gain", "steps_per_second")  # what does not say so in its protocol
NAMED = 3  # so many settings are named in a sentence


@dataclass(frozen=True)
class Cell:
    """One run: factors in the order they are shown, its summary.json ({} where it did not finish), status and directory."""

    setting: dict[str, Any]
    seed: int
    summary: dict[str, dict[str, Any]]
    status: str
    path: str

    def number(self, metric: str) -> float | None:
        """The finite number that a finished run has, or None."""
        value = self.summary.get(metric, {}).get("value") if self.status == "finished" else None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """One setting under one metric: numbers by seed, of how many planned runs; against the best where it is compared."""

    label: str
    setting: dict[str, Any]
    values: dict[int, float]
    planned: int
    estimate: Estimate | None
    steps: float | None
    seconds: float | None
    against: Difference | None = None

    @property
    def complete(self) -> bool:
        return len(self.values) == self.planned


@dataclass(frozen=True)
class Measured:
    """One metric of a panel.

    Attributes:
        rows: by setting, in the order of the cells. seeds: over which is compared.
        chance: the median of what fresh data gives (floor_high), where there is such a thing.
    """

    metric: str
    unit: str
    rows: list[Row]
    seeds: list[int]
    comparison: Comparison | None
    chance: float | None
    notes: list[str]


@dataclass(frozen=True)
class Panel:
    """Settings that are compared with each other; notes: what was left out, and why."""

    title: str
    measured: list[Measured]
    notes: list[str]


def factor(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def label(setting: Mapping[str, Any], keys: Sequence[str], full: bool = False) -> str:
    """`ssm_vr n_proj=4`: text stands alone (unless full), None is left out."""
    shown = {key: setting[key] for key in keys if setting.get(key) is not None}
    return " ".join(v if isinstance(v, str) and not full else f"{factor(k)}={v}" for k, v in shown.items())


def identity(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value!r}" for key, value in sorted(setting.items()) if value is not None) or "all"


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each, the shortest by which they are told apart: of the factors that vary, by value, by name and value."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    varying = [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1] or keys
    for chosen, full in ((varying, False), (varying, True), (keys, True)):
        found = [label(setting, chosen, full) for setting in settings]
        if all(found) and len(set(found)) == len(found):
            return found
    return [identity(setting) for setting in settings]


def panels(cells: Sequence[Cell], by: Sequence[str]) -> dict[str, list[Cell]]:
    """The cells by the factors that nothing is compared across, such as `d = 16, budget = steps`; without these factors."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        title = ", ".join(f"{factor(key)} = {cell.setting[key]}" for key in by if cell.setting.get(key) is not None)
        kept = {key: value for key, value in cell.setting.items() if key not in by}
        found.setdefault(title, []).append(Cell(kept, cell.seed, cell.summary, cell.status, cell.path))
    return found


def analyse(title: str, cells: Sequence[Cell], metrics: Sequence[str]) -> Panel:
    """The metrics of one panel, in that order; those that no run has are left out, of those with unlike protocols is a note.

    Raises ScoreSDEError where a setting has a seed twice.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(identity(cell.setting), []).append(cell)
    named = dict(zip(labels([group[0].setting for group in groups.values()]), groups.values(), strict=True))
    for name, group in named.items():
        if len({cell.seed for cell in group}) != len(group):
            raise ScoreSDEError(
                f"{name}: a seed stands twice among {', '.join(cell.path for cell in group)}, which differ in nothing that is "
                "compared; leave one of them out"
            )
    measured, notes = [], [say(name, group) for say in (unfinished, uneven) for name, group in named.items()]
    for metric in metrics:
        if all(cell.number(metric) is None for cell in cells):
            continue
        reason = differing([cell for cell in cells if cell.number(metric) is not None], metric)
        if reason is None:
            measured.append(measure(metric, named))
        else:
            notes.append(f"{metric} is not compared, the protocols differ: {reason}")
    return Panel(title, measured, [note for note in notes if note])


def unfinished(name: str, group: Sequence[Cell]) -> str:
    """`ssm: 3 of 5 finished (2 diverged: runs/3, runs/4)`, or nothing."""
    others = [cell for cell in group if cell.status != "finished"]
    if not others:
        return ""
    how = "; ".join(
        f"{n} {status}: {', '.join(cell.path for cell in others if cell.status == status)}"
        for status, n in Counter(cell.status for cell in others).items()
    )
    return f"{name}: {len(group) - len(others)} of {len(group)} finished ({how})"


def uneven(name: str, group: Sequence[Cell]) -> str:
    """`ssm: 154 to 309 steps from seed to seed ..`, which a budget of time gave to runs of one setting; or nothing."""
    entries = [cell.summary["train_seconds"] for cell in group if cell.number("train_seconds") is not None]
    steps = [entry["protocol"].get("step") or 0 for entry in entries]
    if not steps or max(steps) < UNEVEN * min(steps):
        return ""
    return f"{name}: {min(steps)} to {max(steps)} steps from seed to seed: was the machine equally free for all?"


def differing(cells: Sequence[Cell], metric: str) -> str | None:
    """The first difference in protocol but for the seed, or None."""
    return unlike([
        {**entry, "protocol": {k: v for k, v in entry["protocol"].items() if k != "seed"}}
        for entry in (cell.summary[metric] for cell in cells)
    ])  # fmt: skip


def measure(metric: str, named: Mapping[str, Sequence[Cell]]) -> Measured:
    """One metric over the settings that have it; its entries share a protocol."""
    without = [
        name
        for name, group in named.items()
        if all(cell.status == "finished" and metric not in cell.summary for cell in group)
    ]
    named = {name: group for name, group in named.items() if name not in without}
    entries = [cell.summary[metric] for group in named.values() for cell in group if cell.number(metric) is not None]
    rows = [row(metric, name, group) for name, group in named.items()]
    complete = [each for each in rows if each.complete]
    seeds = common([set(each.values) for each in complete])
    finished = {name: sum(cell.status == "finished" for cell in group) for name, group in named.items()}
    notes = [
        f"{each.label}: {len(each.values)} of {finished[each.label]} finished runs have a finite number; not compared"
        for each in rows
        if len(each.values) < finished[each.label]
    ] + [f"{name}: no run of it has this number" for name in without]
    named_seeds = ", ".join(map(str, seeds))
    notes += [
        f"{each.label}: not compared, it lacks one of the seeds {named_seeds}"
        for each in complete
        if not set(seeds) <= set(each.values)
    ]
    complete = [each for each in complete if set(seeds) <= set(each.values)]
    dropped = sorted({seed for each in complete for seed in each.values} - set(seeds))
    if dropped:
        notes.append(
            f"compared over {named_seeds or 'no seed'}: not all settings have seed {', '.join(map(str, dropped))}"
        )
    comparison = None
    if len(complete) > 1 and seeds:
        values = {each.label: [each.values[seed] for seed in seeds] for each in complete}
        log = entries[0]["unit"] not in NO_NATURAL_ZERO and min(map(min, values.values())) > 0
        higher = entries[0]["protocol"].get("better", "higher" if metric in HIGHER else "lower") == "higher"
        comparison = compare(values, log, higher)
        against = {name: comparison.against(name, comparison.best()) for name in values}
        rows = [Row(**{**vars(each), "against": against.get(each.label)}) for each in rows]
    floors = [entry["floor_high"] for entry in entries if entry["floor_high"]]
    return Measured(
        metric, entries[0]["unit"], rows, seeds, comparison, float(np.median(floors)) if floors else None, notes
    )


def row(metric: str, name: str, group: Sequence[Cell]) -> Row:
    values = {cell.seed: number for cell in group if (number := cell.number(metric)) is not None}
    times = [cell.summary["train_seconds"] for cell in group if cell.number("train_seconds") is not None]
    steps = float(np.median([entry["protocol"].get("step", math.nan) for entry in times])) if times else None
    seconds = float(np.median([entry["value"] for entry in times])) if times else None
    return Row(
        name, group[0].setting, values, len(group), mean(list(values.values())) if values else None, steps, seconds
    )


def shown(value: float, se: float) -> str:
    """A number to the second digit of its standard error, six digits at most."""
    if not math.isfinite(value):
        return ""
    if not math.isfinite(se) or se <= 0 or value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.4g}"
    decimals = min(1 - math.floor(math.log10(se)), 5 - math.floor(math.log10(abs(value))))
    return f"{value:.{max(decimals, 0)}f}"


def with_interval(found: Estimate) -> str:
    """`0.0216 (0.0205 to 0.0228)`."""
    if found.n == 1:
        return f"{found.value:.4g} (no interval)"
    return f"{shown(found.value, found.se)} ({shown(found.low, found.se)} to {shown(found.high, found.se)})"


def gap(found: Difference, unit: str = "") -> str:
    """`1.31 unit (1.12 to 1.52)`, with a digit more where an end would be rounded to what no difference gives."""
    if not math.isfinite(found.low):
        return f"{found.value:.3g}{unit} (no interval)"
    width = found.high - found.low
    for scale in (width, width / 10, width / 100):
        value, low, high = (shown(end, scale) for end in (found.value, found.low, found.high))
        if not {float(low), float(high)} & {0.0, 1.0}:
            break
    return f"{value}{unit} ({low} to {high})"


def tables(panel: Panel) -> list[Table]:
    """A table a metric, a row a setting."""
    return [table(panel.title, each) for each in panel.measured]


def table(title: str, found: Measured) -> Table:
    ratio = found.comparison is None or found.comparison.log
    columns = [
        "setting",
        "mean",
        "SE",
        "95% interval",
        "median",
        f"{'ratio' if ratio else 'difference'} to the best",
        "verdict",
    ]
    rows = [[*cells(each), verdict(each, found), str(len(each.values)), *speed(each)] for each in found.rows]
    notes = list(found.notes)
    if found.chance is not None:
        exact = found.unit in NO_NATURAL_ZERO
        notes.insert(
            0,
            f"{'the exact density has' if exact else '95 percent of fresh data are at least as good as'} {found.chance:.4g}",
        )
    unit = f" ({found.unit})" if found.unit != "loss" else ""
    name = ": ".join(filter(None, (title, found.metric + unit)))
    return Table(name, [*columns, "seeds", "steps", "seconds"], rows, "; ".join(notes))


def cells(each: Row) -> list[str]:
    found = each.estimate
    if found is None:
        return [each.label, "", "", "", "", ""]
    spread = f"{shown(found.low, found.se)} to {shown(found.high, found.se)}" if found.n > 1 else ""
    median = shown(float(np.median(list(each.values.values()))), found.se)
    se = shown(found.se, found.se) if found.n > 1 else ""
    return [
        each.label,
        shown(found.value, found.se),
        se,
        spread,
        median,
        "" if itself(each) or each.against is None else gap(each.against),
    ]


def itself(each: Row) -> bool:
    """Whether it is the best, against which the others stand."""
    return each.against is not None and each.against.a == each.against.b


def speed(each: Row) -> list[str]:
    return ["" if number is None else f"{number:.{digits}f}" for number, digits in ((each.steps, 0), (each.seconds, 1))]


def verdict(each: Row, found: Measured) -> str:
    if not each.complete:
        return f"{len(each.values)} of {each.planned} finished"
    if each.against is None or found.comparison is None:
        return "not compared"
    if found.comparison.n == 1:
        return "one seed"
    if itself(each):
        return "best"
    return "told apart" if each.against.apart else "not told apart from the best"


def left_out(panel: Panel) -> list[str]:
    """What was not compared, and why: the notes of a report."""
    return [f"{panel.title}: {note}" if panel.title else note for note in panel.notes] + [
        ": ".join(filter(None, (panel.title, each.metric, note))) for each in panel.measured for note in each.notes
    ]


def answers(panel: Panel) -> list[str]:
    """A sentence a metric, out of its numbers: what is best, what is not told apart from it, and how far the others are."""
    return [": ".join(filter(None, (panel.title, sentence(each)))) for each in panel.measured]


def sentence(found: Measured) -> str:
    c, metric = found.comparison, found.metric
    by_label = {each.label: each for each in found.rows}
    if c is None and len(found.rows) == 1 and found.rows[0].estimate is not None:
        seeds = len(found.rows[0].values)
        return f"{metric} {with_interval(found.rows[0].estimate)} over {seeds} seed{'s' * (seeds > 1)}"
    if c is None:
        return f"{metric}: nothing to compare, fewer than two settings finished with the same seeds"
    if c.n == 1:
        return f"{metric}: with one seed nothing can be told apart"

    def number(name: str) -> str:
        estimate = by_label[name].estimate
        assert estimate is not None
        return with_interval(estimate)

    order = sorted(c.means, key=lambda name: c.means[name], reverse=c.higher)
    best, ties = order[0], [name for name in order if name in c.ties()]
    worse = [name for name in order[1:] if name not in ties]
    if not worse:
        return (
            f"with {c.n} seeds no setting is told apart from another in {metric}: from {best}, {number(best)}, to {order[-1]}, "
            f"{number(order[-1])}"
        )
    means = {name: float(np.mean(list(by_label[name].values.values()))) for name in order}
    plain = best == (max if c.higher else min)(means, key=lambda name: means[name])
    rank = "greatest" if c.higher else "least"
    aside = sum(each.complete and each.against is None for each in found.rows)
    of = f"of the {len(order)} settings that have the seeds {', '.join(map(str, found.seeds))}, " if aside else ""
    parts = [f"{of}{best} has the {rank} {metric}, {number(best)}"]
    if not plain:
        parts = [f"{of}{best} has the {rank} geometric mean of {metric}; its mean is {number(best)}"]
    if ties:
        parts.append(f"not told apart from it: {', '.join(ties)}")
    named = worse if len(worse) <= NAMED else worse[: NAMED - 1]
    parts += [f"{name} is {behind(c, name, best, found.unit)}" for name in named]
    if len(worse) > NAMED:
        parts.append(f"{len(worse) - len(named)} more, the last {worse[-1]}, {behind(c, worse[-1], best, found.unit)}")
    return "; ".join(parts)


def behind(c: Comparison, name: str, best: str, unit: str) -> str:
    """`1.31 times worse (1.12 to 1.52)`, or a difference with its unit."""
    found = c.against(best, name) if c.higher else c.against(name, best)
    return gap(found, f"{' times' if c.log else f' {unit}' if unit != 'loss' else ''} worse")
