"""The figures of a study. Colours tell lines apart for colour-blind readers too (Okabe and Ito), markers do it without colour.

A filled marker is a setting all of whose runs finished, a hollow one a mean of those that did. Bands and bars are 95 percent
intervals of one mean each; which settings are told apart is in the tables, which use the pairing over seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scoresde_cli.figures import STYLE, finish, plt
from scoresde_cli.studies.analysis import Measured, Panel, Row, factor, labels

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TIED, APART, LEFT_OUT = "#0072b2", "#d55e00", "0.55"
DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))  # of bands, so that equal ones are both seen
TICKS = 8  # so many values of x have a tick each
PLAIN = STYLE | {"text.parse_math": False}  # a label is what it is, dollars too
WIDE = 4.0  # largest over least from which an axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """A line with an optional band, and beside it, dashed in its colour, what theory says at the same x."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    theory: Sequence[float] = ()


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker by name: 7 of one kind, then the colours again with the markers moved on by one."""
    pairs = ((COLOURS[i % 7], MARKERS[(i + i // 7) % 7]) for i in range(len(names)))
    return dict(zip(names, pairs, strict=True))


def readable(axis: Any, values: Sequence[float], log: bool) -> None:
    """Logarithmic where asked, with plain numbers, more of them the less it spans."""
    if not log:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    decades = np.log10(max(values) / min(values))
    axis.set_major_locator(
        LogLocator(
            subs=(1, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
        )
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def powers(axis: Any, values: Sequence[float]) -> None:
    """log2 with a tick at each value."""
    axis.axes.set_xscale("log", base=2)
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > WIDE * min(values)


def ends(each: Row) -> tuple[float, float, float]:
    """Mean, low, high; the mean alone where there is no interval."""
    found = each.estimate
    assert found is not None
    return (found.value, found.low, found.high) if found.n > 1 else (found.value, found.value, found.value)


def named(metric: Measured) -> str:
    return metric.metric if metric.unit == "loss" else f"{metric.metric}\n({metric.unit})"


def below(figure: Any, handles: Sequence[Any]) -> None:
    """The legend, in as many columns as the figure has room for."""
    if len(handles) > 1:
        column = 0.6 + 0.075 * max(len(handle.get_label()) for handle in handles)
        across = max(1, min(len(handles), int(figure.get_figwidth() / column)))
        figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8)


def key(colour: str, marker: str, name: str, **more: Any) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, ms=5, lw=1.5, label=name, **more)


def by_number(panels: Sequence[Panel], number: str, path: Path) -> Path:
    """Metrics by a numeric factor: a column a panel, a row a metric, a line for each setting of the other factors.

    Settings without the factor are horizontal bands.
    """
    metrics = list(dict.fromkeys(found.metric for panel in panels for found in panel.measured))
    rows = [each for panel in panels for found in panel.measured for each in found.rows]
    rest = list({repr(others(each, number)): others(each, number) for each in rows}.values())
    names = {repr(setting): name for setting, name in zip(rest, labels(rest), strict=True)}
    styles = looks(list(names.values()))
    with plt.rc_context(PLAIN):
        figure, grid = plt.subplots(
            len(metrics), len(panels), figsize=(1.2 + 3.1 * len(panels), 0.9 + 2.3 * len(metrics)),
            sharex=True, sharey="row", squeeze=False,
        )  # fmt: skip
        for down, metric in enumerate(metrics):
            seen: list[float] = []
            for across, panel in enumerate(panels):
                found = next((found for found in panel.measured if found.metric == metric), None)
                if found is None:
                    grid[down, across].set_title("not measured, or protocols differ", fontsize=8, y=0.45)
                    continue
                seen += lines(grid[down, across], found, number, names, styles)
                grid[down, 0].set_ylabel(named(found))
            readable(grid[down, 0].yaxis, seen, wide(seen))
        for axes, panel in zip(grid[0], panels, strict=True):
            axes.set_title(panel.title, fontsize=9, loc="left")
        for axes in grid[-1]:
            axes.set_xlabel(factor(number))
        values = [each.setting[number] for each in rows if each.setting.get(number) is not None]
        powers(grid[0, 0].xaxis, values)
        flat = {names[repr(others(each, number))] for each in rows if each.setting.get(number) is None}
        lone = flat - {names[repr(others(each, number))] for each in rows if each.setting.get(number) is not None}
        handles = [
            key(c, "" if n in lone else m, n, ls=dashes(n, styles) if n in lone else "-")
            for n, (c, m) in styles.items()
        ]
        if not all(each.complete for each in rows):
            handles.append(key("0.3", "o", "not all runs finished", markerfacecolor="white", ls=""))
        below(figure, handles)
        return finish(figure, path)


def dashes(name: str, styles: dict[str, tuple[str, str]]) -> Any:
    return DASHES[list(styles).index(name) % len(DASHES)]


def others(each: Row, number: str) -> dict[str, Any]:
    return {name: value for name, value in each.setting.items() if name != number and value is not None}


def lines(
    axes: Any, found: Measured, number: str, names: dict[str, str], styles: dict[str, tuple[str, str]]
) -> list[float]:
    """The lines and bands of one metric in one panel; returns all that was drawn, for the scale of the axis."""
    groups: dict[str, list[Row]] = {}
    for each in found.rows:
        if each.estimate is not None:
            groups.setdefault(names[repr(others(each, number))], []).append(each)
    for name, group in groups.items():
        colour, marker = styles[name]
        for each in group:
            if each.setting.get(number) is None:
                value, low, high = ends(each)
                axes.axhspan(low, high, color=colour, alpha=0.13, lw=0)
                axes.axhline(value, color=colour, ls=dashes(name, styles), lw=1.5)
        ordered = sorted(
            (each for each in group if each.setting.get(number) is not None), key=lambda each: each.setting[number]
        )
        x = [each.setting[number] for each in ordered]
        drawn = np.array([ends(each) for each in ordered]).reshape(-1, 3)
        axes.fill_between(x, drawn[:, 1], drawn[:, 2], color=colour, alpha=0.15, lw=0)
        axes.plot(x, drawn[:, 0], color=colour, lw=1.6)
        for position, each in zip(x, ordered, strict=True):
            fill = colour if each.complete else "white"
            axes.plot(position, ends(each)[0], marker=marker, ms=5, color=colour, markerfacecolor=fill, ls="")
    return [end for group in groups.values() for each in group for end in ends(each)]


def dots(panel: Panel, path: Path, title: str = "") -> Path:
    """A column a metric, a line a setting, best first under the first metric: mean with interval, seeds as faint points."""
    first = panel.measured[0]
    order = [each.label for each in sorted(first.rows, key=lambda each: rank(each, first))]
    widest = max(map(len, order))
    with plt.rc_context(PLAIN | {"axes.grid.axis": "x"}):
        figure, grid = plt.subplots(
            1, len(panel.measured), figsize=(0.8 + 0.075 * widest + 2.7 * len(panel.measured), 1.5 + 0.27 * len(order)),
            sharey=True, squeeze=False,
        )  # fmt: skip
        for axes, found in zip(grid[0], panel.measured, strict=True):
            drawn = [
                end for each in found.rows if each.estimate is not None for end in [*ends(each), *each.values.values()]
            ]
            for each in found.rows:
                if each.estimate is not None:
                    dot(axes, each, order.index(each.label))
            if found.chance is not None:
                axes.axvline(found.chance, color="0.3", ls=":", lw=1.2)
                drawn.append(found.chance)
            readable(axes.xaxis, drawn, wide(drawn))
            axes.set_xlabel(named(found))
        grid[0, 0].set_yticks(range(len(order)), order, fontsize=8)
        grid[0, 0].set_ylim(len(order) - 0.4, -0.6)
        chance = any(found.chance is not None for found in panel.measured)
        below(figure, legend(panel, chance))
        figure.suptitle(title or panel.title, fontsize=10)
        return finish(figure, path)


def rank(each: Row, found: Measured) -> tuple[bool, float]:
    """Those without a number last."""
    if each.estimate is None:
        return True, 0.0
    higher = found.comparison is not None and found.comparison.higher
    return False, -each.estimate.value if higher else each.estimate.value


def dot(axes: Any, each: Row, height: float) -> None:
    value, low, high = ends(each)
    colour = LEFT_OUT if each.against is None else APART if each.against.apart else TIED
    fill = colour if each.complete else "white"
    axes.plot(
        list(each.values.values()), [height + 0.22] * len(each.values), "o", color=colour, ms=3, alpha=0.45, mew=0
    )
    axes.plot([low, high], [height, height], color=colour, lw=1.6)
    axes.plot(value, height, "o", color=colour, markerfacecolor=fill, ms=5.5)


def legend(panel: Panel, chance: bool) -> list[Any]:
    """What the colours mean, of those that are there."""
    every = [each for found in panel.measured for each in found.rows if each.estimate is not None]
    compared = [each.against for each in every if each.against is not None]
    handles = [Line2D([], [], color="0.3", marker="o", ms=3, alpha=0.45, mew=0, ls="", label="one seed")]
    if any(not gap.apart for gap in compared):
        handles.append(key(TIED, "o", "best, or not told apart from the best"))
    if any(gap.apart for gap in compared):
        handles.append(key(APART, "o", "told apart from the best"))
    if any(each.against is None and each.complete for each in every):
        handles.append(key(LEFT_OUT, "o", "not compared"))
    if not all(each.complete for each in every):
        handles.append(key(LEFT_OUT, "o", "not all runs finished", markerfacecolor="white"))
    if chance:
        handles.append(
            Line2D([], [], color="0.3", ls=":", label="95 percent of fresh data are this good, or the exact density")
        )
    return handles


def curves(
    panels: Mapping[str, Sequence[Curve]], path: Path, xlabel: str, ylabel: str, title: str = "", *,
    log: tuple[bool, bool] = (True, True), share_y: bool = True,
) -> Path:  # fmt: skip
    """Lines with bands, one sub-axes a panel; theory dashed in the colour of its line. log: of x and of y."""
    names = list(dict.fromkeys(curve.label for group in panels.values() for curve in group))
    styles = looks(names)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(1.2 + 3.3 * len(panels), 3.6), sharex=True, sharey=share_y, squeeze=False
        )
        for axes, (name, group) in zip(grid[0], panels.items(), strict=True):
            for curve in group:
                colour, marker = styles[curve.label]
                line = "" if len(curve.theory) else "-"  # beside theory the points alone, so that both are seen
                axes.plot(curve.x, curve.mean, color=colour, lw=1.6, marker=marker, ms=4.5, ls=line)
                if len(curve.low):
                    axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
                if len(curve.theory):
                    axes.plot(curve.x, curve.theory, color=colour, lw=1.4, ls="--")
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(xlabel)
        x, y = zip(
            *[point for group in panels.values() for curve in group for point in zip(curve.x, curve.mean, strict=True)],
            strict=True,
        )
        if log[0] and len(set(x)) <= TICKS:
            powers(grid[0, 0].xaxis, x)
        else:
            readable(grid[0, 0].xaxis, x, log[0])
        readable(grid[0, 0].yaxis, y, log[1])
        grid[0, 0].set_ylabel(ylabel)
        handles: list[Any] = [key(colour, marker, name) for name, (colour, marker) in styles.items()]
        if any(len(curve.theory) for group in panels.values() for curve in group):
            handles.append(Line2D([], [], color="0.3", ls="--", label="theory"))
        below(figure, handles)
        figure.suptitle(title, fontsize=10)
        return finish(figure, path)
