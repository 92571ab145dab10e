"""One loop for all samplers; a sampler is its `step` from t to a smaller s.

Samples are made in blocks of rows (as many as their size asks for), each with a generator of its own, and a block is always
computed whole: sample i depends on the seed and on i alone, bit for bit, however many are asked for.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import generator
from scoresde_cli.sdes.base import SDE


def block_rows(d: int) -> int:
    """Rows of a block: a thousand where a sample is small (scripts/bench sample), fewer where a few are asked for at some cost."""
    return 1024 if d <= 256 else 256


@dataclass(frozen=True)
class Samples:
    """`x` (n, *D) in model coordinates; `nfe` evaluations of the network for each sample."""

    x: Tensor
    nfe: int


class Sampler(ABC):
    """From the prior at T to t_min in `steps` steps, then one denoising step to t = 0.

    Args:
        steps: number of steps.
        spacing: p of the grid t_i = (T^(1/p) + i/steps (t_min^(1/p) - T^(1/p)))^p: 1 is uniform, more is finer near t_min.
        denoise: end with E[x_0 | x_{t_min}] (Tweedie's formula), one more evaluation.
        t_min: where the steps end.
    """

    needs: Set[str] = frozenset({"score"})

    def __init__(
        self, steps: PositiveInt = 40, spacing: PositiveFloat = 2.0, denoise: bool = True,
        t_min: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
    ) -> None:  # fmt: skip
        self.steps, self.spacing, self.denoise, self.t_min = steps, spacing, denoise, t_min

    @abstractmethod
    def step(
        self, fields: Callable[..., Tensor], sde: SDE, x: Tensor, t: Tensor, s: Tensor, source: torch.Generator
    ) -> Tensor:
        """x at s < t from x at t; t and s have shape (B,); `fields(x, t, name)` evaluates the model and is counted."""

    def grid(self, T: float) -> Tensor:
        """The times (steps + 1,), from T down to t_min, float64."""
        p = 1.0 / self.spacing
        u = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        return (T**p + u * (self.t_min**p - T**p)) ** self.spacing

    @torch.no_grad()
    def sample(
        self, model: FieldModel, sde: SDE, shape: tuple[int, ...], n: int, seed: int, *,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        progress: Callable[[int], None] | None = None,
    ) -> Samples:  # fmt: skip
        """n samples (n, *shape) in model coordinates. `progress` is called with the number of samples that are done."""
        parts, nfe, times = [], 0, self.grid(sde.T).to(device=device, dtype=dtype)
        rows = block_rows(torch.Size(shape).numel())
        for block in range(-(-n // rows)):
            nfe = 0
            source = generator(seed, "sample", block, device=device)

            def fields(x: Tensor, t: Tensor, name: str) -> Tensor:
                nonlocal nfe
                nfe += 1
                return model.fields(x, t, {name})[name]

            x = sde.sample_prior((rows, *shape), source, dtype)
            for t, s in itertools.pairwise(times):
                x = self.step(fields, sde, x, t.expand(rows), s.expand(rows), source)
            if self.denoise:
                x = fields(x, times[-1].expand(rows), "x0")
            parts.append(x)
            if progress is not None:
                progress(min(n, (block + 1) * rows))
        return Samples(torch.cat(parts)[:n], nfe)
