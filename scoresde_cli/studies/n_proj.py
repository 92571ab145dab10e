"""How many random directions does sliced score matching need in practice? Runs of train over n_proj x loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import PositiveInt

from scoresde_cli.studies import analysis
from scoresde_cli.studies.base import GridStudy, Setting


@dataclass(kw_only=True)
class NProj(GridStudy):
    """
    Args:
        n_proj: numbers of directions; `d` is the data's dimension, `auto` what train picks by itself (with ssm_vr).
        losses: sliced ones, which have directions, and others beside them.
    """

    n_proj: list[PositiveInt | Literal["d", "auto"]] | None = None
    losses: list[str] | None = None

    title = "How many random directions?"
    question = (
        "How many random directions does sliced score matching need in practice, at equal training steps and at equal training "
        "time, beside the exact trace (ism) and denoising score matching (dsm)?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "loss", "n_proj")

    def settings(self, d: int, loss: str) -> list[Setting]:
        """ssm_vr with n_proj >= d is the exact trace, which stands there as ism."""
        found: list[Setting] = []
        counts = self.of_size("n_proj")
        for loss in self.of_size("losses"):
            if loss not in ("ssm", "ssm_vr"):
                found.append({"loss": loss})
                continue
            numbers = sorted({d if n == "d" else n for n in counts if n != "auto"})
            found += [{"loss": loss, "n_proj": n} for n in numbers if loss == "ssm" or n < d]
            if "auto" in counts and loss == "ssm_vr":
                found.append({"loss": loss, "n_proj": "auto"})
        return found

    def shown(self, setting: Setting) -> Setting:
        """`auto` is no number: a curve over n_proj has it as a band."""
        return {"loss": f"{setting['loss']} auto"} if setting.get("n_proj") == "auto" else setting

    def conclude(self, panel: analysis.Panel) -> list[str]:
        """How many are enough, and how `auto` does, by the first number that was measured."""
        measured = panel.measured[0] if panel.measured else None
        comparison = None if measured is None else measured.comparison
        if measured is None or comparison is None:
            return []
        rows = [row for row in measured.rows if row.against is not None and row.estimate is not None]
        found = []
        for loss in ("ssm_vr", "ssm"):
            counted = [row for row in rows if row.setting.get("loss") == loss and "n_proj" in row.setting]
            if len(counted) > 1:
                counted.sort(key=lambda row: row.setting["n_proj"])
                best = min(counted, key=lambda row: comparison.means[row.label])
                enough = next(
                    row for row in counted if row is best or not comparison.against(row.label, best.label).apart
                )
                against = analysis.gap(comparison.against(best.label, enough.label))
                found.append(
                    f"{panel.title}: with {loss}, no number of directions is told apart as better than "
                    f"n_proj={enough.setting['n_proj']} by {measured.metric}"
                    + (
                        ""
                        if enough is best
                        else f" (n_proj={best.setting['n_proj']}, the least, against it: {against})"
                    )
                )
        fixed = [row for row in rows if row.setting.get("loss") in ("ssm_vr", "ism")]
        auto = next((row for row in rows if row.setting.get("loss") == "ssm_vr auto"), None)
        if auto is not None and fixed and not panel.title.endswith("steps"):  # it is made for the time
            best = min(fixed, key=lambda row: comparison.means[row.label])
            against = analysis.gap(comparison.against(auto.label, best.label))
            how = "ratio" if comparison.log else "difference"
            found.append(
                f"{panel.title}: n_proj=auto against the best fixed number, {best.label}: {how} {against} in {measured.metric}"
            )
        return found
