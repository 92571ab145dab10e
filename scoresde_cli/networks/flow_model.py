"""A model of more than a score: a second network carries the velocity of the flow, or the flux of the jumps.

With f, G and jumps of the process, one follows from the other:  velocity = f - 1/2 Sigma score + flux. Each field u, of the
velocity what it adds to f, is  u = skip y + out net(inp y, c)  as in model.py, with coefficients from the field's own moments
given x_0 (SDE.scales): under jumps the score is of another scale than 1 / sigma.
"""

from collections.abc import Callable, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.networks.model import Gaussian, ScoreModel, Zero
from scoresde_cli.networks.parameterisation import Coefficients, Parameterisation, Residual
from scoresde_cli.networks.phase_model import PhaseModel
from scoresde_cli.sdes.base import SDE, Moments
from scoresde_cli.sdes.kinetic import Kinetic
from scoresde_cli.sdes.operators import expand

Carried = Literal["velocity", "flux"]


class Pair(nn.Module):
    """Two networks of one make. The pair is the first, with the second beside it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.first(x, c)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("first", "second"):
                raise
            return getattr(super().__getattr__("first"), name)


class FlowModel(ScoreModel):
    """score(x, t), and with a second network velocity and flux.

    `x0` is (x + sigma^2 score) / alpha with the sigma of the Gaussian noise alone: E[x_t without it | x_t] (Tweedie's formula),
    which keeps the jumps; without jumps it is E[x_0 | x_t]. Where no law of x_t given x_0 is known, the flow's last step x - t v.

    Args:
        network: the score's, or a Pair of it and of the network of the field that is carried.
        sde: a process with moments (SDE.scales), in its own coordinates.
        parameterisation, gaussian: as for ScoreModel.
        carried: what the second network stands for; None where there is none.
    """

    def __init__(
        self, network: nn.Module, sde: SDE, parameterisation: Parameterisation, gaussian: Gaussian,
        carried: Carried | None = None,
    ) -> None:  # fmt: skip
        super().__init__(network, sde, parameterisation, gaussian)
        if self.white is not None or not self.kernel.scalar:
            raise ScoreSDEError(
                f"sde {type(sde).__name__}: the velocity is learnt where the noise is the same in all directions (vp, subvp, ve, "
                "jump_diffusion)"
            )
        one = torch.ones(1)
        parameterisation.regression(Moments(one, one), one[None], one[None])  # refused now by one that has none
        self.carried, self.own_flow = carried, carried is not None
        quiet = sde if sde.jumps is None or sde.jumps.without is None else sde.jumps.without
        self.quiet = quiet.kernel()
        more = {"velocity"} if sde.jumps is None else {"velocity", "flux"}
        self.provides = frozenset({"score", "eps", "x0"} | (more if carried else set())) | (
            self.provides & {"log_density"}
        )

    def _coefficients(self, levels: tuple[Tensor, Tensor], t: Tensor, name: str) -> Coefficients:
        alpha, sigma = levels
        moments = self.sde.scales(t, self.mean.numel())[name]
        return self.parameterisation.regression(moments, alpha.square() * self.lam, sigma.square())

    def carry(self, x: Tensor, t: Tensor) -> Tensor:
        """The field of the second network at x (B, *D), t (B,)."""
        moving = self.carried == "velocity"
        y, c, skip, out, inp = self._prepare(x, t, "transport" if moving else "flux")
        with self._lowered(x):
            net = self.network.second((inp * y).reshape(x.shape), c).flatten(1)  # type: ignore[operator]
        u = self._turn_back(skip * y + out * net).reshape(x.shape)
        return self.sde.drift(x, t) + u if moving else u

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        u = self.carry(x, t)
        return u if self.carried == "velocity" else self.sde.velocity(x, t, self.score(x, t), u)

    def flux(self, x: Tensor, t: Tensor) -> Tensor:
        """The jumps' part of the velocity, (B, *D)."""
        u = self.carry(x, t)
        return u if self.carried == "flux" else u - self.sde.velocity(x, t, self.score(x, t))

    def fields(self, x: Tensor, t: Tensor, names: Set[str]) -> dict[str, Tensor]:
        missing = names - self.provides
        if missing:
            raise ScoreSDEError(f"the model provides {sorted(self.provides)}, asked for {sorted(missing)}")
        if names == {"velocity"}:
            return {"velocity": self.velocity(x, t)}
        s = self.score(x, t)
        known: dict[str, Callable[[], Tensor]] = {
            "score": lambda: s,
            "eps": lambda: -self._kernel().factor(t).mul_t(s),
            "x0": lambda: self._denoised(x, t, s),
            "log_density": lambda: self.log_density(x, t),
        }
        found = {name: known[name]() for name in names & known.keys()}
        if wanted := names - known.keys():
            u, still = self.carry(x, t), self.sde.velocity(x, t, s)
            both = (u, u - still) if self.carried == "velocity" else (still + u, u)
            found |= {name: field for name, field in zip(("velocity", "flux"), both, strict=True) if name in wanted}
        return found

    def _denoised(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        if self.quiet is None:
            u = self.carry(x, t)
            return x - expand(t, x) * (u if self.carried == "velocity" else self.sde.velocity(x, t, score, u))
        alpha, sigma = expand(self.quiet.alpha(t), x), expand(self.quiet.sigma(t), x)
        return (x + sigma.square() * score) / alpha


def model_of(
    trains: Set[str],
    networks: Callable[[int], nn.Module],
    sde: SDE,
    parameterisation: Parameterisation,
    gaussian: Gaussian,
) -> ScoreModel:
    """The model for a loss that trains these fields; `networks(i)` makes its i-th network."""
    if sde.phase:
        if trains != {"score"}:
            raise ScoreSDEError(
                f"the flow of {type(sde).__name__} follows from the score in the velocity, and a second network has no use; "
                "loss=dsm, ssm_vr, ssm, ism and fd_ssm work"
            )
        assert isinstance(sde, Kinetic)
        return PhaseModel(networks(0), sde, parameterisation, gaussian)
    if trains == {"score"}:
        return ScoreModel(networks(0), sde, parameterisation, gaussian)
    if trains == {"gaussian_denoiser"}:
        model = ScoreModel(networks(0), sde, parameterisation, gaussian)
        model.provides = frozenset(trains)
        return model
    carried: Carried | None = "velocity" if "velocity" in trains else "flux" if "flux" in trains else None
    network = networks(0) if carried is None else Pair(networks(0), networks(1))
    return FlowModel(network, sde, parameterisation, gaussian, carried)


def gaussian_model(sde: SDE, gaussian: Gaussian, trains: Set[str] = frozenset({"score"})) -> ScoreModel:
    """The fields of Gaussian data with these moments, float64: the baseline that training has to beat.

    Exact without jumps; with jumps, those of a Gaussian with the mean and covariance of x_t.
    """
    return model_of(trains, lambda i: Zero(), sde, Residual(), gaussian)
