"""The tables of the study `estimator`, of what `estimator.measure` found."""

from collections.abc import Callable, Sequence
from typing import Any

from scoresde_cli.studies.report import Table

ZERO = 1e-6  # a ratio to the data part below this is rounding
Found = dict[str, Any]
Cell = Callable[[Found], str]
Column = Callable[[dict[int, Found]], str]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def interval(found: Found | None) -> str:
    """`1.24 (0.98 to 1.57)`."""
    if found is None:
        return ""
    if abs(found["value"]) < ZERO:
        return "0"
    value, low, high = (number(found[end]) for end in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def name(found: Found) -> str:
    """`data, d = 16`, as it heads a panel."""
    return f"{found['data']}, d = {found['d']}"


def counts(found: Found) -> list[int]:
    return sorted({row["n"] for row in found["settings"] if row["law"] != "exact"})


def groups(found: Found) -> dict[tuple[str, str], dict[int, Found]]:
    """The settings by loss and law, and then by K."""
    grouped: dict[tuple[str, str], dict[int, Found]] = {}
    for row in found["settings"]:
        grouped.setdefault((row["loss"], row["law"]), {})[row["n"]] = row
    return grouped


def by_law(found: Found, cell: Cell, extra: Sequence[tuple[str, Column]] = ()) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table with a row for each loss and law and a column for each K."""
    numbers = sorted({*counts(found), *(row["n"] for row in found["settings"])})
    rows = [
        [
            f"{loss} {law}",
            *(cell(group[n]) if n in group else "" for n in numbers),
            *(value(group) for _, value in extra),
        ]
        for (loss, law), group in groups(found).items()
    ]
    return ["loss and law", *(f"K = {n}" for n in numbers), *(title for title, _ in extra)], rows


def ratios(found: Found) -> Table:
    def share(group: dict[int, Found]) -> str:
        zs = [abs(row["share"]["z"]) for row in group.values() if row["share"] is not None]
        return number(max(zs)) if zs else ""

    columns, rows = by_law(found, lambda row: interval(row["r"]), [("largest |z| against theory", share)])
    return Table(
        f"Variance of the gradient: projection part over data part; {name(found)}", columns, rows,
        f"Of the mean over a batch of {found['batch_size']}; {found['replicates']} batches, {found['fit_steps']} steps of fitting "
        "before; 95 % intervals. 0 is exact. Theory: 1/K of that at the fewest directions, less for draws without replacement.",
    )  # fmt: skip


def works(found: Found) -> Table:
    columns, rows = by_law(found, lambda row: f"{interval(row['work'])}, {1e3 * row['seconds']:.1f} ms")
    return Table(
        f"Cost times variance over the least of all, and milliseconds a step; {name(found)}", columns, rows,
        "Intervals hold for all settings at once (Bonferroni). Seconds are the least of whole training steps on this machine.",
    )  # fmt: skip


def laws(found: Found) -> Table:
    grouped = groups(found)
    rows = []
    for row in found["laws"]:
        at_best = grouped[row["loss"], row["law"]][row["n"]]
        ties = ", ".join(str(n) for n in sorted(set(row["ties"]) - {row["n"]})) or "none"
        rows.append([
            f"{row['loss']} {row['law']}", str(row["n"]), ties, interval(row["optimum"]), interval(row["c"]),
            interval(row["against"]), interval(at_best["variance"]),
        ])  # fmt: skip
    return Table(
        f"The best K of each law; {name(found)}",
        ["loss and law", "best K", "not told apart", "sqrt(r/c)", "c", "against the best law", "variance, same K"], rows,
        "c: the cost of a tangent over the rest of a step (a line through the seconds). Against the best law: cost times variance, "
        "each law with its best K. Variance, same K: of the gradient, over the least of the laws with this K. The intervals of the "
        "last two hold for all laws of a loss at once.",
    )  # fmt: skip


def loss_table(found: Found) -> Table:
    rows = []
    for row in found["settings"]:
        if row["predicted"] is not None:
            data, projection = row["data"]["value"], row["projection"]["value"]
            z = [cell["z"] for cell in row["by_time"]]
            zero = row["ratio"] is None and row["z"] == 0.0
            rows.append([
                f"{row['loss']} {row['law']} K = {row['n']}", "0" if zero else number(projection), number(row["predicted"]),
                "exact" if zero else interval(row["ratio"]), number(row["z"]), f"{min(z):.1f} to {max(z):.1f}",
                number(0.0 if zero else projection / (data + projection)),
            ])  # fmt: skip
    return Table(
        f"Variance of the loss of a sample, given t: projection part against its closed form; {name(found)}",
        ["loss, law and directions", "measured", "closed form", "measured / closed form", "z", "z by time", "part of the variance"],
        rows,
        f"{found['rows']} samples at each of {found['times']} times from t_min to T, {found['draws']} draws of their directions, "
        "float64. Part of the variance: projection part over projection part + data part.",
    )  # fmt: skip


def bias_table(found: Sequence[Found]) -> Table:
    rows = []
    for each in found:
        for (loss, law), group in groups(each).items():
            if law != "exact":
                z = [number(max((row[key] for row in group.values()), key=abs)) for key in ("bias_z", "gradient_z")]
                rows.append([f"{name(each)}: {loss} {law}", ", ".join(map(str, group)), *z])
    return Table(
        "Bias against the exact trace, on the same draws of the data",
        ["loss and law", "K", "loss, largest z", "gradient, largest z"], rows,
        "The largest over K; of the gradient, over K and 8 random directions in weight space.",
    )  # fmt: skip
