"""Tyche-TS: UniverSeg's scheme for several answers at once, which differ where the examples leave it open.

Rakic, Wong, Ortiz, Cimini, Guttag, Dalca 2024, "Tyche: Stochastic in-context learning for medical image
segmentation", CVPR. K candidates begin with noise of their own and see each other's mean in every block
(SetBlock, section 3.2).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.models.universeg.blocks import SLOPE, STEPS, WIDTH, CrossConv, Each, Head, walk

__all__ = ["Tyche"]


@final
class _SetBlock(nn.Module):
    """(K, T, H, W) and (S, U, H, W) to (K, out, H, W) and (S, out, H, W)."""

    def __init__(self, target: int, support: int, out: int) -> None:
        super().__init__()
        self.cross = CrossConv(target, support, out)
        self.meanconv = Each(target + out, out)
        self.target = Each(out, out)
        self.support = Each(out, out)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        pairs = F.leaky_relu(self.cross(target.mean(dim=0, keepdim=True), support), SLOPE, inplace=True)
        common = pairs.mean(dim=0, keepdim=True).expand(len(target), -1, -1, -1)
        return self.target(self.meanconv(torch.cat([target, common], dim=1))), self.support(pairs)


@final
class Tyche(nn.Module):
    """Maps a target, noise and support to ``logits`` (N, K, H, W), one for each of K candidates.

    ``target`` is (N, 1, H, W), ``noise`` (N, K, H, W) with mean 0 and variance 1, ``support`` (N, S, 1, H, W) in
    0..1 and ``labels`` the same, zeros and ones; H and W are multiples of 8.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enc_blocks = nn.ModuleList(
            _SetBlock(width if k else 2, width if k else 2, width) for k in range(STEPS + 1)
        )
        self.dec_blocks = nn.ModuleList(_SetBlock(2 * width, 2 * width, width) for _ in range(STEPS))
        self.out_conv = Head(width)

    def forward(self, target: Tensor, noise: Tensor, support: Tensor, labels: Tensor) -> dict[str, Tensor]:
        examples = torch.cat([support, labels.to(support.dtype)], dim=2)
        candidates = torch.stack([target.expand_as(noise), noise], dim=2)
        down, up = list(self.enc_blocks), list(self.dec_blocks)
        each = [
            self.out_conv(walk(down, up, some, few)) for some, few in zip(candidates, examples, strict=True)
        ]
        return {"logits": torch.stack([logits[:, 0] for logits in each])}
