"""Fields that a sampler may follow in place of the model's own: tempered, clipped, and pinned to known values."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli.datasets.base import Dataset
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest, one_line
from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import normal
from scoresde_cli.sdes.base import Kernel, Whitening
from scoresde_cli.sdes.operators import expand


class Steered(FieldModel):
    """A field model made of another."""

    def __init__(self, model: FieldModel) -> None:
        self.model, self.sde, self.provides = model, model.sde, model.provides
        self.evaluations, self.variance, self.bounds = model.evaluations, model.variance, model.bounds


class Tempered(Steered):
    """score <- score (alpha^2 v + sigma^2) / (alpha^2 v temperature + sigma^2), v the data's mean variance.

    For Gaussian data N(m, v I) with m = 0 this is the score of noised data of variance v temperature, exactly; for other data it
    sharpens (below 1) or flattens the law without being p^(1/temperature) (Ingraham et al., Nature 623, 2023, appendix C).
    """

    def __init__(self, model: FieldModel, temperature: float) -> None:
        super().__init__(model)
        self.temperature = temperature

    def factor(self, t: Tensor) -> Tensor:
        """The factor of the score, (B,)."""
        kernel = self._kernel()
        signal, noise = self.variance * kernel.alpha(t).square(), kernel.sigma(t).square()
        return (signal + noise) / (signal * self.temperature + noise)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return expand(self.factor(t), x) * self.model.score(x, t)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor(t) * self.model.log_density(x, t)


class Guided(Steered):
    """score(x) + weight (score(x | label) - score(x)): 1 is the score given the label, above 1 it is followed more strictly.

    Source: Ho and Salimans, "Classifier-free diffusion guidance", 2022, eq. 6, whose w is weight - 1. For a weight other than 0
    and 1 this is the score of no noised law, and samples are sharper than the data.
    """

    def __init__(self, model: FieldModel, label: int, weight: float) -> None:
        super().__init__(model)
        self.provides = self.provides - {"log_density"}
        self.weight, of = weight, torch.tensor([label])
        self.given, self.free = model.labelled(of), model.labelled(None)
        self.evaluations = 2 * model.evaluations

    def whitened(self) -> FieldModel:
        view = copy.copy(self)
        view.model, view.given, view.free = self.model.whitened(), self.given.whitened(), self.free.whitened()
        view.sde = view.model.sde
        return view

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        free = self.free.score(x, t)
        return free + self.weight * (self.given.score(x, t) - free)


class Clipped(Steered):
    """The score of which E[x_0 | x_t] stays within the range of the data ("clip_denoised": Ho et al., NeurIPS 2020, their code).

    The range is that of the data's own coordinates, of which those of the model are `white` where that is given.
    """

    provides = frozenset({"score", "eps", "x0", "velocity"})

    def __init__(self, model: FieldModel, white: Whitening | None = None) -> None:
        super().__init__(model)
        self.provides, self.white = Clipped.provides, white
        if self.bounds is None:
            raise ScoreSDEError("sampler.clip=true: the range of the data is not known here")

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        s, kernel = self.model.score(x, t), self._kernel()
        factor = kernel.factor(t)
        x0 = kernel.denoised(x, t, s)
        beyond = self.clamp(x0) - x0
        return s + factor.solve_t(factor.solve(kernel.mean(beyond, t)))

    def clamp(self, x: Tensor) -> Tensor:
        """x (B, *D) within the range of the data."""
        assert self.bounds is not None
        low, high = (end.to(x).reshape(x.shape[1:]) for end in self.bounds)
        seen = x if self.white is None else self.white.out(x)
        within = torch.minimum(torch.maximum(seen, low), high)
        return within if self.white is None else self.white.into(within)


class Known:
    """Values that the samples have to take, in model coordinates; the rest is drawn given them.

    Args:
        value: (m, *D); not a number where it is open. Sample i takes row i modulo m.
        given: the same in the user's units.
    """

    def __init__(self, value: Tensor, given: np.ndarray | None = None) -> None:
        self.value, self.given = value, given

    def rows(self, first: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mask, values) of samples first to first + count, (count, *D) each, zero where open."""
        index = torch.arange(first, first + count) % len(self.value)
        value = self.value[index].to(like)
        return ~value.isnan(), value.nan_to_num()

    def restore(self, u: np.ndarray, first: int) -> np.ndarray:
        """Samples first, first + 1, .. (n, *D) in the user's units with the known values as they were given, off a grid or not."""
        assert self.given is not None
        value = self.given[np.arange(first, first + len(u)) % len(self.given)]
        return np.where(np.isnan(value), u, value)

    def beyond(self, data: Dataset) -> str | None:
        """The first known value that is farther from the training data than that is wide, in words."""
        low, high = data.bounds
        flat, width = self.value.flatten(1).float(), (high - low).cpu()
        width = width.max() if data.kind == "image" else width
        far = (flat < low.cpu() - width) | (flat > high.cpu() + width)
        if not far.any():
            return None
        row, place = far.nonzero()[0].tolist()
        ends = data.units.to_user(torch.stack([low, high]).cpu().reshape(2, *data.shape), rounded=False).flatten(1)
        name = data.columns[place] if data.columns else f"x{place}"
        value = float(data.units.to_user(self.value[row : row + 1], rounded=False).flatten()[place])
        return f"{name}={value:g} is far outside the training data ({ends[0, place]:.4g} to {ends[1, place]:.4g})"

    @classmethod
    def read(cls, given: Mapping[Any, Any] | str, data: Dataset) -> "Known":
        """From {column: value} or a file, in the user's units. Raises ScoreSDEError or Unreadable where that fails."""
        if data.units.scale is None:
            raise ScoreSDEError(
                "sampler.known: the model's coordinates mix the columns (data.scaling=whiten); train with standardise"
            )
        d = int(torch.Size(data.shape).numel())
        names = data.columns or [f"x{i}" for i in range(d)]
        if isinstance(given, str):
            u = read_known(Path(given).expanduser(), names, data)
        else:
            u = torch.full((1, d), torch.nan, dtype=torch.float64)
            for name, value in given.items():
                if name not in names and not (isinstance(name, int) and 0 <= name < d):
                    raise ScoreSDEError(
                        f"sampler.known.{name}: no such column; expected one of {', '.join(names[:20])}, or a number below {d}"
                        f"{nearest(str(name), names)}"
                    )
                if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                    raise ScoreSDEError(f"sampler.known.{name}={value}: expected a number")
                u[0, names.index(name) if name in names else name] = float(value)
        if u.isnan().all():
            raise ScoreSDEError("sampler.known: nothing is known in it")
        if u.isinf().any():
            raise ScoreSDEError("sampler.known: it holds infinite values")
        u = u.reshape(-1, *data.shape)
        return cls(data.units.to_model(u), u.numpy())


def read_known(file: Path, names: list[str], data: Dataset) -> Tensor:
    """(m, d) in the user's units: an .npy array with nan where it is open, or a .csv table with empty cells or columns left out."""
    if not file.is_file():
        raise ScoreSDEError(f"sampler.known={file}: the file does not exist")
    suffix, d = file.suffix.lower(), len(names)
    if suffix not in (".npy", ".csv"):
        raise ScoreSDEError(f"sampler.known={file}: expected {{column: value}}, a .csv or an .npy file")
    try:
        if suffix == ".npy":
            found = np.load(file, allow_pickle=False).astype(np.float64)
            if found.shape == tuple(data.shape) or found.shape[1:] == tuple(data.shape):
                return torch.from_numpy(found.reshape(-1, d))
            raise ScoreSDEError(
                f"sampler.known={file}: an array of shape {found.shape}, expected {tuple(data.shape)} or (m, "
                f"{', '.join(map(str, data.shape))})"
            )
        import pandas as pd

        frame = pd.read_csv(file)
        foreign = [str(name) for name in frame.columns if name not in names]
        if foreign:
            raise ScoreSDEError(f"sampler.known={file}: no column {foreign[0]!r}{nearest(foreign[0], names)}")
        return torch.from_numpy(frame.reindex(columns=names).to_numpy(dtype=np.float64, na_value=np.nan).copy())
    except ScoreSDEError:
        raise
    except Exception as problem:
        raise Unreadable(f"sampler.known={file}: not readable as {suffix[1:]} ({one_line(problem)[:160]})") from problem


def impose(x: Tensor, mask: Tensor, value: Tensor, kernel: Kernel, t: Tensor, source: torch.Generator) -> Tensor:
    """x (B, *D) at t (B,) with the known part replaced by a draw of it given its value at time 0 (Song et al., ICLR 2021, I.2)."""
    noised = expand(kernel.alpha(t), x) * value + kernel.factor(t).mul(normal(tuple(x.shape), source, x.dtype))
    return torch.where(mask, noised, x)


def renoise(x: Tensor, kernel: Kernel, s: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
    """A draw of x_t given x_s = x, s <= t (B,): a x + sqrt(sigma_t^2 - a^2 sigma_s^2) z with a = alpha_t / alpha_s."""
    a = kernel.alpha(t) / kernel.alpha(s)
    spread = (kernel.sigma(t).square() - (a * kernel.sigma(s)).square()).clamp_min(0.0).sqrt()
    return expand(a, x) * x + expand(spread, x) * normal(tuple(x.shape), source, x.dtype)
