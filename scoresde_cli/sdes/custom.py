"""A process of the user's own: drift and noise are classes with `__call__(x, t)`, named in the config; with jumps if asked for."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.sdes.operators import Diagonal, LinearOperator, Matrix, Scalar
from scoresde_cli.sdes.poisson import NONE
from scoresde_cli.sdes.simulated import Simulated


class Custom(Simulated):
    """dx = f(x, t) dt + G(x, t) dW + dJ (Ito).

    Args:
        drift: f, an object that is called with x (B, *D) and t (B,) and gives (B, *D).
        diffusion: G, a positive number or an object that is called in the same way and gives numbers (B,), a diagonal (B, *D) or
            matrices (B, d, d). It may depend on x.
        T, steps, paths, refresh, jumps: as for every simulated process.
    """

    def __init__(
        self, drift: object, diffusion: PositiveFloat | object = 1.0, T: PositiveFloat = 1.0, steps: PositiveInt = 200,
        paths: PositiveInt = 2048, refresh: PositiveInt = 100, jumps: Mapping[str, Any] = NONE, *,
        shape: tuple[int, ...], train: Tensor | None = None, kept: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        for name, part in (("drift", drift), ("diffusion", diffusion)):
            if not callable(part) and not (name == "diffusion" and isinstance(part, int | float) and part > 0):
                raise ScoreSDEError(
                    f"sde.{name}={part}: expected {'a positive number or ' if name == 'diffusion' else ''}a class of your own with "
                    f"__call__(self, x, t), named by sde.{name}._target_=module.Class (docs/nonlinear.md)"
                )
        self.f, self.G = drift, diffusion
        self.check(shape)
        super().__init__(T, steps, paths, refresh, jumps, shape=shape, train=train, kept=kept)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ScoreSDEError where drift or diffusion fail, or return another shape than they should."""
        x, t, d = torch.zeros(3, *shape), torch.full((3,), 0.5), int(torch.Size(shape).numel())
        fits: dict[str, set[tuple[int, ...]]] = {"drift": {(3, *shape)}, "diffusion": {(3,), (3, *shape), (3, d, d)}}
        for name, part in (("drift", self.f), ("diffusion", self.G)):
            if not callable(part):
                continue
            try:
                found = part(x, t)
            except Exception as problem:
                raise ScoreSDEError(
                    f"sde.{name}: {type(part).__name__} fails at x (3, {', '.join(map(str, shape))}), t (3,): "
                    f"{type(problem).__name__}: {str(problem).splitlines()[0][:160] if str(problem) else ''}"
                ) from problem
            if not isinstance(found, Tensor) or tuple(found.shape) not in fits[name]:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                wanted = " or ".join(map(str, sorted(fits[name], key=len)))
                raise ScoreSDEError(
                    f"sde.{name}: {type(part).__name__} gives {got} for x {tuple(x.shape)}, expected {wanted}"
                )

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.f(x, t)  # type: ignore[operator]
        return found

    def diffusion(self, t: Tensor, x: Tensor | None = None) -> LinearOperator:
        if not callable(self.G):
            return Scalar(torch.full_like(t, float(self.G)))  # type: ignore[arg-type]
        if x is None:
            raise ScoreSDEError("loss.weighting=g2: the noise of sde=custom may depend on x; sigma2 and one work")
        values: Tensor = self.G(x, t)
        if values.ndim == 1:
            return Scalar(values)
        if values.shape == x.shape:  # in one dimension a diagonal is the matrix
            return Diagonal(values.flatten(1))
        return Matrix(values)
