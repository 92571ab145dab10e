"""Is there a better law of directions than Gaussian or Rademacher? Runs of train over laws x n_proj."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import PositiveInt

from scoresde_cli import configs
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.studies.base import GridStudy, Setting

LEAST = {"hutchpp": 2, "xtrace": 3}  # directions below which a sketching law is `orthogonal`


@dataclass(kw_only=True)
class ProjectionLaw(GridStudy):
    """
    Args:
        laws: options of the group `projection`, a user's own among them; all by null.
        n_proj: numbers of directions.
    """

    laws: list[str] | None = None
    n_proj: list[PositiveInt] | None = None

    title = "Which law of directions?"
    question = (
        "Is there a better law of the random directions than Gaussian or Rademacher, for the same loss, number of directions, "
        "network and budget?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "projection", "n_proj")

    def check(self, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
        super().check(overrides, config)
        if "projection" not in config["loss"]:
            raise ScoreSDEError("study=projection: this loss draws no directions; expected loss=ssm_vr, ssm or fd_ssm")

    def settings(self, d: int, loss: str) -> list[Setting]:
        """No law where n_proj >= d: with ssm_vr the trace is exact there, and stands as one setting."""
        laws = self.of_size("laws") or configs.options("projection")
        counts = [n for n in self.of_size("n_proj") if n < d or loss != "SSMVR"]
        found: list[Setting] = [
            {"projection": law, "n_proj": n} for n in counts for law in laws if n >= LEAST.get(law, 1)
        ]
        return found or [{"projection": law, "n_proj": 1} for law in laws if LEAST.get(law, 1) == 1]
