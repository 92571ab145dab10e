"""Positive measures on the half line as atoms: Gauss compression and the compound Poisson law, in float64 numpy.

Compression replaces the atoms of each cell of a logarithmic grid by the two of the Gauss rule that has the cell's mass and
first three moments: for a function f that is smooth on the cell's relative width e the error is of order e^4 / 4320 of f's
fourth relative derivative, and weights stay positive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRID = 2048  # points of each linear grid
COARSER = 4  # ratio of the steps of two neighbouring grids
ROWS = 64  # that are convolved at a time, so that they stay in a core's cache
LEAST = 1e-290


@dataclass(frozen=True)
class Atoms:
    """sum_i mass_i delta(at_i): `at` and `mass` have shape (n,)."""

    at: np.ndarray
    mass: np.ndarray

    def plus(self, other: "Atoms") -> "Atoms":
        """The convolution of two measures, all pairs of atoms."""
        return Atoms(np.add.outer(self.at, other.at).ravel(), np.multiply.outer(self.mass, other.mass).ravel())

    def compressed(self, low: float, width: float) -> "Atoms":
        """At most two atoms in each cell [low e^(i width), low e^((i+1) width)), of equal mass and first three moments.

        Mass of less than LEAST has no digits left, and is dropped.
        """
        cell = np.maximum(np.log(self.at / low) / width, 0).astype(np.int64)
        cells = int(cell.max()) + 1
        centre = low * np.exp((np.arange(cells) + 0.5) * width)
        z = self.at / centre[cell] - 1
        moments, part = [], self.mass
        for _ in range(4):
            moments.append(np.bincount(cell, part, cells))
            part = part * z
        m0, m1, m2, m3 = moments
        used = m0 > LEAST
        m0, m1, m2, m3, centre = (m[used] for m in (m0, m1, m2, m3, centre))
        mean, second, third = m1 / m0, m2 / m0, m3 / m0
        sd = np.sqrt(np.maximum(second - mean**2, 0))
        single = sd < 1e-7 * width  # rounding: one atom
        skew = np.where(single, 0, (third - 3 * mean * second + 2 * mean**3) / np.where(single, 1, sd) ** 3)
        root = np.sqrt(skew**2 + 4)
        at = np.concatenate([centre * (1 + mean + 0.5 * sd * (skew + sign * root)) for sign in (-1, 1)])
        mass = np.concatenate([0.5 * m0 * (1 + sign * skew / root) for sign in (1, -1)])
        return Atoms(at[mass > 0], mass[mass > 0])


def panels(low: float, high: float, width: float, nodes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes w and weights (for dw) on [low, high], in panels of log w of the given width."""
    count = max(math.ceil(math.log(high / low) / width), 1)
    z, weight = np.polynomial.legendre.leggauss(nodes)
    step = math.log(high / low) / count
    w = low * np.exp(((np.arange(count)[:, None] + 0.5 + 0.5 * z) * step).ravel())
    return w, w * np.tile(0.5 * step * weight, count)


def panjer(q: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The pmf of sum_{i <= N} X_i, N ~ Poisson(rate), on the grid 0, 1, .., n: (rows, n + 1), for rate (rows,).

        p_0 = exp(-rate (1 - q_0)),  p_j = rate / j sum_{i=1}^j i q_i p_{j-i}       (Panjer, ASTIN Bulletin 12, 1981)

    q (rows, n + 1) is the pmf of X up to n, its mass beyond left out: p_j needs no more. All terms are positive, so each p_j has
    its digits, deep in the tail too, where a Fourier transform leaves rounding noise of the largest.
    """
    rows, n = q.shape[0], q.shape[1] - 1
    found = np.empty((rows, n + 1))
    for first in range(0, rows, ROWS):
        part = slice(first, first + ROWS)
        weighted = rate[part, None] * np.arange(n + 1) * q[part]
        back = np.zeros_like(weighted)  # p_j at n - j, so that the sum is one over neighbours
        back[:, n] = np.exp(-rate[part] * (1 - q[part, 0]))
        for j in range(1, n + 1):
            back[:, n - j] = np.einsum("ri,ri->r", weighted[:, 1 : j + 1], back[:, n - j + 1 :]) / j
        found[part] = back[:, ::-1]
    return found


def binned(atoms: Atoms, step: float) -> np.ndarray:
    """Masses on the grid {j step}, j <= GRID, each atom shared by its neighbours so that the mean is kept; (GRID + 1,)."""
    place = atoms.at / step
    inside = place < GRID + 1
    place, mass = place[inside], atoms.mass[inside]
    left = place.astype(np.int64)
    right = place - left
    return (
        np.bincount(left, mass * (1 - right), GRID + 2) + np.bincount(left + 1, mass * right, GRID + 3)[: GRID + 2]
    )[: GRID + 1]


def compound_poisson(jumps: Sequence[Atoms], rates: np.ndarray, fine: np.ndarray, top: np.ndarray) -> list[Atoms]:
    """The laws of V = sum_{i <= N} X_i, N ~ Poisson(rate), X of law jumps[k], one for each k.

    The law is found on linear grids, each COARSER than the last, from step `fine` (K,) until they reach `top` (K,); neighbouring
    grids share the range where they overlap by weights that are linear in V, so that mass is kept.
    """
    levels = [
        max(0, math.ceil(math.log(t / (GRID * f)) / math.log(COARSER))) + 1 for f, t in zip(fine, top, strict=True)
    ]
    steps = [f * COARSER ** np.arange(n) for f, n in zip(fine, levels, strict=True)]
    rows = np.array([binned(atoms, h) for atoms, many in zip(jumps, steps, strict=True) for h in many])
    pmf = panjer(rows, np.repeat(rates, levels))
    found, first, j = [], 0, np.arange(GRID + 1)
    fade = np.clip(2 - 2 * j / GRID, 0, 1)  # of a grid towards its end: 1 up to the middle, then linear to 0
    rise = 1 - np.clip(2 - 2 * j * COARSER / GRID, 0, 1)  # of the next one, on the same range
    for many in steps:
        parts = pmf[first : first + len(many)].copy()
        parts[1:] *= rise
        parts[:-1] *= fade
        at, mass = np.outer(many, j).ravel(), parts.ravel()
        found.append(Atoms(at[mass > 0], mass[mass > 0]))
        first += len(many)
    return found
