"""What may stand under the nested keys of `train`, as conf/train.yaml describes them: names, types and bounds."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class CheckpointKeys:
    """The keys under `checkpoint`."""

    every: PositiveInt
    keep: PositiveInt


@dataclass(frozen=True)
class EvalKeys:
    """The keys under `eval`."""

    n: Annotated[int, Field(ge=20, le=10_000_000)]
    metrics: list[str] | None
    figures: bool
    nll: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class NLLKeys:
    """The keys under `eval.nll`."""

    rows: Annotated[int, Field(ge=10, le=1_000_000)] = 2000
    steps: PositiveInt = 50


@dataclass(frozen=True)
class DivergenceKeys:
    """The keys under `divergence`."""

    chunk: PositiveInt | Literal["auto"] | None
    tangent_cost: PositiveFloat | Literal["auto"] = "auto"
    exact_cost: PositiveFloat | Literal["auto"] = "auto"
    cost_seconds: Annotated[float, Field(ge=0)] = 0.0
