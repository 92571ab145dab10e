"""Features of the noise level, and of a label, for a network's input."""

from typing import Any

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """c -> [c, sin(f_k c), cos(f_k c)] with fixed frequencies f_k = 2^(k/2)/2 (cf. Tancik et al., NeurIPS 2020).

    With classes, the input is (c, label) and a one-hot code of the label follows, all zeros for a label of -1 (none). The code is
    sqrt(classes), of mean square 1 a feature (as in the networks of Karras et al., NeurIPS 2022): a 1 is hardly heard.

    Args:
        frequencies: how many f_k; the output has 1 + 2 * frequencies + classes features.
        classes: how many labels there are.
    """

    f: Tensor
    label_scale: Tensor

    def __init__(self, frequencies: int = 8, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("f", 0.5 * 2.0 ** (0.5 * torch.arange(frequencies)), persistent=False)
        if classes:
            self.register_buffer("label_scale", torch.tensor(classes**0.5))
        self.features = 1 + 2 * frequencies + classes

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if self.classes:  # the code was 1 before the scale stood beside the weights
            state_dict.setdefault(f"{prefix}label_scale", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, c: Tensor) -> Tensor:
        """(B,), with classes (B, 2), -> (B, features)."""
        level, label = (c[:, :1], c[:, 1:]) if self.classes else (c.unsqueeze(-1), None)
        phase = level * self.f
        parts = [level, torch.sin(phase), torch.cos(phase)]
        if label is not None:
            known = torch.arange(self.classes, device=c.device)
            parts.append((label == known).to(c.dtype) * self.label_scale)
        return torch.cat(parts, dim=-1)
