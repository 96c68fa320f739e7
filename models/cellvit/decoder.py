"""The decoder: skip decoders, shared by three branches, each of which ends in a map.

Module and parameter names are upstream's, so that published weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.models.cellvit.config import CellViTConfig

__all__ = ["Conv2DBlock", "Deconv2DBlock", "Branch", "resize", "skip_decoders"]


class Conv2DBlock(nn.Module):
    """Convolution, batch norm, ReLU, dropout: (N, i, H, W) -> (N, o, H, W)."""

    def __init__(self, inside: int, outside: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


class Deconv2DBlock(nn.Module):
    """Transposed convolution, convolution, batch norm, ReLU, dropout: (N, i, H, W) -> (N, o, 2H, 2W)."""

    def __init__(self, inside: int, outside: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            double(inside, outside),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def double(inside: int, outside: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(inside, outside, 2, 2)


def skip_decoders(config: CellViTConfig) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential, nn.Sequential]:
    """Return what brings image, z1, z2 and z3 to the scales 1, 1/2, 1/4 and 1/8 (patch 16)."""
    embed, (deep, shallow), rate = config.embed_dim, config.skip_widths, config.dropout
    return (
        nn.Sequential(Conv2DBlock(config.input_channels, 32, rate), Conv2DBlock(32, 64, rate)),
        nn.Sequential(
            Deconv2DBlock(embed, deep, rate),
            Deconv2DBlock(deep, shallow, rate),
            Deconv2DBlock(shallow, 128, rate),
        ),
        nn.Sequential(Deconv2DBlock(embed, deep, rate), Deconv2DBlock(deep, 256, rate)),
        nn.Sequential(Deconv2DBlock(embed, config.bottleneck, rate)),
    )


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` at the height and width of `like`; itself if it has them (always so for patches of 16)."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Branch(nn.Module):
    """One map from the deepest tokens and the decoded skips: -> (N, classes, H, W)."""

    def __init__(self, config: CellViTConfig, classes: int) -> None:
        super().__init__()
        neck, rate = config.bottleneck, config.dropout
        self.bottleneck_upsampler = double(config.embed_dim, neck)
        self.decoder3_upsampler = nn.Sequential(
            Conv2DBlock(2 * neck, neck, rate),
            Conv2DBlock(neck, neck, rate),
            Conv2DBlock(neck, neck, rate),
            double(neck, 256),
        )
        self.decoder2_upsampler = nn.Sequential(
            Conv2DBlock(512, 256, rate), Conv2DBlock(256, 256, rate), double(256, 128)
        )
        self.decoder1_upsampler = nn.Sequential(
            Conv2DBlock(256, 128, rate), Conv2DBlock(128, 128, rate), double(128, 64)
        )
        self.decoder0_header = nn.Sequential(
            Conv2DBlock(128, 64, rate), Conv2DBlock(64, 64, rate), nn.Conv2d(64, classes, 1)
        )

    def forward(self, deepest: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Join `skips` (full resolution first: of the image, z1, z2, z3), deepest first."""
        image, first, second, third = skips
        x = self.bottleneck_upsampler(deepest)
        x = self.decoder3_upsampler(torch.cat([third, x], dim=1))
        x = self.decoder2_upsampler(torch.cat([second, x], dim=1))
        x = self.decoder1_upsampler(torch.cat([first, x], dim=1))
        x = resize(x, image)
        y: Tensor = self.decoder0_header(torch.cat([image, x], dim=1))
        return y
