"""A multilayer perceptron whose first layer begins sharper: for fields that turn within a small part of the data's width.

A network learns slow functions first (Rahaman et al., "On the Spectral Bias of Neural Networks", ICML 2019): the larger its first
weights, the sooner it learns such fields. Under jumps the velocity is large all but on the data, and small on it.
"""

import torch
from pydantic import PositiveFloat, PositiveInt

from scoresde_cli.networks import dual
from scoresde_cli.networks.mlp import MLP


class SharpMLP(MLP):
    """The MLP with the first layer's initial weights and biases times `first_gain`. Other arguments as for MLP."""

    def __init__(
        self, shape: tuple[int, ...], width: PositiveInt = 128, depth: PositiveInt = 3,
        activation: dual.Activation = "silu", first_gain: PositiveFloat = 4.0, classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(shape, width, depth, activation, classes)
        with torch.no_grad():
            self.first.weight.mul_(first_gain)
            self.first.bias.mul_(first_gain)
