"""Does sliced score matching as the control variate of denoising score matching pay? On what data, for how long a training?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from scoresde_cli import figures
from scoresde_cli.studies import analysis
from scoresde_cli.studies.base import Findings, GridStudy, Job, Setting, collect
from scoresde_cli.studies.report import Figure, Table

AUTO = "dsm_cv"


@dataclass(kw_only=True)
class ControlVariate(GridStudy):
    """
    Args:
        thresholds: fixed ones of dsm_cv, beside auto; [] for auto alone.
        losses: beside dsm_cv; those that have directions with n_proj of them.
        n_proj: directions a sample.
        exact_up_to: dimensions beyond which ism is left out.
    """

    thresholds: list[Annotated[float, Field(gt=0)]] | None = None
    losses: list[str] | None = None
    n_proj: PositiveInt | None = None
    exact_up_to: PositiveInt = 64

    title = "Is denoising score matching better with a sliced control variate?"
    question = (
        "Does dsm_cv, which mixes the gradients of denoising and of sliced score matching by noise level, learn more than either, "
        "at equal training steps and at equal training time?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "loss", "n_proj")
    may_be_empty: ClassVar[tuple[str, ...]] = ("thresholds",)

    def settings(self, d: int, loss: str) -> list[Setting]:
        """The count stands in the config of all, so that they share all but the loss."""
        found: list[Setting] = [
            {"loss": name} for name in self.of_size("losses") if name != "ism" or d <= self.exact_up_to
        ]
        found += [{"loss": AUTO, "loss.threshold": value} for value in self.of_size("thresholds")]
        return [{**setting, "n_proj": self.of_size("n_proj")} for setting in [*found, {"loss": AUTO}]]

    def shown(self, setting: Setting) -> Setting:
        value = setting.get("loss.threshold")
        return {"loss": setting["loss"] if value is None else f"{AUTO} {value:g}"}

    def conclude(self, panel: analysis.Panel) -> list[str]:
        """dsm_cv against each of its parents, by the first number that was measured."""
        measured = panel.measured[0] if panel.measured else None
        if measured is None or measured.comparison is None:
            return []
        names = [row.label for row in measured.rows if row.against is not None]
        comparison = measured.comparison
        how = "ratio" if comparison.log else "difference"
        return [
            f"{panel.title}: {AUTO} against {other}: {how} {analysis.gap(comparison.against(AUTO, other))} in {measured.metric}"
            for other in ("dsm", "ssm_vr")
            if {AUTO, other} <= set(names)
        ]

    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        found = super().findings(folder, jobs, out, metrics)
        cells = [c for c in collect(folder, jobs) if c.setting["loss"] == AUTO and "threshold" in c.summary]
        rows: list[list[str]] = []
        for title, group in analysis.panels(cells, ("data.d", "budget")).items():
            entries = [c.summary["threshold"] for c in group]
            path = figures.mixing(entries, title, out / f"mixing-{len(rows)}.png")
            found.figures.append(
                Figure(path, f"{title}: the weights of SSM-VR of one seed, and the noise of all, by level.")
            )
            late = [row for entry in entries for row in entry["curve"][len(entry["curve"]) // 2 :]]
            noises, often = np.array([figures.noises(row) for row in late]), np.array([row["density"] for row in late])
            dsm, ssm, mixed = noises.sum((0, 2))
            drawn = (noises[:, 2] / often * often.mean(1, keepdims=True)).sum()
            rows.append([
                title, f"{np.median([e['value'] for e in entries]):.2g}", f"{mixed / dsm:.2f}", f"{mixed / ssm:.2f}",
                f"{drawn / dsm:.2f}",
            ])  # fmt: skip
        if rows:
            found.tables.append(Table(
                "Noise of a gradient, summed over the levels of the training times",
                ["", "sigma/alpha where w = 1/2", "w alone, over dsm", "over ssm_vr", "with its own times, over dsm"], rows,
                "Second moments of the gradients of single samples, second half of the training; median or sum over seeds.",
            ))  # fmt: skip
        return found
