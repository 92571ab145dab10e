"""The implicit loss of the flux: the jumps' analogue of implicit score matching. It needs samples of x_t and amplitudes alone.

    E|v(X_t)|^2 - 2 lambda E[ A . v(X_t + theta A) ],     theta ~ U(0, 1), A ~ nu

is |v - flux|^2 up to a constant, flux = lambda E[A p(x - theta A)] / p(x): move theta A from the argument of v to that of p. It is
the flux, as p(x) - p(x - y) = div(y int_0^1 p(x - theta y) dtheta). No divergence is taken, and no law of x_t given x_0.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from scoresde_cli.divergence import inner
from scoresde_cli.fields import FieldModel
from scoresde_cli.losses.base import MinTime, Times
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.losses.table_dsm import FieldLoss, squared
from scoresde_cli.projections import Projection, Rademacher
from scoresde_cli.rng import uniform
from scoresde_cli.sdes.base import SDE, Noised
from scoresde_cli.sdes.operators import expand


def jump(sde: SDE, x: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A (B, *D), rate (B,)): the amplitude of a jump and the rate of such; of one coordinate where each jumps by itself."""
    jumps = sde.jumps
    assert jumps is not None
    amplitude, rate = jumps.sample(len(x), tuple(x.shape[1:]), t, generator).to(x), jumps.rate(t)
    if jumps.joint:
        return amplitude, rate
    d = x[0].numel()
    which = torch.randint(d, (len(x),), generator=generator, device=x.device)
    return amplitude * torch.nn.functional.one_hot(which, d).to(x).view_as(x), rate * d


def flux_value(model: FieldModel, sde: SDE, x: Tensor, t: Tensor, generator: torch.Generator, draws: int) -> Tensor:
    """The loss above of each sample, (B,), with `draws` of A and theta; the thetas are one in each of as many parts of (0, 1)."""
    moved, pulls = [x], []
    for i in range(draws):
        amplitude, rate = jump(sde, x, t, generator)
        theta = (i + uniform((len(x),), generator, x.dtype)) / draws
        moved.append(x + expand(theta, x) * amplitude)
        pulls.append(expand(rate, x) * amplitude)
    here, *there = model.fields(torch.cat(moved), t.repeat(1 + draws), {"flux"})["flux"].chunk(1 + draws)
    pulled = torch.stack([inner(a, v, 1) for a, v in zip(pulls, there, strict=True)]).mean(0)
    return squared(here) - 2.0 * pulled


class ImplicitFlux(FieldLoss, SSMVR):
    """The implicit loss of the flux, and SSM-VR for the score, each in units of its target's power given x_0.

    Args:
        projection, n_proj: directions of the score's trace, as for ssm_vr.
        draws: jumps a sample.
        half, times, t_min: as for every loss (base.py).
    """

    name = "implicit_flux"
    formula = "(|s|^2 + 2 tr J) / E|s*|^2 + (|v|^2 - 2 lambda A . v(x + theta A)) / E|v*|^2"
    trains = frozenset({"score", "flux"})
    needs_jumps = second_order = True

    def __init__(
        self, projection: Projection, n_proj: PositiveInt = 4, draws: PositiveInt = 2, half: bool = False,
        times: Times = "mixed", t_min: MinTime = 1e-3,
    ) -> None:  # fmt: skip
        SSMVR.__init__(self, projection, n_proj, "one", half, times, t_min)
        self.draws = draws

    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        moments = sde.scales(t, x0[0].numel())
        score = SSMVR.value(self, model, sde, x0, noised, t, generator)
        flux = flux_value(model, sde, noised.x_t, t, generator, self.draws)
        return score / moments["score"].power + flux / moments["flux"].power.clamp_min(TINY)

    def reference(self, d: int) -> "ImplicitFlux":
        return ImplicitFlux(Rademacher(), max(self.n_proj, min(d, 16)), 8, self.half, self.times, self.t_min)

    def convention(self, d: int | None = None) -> str:
        return f"{FieldLoss.convention(self, d)}, n_proj={self.n_proj}, draws={self.draws}"


TINY = 1e-12  # a power at rate 0
