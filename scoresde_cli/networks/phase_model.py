"""The score model of states (x, v) whose noise acts on v alone.

Given x_0 the state is normal with mean m x_0 and covariance S, m and S the same in each coordinate. So all that it tells of x_0 is

    w = tau^2 m^T S^-1 (x_t, v_t),    1 / tau^2 = m^T S^-1 m,    w = x_0 + tau eps given x_0

(w is sufficient: the likelihood of x_0 is a function of w times one of the state). With s_w the score of w, E[x_0 | x_t, v_t] is
w + tau^2 s_w(w), and the score of p_t in v is

    s_v = c (E_xx v_t - E_vx x_t) + g s_w(w),    g = dw/dv

with numbers c and g of t (sdes/kinetic.py). s_w is that of the data under plain Gaussian noise of the level tau: the network, its
input, its preconditioning and its noise level are those of ScoreModel for alpha = 1, sigma = tau. Hybrid score matching of s_v is
denoising score matching of s_w, each time weighted by g^2.
"""

import torch
from torch import Tensor, nn

from scoresde_cli.networks.model import Gaussian, ScoreModel
from scoresde_cli.networks.parameterisation import Parameterisation
from scoresde_cli.sdes.base import GaussianKernel
from scoresde_cli.sdes.kinetic import Kinetic, Told
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.phase import join, split


class PhaseModel(ScoreModel):
    """score(z, t) of states z = (x, v), (B, 2 D_1, ..): zero in x, the score of p_t in v. Directions and traces are of v alone.

    Args:
        network, parameterisation, gaussian: as for ScoreModel, of the data. sde: a process with SDE.phase.
    """

    sde: Kinetic

    def __init__(
        self, network: nn.Module, sde: Kinetic, parameterisation: Parameterisation, gaussian: Gaussian
    ) -> None:
        super().__init__(network, sde, parameterisation, gaussian)
        self.kernel = GaussianKernel(torch.ones_like, sde.level)
        self.provides = frozenset({"score", "x0", "velocity"})

    def _whole(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Told]:
        """w, the linear part of s_v (B, *D each), and the numbers."""
        told = self.sde.told(t)
        x, v = split(z)
        at_x, at_v, pull_x, pull_v = (expand(c, x) for c in told)
        return at_x * x + at_v * v, pull_x * x + pull_v * v, told

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        w, linear, told = self._whole(x, t)
        return join(torch.zeros_like(w), linear + expand(told.at_v, w) * super().forward(w, t))

    def forward_dual(self, x: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(score, J v (K, m, 2 D_1, ..)) for directions v of that shape, of which the velocity's half counts."""
        w, linear, told = self._whole(x, t)
        u = v.chunk(2, dim=2)[1]
        s, jvp = super().forward_dual(w, t, u)
        g, c = expand(told.at_v, w), expand(told.pull_v, w)
        m = v.shape[1]
        pushed = c[:m] * u + g[:m].square() * jvp
        return join(torch.zeros_like(w), linear + g * s), torch.cat([torch.zeros_like(u), pushed], dim=2)

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(score, v_k^T J v_k (K, m)) for directions as in forward_dual."""
        w, linear, told = self._whole(x, t)
        u = v.chunk(2, dim=2)[1]
        s, products = super().forward_projections(w, t, u, exact)
        m = v.shape[1]
        length = u[0, 0].numel() if exact else u.square().flatten(2).sum(2)
        score = join(torch.zeros_like(w), linear + expand(told.at_v, w) * s)
        return score, told.pull_v[:m] * length + told.at_v[:m].square() * products

    def forward_trace(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(score, tr J (B,)), exact."""
        w, linear, told = self._whole(x, t)
        s, trace = super().forward_trace(w, t)
        score = join(torch.zeros_like(w), linear + expand(told.at_v, w) * s)
        return score, w[0].numel() * told.pull_v + told.at_v.square() * trace
