"""The density ratio of the true time reversal, by a classifier: p(x - y) / p(x) is what reverse jumps go by.

A classifier of pairs (X_t, A) [0] and (X_t + A, A) [1] has the log-odds  log p(x - a) - log p(x)  at its best, as pairs have the
densities p(x) nu(a) and p(x - a) nu(a). With the log-density L of an energy network, whose gradient is the score, the log-odds are
L(x - a) - L(x): one network learns both. It needs samples of x_t and of the amplitude alone; the score is regressed on the table's.
(Least squares on the ratio itself has the same minimiser and a variance without bound.)
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.implicit_flux import jump
from scoresde_cli.losses.table_dsm import FieldLoss, squared
from scoresde_cli.sdes.base import SDE, Noised


class JumpRatio(FieldLoss):
    """|s - s*|^2 / E|s*|^2 + the classifier's log-loss; for networks with an energy, and joint jumps. Arguments: FieldLoss."""

    name = "jump_ratio"
    formula = "|s - s*|^2 / E|s*|^2 + log(1 + p(x-A)/p(x)) + log(1 + p(x+A)/p(x))"
    trains = frozenset({"score", "log_density"})
    needs_kernel = needs_jumps = True

    def check(self, model: FieldModel, sde: SDE) -> None:
        super().check(model, sde)
        assert sde.jumps is not None
        if "log_density" not in model.provides:
            raise ScoreSDEError("loss=jump_ratio needs a network with an energy: network=energy_mlp")
        if not sde.jumps.joint:
            raise ScoreSDEError("loss=jump_ratio needs joint jumps: sde.joint=true, or loss=table_dsm")

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        kernel, x = sde.kernel(), noised.x_t
        assert kernel is not None
        target = kernel.targets(x0, noised, t, {"score"})["score"]
        score = squared(model.score(x, t) - target) / sde.scales(t, x0[0].numel())["score"].power
        amplitude, _ = jump(sde, x, t, generator)
        here, before, after = model.log_density(torch.cat([x, x - amplitude, x + amplitude]), t.repeat(3)).chunk(3)
        return score + softplus(before - here) + softplus(after - here)
