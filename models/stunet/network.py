"""STU-Net: a U-Net of residual blocks that grows from 14 million to 1.4 billion parameters.

Huang et al. 2023, "STU-Net: Scalable and transferable medical image segmentation models empowered by
large-scale supervised pre-training", arXiv 2304.06716. Names of modules are upstream's, so that its
checkpoints load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["POOLS", "SIZES", "STUNet", "STUNetConfig", "config_of"]

POOLS = (*((2, 2, 2),) * 4, (1, 1, 2))
"""Strides between the six stages in the published plans; the last one halves x alone."""

WIDTHS = (1, 2, 4, 8, 16, 16)
"""Channels of the stages, as multiples of the first stage's."""

SLOPE = 0.01


@dataclass(frozen=True)
class STUNetConfig:
    """A member of the family: `base` channels in the first stage, `depth` blocks in each stage."""

    base: int
    depth: int = 1
    channels: int = 1
    classes: int = 105
    pools: tuple[tuple[int, ...], ...] = POOLS

    @property
    def dims(self) -> tuple[int, ...]:
        """Return the channels of each stage, finest first."""
        return tuple(self.base * w for w in WIDTHS)

    @property
    def divisor(self) -> tuple[int, ...]:
        """Return what a tile's sides must be multiples of."""
        return tuple(prod(along) for along in zip(*self.pools, strict=True))


SIZES: Mapping[str, STUNetConfig] = {
    "small": STUNetConfig(16),
    "base": STUNetConfig(32),
    "large": STUNetConfig(64, 2),
    "huge": STUNetConfig(96, 3),
}
"""The published sizes: 14.6, 58.3, 440.3 and 1457.3 million parameters."""


@final
class ResidualBlock(nn.Module):
    """Two convolutions with instance norm, and a projection beside them where `projected`."""

    def __init__(self, inside: int, out: int, stride: Sequence[int], projected: bool) -> None:
        super().__init__()
        step = (stride[0], stride[1], stride[2])
        self.conv1 = nn.Conv3d(inside, out, 3, stride=step, padding=1)
        self.norm1 = nn.InstanceNorm3d(out, affine=True)
        self.conv2 = nn.Conv3d(out, out, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(out, affine=True)
        self.conv3 = nn.Conv3d(inside, out, 1, stride=step) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE, inplace=True)
        y = self.norm2(self.conv2(y))
        y += x if self.conv3 is None else self.conv3(x)
        return F.leaky_relu(y, SLOPE, inplace=True)


@final
class Upsampling(nn.Module):
    """A point-wise convolution, then each value repeated `factor` times.

    Upstream repeats first; a point-wise convolution doesn't notice, and costs an eighth this way round.
    """

    def __init__(self, inside: int, out: int, factor: Sequence[int]) -> None:
        super().__init__()
        self.factor = [float(f) for f in factor]
        self.conv = nn.Conv3d(inside, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=self.factor, mode="nearest")


def _stage(inside: int, out: int, stride: Sequence[int], depth: int) -> nn.Sequential:
    first = ResidualBlock(inside, out, stride, projected=True)
    return nn.Sequential(first, *(ResidualBlock(out, out, (1, 1, 1), False) for _ in range(depth - 1)))


@final
class STUNet(nn.Module):
    """Maps normalised (N, channels, Z, Y, X) to ``logits`` (N, classes, Z, Y, X); sides: `config.divisor`.

    ``head(features(x))`` is the same in two steps, so that many classes can be computed a few at a time.
    """

    def __init__(self, config: STUNetConfig) -> None:
        super().__init__()
        self.config = config
        dims, depth = config.dims, config.depth
        strides = ((1, 1, 1), *config.pools)
        inside = (config.channels, *dims)
        self.conv_blocks_context = nn.ModuleList(
            _stage(i, d, s, depth) for i, d, s in zip(inside, dims, strides, strict=False)
        )
        finer = range(len(dims) - 2, -1, -1)
        self.upsample_layers = nn.ModuleList(Upsampling(dims[k + 1], dims[k], config.pools[k]) for k in finer)
        self.conv_blocks_localization = nn.ModuleList(
            _stage(2 * dims[k], dims[k], (1, 1, 1), depth) for k in finer
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(dims[k], config.classes, 1) for k in finer)

    @property
    def head(self) -> nn.Conv3d:
        """Return the point-wise convolution from features to logits."""
        head = self.seg_outputs[-1]
        assert isinstance(head, nn.Conv3d)
        return head

    def decoded(self, x: Tensor) -> list[Tensor]:
        """Return the decoder's features at each resolution, coarsest first."""
        skips = []
        for stage in self.conv_blocks_context:
            x = stage(x)
            skips.append(x)
        found = []
        for up, stage, skip in zip(
            self.upsample_layers, self.conv_blocks_localization, reversed(skips[:-1]), strict=True
        ):
            x = stage(torch.cat((up(x), skip), dim=1))
            found.append(x)
        return found

    def features(self, x: Tensor) -> Tensor:
        """Return (N, base, Z, Y, X), to which `head` is applied."""
        return self.decoded(x)[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.features(x))}

    def supervised(self, x: Tensor) -> list[Tensor]:
        """Return the logits of all resolutions, finest first: what deep supervision trains on."""
        heads = zip(self.seg_outputs, self.decoded(x), strict=True)
        return [head(features) for head, features in heads][::-1]


def config_of(state: Mapping[str, Tensor], pools: tuple[tuple[int, ...], ...] = POOLS) -> STUNetConfig | None:
    """Return the member of the family that a checkpoint's tensors belong to, judged by their shapes.

    The strides leave no trace in the weights. None if the tensors are no STU-Net's.
    """
    first, last = (
        state.get("conv_blocks_context.0.0.conv1.weight"),
        state.get(f"seg_outputs.{len(WIDTHS) - 2}.weight"),
    )
    if first is None or last is None or first.ndim != 5 or last.ndim != 5:
        return None
    depth = 1
    while f"conv_blocks_context.0.{depth}.conv1.weight" in state:
        depth += 1
    return STUNetConfig(int(first.shape[0]), depth, int(first.shape[1]), int(last.shape[0]), pools)
