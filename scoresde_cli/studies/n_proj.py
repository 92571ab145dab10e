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

    def settings(self, d: int) -> list[Setting]:
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
        """The least number of directions that is not told apart from the best of its loss."""
        found = []
        for measured in panel.measured[:1]:
            comparison = measured.comparison
            if comparison is None:
                continue
            for loss in ("ssm_vr", "ssm"):
                rows = [
                    r
                    for r in measured.rows
                    if r.setting.get("loss") == loss and isinstance(r.setting.get("n_proj"), int)
                ]
                rows = [r for r in rows if r.against is not None]
                if len(rows) < 2:
                    continue
                best = min(rows, key=lambda r: r.estimate.value)  # type: ignore[union-attr]
                enough = next(r for r in sorted(rows, key=lambda r: r.setting["n_proj"])
                              if r is best or not comparison.against(r.label, best.label).apart)  # fmt: skip
                found.append(
                    f"{panel.title}: with {loss}, n_proj={enough.setting['n_proj']} is enough by {measured.metric}: no number on "
                    "the grid is told apart as better"
                )
        return found
