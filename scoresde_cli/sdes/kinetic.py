"""Critically damped Langevin diffusion: the noise acts on a velocity, and through it on the data, which is the position.

    dx = beta v / M dt,    dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dW,    Gamma = 2 sqrt(M)

v_0 ~ N(0, gamma M) independent of the data; the stationary law is N(0, I) x N(0, M I), which generation starts from. With
p = beta t / sqrt(M) and y = 2 p, in each coordinate,

    E = e^-p [[1 + p, p / sqrt M], [-p sqrt M, 1 - p]]            the mean of (x_t, v_t) is E (x_0, v_0)
    C = diag(1, M) - E diag(1, M) E^T                             its covariance given both,
    C_xx = P(3, y),  C_xv = sqrt M y^2 / 2 e^-y,  C_vv = M (P(3, y) + 2 y e^-y)

P the regularised incomplete gamma function, which keeps the digits at small t. Given x_0 alone the covariance is
S = C + gamma M E_v E_v^T, E_v the second column of E, and S = L L^T with L lower triangular, so that

    grad_v log p(x_t, v_t | x_0) = -eps_v / L_vv        (hybrid score matching)

is all there is to learn: noise acts on v alone, and so the reversal needs no other part of the score. As a function of v it is the
score of p(v_t | x_t), where the velocity's noise is L_vv.

Source: Dockhorn, Vahdat and Kreis, "Score-Based Generative Modeling with Critically-Damped Langevin Diffusion", ICLR 2022,
section 3 and appendix B. That a state tells of x_0 what one noised copy tells is shown in networks/phase_model.py.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import SDE, GaussianKernel, Noised
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.phase import Blocks, join, split

MOST = 30.0  # of the clock at t = 1


class Told(NamedTuple):
    """w = at_x x + at_v v, all that a state tells of x_0, and pull_x x + pull_v v, the rest of the score in v; (B,) each.

    The score in v is  pull_x x + pull_v v + at_v s_w(w)  (networks/phase_model.py).
    """

    at_x: Tensor
    at_v: Tensor
    pull_x: Tensor
    pull_v: Tensor


class KineticKernel(GaussianKernel):
    """The law of (x_t, v_t) given x_0. As a kernel of the velocity given the position it is `scalar`, with sigma = L_vv.

    sigma / alpha is the level tau of the noise that x_0 is told with.
    """

    diagonal = False

    def __init__(self, process: "Kinetic") -> None:
        self.process = process

    def alpha(self, t: Tensor) -> Tensor:
        return self.sigma(t) / self.process.level(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.factor(t).vv

    def factor(self, t: Tensor) -> Blocks:
        return self.process.factor(t)

    def mean(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.process.flow(t).mul(join(x0, torch.zeros_like(x0)))

    def sample(self, x0: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        return self.with_noise(x0, t, normal((len(x0), *self.process.state(tuple(x0.shape[1:]))), generator, x0.dtype))

    def denoised(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """E[x_0 | x_t, v_t] by the score in v alone: E[eps_v] = -L_vv s_v, and two equations are left for E[x_0] and E[eps_x]."""
        E, L = self.process.flow(t), self.factor(t)
        (position, velocity), (_, s) = split(x), split(score)
        scale = E.xx * L.vx - E.vx * L.xx
        quiet = velocity + expand(L.vv.square(), s) * s
        return expand(L.vx / scale, s) * position - expand(L.xx / scale, s) * quiet


class Kinetic(SDE):
    """The process of the module's head, on [0, 1].

    Args:
        beta: the rate of its clock.
        mass: M.
        gamma: variance of the velocity at t = 0, as a part of the stationary one.
    """

    phase = True
    remedy = "sscs, euler_maruyama, euler_ode, heun_ode and dopri5 work"

    def __init__(
        self, beta: PositiveFloat = 4.0, mass: PositiveFloat = 0.25, gamma: Annotated[float, Field(gt=0, le=1)] = 0.04
    ) -> None:
        self.beta, self.mass, self.gamma = beta, mass, gamma
        self.root, self.friction = mass**0.5, 2.0 * mass**0.5
        if beta > MOST * self.root:
            raise ScoreSDEError(
                f"sde.beta={beta}: expected at most {MOST:g} sqrt(mass) = {MOST * self.root:.3g}; the data is forgotten like "
                "exp(-beta t / sqrt(mass)), and single precision knows nothing of it beyond"
            )

    def state(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2 * shape[0], *shape[1:])

    def data(self, z: Tensor) -> Tensor:
        return split(z)[0]

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        position, velocity = split(x)
        return self.beta * join(velocity / self.mass, -position - self.friction / self.mass * velocity)

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> Blocks:
        none = torch.zeros_like(t)
        return Blocks(none, none, none, none + (2.0 * self.friction * self.beta) ** 0.5)

    def clock(self, t: Tensor) -> Tensor:
        """p = beta t / sqrt(M), (B,), float64."""
        return self.beta / self.root * t.double()

    def flow(self, t: Tensor) -> Blocks:
        """E, the solution of the drift over a time t (B,)."""
        p = self.clock(t)
        decay = torch.exp(-p)
        found = (1.0 + p) * decay, p / self.root * decay, -p * self.root * decay, (1.0 - p) * decay
        return Blocks(*(c.to(t.dtype) for c in found))

    def _covariance(self, p: Tensor, start: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """xx, xv, vv of the covariance at the clock p, from a velocity of variance `start`, and its determinant."""
        y = 2.0 * p
        decay = torch.exp(-y)
        xx = torch.special.gammainc(torch.full_like(y, 3.0), y)
        xv, vv = self.root * 0.5 * y.square() * decay, self.mass * (xx + 2.0 * y * decay)
        ex, ev = p / self.root, 1.0 - p  # e^p times the column of E that v_0 comes by
        first = start * decay
        det = xx * vv - xv.square() + first * (ex.square() * vv - 2.0 * ex * ev * xv + ev.square() * xx)
        return xx + first * ex.square(), xv + first * ex * ev, vv + first * ev.square(), det

    def _factor(self, t: Tensor, start: float) -> Blocks:
        """L; at t = 0 its limit."""
        xx, xv, _, det = self._covariance(self.clock(t), start)
        some = xx > 0
        safe = torch.where(some, xx, 1.0)
        found = xx.sqrt(), torch.zeros_like(xx), torch.where(some, xv / safe.sqrt(), start**0.5), (det / safe).sqrt()
        return Blocks(*(c.to(t.dtype) for c in found))

    def factor(self, t: Tensor) -> Blocks:
        """L with L L^T = Cov((x_t, v_t) | x_0), lower triangular."""
        return self._factor(t, self.gamma * self.mass)

    def between(self, t: Tensor) -> tuple[Blocks, Blocks]:
        """(E, L) of a state t (B,) later given the state, L L^T = C."""
        return self.flow(t), self._factor(t, 0.0)

    def _precision(self, t: Tensor) -> tuple[Blocks, Blocks, Tensor, Tensor]:
        """E, L, the determinant D = E_xx L_vx - E_vx L_xx of what comes by x_0 and by eps_x, and tau^2; (B,), float64.

        m^T S^-1 m = |L^-1 m|^2 = (E_xx / L_xx)^2 + (D / (L_xx L_vv))^2.
        """
        t = t.double()
        E, L = self.flow(t), self.factor(t)
        D = E.xx * L.vx - E.vx * L.xx
        return E, L, D, (L.xx * L.vv).square() / ((E.xx * L.vv).square() + D.square())

    def level(self, t: Tensor) -> Tensor:
        """tau, (B,)."""
        return self._precision(t)[3].sqrt().to(t.dtype)

    def told(self, t: Tensor) -> Told:
        E, L, D, tau2 = self._precision(t)
        at_v = -tau2 * D / (L.xx * L.vv.square())
        pull = tau2 * E.xx / (L.xx * L.vv).square()
        found = (1.0 - E.vx * at_v) / E.xx, at_v, pull * E.vx, -pull * E.xx
        return Told(*(c.to(t.dtype) for c in found))

    def kernel(self) -> KineticKernel:
        return KineticKernel(self)

    def sample_prior(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws of N(0, I) x N(0, M I), states of n samples, for `shape` = (n, *D)."""
        x, v = split(normal((shape[0], *self.state(shape[1:])), generator, dtype))
        return join(x, self.root * v)

    def simulate(self, x0: Tensor, t: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        v0 = (self.gamma * self.mass) ** 0.5 * normal(tuple(x0.shape), generator, x0.dtype)
        return super().simulate(join(x0, v0), t, steps, generator)
