"""The law of x_t given x_0 under linear drift and jumps that are Gaussian scale mixtures, as functions of (rho, t).

Given the times tau_i and scales w_i of its jumps, x_t is normal about alpha x_0 with variance S = l^2 + V, where

    l^2(t) = sigma^2(t) + alpha^2(t) lam,   V = sum_{i <= N} r(t, tau_i)^2 w_i,   r(t, u) = alpha(t) / alpha(u),

N ~ Poisson(int_0^t rate), tau_i of density rate / int rate; lam = 0 for one x_0, and the variance of the component where x_0 is
itself normal. With the law of V as atoms P_j at V_j, S_j = l^2 + V_j, N_j = N(rho; 0, S_j I_d), rho = |x_t - alpha x_0|:

    p      = sum_j P_j N_j
    score  = -c_s (x_t - alpha x_0),         c_s = sum_j P_j N_j / S_j / p
    flux   = rate c_J (x_t - alpha x_0),     c_J = 1/2 sum_j Q_j N_j / S_j / p,     Q = P * Fbar(w) dw,  Fbar(w) = P(w_i > w)
    nu*p/p = sum_j R_j N_j / p,              R = P * (law of w)

(* is convolution; div(flux p) = -rate (nu*p - p).) Everything is found on a grid of t (even in log t) and of
z = 1/2 log(1 + rho^2 / l^2) (even), in float64, and read off by cubic interpolation in both (`tests/test_jumps.py` measures it).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.sdes.measures import Atoms, compound_poisson
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.scale_mixture import Amplitude

FIRST = (
    1e-5  # the earliest time of the table, as a share of T: before it, the fields are those at this time for the same z
)
TIMES, RADII = 96, 1536  # points in t and in z; twice as many from 16 dimensions up
FINE = 256  # steps of the finest grid of V to l^2
FIELDS = 4
CUT = 10.0


@dataclass(frozen=True)
class Coefficients:
    """What a table needs to know of a process: alpha, sigma (without the jumps), rate and its integral, t (B,) -> (B,)."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]
    amplitude: Amplitude
    T: float

    def instants(self, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(r(t, u)^2, mass) (B, count): the squared decay of a jump at time u, u by the jumps' intensity on [0, t] (mass sums to
        int_0^t rate): Gauss-Legendre in u."""
        z, weight = (torch.as_tensor(a).to(t) for a in np.polynomial.legendre.leggauss(count))
        u = 0.5 * t[:, None] * (1 + z)
        flat = u.flatten()
        decay = (self.alpha(t)[:, None] / self.alpha(flat).view_as(u)).square()
        return decay, 0.5 * t[:, None] * weight * self.rate(flat).view_as(u)


class Mixed(NamedTuple):
    """The measures P, Q and R of one time, as atoms of S."""

    p: Atoms
    q: Atoms
    r: Atoms


class Read(NamedTuple):
    """What the table knows at (rho, t); c_flux is without the rate."""

    log_p: Tensor
    c_score: Tensor
    c_flux: Tensor
    log_ratio: Tensor


class ScaleTable:
    """The conditional law in d dimensions, for x_0 that is a point (lam = 0) or normal with variance lam.

    Building takes 2 to 4 seconds in few dimensions, some 6 in 64 (times x radii x atoms exponentials);
    reading is 16 weighted rows a point, on any device.

    Args:
        process: its coefficients.
        d: dimension of the vectors that jump together.
        lam: variance of x_0 about its mean.
    """

    def __init__(self, process: Coefficients, d: int, lam: float = 0.0) -> None:
        self.process, self.d, self.lam = process, d, lam
        self.width = min(0.12, math.sqrt(2 / d))  # of a cell of S: the law of S given rho is no narrower than sqrt(2/d)
        finer = min(max(1.0, math.sqrt(d / 4)), 2.0)  # the fields turn within 1/d or so in z and log t
        self.times, self.radii = round(TIMES * finer), round(RADII * finer)
        self.first, self.last = math.log(FIRST * process.T), math.log(process.T)
        self._casts: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @cached_property
    def _built(self) -> tuple[float, Tensor]:
        """The largest z, and the fields on the grid (times, radii, FIELDS)."""
        times = torch.linspace(self.first, self.last, self.times, dtype=torch.float64).exp()
        laws, ell = self.mixed(times), self.ell(times).numpy()
        most = [math.sqrt(law.r.at.max()) * (math.sqrt(self.d) + 8) for law in laws]
        reach = math.log1p(max((m / a) ** 2 for m, a in zip(most, ell, strict=True))) / 2
        z = np.linspace(0, reach, self.radii)
        rows = [evaluate(law, a * a * np.expm1(2 * z), self.d, a) for law, a in zip(laws, ell, strict=True)]
        return reach, torch.as_tensor(np.stack(rows))

    @property
    def reach(self) -> float:
        return self._built[0]

    def ell(self, t: Tensor) -> Tensor:
        """Root of the variance without jumps, (B,)."""
        return (self.process.sigma(t).square() + self.lam * self.process.alpha(t).square()).sqrt()

    def mixed(self, t: Tensor) -> list[Mixed]:
        """The measures at each time of t (B,), float64."""
        process, width = self.process, self.width
        law, ell2 = process.amplitude, self.ell(t).square().numpy()
        decay, mass = (a.numpy() for a in process.instants(t, math.ceil(48 * 0.12 / width)))
        rates = mass.sum(1)
        w, fbar = law.atoms(2 * width), law.tail_atoms(1e-3 * float(ell2.min()), 2 * width)
        if not rates.any():
            at_zero = [Atoms(np.zeros(1), np.ones(1)) for _ in ell2]
        else:
            one = [Atoms(np.outer(r2, w.at).ravel(), np.outer(m / m.sum(), w.mass).ravel())
                   for r2, m in zip(decay, mass, strict=True)]  # fmt: skip
            mean = float(w.at @ w.mass)
            top = mean * (rates + 8 * np.sqrt(rates) + 16) + law.ends[1]  # V is beyond with a chance of 1e-12 or less
            at_zero = compound_poisson(one, rates, ell2 / FINE, top)
        found = []
        for v, base in zip(at_zero, ell2, strict=True):
            p = Atoms(base + v.at, v.mass).compressed(base, width)
            found.append(Mixed(p, p.plus(fbar).compressed(base, width), p.plus(w).compressed(base, width)))
        return found

    def exact(self, rho2: Tensor, t: float) -> Read:
        """The fields at rho^2 (n,) and one time, without interpolation, float64."""
        times = torch.tensor([t], dtype=torch.float64)
        ell = float(self.ell(times))
        values = torch.as_tensor(evaluate(self.mixed(times)[0], rho2.double().numpy(), self.d, ell))
        return self._unpack(values, torch.tensor(ell, dtype=torch.float64))

    def __call__(self, rho2: Tensor, t: Tensor) -> Read:
        """The fields at squared distances rho2 (B, ...) and times t (B,), each shaped like rho2, typed like it."""
        ell = expand(self.ell(t), rho2)
        table = self._cast("table", rho2)
        z = 0.5 * torch.log1p(rho2 / ell.square())
        j, wz = stencil(z * ((self.radii - 1) / self.reach), self.radii)
        i, wt = stencil((t.log() - self.first) * ((self.times - 1) / (self.last - self.first)), self.times)
        if len(t) == 1 or t.stride(0) == 0:  # one time for all, as in a sampler: the times first
            rows = torch.einsum("a,azf->zf", wt[0], table[i[0] + torch.arange(4, device=i.device)])
            values = (rows[j[..., None] + torch.arange(4, device=j.device)] * wz[..., None]).sum(-2)
        else:
            near = torch.arange(4, device=j.device)
            first = (expand(i, j)[..., None] + near) * self.radii + j[..., None]
            rows = table.view(-1, FIELDS)[first[..., None] + near]  # (B, ..., 4 times, 4 radii, FIELDS)
            weight = wt.reshape(len(t), *[1] * (j.ndim - 1), 4, 1) * wz[..., None, :]
            values = (rows * weight[..., None]).flatten(-3, -2).sum(-2)
        return self._unpack(values, ell)

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E c_s^2 rho^2 / d, E c_s c_J rho^2 / d and E c_J^2 rho^2 / d given x_0, at times t (B,): cubic in log t.

        The flux is cut at CUT times its mean over what has jumped. Between x_0 and where jumps land is hardly anything, and in
        many dimensions all that is on its way back passes there: the flux is so large that its mean square says nothing of its
        size elsewhere.
        """
        i, weight = stencil((t.log() - self.first) * ((self.times - 1) / (self.last - self.first)), self.times)
        near = self._cast("moments", t)[i[:, None] + torch.arange(4, device=i.device)]
        precision, both, square = (near * weight[..., None]).sum(1).exp().unbind(1)
        return precision, both, square

    @cached_property
    def _moments(self) -> Tensor:
        """(times, 3), logarithms: sums over the table's own radii, by the trapezium rule."""
        rows = self._built[1]
        z = torch.linspace(0, self.reach, self.radii, dtype=torch.float64)
        r = torch.expm1(2 * z).sqrt()  # rho / l
        width = torch.diff(r, prepend=r[:1]) + torch.diff(r, append=r[-1:])
        log = rows[..., 0] + (self.d - 1) * r.clamp_min(1e-300).log()
        share = torch.log_softmax(log + width.log(), dim=1)
        times = torch.linspace(self.first, self.last, self.times, dtype=torch.float64).exp()
        ell, jumped = self.ell(times)[:, None], -torch.expm1(-self.process.expected(times))
        pull, push = rows[..., 1] + r.log() - ell.log(), rows[..., 2] + r.log() + ell.log()
        top = torch.logsumexp(share + push, 1) + math.log(CUT) - jumped.log()
        push = push.minimum(top[:, None])
        found = [torch.logsumexp(share + squares, 1) for squares in (2 * pull, pull + push, 2 * push)]
        return torch.stack(found, dim=1) - math.log(self.d)

    def _unpack(self, values: Tensor, ell: Tensor) -> Read:
        log_p = values[..., 0] - self.d * (ell.log() + 0.5 * math.log(2 * math.pi))
        return Read(log_p, values[..., 1].exp() / ell.square(), values[..., 2].exp(), values[..., 3])

    def _cast(self, name: str, like: Tensor) -> Tensor:
        """The table, or its moments, on the device and in the precision of `like`."""
        key = (name, like.device, like.dtype)
        if key not in self._casts:
            self._casts[key] = (self._built[1] if name == "table" else self._moments).to(like)
        return self._casts[key]


def stencil(place: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(first (...), weights (..., 4)) of the cubic through four neighbours of n even points, at place (...) in [0, n - 1]."""
    place = place.clamp(0, n - 1)
    first = (place.floor() - 1).clamp(0, n - 4)
    u = place - first
    a, b, c = u - 1, u - 2, u - 3
    return first.long(), torch.stack([-a * b * c / 6, u * b * c / 2, -u * a * c / 2, u * a * b / 6], dim=-1)


def evaluate(law: Mixed, rho2: np.ndarray, d: int, ell: float) -> np.ndarray:
    """(n, FIELDS): log p + d/2 log(2 pi l^2), log(c_s l^2), log c_J, log nu*p/p at rho^2 (n,), by log-sum-exp."""

    def summed(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        """log sum_j mass_j N_j and log sum_j mass_j N_j / S_j, less the constant."""
        exponent = np.outer(rho2, -0.5 / atoms.at)
        exponent += np.log(atoms.mass) - 0.5 * d * np.log(atoms.at / ell**2)
        high = exponent.max(1)
        exponent -= high[:, None]
        np.exp(exponent, out=exponent)
        total, pulled = (exponent @ np.stack([np.ones_like(atoms.at), 1 / atoms.at], 1)).T
        return high + np.log(total), high + np.log(pulled)

    (p, pull), (_, push), (ratio, _) = summed(law.p), summed(law.q), summed(law.r)
    return np.stack([p, pull - p + 2 * math.log(ell), push - p - math.log(2), ratio - p], axis=1)
