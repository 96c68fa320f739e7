"""UniverSeg: a network that is told its task by examples, and learns nothing more.

Butoi, Ortiz, Ma, Sabuncu, Guttag, Dalca 2023, "UniverSeg: Universal medical image segmentation", ICCV. Each block
convolves the target with every member of the support (CrossConv, section 3.2) and averages over them.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from wsitk.models.universeg.blocks import STEPS, WIDTH, CrossConv, Each, Head, walk

__all__ = ["UniverSeg"]


@final
class _CrossBlock(nn.Module):
    """(1, T, H, W) and (S, U, H, W) to (1, out, H, W) and (S, out, H, W)."""

    def __init__(self, target: int, support: int, out: int) -> None:
        super().__init__()
        self.cross = CrossConv(target, support, out)
        self.target = Each(out, out)
        self.support = Each(out, out)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        pairs = self.cross(target, support)
        return self.target(pairs.mean(dim=0, keepdim=True)), self.support(pairs)


@final
class UniverSeg(nn.Module):
    """Maps a target (N, 1, H, W) and its support to ``logits`` (N, 1, H, W); H and W are multiples of 8.

    ``support`` is (N, S, 1, H, W), images in 0..1; ``labels`` is the same, zeros and ones.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enc_blocks = nn.ModuleList(
            _CrossBlock(width if k else 1, width if k else 2, width) for k in range(STEPS + 1)
        )
        self.dec_blocks = nn.ModuleList(_CrossBlock(2 * width, 2 * width, width) for _ in range(STEPS))
        self.out_conv = Head(width)

    def forward(self, target: Tensor, support: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # One target at a time: the support's features depend on it, and fill the memory.
        examples = torch.cat([support, labels.to(support.dtype)], dim=2)
        down, up = list(self.enc_blocks), list(self.dec_blocks)
        each = [
            self.out_conv(walk(down, up, one[None], few)) for one, few in zip(target, examples, strict=True)
        ]
        return {"logits": torch.cat(each)}
