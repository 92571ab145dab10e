"""A trained run in Python, in the user's units: the door for notebooks, and what `sample` and `evaluate` stand on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde_cli import likelihood
from scoresde_cli.compose import build, compose
from scoresde_cli.datasets.base import label_name
from scoresde_cli.errors import ScoreSDEError, nearest
from scoresde_cli.fields import FieldModel
from scoresde_cli.likelihood import Flow
from scoresde_cli.networks.model import ScoreModel
from scoresde_cli.rundir import RunDir
from scoresde_cli.samplers.base import Sampler, Samples, Watch
from scoresde_cli.samplers.steering import Guided, Known
from scoresde_cli.training.state import load_weights

Label = str | int | float


class Run:
    """A trained run, in the user's units. Made by `load_run`.

    Attributes:
        path: the directory. config: its resolved config. summary: its summary.json. columns: names of a table's columns.
        step: training steps of the weights that are used.
    """

    def __init__(
        self, folder: RunDir, trust: bool = False, device: str | None = None, average: bool = True, which: str | int = "selected",
    ) -> None:  # fmt: skip
        self.path, self.config, self.summary = folder.path, folder.config(trust), folder.summary()
        data, gaussian = folder.stored_data()
        checkpoint = folder.checkpoint(which=which)
        composed = {**self.config, "device": device or "auto", "resume": None, "dir": None, "trust": False}
        self.parts = compose(composed, data, gaussian)
        self.columns, self.units, self.shape = data.columns, data.units, data.shape
        self.step = int(checkpoint.facts["step"])
        self.averaged = average and checkpoint.average is not None
        chosen = checkpoint.average if self.averaged else checkpoint.model
        self.model: ScoreModel = self.parts.model.eval()
        load_weights(self.model, chosen or checkpoint.model)

    def _model_coordinates(self, u: Any) -> Tensor:
        u = torch.as_tensor(np.asarray(u, dtype=np.float64))
        if tuple(u.shape[1:]) != self.shape:
            raise ScoreSDEError(f"x has the shape {tuple(u.shape)}, expected (n, {', '.join(map(str, self.shape))})")
        return self.units.to_model(u).to(device=self.parts.device, dtype=self.parts.dtype)

    @torch.no_grad()
    def score(self, x: Any, t: float) -> np.ndarray:
        """grad_x log p_t(x) for x (n, *D) in the user's units and a time t in [t_min, T]: (n, *D), per user's unit.

        The noise acts in model coordinates z, x = F z + shift; the score in x is F^{-T} times the score in z.
        """
        sde = self.parts.sde
        if "score" not in self.model.provides:
            raise ScoreSDEError(
                f"{self.path}: the run has learnt no score, but {', '.join(sorted(self.model.provides))}"
            )
        if sde.phase:
            raise ScoreSDEError(
                f"{self.path}: under {type(sde).__name__} the score is that of (x, v) in the velocity v, and x alone has none"
            )
        if not self.parts.settings.t_min <= t <= sde.T:
            raise ScoreSDEError(f"t={t}: expected a time in [{self.parts.settings.t_min}, {sde.T}]")
        z = self._model_coordinates(x)
        s = (
            self.model.score(z, torch.full((len(z),), float(t), device=z.device, dtype=z.dtype))
            .cpu()
            .double()
            .flatten(1)
        )
        units = self.units
        s = s / units.scale if units.scale is not None else torch.linalg.solve(units.matrix.T, s.T).T  # type: ignore[union-attr]
        return s.reshape(-1, *self.shape).numpy()

    def given(self, label: Label | None, guidance: float = 1.0) -> FieldModel:
        """The model, given a label where there is one. Raises ScoreSDEError for a label that the run does not know."""
        if label is None:
            return self.model
        classes = self.parts.data.classes
        if not classes:
            raise ScoreSDEError(f"label={label}: the run was trained without labels (data.labels)")
        name = label_name(label)
        if name not in classes:
            near = (
                "" if isinstance(label, int | float) else nearest(name, classes)
            )  # numbers of like digits are not near
            raise ScoreSDEError(f"label={label}: expected one of {', '.join(classes)}{near}")
        index = classes.index(name)
        return self.model.labelled(torch.tensor([index])) if guidance == 1 else Guided(self.model, index, guidance)

    def known(self, sampler: Sampler | None = None) -> Known | None:
        """The values that the samples of a sampler (None for the run's own) have to take, read from its `known`."""
        given = (sampler or self.parts.sampler).known
        return None if given is None else Known.read(given, self.parts.data)

    def blocks(
        self, n: int, seed: int = 0, sampler: Sampler | None = None, label: Label | None = None, guidance: float = 1.0,
        known: Known | None = None, watch: Watch | None = None,
    ) -> Iterator[Samples]:  # fmt: skip
        """n samples in model coordinates, block by block, with their NFE; `known` as the method of that name reads it."""
        if n < 1:
            raise ScoreSDEError(f"n={n}: expected at least one sample")
        parts = self.parts
        return (sampler or parts.sampler).blocks(
            self.given(label, guidance), parts.sde, self.shape, n, seed, device=parts.device, dtype=parts.dtype, known=known,
            watch=watch,
        )  # fmt: skip

    def sample(
        self, n: int, seed: int = 0, sampler: Sampler | None = None, label: Label | None = None, guidance: float = 1.0
    ) -> np.ndarray:
        """n samples (n, *D) in the user's units.

        Args:
            sampler: another than the run's own; its `known` is in the user's units.
            label: the name of a class, for a run whose data has labels.
            guidance: weight of the label (steering.Guided).
        """
        known = self.known(sampler)
        blocks = self.blocks(n, seed, sampler, label, guidance, known)
        x = self.units.to_user(torch.cat([block.x for block in blocks]).cpu()).numpy()
        return x if known is None else known.restore(x, 0)

    def log_density(
        self, x: Any, flow: Flow | None = None, seed: int = 0, label: Label | None = None
    ) -> likelihood.LogDensity:
        """log p(x) in nats, density in the user's units, for x (n, *D) in these units, with what its estimate is off by.

        By the probability-flow ODE (likelihood.Flow; None for the exact trace and 50 Runge-Kutta steps): the density of the model
        at t_min, that is of data with that little noise; given a label, of that class.
        """
        z = self._model_coordinates(x)
        found = likelihood.log_prob(self.given(label), self.parts.sde, z, self.parts.settings.t_min, flow, seed)
        return replace(found, estimates=found.estimates + self.units.log_det())

    def log_prob(self, x: Any) -> np.ndarray:
        """log p(x) in nats, (n,), by `log_density` with the exact trace."""
        return self.log_density(x).value.cpu().numpy()

    def dataset(self) -> Any:
        """The run's data set, built anew (a table is read from its file again)."""
        return build(self.config["data"], "data")


def load_run(path: str | Path, trust: bool = False, device: str | None = None) -> Run:
    """A trained run from its directory: `.score(x, t)`, `.sample(n)`, `.log_prob(x)`, `.config`, `.summary`.

    Args:
        path: the run directory.
        trust: allow classes from outside this package in its config. Leave it off for runs that are not your own.
        device: cpu, cuda, mps; None for the best there is.

    Raises ScoreSDEError where the directory is no run or asks for foreign classes, Unreadable where it is damaged.
    """
    return Run(RunDir.open(path), trust, device)
