"""Correlated noise on Gaussian data in closed form, eigenmode by eigenmode; no network, no samples.

dx = -b/2 x dt + sqrt(b) L dW, L L^T = Sigma, on data N(0, K_0). In z = L^{-1} x the noise is white, so all depends on the
eigenvalues kappa of Sigma^{-1} K_0 alone: a mode of z has the variance v(t) = kappa m^2 + 1 - m^2, m^2 = exp(-b t), and the score
-z / v. Under the reversible drift -b/2 Sigma x a mode of x forgets at its own rate lam, v = kappa m^(2 lam) + 1 - m^(2 lam).

A step of Euler's method multiplies a mode, so the variance that a sampler ends with is a product; the sampler starts from the prior
and is measured by KL(N(0, V) || N(0, K(t_min))) / d, or by the mode that is worst, |V / K(t_min) - 1|.
"""

import math
from functools import cache
from typing import Literal

import numpy as np

Kind = Literal["none", "equi", "ar1"]
Array = np.ndarray
B, T_MIN, POWER = 8.0, 1e-3, 3.0
MOST = 30_000


def eigenvalues(kind: str, rho: float, d: int) -> Array:
    """Of the correlation matrix: equi 1 - rho and 1 + (d-1) rho; AR(1) by the tridiagonal inverse, which is exact."""
    if kind == "none" or d == 1:
        return np.ones(d)
    if kind == "equi":
        return np.concatenate([np.full(d - 1, 1.0 - rho), [1.0 + (d - 1) * rho]])
    from scipy.linalg import eigvalsh_tridiagonal

    diagonal = np.full(d, 1.0 + rho**2)
    diagonal[[0, -1]] = 1.0
    inverse = eigvalsh_tridiagonal(diagonal, np.full(d - 1, -rho))
    return np.sort((1.0 - rho**2) / inverse)


def condition(lam: Array) -> float:
    """The largest over the smallest eigenvalue."""
    return float(lam.max() / lam.min())


def effective_dimension(lam: Array) -> float:
    """(tr Sigma)^2 / tr Sigma^2."""
    return float(lam.sum() ** 2 / np.square(lam).sum())


def divergence(ratio: Array) -> float:
    """KL(N(0, V) || N(0, K)) in nats for the modes' V / K."""
    return float(0.5 * (ratio - 1.0 - np.log(ratio)).sum())


def time_to_forget(kappa: Array, rates: Array, tolerance: float = 0.01) -> float:
    """b t at which KL(p_t || prior) has come down to the tolerance, by bisection (it falls)."""

    def left(bt: float) -> float:
        m2 = np.exp(-rates * bt)
        return divergence(kappa * m2 + 1.0 - m2)

    low, high = 0.0, 1.0
    while left(high) > tolerance:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if left(middle) > tolerance else (low, middle)
    return high


def grid(steps: int) -> Array:
    """Times from 1 to T_MIN, even in t^(1/POWER)."""
    ends = T_MIN ** (1 / POWER)
    return np.asarray((1.0 + np.linspace(0, 1, steps + 1) * (ends - 1.0)) ** POWER)


def end_ratio(
    kappa: Array, steps: int, stochastic: bool, noise: Array | None = None, assumed: Array | None = None
) -> Array:
    """V / K(t_min) by mode after Euler's method with the exact score; arguments as for `log_ratio`."""
    return np.asarray(np.exp(log_ratio(kappa, steps, stochastic, noise, assumed)))


def log_ratio(
    kappa: Array, steps: int, stochastic: bool, noise: Array | None = None, assumed: Array | None = None
) -> Array:
    """The logarithm of V / K(t_min) by mode, which holds where a wrong flow leaves less than floating point can say.

    Args:
        kappa: the data's variances; in units of the noise's, or plain with `noise` the noise's.
        stochastic: the reverse SDE, else the flow.
        assumed: the noise's variances that the reversal takes for true; None for the true ones.
    """
    noise = np.ones_like(kappa) if noise is None else noise
    assumed = noise if assumed is None else assumed
    t = grid(steps)
    V, log_V = noise.copy(), np.log(noise)  # of the prior
    share = 1.0 if stochastic else 0.5
    for start in range(0, steps, 256):
        now, h = t[start : start + 256 + 1][:-1], -np.diff(t[start : start + 256 + 1])
        m2 = np.exp(-B * now)[:, None]
        v = kappa * m2 + noise * (1.0 - m2)
        factor = 1.0 + h[:, None] * B * (0.5 - share * assumed / v)
        if stochastic:
            for f, step in zip(factor**2, h, strict=True):
                V = f * V + B * step * assumed
        else:
            log_V = log_V + 2.0 * np.log(np.maximum(np.abs(factor), 1e-150)).sum(0)
    end = math.exp(-B * T_MIN)
    return np.asarray((np.log(V) if stochastic else log_V) - np.log(kappa * end + noise * (1.0 - end)))


def ladder() -> list[int]:
    """Numbers of steps, each 1.15 times the one before."""
    found = [1]
    while found[-1] < MOST:
        found.append(max(found[-1] + 1, math.ceil(1.15 * found[-1] - 1e-9)))
    return [n for n in found if n <= MOST]


def steps_to(kappa: Array, stochastic: bool, criterion: Literal["mean", "worst"], tolerance: float) -> int | None:
    """The fewest steps of the ladder that keep KL / d, or the worst mode's error, within the tolerance; None where none do."""
    found, counts = np.unique(np.round(kappa, 12), return_counts=True)
    return fewest(tuple(found), tuple(counts), stochastic, criterion, tolerance)


@cache  # tables, figure and sentences ask alike
def fewest(
    values: tuple[float, ...], often: tuple[int, ...], stochastic: bool, criterion: str, tolerance: float
) -> int | None:
    kappa, counts = np.array(values), np.array(often)
    m2 = math.exp(-B)
    floor = np.abs(
        1.0 / (kappa * m2 + 1.0 - m2) - 1.0
    )  # what the prior leaves of a mode when the flow is followed exactly
    if criterion == "worst" and not stochastic and floor.max() > tolerance:
        return None
    for n in ladder():
        ratio = end_ratio(kappa, n, stochastic)
        if criterion == "worst":
            error = float(np.abs(ratio - 1.0).max())
        else:
            error = float((0.5 * counts * (ratio - 1.0 - np.log(np.maximum(ratio, 1e-300)))).sum() / counts.sum())
        if error <= tolerance:
            return n
    return None


def cost_of_forgetting(lam: Array, stochastic: bool, steps: int = 4000) -> tuple[float, float]:
    """(KL / d, worst ratio) where the reversal takes I for Sigma; data 0.25 I, noise with eigenvalues lam, prior N(0, Sigma)."""
    with np.errstate(over="ignore"):
        log = log_ratio(np.full_like(lam, 0.25), steps, stochastic, lam, np.ones_like(lam))
        worst = float(np.exp(log[np.argmax(np.abs(log))]))
        return float(0.5 * (np.exp(log) - 1.0 - log).mean()) if np.isfinite(log).all() else math.inf, worst
