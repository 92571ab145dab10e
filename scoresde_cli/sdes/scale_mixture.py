"""Laws of a jump's amplitude that are Gaussian scale mixtures: A = sqrt(w) N(0, I), w = s^2 W independent of the direction.

    gaussian    W = 1             nuhat(k) = exp(-s^2 k^2 / 2)
    laplace     W ~ Exp(1)        nuhat(k) = 1 / (1 + s^2 k^2 / 2)
    student_t   W = nu / chi2_nu  (multivariate Student t; no elementary nuhat)

nuhat(k) = E exp(i k . A), a function of |k| in any dimension. One number a jump is all that a conditional law needs to know
(Andrews and Mallows, "Scale mixtures of normal distributions", JRSS B 36, 1974).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.measures import Atoms, panels

if TYPE_CHECKING:
    from scipy.stats._distn_infrastructure import rv_continuous_frozen

NONE = 1e-12  # mass that is left out at each end of a law
DRAWS = 1_000_000


class Amplitude(ABC):
    """A law of w > 0, the squared scale of one jump. A user's own law is a subclass with `draw`.

    What follows from draws alone carries their Monte Carlo error (DRAWS of them); the shipped laws know better.
    """

    @abstractmethod
    def draw(self, shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws of w of the given shape, on the generator's device."""

    @property
    def mean(self) -> float:
        """E w: the variance of a jump along each coordinate."""
        return float(self._drawn.mean())

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high): w is there but for NONE on either side."""
        return float(self._drawn[0]), float(self._drawn[-1])

    def tail(self, w: np.ndarray) -> np.ndarray:
        """Fbar(w) = P(w' > w)."""
        return 1 - np.searchsorted(self._drawn, w, side="right") / len(self._drawn)

    def atoms(self, width: float) -> Atoms:
        """The law as atoms, a few in each panel of relative width `width`."""
        count = np.full(len(self._drawn), 1 / len(self._drawn))
        return Atoms(self._drawn, count).compressed(float(self._drawn[0]), width)

    def tail_atoms(self, low: float, width: float) -> Atoms:
        """The measure Fbar(w) dw (of mass E w) as atoms, fine from `low` up."""
        nodes, lengths = panels(min(low, self.ends[1]), self.ends[1], width)
        head = min(low, self.ends[1])
        return Atoms(np.append(nodes, head / 2), np.append(self.tail(nodes) * lengths, head))

    def characteristic(self, k: Tensor) -> Tensor:
        """nuhat at |k| = k, in closed form where there is one. Raises NotImplementedError elsewhere."""
        raise NotImplementedError(f"{type(self).__name__} has no elementary characteristic function")

    def sample(self, n: int, shape: tuple[int, ...], t: Tensor, source: torch.Generator) -> Tensor:
        """n amplitudes (n, *shape), one scale for all coordinates: `Jumps.sample`."""
        w = self.draw((n,) + (1,) * len(shape), source)
        return w.sqrt() * normal((n, *shape), source)

    @cached_property
    def _drawn(self) -> np.ndarray:
        return np.sort(self.draw((DRAWS,), generator(0, "amplitude"), torch.float64).cpu().numpy())


def check(law: Amplitude) -> None:
    """Refuse a law whose draws are not numbers above zero of the shape that was asked for."""
    name, shape = type(law).__name__, (1000, 1)
    try:
        w = law.draw(shape, generator(0, "amplitude"))
    except Exception as problem:
        raise ScoreSDEError(f"sde.amplitude: {name}.draw fails: {type(problem).__name__}: {problem}") from problem
    if not isinstance(w, Tensor) or tuple(w.shape) != shape:
        found = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise ScoreSDEError(
            f"sde.amplitude: {name}.draw gave {found}: expected a tensor of the shape asked for, {shape}"
        )
    wrong = w[~(w.isfinite() & (w > 0))]
    if len(wrong):
        raise ScoreSDEError(
            f"sde.amplitude: {name}.draw gave {float(wrong[0]):.3g}: expected finite numbers above zero, squared scales of jumps"
        )


class GaussianAmplitude(Amplitude):
    """A ~ N(0, s^2 I).

    Args:
        scale: s.
    """

    def __init__(self, scale: PositiveFloat = 1.0) -> None:
        self.w = scale**2

    def draw(self, shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, self.w, device=source.device, dtype=dtype)

    @property
    def mean(self) -> float:
        return self.w

    @property
    def ends(self) -> tuple[float, float]:
        return self.w, self.w

    def tail(self, w: np.ndarray) -> np.ndarray:
        return (w < self.w).astype(float)

    def atoms(self, width: float) -> Atoms:
        return Atoms(np.array([self.w]), np.ones(1))

    def characteristic(self, k: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.w * k.square())


class _Continuous(Amplitude):
    """A law of w that scipy knows."""

    law: "rv_continuous_frozen[Any]"

    @property
    def mean(self) -> float:
        return float(self.law.mean())

    @property
    def ends(self) -> tuple[float, float]:
        return float(self.law.ppf(NONE)), float(self.law.isf(NONE))

    def tail(self, w: np.ndarray) -> np.ndarray:
        return self.law.sf(w)

    def atoms(self, width: float) -> Atoms:
        nodes, lengths = panels(*self.ends, width)
        mass = self.law.pdf(nodes) * lengths
        return Atoms(nodes, mass / mass.sum())


class LaplaceAmplitude(_Continuous):
    """The isotropic Laplace law, w ~ s^2 Exp(1); variance s^2 along each coordinate.

    Args:
        scale: s.
    """

    def __init__(self, scale: PositiveFloat = 1.0) -> None:
        from scipy.stats import expon

        self.w, self.law = scale**2, expon(scale=scale**2)

    def draw(self, shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.w * torch.empty(shape, device=source.device, dtype=dtype).exponential_(generator=source)

    def characteristic(self, k: Tensor) -> Tensor:
        return 1 / (1 + 0.5 * self.w * k.square())


class StudentAmplitude(_Continuous):
    """The multivariate Student t law with nu degrees of freedom, w = s^2 nu / chi2_nu; variance s^2 nu / (nu - 2).

    Args:
        scale: s.
        nu: degrees of freedom, above 2: the variance of the noise must exist.
    """

    def __init__(self, scale: PositiveFloat = 1.0, nu: Annotated[float, Field(gt=2)] = 5.0) -> None:
        from scipy.stats import invgamma

        self.w, self.nu, self.law = scale**2, nu, invgamma(nu / 2, scale=scale**2 * nu / 2)

    def draw(self, shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        half = torch.full(shape, self.nu / 2, device=source.device, dtype=torch.float64)
        return (self.w * self.nu / (2 * torch._standard_gamma(half, generator=source))).to(dtype)

    def characteristic(self, k: Tensor) -> Tensor:
        """2^(1-a) / Gamma(a) z^a K_a(z), a = nu/2, z = sqrt(nu) s |k| (Bessel's function of the second kind)."""
        from scipy.special import kv

        a, z = self.nu / 2, (math.sqrt(self.nu * self.w) * k.double().abs().clamp_min(1e-9)).numpy()
        return torch.as_tensor(2 ** (1 - a) / math.gamma(a) * z**a * kv(a, z))


Law = Literal["gaussian", "laplace", "student_t"]
LAWS: dict[str, Callable[[float], Amplitude]] = {
    "gaussian": GaussianAmplitude, "laplace": LaplaceAmplitude, "student_t": StudentAmplitude,
}  # fmt: skip


def amplitude_of(law: Law | Amplitude, scale: float, nu: float, where: str = "sde.") -> Amplitude:
    """The law that the keys describe, or one of the user's own, checked."""
    if isinstance(law, Amplitude):
        check(law)
        return law
    if law == "student_t" and nu <= 2:
        raise ScoreSDEError(f"{where}nu={nu}: expected more than 2, or the noise has no variance")
    return StudentAmplitude(scale, nu) if law == "student_t" else LAWS[law](scale)
