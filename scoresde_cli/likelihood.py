"""log p through the probability-flow ODE: the instantaneous change of variables.

With dx/dt = velocity(x, t),

    log p_{t_min}(x) = log p_T(x_T) + int_{t_min}^T div velocity dt,
    div velocity = div [f - 1/2 div Sigma] - 1/2 (div Sigma) . score - 1/2 tr(Sigma J),

p_T taken to be the process's prior (Chen et al., NeurIPS 2018, theorem 1; Song et al., ICLR 2021, eq. 39). The trace is exact, or
estimated with random directions that stay the same along the way (Grathwohl et al., ICLR 2019, eq. 8): unbiased, as the way itself
does not depend on them. A law that looks at the Jacobian aims them anew at every time, from the same random numbers: as unbiased.
Independent repeats of the estimate give its standard error.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli import divergence, processes
from scoresde_cli.errors import ScoreSDEError, one_line
from scoresde_cli.fields import FieldModel
from scoresde_cli.projections import Projection
from scoresde_cli.rng import generator
from scoresde_cli.sdes.base import SDE

ROWS = 2048  # at a time
MOST_STEPS = 400


@dataclass(frozen=True, kw_only=True)
class Flow:
    """How the integral is done.

    Args:
        method: rk4 (Kutta's 3/8 rule, order 4, `steps` steps even in sqrt(t)) or dopri5 (adaptive, to rtol and atol).
        projection: law of the directions of the trace; None for the exact trace.
        n_proj: directions of one estimate.
        repeats: independent estimates, at least two for a standard error.
    """

    method: Literal["rk4", "dopri5"] = "rk4"
    steps: PositiveInt = 50
    rtol: PositiveFloat = 1e-5
    atol: PositiveFloat = 1e-5
    projection: Projection | None = None
    n_proj: PositiveInt = 1
    repeats: PositiveInt = 8


@dataclass(frozen=True)
class LogDensity:
    """`estimates` (repeats, n) of log p in nats, one where the trace is exact; `nfe` evaluations of the score for each row."""

    estimates: Tensor
    nfe: float

    @property
    def value(self) -> Tensor:
        """The mean estimate, (n,)."""
        return self.estimates.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean over the directions, (n,); zero where the trace is exact, nan where it was estimated once."""
        if len(self.estimates) == 1:
            return torch.full_like(self.estimates[0], torch.nan)
        return self.estimates.std(0) / len(self.estimates) ** 0.5


@torch.no_grad()
def log_prob(
    model: FieldModel, sde: SDE, x: Tensor, t_min: float, flow: Flow | None = None, seed: int = 0
) -> LogDensity:
    """log p at t_min of x (n, *D) in model coordinates.

    Under jumps it needs a model that has the velocity. The directions of row i depend on the seed and i alone.
    """
    flow = flow or Flow()
    if sde.phase:
        raise ScoreSDEError(
            f"log p(x) under {type(sde).__name__}: the flow carries the density of (x, v), and that of x alone is an integral over "
            "v, which nobody knows; sde=vp has it"
        )
    if sde.jumps is not None and not model.own_flow:
        raise ScoreSDEError(
            f"log p needs the velocity of the flow, which under jumps is not the score's alone; the model has "
            f"{', '.join(sorted(model.provides))} (loss=table_dsm, augmented_dsm and implicit_flux learn it)"
        )
    white, shift = sde.whitening(), 0.0
    if white is not None:  # x = W z: log p(x) = log p(z) - log |det W|
        model, sde, x = model.whitened(), white.sde, white.into(x)
        shift = float(white.factor.logdet(x[0].numel()))
    parts = x.split(ROWS)

    def of_part(i: int) -> tuple[Tensor, float]:
        estimates, nfe = integrate(model, sde, parts[i], t_min, flow, generator(seed, "probes", i, device=x.device))
        return estimates, nfe * len(parts[i]) / len(x)

    found, spent = zip(*processes.shared(len(parts), of_part), strict=True)
    return LogDensity(torch.cat(found, dim=1).to(x.device) - shift, sum(spent))


def integrate(
    model: FieldModel, sde: SDE, x: Tensor, t_min: float, flow: Flow, source: torch.Generator
) -> tuple[Tensor, int]:
    """(log p (repeats, B), evaluations). The state is kept in float64, the model evaluated in the precision of x."""
    from torchdiffeq import odeint

    law, beginning, nfe = flow.projection, source.get_state(), 0

    def directions(law: Projection, y: Tensor, t: Tensor) -> Tensor:
        """Those of all repeats, (repeats n_proj, B, *D).

        A chunk that is not full draws as if it were, so that its rows do not depend on how many there are.
        """

        def push(w: Tensor) -> Tensor:
            return torch.cat([divergence.dual(model, y, t, w[:, : len(y)])[1], w[:, len(y) :]], dim=1)

        source.set_state(beginning)
        shape = (ROWS, *x.shape[1:])
        draws = [law.directions(push, shape, flow.n_proj, source, x.dtype) for _ in range(flow.repeats)]
        return torch.cat(draws)[:, : len(x)]

    fixed = None if law is None or law.adapted else directions(law, x, x)

    def rates(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """d/du of x and of the integral, with t = u^2."""
        nonlocal nfe
        nfe += 1
        y, t = state[0].to(x.dtype), u.square().to(x.dtype).expand(len(x))
        v = directions(law, y, t) if law is not None and law.adapted else fixed
        if model.own_flow:
            velocity, div = flow_and_divergence(model, y, t, v, flow.repeats)
            return 2 * u * velocity.double(), 2 * u * div.double()
        score, trace = weighted_traces(model, sde, y, t, v, flow.repeats)
        div = sde.known_divergence(y, t) - 0.5 * (sde.div_sigma(y, t) * score).flatten(1).sum(1) - 0.5 * trace
        return 2 * u * sde.velocity(y, t, score).double(), 2 * u * div.double()

    ends = torch.tensor([t_min**0.5, sde.T**0.5], dtype=torch.float64, device=x.device)
    if flow.method == "rk4":
        grid = torch.linspace(float(ends[0]), float(ends[1]), flow.steps + 1, dtype=torch.float64, device=x.device)
        options: dict[str, Any] = {"grid_constructor": lambda *_: grid}
    else:
        options = {"step_t": ends[1:], "max_num_steps": MOST_STEPS}
    start = x.double(), torch.zeros(1 if law is None else flow.repeats, len(x), dtype=torch.float64, device=x.device)
    try:
        ys, totals = odeint(rates, start, ends, rtol=flow.rtol, atol=flow.atol, method=flow.method, options=options)
    except AssertionError as problem:
        raise ScoreSDEError(
            f"nll.rtol={flow.rtol:g}, nll.atol={flow.atol:g}: not met in {MOST_STEPS} steps ({one_line(problem)[:80]}); "
            "take larger ones"
        ) from None
    return totals[-1] + sde.prior_log_prob(ys[-1]), nfe


def flow_and_divergence(
    model: FieldModel, x: Tensor, t: Tensor, v: Tensor | None, repeats: int
) -> tuple[Tensor, Tensor]:
    """(velocity (B, *D), its divergence (1, B), or estimates (repeats, B)) of a model that has a velocity of its own."""
    if v is None:
        velocity, div = divergence.score_and_trace(model.velocity, x, t)
        return velocity, div.unsqueeze(0)
    velocity, products = divergence.score_and_projections(model.velocity, x, t, v)
    return velocity, products.reshape(repeats, -1, len(x)).mean(1)


def weighted_traces(
    model: FieldModel, sde: SDE, x: Tensor, t: Tensor, v: Tensor | None, repeats: int
) -> tuple[Tensor, Tensor]:
    """(score (B, *D), tr(Sigma J) (1, B) or its estimates (repeats, B) with directions v (K, B, *D), K a multiple of repeats)."""
    G = sde.diffusion(t, x)
    scale = G.scale()
    if v is None and scale is not None:
        score, trace = divergence.score_and_trace(model, x, t)
        return score, (scale.square() * trace).unsqueeze(0)
    if v is not None and scale is not None:
        score, products = divergence.score_and_projections(model, x, t, v, exact=True)
        return score, scale.square() * products.reshape(repeats, -1, len(x)).mean(1)
    if v is None:  # sum_i (G e_i)^T J (G e_i)
        d = x[0].numel()
        units = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
        score, products = divergence.score_and_projections(model, x, t, torch.stack([G.mul(e) for e in units]))
        return score, products.sum(0, keepdim=True)
    score, products = divergence.score_and_projections(model, x, t, torch.stack([G.mul(each) for each in v]))
    return score, products.reshape(repeats, -1, len(x)).mean(1)
