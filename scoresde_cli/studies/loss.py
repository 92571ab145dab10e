"""Which loss? The same data, network, seeds and budgets under each of them."""

from dataclasses import dataclass
from typing import ClassVar

from scoresde_cli.studies.base import GridStudy, Setting


@dataclass(kw_only=True)
class LossStudy(GridStudy):
    """
    Args:
        losses: options of the group `loss`.
    """

    losses: list[str] | None = None

    title = "Which loss?"
    question = (
        "Which loss learns the score best on the same data, with the same network and seeds, at equal training steps and at equal "
        "training time?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "loss")

    def settings(self, d: int, loss: str) -> list[Setting]:
        return [{"loss": loss} for loss in self.of_size("losses")]
