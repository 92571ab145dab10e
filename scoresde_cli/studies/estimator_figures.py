"""The figures of the study `estimator`: a panel for each data set or dimension."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scoresde_cli.figures import finish, plt
from scoresde_cli.studies.charts import PLAIN, Curve, below, curves, key, looks, powers, readable
from scoresde_cli.studies.report import Figure

ZERO = 1e-6  # a ratio to the data part below this is rounding, and is not drawn
Found = dict[str, Any]


def draw(found: Sequence[Found], folder: Path) -> list[Figure]:
    """All of them, as PNGs in `folder`."""
    figures = [
        Figure(
            by_count(found, loss, folder / f"ratio-{loss}.png"),
            f"{loss}: what the directions add to the variance of the gradient, as a multiple of what the data brings. Bands are "
            "95 % intervals, dashed is theory from the point at the fewest directions.",
        )
        for loss in ("ssm_vr", "ssm")
        if any(points(each, loss) for each in found)
    ]
    time, cost = by_time(found, folder / "ratio-by-time.png"), by_cost(found, folder / "cost.png")
    return [
        *figures,
        Figure(time, "The same by time, with the fewest directions, all samples at time t."),
        Figure(
            cost,
            "Above, cost times variance over the least of all; bands hold for all settings at once, and the star is the least. "
            "Below, the seconds of a training step, the least of several turns.",
        ),
    ]


def title(found: Found) -> str:
    return f"{found['data']}, d = {found['d']}"


def points(found: Found, loss: str) -> dict[str, list[Found]]:
    """The settings of a loss that are not exact, by law, in the order of K."""
    grouped: dict[str, list[Found]] = {}
    for row in found["settings"]:
        if row["loss"] == loss and row["r"]["value"] > ZERO:
            grouped.setdefault(row["law"], []).append(row)
    return {law: sorted(rows, key=lambda row: row["n"]) for law, rows in grouped.items()}


def column(rows: Sequence[Found], name: str) -> dict[str, list[float]]:
    return {"mean" if end == "value" else end: [row[name][end] for row in rows] for end in ("value", "low", "high")}


def by_count(found: Sequence[Found], loss: str, path: Path) -> Path:
    panels: dict[str, list[Curve]] = {}
    for each in found:
        for law, rows in points(each, loss).items():
            shares = [1.0, *(row["share"]["predicted"] if row["share"] else 0.0 for row in rows[1:])]
            theory = [rows[0]["r"]["value"] * share for share in shares] if all(shares) else ()
            panels.setdefault(title(each), []).append(
                Curve(law, [row["n"] for row in rows], **column(rows, "r"), theory=theory)
            )
    return curves(
        panels, path, "directions a sample, K", "projection part / data part", f"variance of the gradient, {loss}"
    )


def by_time(found: Sequence[Found], path: Path) -> Path:
    """All laws with ssm_vr, one with ssm."""
    panels: dict[str, list[Curve]] = {}
    for each in found:
        grouped: dict[tuple[str, str], list[Found]] = {}
        for row in each["by_time"]:
            if row["r"]["value"] > ZERO:
                grouped.setdefault((row["loss"], row["law"]), []).append(row)
        plain = [law for loss, law in grouped if loss == "ssm"]
        one = "rademacher" if "rademacher" in plain else next(iter(plain), None)
        panels[title(each)] = [
            Curve(
                law if loss == "ssm_vr" else f"plain ssm, {law}",
                [float(f"{row['t']:.2g}") for row in rows],
                **column(rows, "r"),
            )
            for (loss, law), rows in grouped.items()
            if loss == "ssm_vr" or law == one
        ]
    return curves(panels, path, "t", "projection part / data part", "variance of the gradient by time")


def by_cost(found: Sequence[Found], path: Path) -> Path:
    """Cost times variance above, the step below; all laws with ssm_vr, one with ssm."""
    panels = [shown(each) for each in found]
    styles = looks(list(dict.fromkeys(name for panel in panels for name in panel)))
    rows = [row for panel in panels for group in panel.values() for row in group]
    with plt.rc_context(PLAIN):
        figure, grid = plt.subplots(
            2, len(found), figsize=(1.2 + 3.3 * len(found), 5.6), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2)
        )  # fmt: skip
        for (top, bottom), each, panel in zip(grid.T, found, panels, strict=True):
            for name, group in panel.items():
                colour, marker = styles[name]
                x, work = [row["n"] for row in group], column(group, "work")
                top.fill_between(x, work["low"], work["high"], color=colour, alpha=0.1, lw=0)
                if len(x) == 1:
                    top.vlines(x, work["low"], work["high"], color=colour, alpha=0.4, lw=1.6)
                top.plot(x, work["mean"], color=colour, marker=marker, ms=4.5, lw=1.6)
                bottom.plot(x, [1e3 * row["seconds"] for row in group], color=colour, marker=marker, ms=4.5, lw=1.6)
            best = min((row for group in panel.values() for row in group), key=lambda row: row["work"]["value"])
            top.plot(best["n"], best["work"]["value"], marker="*", ms=15, mfc="none", mec="black", mew=1.2)
            top.set_title(title(each), fontsize=9)
            bottom.set_xlabel("directions a sample, K")
            powers(bottom.xaxis, [row["n"] for group in panel.values() for row in group])
        readable(grid[0, 0].yaxis, [row["work"]["value"] for row in rows], True)
        readable(grid[1, 0].yaxis, [1e3 * row["seconds"] for row in rows], True)
        grid[0, 0].set_ylabel("cost times variance,\nover the least")
        grid[1, 0].set_ylabel("a training step (ms)")
        below(figure, [key(colour, marker, name) for name, (colour, marker) in styles.items()])
        return finish(figure, path)


def shown(found: Found) -> dict[str, list[Found]]:
    """The settings that are drawn, by name, in the order of K: ssm_vr by law, the exact trace, ssm with one law."""
    laws = [row["law"] for row in found["settings"] if row["loss"] == "ssm"]
    one = "rademacher" if "rademacher" in laws else next(iter(laws), None)
    grouped: dict[str, list[Found]] = {}
    for row in sorted(found["settings"], key=lambda row: row["n"]):
        if row["loss"] == "ssm_vr" or row["law"] == one:
            name = (
                f"plain ssm, {row['law']}"
                if row["loss"] == "ssm"
                else "exact trace"
                if row["law"] == "exact"
                else row["law"]
            )
            grouped.setdefault(name, []).append(row)
    return grouped
