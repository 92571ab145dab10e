"""What the study `estimator` answers, in words drawn from the numbers that `estimator.measure` found, by dimension."""

from collections.abc import Sequence
from pathlib import Path

from scoresde_cli.identity import bonferroni
from scoresde_cli.studies import estimator_figures
from scoresde_cli.studies.estimator_tables import (
    Found,
    bias_table,
    counts,
    groups,
    interval,
    laws,
    loss_table,
    name,
    number,
    ratios,
    works,
)
from scoresde_cli.studies.report import Figure, Table


def setting(row: Found) -> str:
    return f"the exact trace ({row['n']} unit directions)" if row["law"] == "exact" else f"{row['law']}, K = {row['n']}"


def report_parts(
    found: Sequence[Found], folder: Path
) -> tuple[list[str], list[Table], list[Figure], list[str]]:  # fmt: skip
    """Answers, tables, figures (PNGs in `folder`) and notes, over what was found in one or several dimensions.

    Args:
        found: of `estimator.measure`, each with the name of its data beside it, as `data`.
    """
    answers = [
        sentence
        for each in found
        for sentence in (directions(each), law(each), sketches(each), plain(each))
        if sentence
    ]
    answers += [sentence for sentence in (closed_forms(found), bias(found)) if sentence]
    tables = [table for each in found for table in (ratios(each), works(each), laws(each))]
    exact = [each for each in found if each["exact"]]
    tables += [loss_table(each) for each in exact] + ([bias_table(exact)] if exact else [])
    return answers, tables, estimator_figures.draw(found, folder), [note for each in found for note in notes(each)]


def directions(found: Found) -> str:
    """How many directions ssm_vr takes here."""
    said = found["best"].get("ssm_vr")
    if said is None:
        return ""
    best = said["best"]
    others = [
        tie for tie in said["ties"] if tie != best and (tie["law"] in (best["law"], "exact") or best["law"] == "exact")
    ]
    ties = [f"K = {n}" for n in sorted({tie["n"] for tie in others if tie["law"] != "exact"})]
    ties += ["the exact trace"] * any(tie["law"] == "exact" for tie in others)
    law = "" if best["law"] == "exact" else f" of {best['law']}"
    text = f"{name(found)}: cost times variance of ssm_vr is least with {setting(best)}"
    text += f"; not told apart from it: {listed(ties)}" if ties else f"; every other K{law} is told apart from it"
    optimum = next(
        (row["optimum"] for row in found["laws"] if (row["loss"], row["law"]) == ("ssm_vr", best["law"])), None
    )
    return f"{text}. Theory, sqrt(r/c): {interval(optimum)}." if optimum else f"{text}."


def listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def law(found: Found) -> str:
    """Which law, each with its best K; how far the others may be off."""
    rows = [row for row in found["laws"] if row["loss"] == "ssm_vr" and row["law"] not in found["adapted"]]
    if len(rows) < 2:
        return ""
    rows.sort(key=lambda row: row["against"]["value"])
    best, rest = rows[0], rows[1:]
    worse = [row for row in rest if row["against"]["low"] > 1.0]
    same = [row for row in rest if row not in worse]
    text = f"{name(found)}: of the laws, each with its best K, {best['law']} (K = {best['n']}) has the least cost times variance"
    if same:
        most = max(row["against"]["high"] for row in same)
        text += f"; not told apart: {', '.join(row['law'] for row in same)} (at most {number(most)} times it)"
    if worse:
        text += "; told apart: " + ", ".join(f"{row['law']} {interval(row['against'])} times" for row in worse)
    return f"{text}. {variances(found)}"


def variances(found: Found) -> str:
    """The laws of ssm_vr told apart by the gradient's variance at the fewest directions, whatever they cost."""
    first = min(counts(found))
    rows = [row for row in found["settings"] if (row["loss"], row["n"]) == ("ssm_vr", first) and row["law"] != "exact"]
    worse = [f"{row['law']} has {interval(row['variance'])} times" for row in rows if row["variance"]["low"] > 1.0]
    least = min(rows, key=lambda row: row["variance"]["value"])["law"]
    said = f"{', '.join(worse)} that of {least}" if worse else "none is told apart"
    return f"By variance alone, K = {first}: {said}."


def sketches(found: Found) -> str:
    """Whether laws that look at the Jacobian pay, against the best of all laws of ssm_vr."""
    rows = [row for row in found["laws"] if row["loss"] == "ssm_vr" and row["law"] in found["adapted"]]
    if not rows:
        return ""
    said = []
    for row in rows:
        against = row["against"]
        verdict = (
            "does not pay" if against["low"] > 1.0 else "is best" if against["value"] == 1.0 else "is not told apart"
        )
        said.append(
            f"{row['law']} {verdict} ({interval(against)} times the best law's cost times variance, K = {row['n']})"
        )
    return f"{name(found)}: {'; '.join(said)}."


def plain(found: Found) -> str:
    """ssm against ssm_vr: the best of each, and the projection part at the fewest directions."""
    if "plain" not in found["best"]:
        return ""
    against, grouped, first = found["best"]["plain"], groups(found), min(counts(found))
    ends = "not told apart from" if against["low"] <= 1.0 <= against["high"] else "told apart from"
    text = (
        f"{name(found)}: plain ssm at its best ({setting(found['best']['ssm']['best'])}) has {interval(against)} times the cost "
        f"times variance of ssm_vr at its best ({setting(found['best']['ssm_vr']['best'])}), {ends} it"
    )
    shared = next(
        (law for loss, law in grouped if loss == "ssm_vr" and ("ssm", law) in grouped and first in grouped[loss, law]),
        None,
    )
    if shared is None:
        return f"{text}."
    shared = "rademacher" if ("ssm_vr", "rademacher") in grouped else shared
    r = [interval(grouped[loss, shared][first]["r"]) for loss in ("ssm", "ssm_vr")]
    return (
        f"{text}. With K = {first} ({shared}) its directions bring {r[0]} times the data's variance to the gradient, those of "
        f"ssm_vr {r[1]}."
    )


def compared(found: Sequence[Found]) -> list[Found]:
    """Every comparison with a closed form: over all times and at each, those that are exact left out."""
    rows = [row for each in found for row in each["settings"]]
    return [cell for row in rows for cell in (row, *row["by_time"]) if cell["ratio"] is not None]


def closed_forms(found: Sequence[Found]) -> str:
    """Whether the measured variances of the loss are those of theory."""
    cells, zeros = (
        compared(found),
        [row for each in found for row in each["settings"] if row["z"] is not None and row["ratio"] is None],
    )
    if not cells and not zeros:
        return ""
    worst = max((abs(cell["z"]) for cell in [*cells, *zeros]), default=0.0)
    inside = sum(cell["ratio"]["low"] <= 1.0 <= cell["ratio"]["high"] for cell in cells)
    verdict = "agree with" if worst < bonferroni(len(cells)) else "do NOT agree with"
    exact = (
        f" {len(zeros)} settings are exact, as they should be."
        if zeros and all(row["z"] == 0.0 for row in zeros)
        else ""
    )
    return (
        f"The measured variances of the loss {verdict} the closed forms: {inside} of {len(cells)} 95 % intervals hold the closed "
        f"form, and the largest |z| is {number(worst)} (limit for the largest of so many: {number(bonferroni(len(cells)))}).{exact}"
    )


def bias(found: Sequence[Found]) -> str:
    """Whether loss or gradient is off the exact trace's."""
    rows = [row for each in found if each["exact"] for row in each["settings"] if row["law"] != "exact"]
    if not rows:
        return ""
    said, good = [], True
    for what, key, ways in (("loss", "bias_z", 1), ("gradient, 8 ways each", "gradient_z", 8)):
        worst, most = max(abs(row[key]) for row in rows), bonferroni(ways * len(rows))
        good &= worst < most
        said.append(f"{what}: largest |z| {number(worst)} of {ways * len(rows)}, limit {number(most)}")
    return f"{'No bias' if good else 'A BIAS'} is seen against the exact trace ({'; '.join(said)})."


def notes(found: Found) -> list[str]:
    said = []
    if found["fit_steps"]:
        said.append(
            f"{name(found)}: the network was fitted for {found['fit_steps']} steps; the projection part grows as training goes on, "
            "so a trained run (run=DIR) may want more directions"
        )
    if not found["exact"]:
        said.append(
            f"{name(found)}: too many dimensions for the exact trace: no bias, no closed form, and no exact trace to compare with"
        )
    return said
