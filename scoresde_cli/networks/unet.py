"""A U-Net for images, and its dual pass (Ronneberger et al., MICCAI 2015, as in Ho et al., NeurIPS 2020)."""

from collections.abc import Iterable
from typing import Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.networks.embedding import NoiseEmbedding
from scoresde_cli.networks.image_blocks import Block, Conv, Norm, Pair, Up, joined, linear

# channels, multipliers, blocks, patch
SIZES = {"small": (32, [1, 2, 2], 1, 1), "base": (64, [1, 2, 4], 2, 1), "patched": (64, [1, 1], 1, 2)}
CACHED = 8_000_000  # bytes of the finest level that a pass without a gradient holds at a time: what a CPU's cache does


class UNet(nn.Module):
    """(x, c) -> (B, *D): residual blocks at each of several sizes, each half of the one before, and up again with what was seen.

    The last layer starts at zero, so an untrained network returns zero. Images are padded with zeros to a multiple of the
    coarsest pixel, and cropped again.

    Args:
        shape: D = (C, H, W); (H, W) is an image of one channel, (d,) one of a single row.
        size: small, base or patched, for what is null below.
        channels: of the finest level.
        multipliers: channels of each level, as a multiple of that.
        blocks: residual blocks of a level, on the way down and on the way up.
        attention: the heights (after padding) at which blocks are followed by attention; null for the coarsest.
        patch: patch x patch pixels are the channels of one of the finest level (Luhman and Luhman, arXiv 2207.04316, 2022).
        classes: as for MLP.

    Raises ScoreSDEError for a shape of more axes, an empty list of levels, or a height that no level has.
    """

    partial = spatial = True

    def __init__(
        self, shape: tuple[int, ...], size: Literal["small", "base", "patched"] = "small",
        channels: PositiveInt | None = None, multipliers: list[PositiveInt] | None = None, blocks: PositiveInt | None = None,
        attention: list[PositiveInt] | None = None, patch: PositiveInt | None = None, classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(shape) > 3:
            raise ScoreSDEError(
                f"network=unet: the data has the shape {tuple(shape)}, expected images (channels, height, width)"
            )
        default = SIZES[size]
        width, ratios = channels or default[0], default[1] if multipliers is None else list(multipliers)
        if not ratios:
            raise ScoreSDEError("network.multipliers=[]: expected one number a level, as in [1,2,2]")
        self.image = (*(1,) * (3 - len(shape)), *shape)
        self.classes, self.patch = classes, patch or default[3]
        self.coarsest = self.patch * 2 ** (len(ratios) - 1)
        self.padded = tuple(-(-side // self.coarsest) * self.coarsest for side in self.image[1:])
        heights = [self.padded[0] // self.patch >> i for i in range(len(ratios))]
        chosen = heights[-1:] if attention is None else attention
        missing = set(chosen) - set(heights)
        if missing:
            raise ScoreSDEError(
                f"network.attention={list(chosen)}: no level has the height {min(missing)}; expected some of {heights}"
            )
        self.embedding = NoiseEmbedding(classes=classes)
        features = 4 * width
        self.features = nn.Sequential(
            nn.Linear(self.embedding.features, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU()
        )

        def level(sizes: list[tuple[int, int]], height: int) -> nn.ModuleList:
            return nn.ModuleList(Block(a, b, features, height in chosen) for a, b in sizes)

        count = blocks or default[2]
        widths = [width * ratio for ratio in ratios]
        self.stem = Conv(self.image[0] * self.patch**2, width)
        self.down, self.shrink, self.up, self.grow = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        now = width
        for i, wide in enumerate(widths):
            self.down.append(level([(now if j == 0 else wide, wide) for j in range(count)], heights[i]))
            if i + 1 < len(widths):
                self.shrink.append(Conv(wide, wide, stride=2))
            now = wide
        self.middle = level([(now, now)], heights[-1])
        for i, wide in reversed(list(enumerate(widths))):
            self.up.append(level([((now if j == 0 else wide) + wide, wide) for j in range(count)], heights[i]))
            if i > 0:
                self.grow.append(Up(wide, widths[i - 1]))
            now = widths[max(0, i - 1)]
        self.norm, self.last = Norm(now), Conv(now, self.image[0] * self.patch**2, zero=True)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self._pass(x, c, None)[0]
        pixels = self.image[1] * self.image[2] // self.patch**2
        rows = max(1, CACHED // (self.stem.out_channels * max(1, pixels) * x.element_size()))
        parts = zip(x.split(rows), c.split(rows), strict=True)
        return torch.cat([self._pass(*part, None)[0] for part in parts])

    def forward_dual(self, x: Tensor, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out (B, *D), J v (K, m, *D)) for directions v (K, m, *D) of the first m <= B samples."""
        out, jvp = self._pass(x, c, v)
        assert jvp is not None
        return out, jvp

    def _pass(self, x: Tensor, c: Tensor, v: Tensor | None) -> Pair:
        embedding = self.features(self.embedding(c))
        height, width = self.image[1:]
        edges = (0, -width % self.coarsest, 0, -height % self.coarsest)

        shaped = x.reshape(-1, *self.image), None if v is None else v.reshape(*v.shape[:2], *self.image)
        pair = self.stem(*linear(lambda u: F.pixel_unshuffle(F.pad(u, edges), self.patch), *shaped))
        seen = []
        for i, level in enumerate(self.down):
            for block in blocks(level):
                pair = block(*pair, embedding)
                seen.append(pair)
            if i < len(self.shrink):
                pair = self.shrink[i](*pair)
        for block in blocks(self.middle):
            pair = block(*pair, embedding)
        for i, level in enumerate(self.up):
            for block in blocks(level):
                pair = block(*joined(pair, seen.pop()), embedding)
            if i < len(self.grow):
                pair = self.grow[i](*pair)
        pair = self.last(*self.norm(*pair))
        out, jvp = linear(lambda u: F.pixel_shuffle(u, self.patch)[..., :height, :width], *pair)
        return out.reshape(x.shape), None if v is None or jvp is None else jvp.reshape(v.shape)


def blocks(level: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a level."""
    return cast(nn.ModuleList, level)
