"""Features of the noise level for a network's input."""

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """c -> [c, sin(f_k c), cos(f_k c)] with fixed frequencies f_k = 2^(k/2)/2 (cf. Tancik et al., NeurIPS 2020).

    Args:
        frequencies: how many f_k; the output has 1 + 2 * frequencies features.
    """

    f: Tensor

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("f", 0.5 * 2.0 ** (0.5 * torch.arange(frequencies)), persistent=False)
        self.features = 1 + 2 * frequencies

    def forward(self, c: Tensor) -> Tensor:
        """(B,) -> (B, features)."""
        phase = c.unsqueeze(-1) * self.f
        return torch.cat([c.unsqueeze(-1), torch.sin(phase), torch.cos(phase)], dim=-1)
