"""What UniverSeg and Tyche are built of: convolutions over each image of a set, and between two sets.

Names of modules are upstream's, so that its checkpoints load unchanged; tensors are (set, channels, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SLOPE", "STEPS", "WIDTH", "CrossConv", "Each", "Head", "walk"]

WIDTH = 64
"""Channels of every layer in the published networks."""

STEPS = 3
"""How often the resolution is halved: sides must be multiples of ``2 ** STEPS``."""

SLOPE = 0.01
"""Of the leaky ReLU."""

Sets = tuple[Tensor, Tensor]


@final
class _Activated(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), SLOPE, inplace=True)


@final
class Each(nn.Module):
    """A convolution with activation, the same for every member of a set."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.vmapped = _Activated(inside, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.vmapped(x)
        return y


@final
class CrossConv(nn.Module):
    """One convolution over each pair of the target and a member of the support: (1, C, …), (S, C', …) -> (S, …).

    A convolution over two images that lie behind each other is the sum of one over each; the target's is
    computed once, not once for every member.
    """

    def __init__(self, target: int, support: int, out: int) -> None:
        super().__init__()
        self.cross_conv = nn.Conv2d(target + support, out, 3, padding=1)

    def forward(self, target: Tensor, support: Tensor) -> Tensor:
        weight, count = self.cross_conv.weight, target.shape[1]
        of_support = F.conv2d(support, weight[:, count:], self.cross_conv.bias, padding=1)
        return of_support.add_(F.conv2d(target, weight[:, :count], padding=1))


@final
class Head(nn.Module):
    """The point-wise convolution from features to the logit."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def walk(
    down: Sequence[Callable[[Tensor, Tensor], Sets]],
    up: Sequence[Callable[[Tensor, Tensor], Sets]],
    target: Tensor,
    support: Tensor,
) -> Tensor:
    """Return the target's features after a U of blocks, each of which takes and gives target and support."""
    skips: list[Sets] = []
    for block in down[:-1]:
        target, support = block(target, support)
        skips.append((target, support))
        target, support = F.max_pool2d(target, 2), F.max_pool2d(support, 2)
    target, support = down[-1](target, support)
    for block, (fine_target, fine_support) in zip(up, reversed(skips), strict=True):
        target = torch.cat([_doubled(target), fine_target], dim=1)
        support = torch.cat([_doubled(support), fine_support], dim=1)
        target, support = block(target, support)
    return target


def _doubled(x: Tensor) -> Tensor:
    """Return `x` at twice its size, corner pixels on corner pixels."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
