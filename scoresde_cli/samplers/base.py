"""One loop for all samplers; a sampler is its `step` from t to a smaller s.

Samples are made in blocks of rows (as many as their size asks for), each with a generator of its own, and a block is always
computed whole: sample i depends on the seed and on i alone, bit for bit, however many are asked for.

Where noise is correlated, the walk is in white coordinates z, x = W z: what a sampler does with isotropic noise is right there, and
it is the walk in x with W z as noise and W W^T in front of the score. What is clipped is so in x.
"""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from scoresde_cli import processes
from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.fields import FieldModel
from scoresde_cli.rng import generator, normal
from scoresde_cli.samplers import grids
from scoresde_cli.samplers.steering import Clipped, Known, Tempered, impose, renoise
from scoresde_cli.sdes.base import SDE, Whitening
from scoresde_cli.sdes.operators import expand
from scoresde_cli.sdes.whitened import MatrixKernel

BY_FIELD = {  # what a model under jumps is sampled by
    "flux": "heun_ode, euler_ode, dopri5 and euler_maruyama work",
    "log_density": "true_reversal works",
    "gaussian_denoiser": "scale_path works",
}
Watch = Callable[[int, float, Tensor], None]


def block_rows(d: int) -> int:
    """Rows of a block: a thousand where a sample is small (scripts/bench sample), fewer where a few are asked for at some cost."""
    return 1024 if d <= 256 else 256


@dataclass(frozen=True)
class Samples:
    """`x` (n, *D) in model coordinates; `nfe` evaluations of the network for each sample (the mean, where they adapt)."""

    x: Tensor
    nfe: float


class Walk:
    """What a block has on its way down: the model, whose evaluations are counted, the process, noise, and a sampler's memory."""

    def __init__(self, model: FieldModel, sde: SDE, source: torch.Generator) -> None:
        self.model, self.sde, self.source = model, sde, source
        self.nfe, self.memory = 0, None  # type: tuple[int, Any]

    def fields(self, x: Tensor, t: Tensor, *names: str) -> tuple[Tensor, ...]:
        """The named fields of the model at x (B, *D), t (B,), from one evaluation."""
        self.nfe += self.model.evaluations
        found = self.model.fields(x, t, set(names))
        return tuple(found[name] for name in names)

    def field(self, x: Tensor, t: Tensor, name: str) -> Tensor:
        """One field of the model."""
        return self.fields(x, t, name)[0]

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise like x."""
        return normal(tuple(x.shape), self.source, x.dtype)

    def levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), shaped so that they broadcast against x; by coordinate where each has its own."""
        kernel = self.sde.kernel()
        assert kernel is not None
        if isinstance(kernel, MatrixKernel):
            ones = x.new_ones(x[0].numel())
            return tuple(level.reshape(x.shape) for level in kernel.levels(t, ones))  # type: ignore[return-value]
        return expand(kernel.alpha(t), x), expand(kernel.sigma(t), x)


@dataclass(kw_only=True)
class Sampler(ABC):
    """From the prior at T to t_min in `steps` steps, then one denoising step to t = 0.

    Args:
        steps: number of steps.
        grid: the times of the steps, by name (grids.py) or as a list from T down; a list's length decides the steps.
        rho: exponent of the grids power (2 where it is None) and edm_rho (7): more is finer near t_min.
        denoise: end with E[x_0 | x_{t_min}] (Tweedie's formula), one more evaluation.
        clip: keep E[x_0 | x_t] within the range of the training data.
        temperature: below 1 sharper samples, above 1 flatter ones (steering.Tempered).
        known: values that the samples take, {column: value} or a file (steering.Known); for `sample` alone.
        repaint: with known, how often each step is noised again and repeated, so that the open part agrees with the known
            (Lugmayr et al., CVPR 2022).
        t_min: where the steps end.
    """

    needs: ClassVar[Set[str]] = frozenset({"score"})
    with_jumps: ClassVar[Set[str]] = frozenset({"flux"})  # what it needs besides, for a process that jumps
    needs_kernel: ClassVar[bool] = False  # and one that is Gaussian
    adaptive: ClassVar[bool] = False  # the number of evaluations is found on the way
    descends: ClassVar[bool] = True  # goes from T down to t_min

    steps: PositiveInt = 20
    grid: grids.Grid = "power"
    rho: PositiveFloat | None = None
    denoise: bool = True
    clip: bool = False
    temperature: PositiveFloat = 1.0
    known: dict[Any, Any] | str | None = None
    repaint: NonNegativeInt = 10
    t_min: Annotated[float, Field(gt=0, lt=1)] = 1e-3

    def __post_init__(self) -> None:
        grids.check(self.grid, self.rho)
        if isinstance(self.grid, list):
            self.steps, self.t_min = len(self.grid) - 1, self.grid[-1]

    @abstractmethod
    def step(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at s < t from x at t; t and s have shape (B,)."""

    def times(self, sde: SDE) -> Tensor:
        """The times (steps + 1,), from T down to t_min, float64."""
        return grids.times(self.grid, self.rho, self.steps, sde, self.t_min)

    def start(self, walk: Walk, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the walk starts from, `shape` = (B, *D)."""
        return walk.sde.sample_prior(shape, walk.source, dtype)

    def finish(self, walk: Walk, x: Tensor, t: Tensor) -> Tensor:
        """The denoising step, from t_min (B,) to 0."""
        return walk.field(x, t, "x0")

    def protocol(self) -> dict[str, Any]:
        """The settings that two figures of samples must share to be compared."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"sampler": type(self).__name__} | {
            k: v.protocol() if isinstance(v, Sampler) else v for k, v in found.items()
        }

    def check(self, model: FieldModel, sde: SDE) -> None:
        """Refuse a model or a process that lacks what the sampler needs."""
        name = type(self).__name__
        missing = (self.needs | (frozenset() if sde.jumps is None else self.with_jumps)) - model.provides
        if missing:
            fits = [way for field, way in BY_FIELD.items() if field in model.provides and sde.jumps is not None]
            raise ScoreSDEError(
                f"sampler {name} needs {', '.join(sorted(missing))}; the model has {', '.join(sorted(model.provides))}"
                f"{'; ' + fits[0] if fits else ''}"
            )
        if sde.still and self.descends:
            raise ScoreSDEError(
                f"sampler {name} comes back from noise, of which {type(sde).__name__} has none; sampler=langevin works"
            )
        special = {"clip": self.clip, "temperature": self.temperature != 1, "known": self.known is not None}
        asked = [f"sampler.{key}" for key, there in special.items() if there]
        if sde.phase and asked:
            raise ScoreSDEError(
                f"{asked[0]} is for noise that acts on the data itself, and that of {type(sde).__name__} acts on a velocity; "
                "train with sde=vp"
            )
        white = sde.whitening()
        kernel = (sde if white is None else white.sde).kernel()
        if white is not None and self.known is not None:
            raise ScoreSDEError(
                f"sampler.known with correlated noise ({type(sde).__name__}): the known part's noise would have to be drawn given "
                "that of the open part, which nobody knows; train with sde=vp"
            )
        if kernel is not None and not kernel.scalar and self.temperature != 1:
            raise ScoreSDEError(
                f"sampler.temperature needs one noise level for all directions, and with this drift of {type(sde).__name__} each "
                "forgets at its own rate; sde.drift=isotropic has one"
            )
        if kernel is not None and not kernel.diagonal and (self.needs_kernel or not self.descends):
            raise ScoreSDEError(
                f"sampler {name} needs coordinates that forget each by itself, which the drift of {type(sde).__name__} mixes; "
                f"{sde.remedy}"
            )
        if kernel is None and (self.needs_kernel or asked):
            raise ScoreSDEError(
                f"{asked[0] if asked else f'sampler {name}'} needs a process with a closed-form kernel, which {type(sde).__name__} "
                f"has not; {'it works with sde=vp' if asked else sde.remedy}"
            )
        if sde.jumps is not None and (self.needs_kernel or asked):
            raise ScoreSDEError(
                f"{asked[0] if asked else f'sampler {name}'} takes the noise for Gaussian, and {type(sde).__name__} jumps; "
                "euler_ode, heun_ode, dopri5, euler_maruyama, true_reversal and scale_path work"
            )
        self.times(sde)

    @torch.no_grad()
    def blocks(
        self, model: FieldModel, sde: SDE, shape: tuple[int, ...], n: int, seed: int, *,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, known: Known | None = None,
        watch: Watch | None = None, which: Iterable[int] | None = None,
    ) -> Iterator[Samples]:  # fmt: skip
        """The n samples block by block, each computed when it is asked for; of some blocks alone. Arguments as for `sample`."""
        if (self.known is None) != (known is None):
            raise ScoreSDEError(
                "sampler.known is for `scoresde sample`: there is no other place where samples are given values"
            )
        self.check(model, sde)
        white = sde.whitening()
        if white is not None:
            model, sde = model.whitened(), white.sde
        if self.temperature != 1:
            model = Tempered(model, self.temperature)
        if self.clip:
            model = Clipped(model, white)
        times = self.times(sde).to(device=device, dtype=dtype)
        rows = block_rows(torch.Size(shape).numel())
        for block in range(-(-n // rows)) if which is None else which:
            walk = Walk(model, sde, generator(seed, "sample", block, device=device))
            x = self.walk_down(walk, times, (rows, *shape), dtype, block, known, watch, white)
            yield Samples(x[: n - block * rows], walk.nfe)

    def walk_down(
        self, walk: Walk, times: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block: int, known: Known | None,
        watch: Watch | None, white: Whitening | None = None,
    ) -> Tensor:  # fmt: skip
        """One block (B, *D) of the data's coordinates, from start to end; the walk is in white ones where there are such."""

        def out(z: Tensor) -> Tensor:
            return seen(walk.sde.data(z))

        def seen(z: Tensor) -> Tensor:
            return z if white is None else white.out(z)

        x, kernel = self.start(walk, shape, dtype), walk.sde.kernel()
        pinned = None if known is None else known.rows(block * len(x), len(x), x)
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            if watch is not None:
                watch(block, float(t), out(x))
            t, s = t.expand(len(x)), s.expand(len(x))
            if pinned is None or kernel is None:
                x = walk.sde.within(self.step(walk, x, t, s))
                continue
            if i == 0:
                x = impose(x, *pinned, kernel, t, walk.source)
            for again in range(self.repaint, -1, -1):
                x = impose(self.step(walk, x, t, s), *pinned, kernel, s, walk.source)
                if again:
                    x, walk.memory = renoise(x, kernel, s, t, walk.source), None
        last = times[-1]
        if self.denoise:
            if watch is not None:
                watch(block, float(last), out(x))
            x, last = self.finish(walk, x, last.expand(len(x))), 0.0 * last
        else:
            x = walk.sde.data(x)
        if self.clip:
            x = Clipped(walk.model, white).clamp(x)
        x = seen(x)
        if pinned is not None:
            x = torch.where(*pinned, x)
        if watch is not None:
            watch(block, float(last), x)
        return x

    def sample(
        self, model: FieldModel, sde: SDE, shape: tuple[int, ...], n: int, seed: int, *,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, known: Known | None = None,
        watch: Watch | None = None, progress: Callable[[int], None] | None = None,
    ) -> Samples:  # fmt: skip
        """n samples (n, *shape) in model coordinates.

        Args:
            known: values that the samples have to take.
            watch: called with (block, t, x) before every step and at the end.
            progress: called with the number of samples that are done.

        Raises ScoreSDEError where the model or the process lacks what the sampler needs.
        """
        done, count = 0, -(-n // block_rows(torch.Size(shape).numel()))

        def block(i: int) -> tuple[Tensor, float]:
            nonlocal done
            (found,) = self.blocks(
                model, sde, shape, n, seed, device=device, dtype=dtype, known=known, watch=watch, which=[i]
            )
            done += len(found.x) * processes.size()
            if progress is not None:
                progress(min(done, n))
            return found.x, found.nfe * len(found.x)

        parts, nfe = zip(*processes.shared(count, block), strict=True)
        return Samples(torch.cat(parts).to(device), sum(nfe) / n)
