"""What the losses share: times, weighting, convention. A loss is its `value`.

A loss maps (model, sde, x0, generator) to one number a sample, (B,). All of them are written in the convention
|S|^2 + 2 tr J (and |S - target|^2 for DSM); `half=True` gives half of it.

Where noise is correlated, with a covariance C of x_t given x_0, the loss is S^T C S + 2 tr(C J), and DSM's |L^T S + eps|^2 with
C = L L^T: the same losses in coordinates in which C = sigma(t)^2 I, so a loss never sees any but isotropic noise.

Where noise acts on a velocity v beside the data's x (SDE.phase), the loss is that of the score in v at x_t held fixed, S_v and
d S_v / d v, and DSM's target that of the law of (x_t, v_t) given x_0: hybrid score matching (Dockhorn et al., ICLR 2022).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel, GivenPosition, Within
from scoresde_cli.rng import uniform
from scoresde_cli.sdes.base import SDE, Kernel, Noised
from scoresde_cli.sdes.operators import Scalar
from scoresde_cli.sdes.phase import Blocks, split

Weighting = Literal["sigma2", "g2", "one"]
Times = Literal["mixed", "uniform", "log_uniform"]
MinTime = Annotated[float, Field(gt=0, lt=1)]


def draw_times(law: Times, n: int, t_min: float, T: float, generator: torch.Generator) -> Tensor:
    """n stratified times on [t_min, T], shape (n,): uniform, log-uniform, or the first half one, the rest the other."""

    def strata(m: int) -> Tensor:
        return (torch.arange(m, device=generator.device) + uniform((m,), generator)) / max(m, 1)

    n_uniform = {"uniform": n, "log_uniform": 0, "mixed": n - n // 2}[law]
    even = t_min + (T - t_min) * strata(n_uniform)
    logs = torch.exp(math.log(t_min) + math.log(T / t_min) * strata(n - n_uniform))
    return torch.cat([even, logs]).clamp(t_min, T)


class Loss(ABC):
    """loss(model, sde, x0 (B, *D), generator) -> (B,).

    Args:
        weighting: lambda(t): sigma2 (the kernel's variance), g2 (the mean diagonal of Sigma), or one.
        half: report and train on half of it (the convention 1/2 |S|^2 + tr J).
        times: how t is drawn on [t_min, T].
        t_min: smallest time.
    """

    name: str
    formula: str
    trains: Set[str] = frozenset({"score"})
    needs_kernel = False
    second_order = True
    varying = False  # its work has another shape in each step, so that it is not compiled
    needs_jumps = False

    def __init__(
        self, weighting: Weighting = "sigma2", half: bool = False, times: Times = "mixed", t_min: MinTime = 1e-3
    ) -> None:
        self.weighting, self.half, self.times, self.t_min = weighting, half, times, t_min

    @abstractmethod
    def value(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The unweighted loss of each sample, (B,), in the convention |S|^2 + 2 tr J."""

    def check(self, model: FieldModel, sde: SDE) -> None:
        """Refuse a process that the loss cannot serve, naming what would."""
        process = type(sde).__name__
        if self.needs_kernel and sde.kernel() is None:
            why = "has no noise to remove" if sde.still else "is known by its paths alone"
            raise ScoreSDEError(
                f"loss={self.name} needs the law of x_t given x_0 in closed form, and {process} {why}; ism, ssm, ssm_vr and fd_ssm "
                "work"
            )
        if self.needs_jumps and sde.jumps is None:
            raise ScoreSDEError(
                f"loss={self.name} is for a process that jumps, and {process} does not; ssm_vr and dsm work"
            )
        if sde.jumps is not None and self.trains == {"score"}:
            raise ScoreSDEError(
                f"loss={self.name} trains the score alone, and the flow of {process} needs its flux besides; table_dsm, "
                "augmented_dsm, implicit_flux, jump_ratio and scale_dsm work"
            )

    def tangents(self, d: int) -> int:
        """How many Jacobian-vector products a sample takes in d dimensions."""
        return 0

    def reference(self, d: int) -> "Loss":
        """The loss of equal expectation with the least variance that is affordable: what is reported at the end."""
        return self

    def weight(self, sde: SDE, t: Tensor, d: int) -> Tensor:
        """lambda(t), shape (B,)."""
        if self.weighting == "sigma2":
            levels = sde.levels()
            assert levels is not None
            return levels.sigma(t).square()
        if self.weighting == "g2":
            return sde.diffusion(t).trace_cov(d) / d
        return torch.ones_like(t)

    def noise(self, sde: SDE, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Noised]:
        """Times (B,) by the loss's own law, and the data at these times."""
        t = draw_times(self.times, len(x0), self.t_min, sde.T, generator).to(x0.dtype)
        return t, sde.perturb(x0, t, generator)

    def weighted(
        self, model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The loss (B,) of data that is noised already; the generator draws the directions.

        Times that were drawn by another law than `times` bring a weight.
        """
        shares = noised.aux.get("weight", 1.0)
        model, sde, x0, noised = in_white(model, sde, x0, noised, t)
        if sde.phase:
            model, noised = given_position(model, noised)
        kernel = sde.kernel()
        if self.weighting == "sigma2" and kernel is not None and not kernel.scalar:
            model, noised = in_noise_units(model, sde, kernel, noised, t)
        value = self.value(model, sde, x0, noised, t, generator) * shares
        return (0.5 if self.half else 1.0) * self.weight(sde, t, x0[0].numel()) * value

    def __call__(self, model: FieldModel, sde: SDE, x0: Tensor, generator: torch.Generator) -> Tensor:
        t, noised = self.noise(sde, x0, generator)
        return self.weighted(model, sde, x0, noised, t, generator)

    def convention(self, d: int | None = None) -> str:
        """The loss in words, with its scale; in d dimensions, where they are given."""
        scale = "1/2 " if self.half else ""
        weighting = {"sigma2": "sigma(t)^2", "g2": "g(t)^2", "one": "1"}[self.weighting]
        return f"{self.name}: {scale}E[ {self.formula} ], weighted by {weighting}"


def in_white(
    model: FieldModel, sde: SDE, x0: Tensor, noised: Noised, t: Tensor
) -> tuple[FieldModel, SDE, Tensor, Noised]:
    """All of them in the process's white coordinates, as they are where it has none."""
    white = sde.whitening()
    if white is None:
        return model, sde, x0, noised
    return model.whitened(), white.sde, white.into(x0), white.noised(x0, t, noised)


def in_noise_units(model: FieldModel, sde: SDE, kernel: Kernel, noised: Noised, t: Tensor) -> tuple[Within, Noised]:
    """Both in u = sigma L^{-1} x, where the covariance L L^T of x_t given x_0 is sigma^2 I, sample by sample."""
    R, sigma = kernel.shape(t), kernel.sigma(t)
    mean = None if noised.mean is None else R.solve(noised.mean)
    return Within(model, sde, kernel.shape), Noised(R.solve(noised.x_t), mean, Scalar(sigma), noised.eps)


def given_position(model: FieldModel, noised: Noised) -> tuple[GivenPosition, Noised]:
    """Both for the velocity alone, at the position that it comes with: v_t = .. + L_vv eps_v."""
    assert isinstance(noised.factor, Blocks)
    assert noised.eps is not None
    x, v = split(noised.x_t)
    return GivenPosition(model, x), Noised(v, None, Scalar(noised.factor.vv), split(noised.eps)[1])
