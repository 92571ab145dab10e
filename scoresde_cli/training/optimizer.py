"""Adam and its schedule: the learning rate is a function of the step and of the part of the budget that is behind it."""

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]


class Adam:
    """Adam (Kingma and Ba, ICLR 2015) with warm-up, decay and clipping; AdamW (Loshchilov and Hutter 2019) with decay > 0.

    Args:
        lr: largest learning rate.
        warmup: steps of linear warm-up.
        schedule: cosine (to zero at the end of the budget) or constant.
        clip: largest norm of the gradient, None for no clipping.
        beta1, beta2: of Adam.
        weight_decay: decoupled.
    """

    def __init__(
        self, lr: PositiveFloat = 5e-3, warmup: NonNegativeInt = 100, schedule: Literal["cosine", "constant"] = "cosine",
        clip: PositiveFloat | None = 1.0, beta1: Beta = 0.9, beta2: Beta = 0.99, weight_decay: NonNegativeFloat = 0.0,
    ) -> None:  # fmt: skip
        self.lr, self.warmup, self.schedule, self.clip = lr, warmup, schedule, clip
        self.betas, self.weight_decay = (beta1, beta2), weight_decay

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay,
            fused=parameters[0].device.type in ("cpu", "cuda"),
        )  # fmt: skip

    def apply(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Clip the gradients, take one step at this learning rate, and drop the gradients. Nothing is read back."""
        (group,) = optimizer.param_groups
        group["lr"] = rate
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], self.clip)
        optimizer.step()
        for p in group["params"]:
            p.grad = None

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step, `progress` in [0, 1] of the budget behind it."""
        decay = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))) if self.schedule == "cosine" else 1.0
        return self.lr * decay * min(1.0, (step + 1) / max(self.warmup, 1))
