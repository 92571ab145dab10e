"""The model as the training step sees it, compiled by torch.compile for the one shape that training has.

The doors of divergence.py and the score are compiled whole, forward and backward, so that the small operations around
the matrix products become a few kernels. Weights are shared with the model; evaluation never comes here.
Where noise is correlated, it is the model of white coordinates, which the losses ask for (`whitened`).
"""

import logging
from typing import Any

import torch
from torch import Tensor

from scoresde_cli.fields import FieldModel
from scoresde_cli.networks.model import ScoreModel


class Compiled(FieldModel):
    """The same fields as `model`. A trace in several chunks, or directions, stays as it is: its products are all the work."""

    def __init__(self, model: ScoreModel) -> None:
        torch._dynamo.reset()  # a process that runs many jobs would come to the limit of recompilations
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        model = model.whitened()
        self.model, self.sde, self.provides = model, model.sde, model.provides
        self._score = torch.compile(model.forward, dynamic=False)
        self._projections = torch.compile(model.forward_projections, dynamic=False)
        self._trace = torch.compile(model.forward_trace, dynamic=False)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy in the making has none
            raise AttributeError(name)
        return getattr(self.model, name)

    def _whole(self, directions: int) -> bool:
        return self.model.chunk is None or directions <= self.model.chunk

    def labelled(self, labels: Tensor | None) -> "Compiled":
        self.model.labels = labels  # what is compiled is bound to this model, so the labels go to it
        return self

    def whitened(self) -> "Compiled":
        return self

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self._score(x, t)

    def forward_projections(self, x: Tensor, t: Tensor, v: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        return (self._projections if self._whole(len(v)) else self.model.forward_projections)(x, t, v, exact)

    def forward_trace(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (self._trace if self._whole(x[0].numel()) else self.model.forward_trace)(x, t)
