"""The network of CXAS: a ResNet-50 that is decoded back to the image, one logit for each structure.

Seibold et al. 2023, "Accurate fine-grained segmentation of human anatomy in radiographs via volumetric
pseudo-labeling", arXiv 2306.03934. Names of modules are upstream's, so that its checkpoints load unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.torchvision_guard import ensure_torchvision

__all__ = ["CXAS", "STRUCTURES"]

STRUCTURES = 159


def _layers(widths: tuple[int, ...]) -> list[nn.Module]:
    """Return 3 x 3 convolutions from width to width, each with batch norm and ReLU."""
    found: list[nn.Module] = []
    for inside, out in pairwise(widths):
        found += [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return found


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


@final
class OneConv(nn.Module):
    """One convolution under the name that upstream gives it."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*_layers((inside, out)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@final
class TwoConvs(nn.Module):
    """Two convolutions with `middle` channels between them."""

    def __init__(self, inside: int, middle: int, out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(*_layers((inside, middle, out)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.double_conv(x)
        return out


@final
class FirstUp(nn.Module):
    """The deepest features, narrowed, enlarged, and joined with the finer ones."""

    def __init__(self, deep: int, fine: int, out: int) -> None:
        super().__init__()
        self.conv1 = OneConv(deep, fine)
        self.conv2 = TwoConvs(2 * fine, fine, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv2(torch.cat([skip, _enlarged(self.conv1(x), skip)], dim=1))
        return out


@final
class Up(nn.Module):
    """Features enlarged and joined with finer ones of as many channels."""

    def __init__(self, fine: int, out: int) -> None:
        super().__init__()
        self.conv = TwoConvs(2 * fine, fine, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([skip, _enlarged(x, skip)], dim=1))
        return out


@final
class Pointwise(nn.Module):
    """From features to logits."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@final
class Backbone(nn.Module):
    """torchvision's ResNet-50 without its classifier: features at strides 4, 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        ensure_torchvision()
        from torchvision.models import resnet50

        net = resnet50(weights=None)
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        named = [("layer0", stem), *((f"layer{k}", stage) for k, stage in enumerate(stages, 1))]
        self.backbone = nn.Sequential(OrderedDict(named))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.backbone:
            x = stage(x)
            found.append(x)
        return found


@final
class Head(nn.Module):
    """Four steps up, and the logits."""

    def __init__(self, structures: int) -> None:
        super().__init__()
        self.up1 = FirstUp(2048, 1024, 512)
        self.up2 = Up(512, 256)
        self.up3 = Up(256, 64)
        self.up4 = Up(64, 128)
        self.out = Pointwise(128, structures)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return features (N, 128, H / 4, W / 4) of the backbone's five maps, finest first."""
        first, second, third, fourth, last = maps
        x = self.up2(self.up1(last, fourth), third)
        out: Tensor = self.up4(self.up3(x, second), first)
        return out


@final
class CXAS(nn.Module):
    """Maps normalised (N, 3, H, W) to ``logits`` (N, 159, H, W) and upstream's features (73.4 M parameters).

    ``feats`` is what the logits are made of, at a quarter of the size; ``feats_1_map`` to ``feats_4_map`` and
    ``feats_last_map`` are the backbone's, ``feats_pooled`` (N, 2048) the mean of the last.
    """

    def __init__(self, structures: int = STRUCTURES) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = Head(structures)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(x)
        feats = self.head(maps)
        names = [*(f"feats_{k}_map" for k in range(1, 5)), "feats_last_map"]
        return {
            **dict(zip(names, maps, strict=True)),
            "feats_pooled": maps[-1].mean(dim=(2, 3)),
            "feats": feats,
            "logits": self.head.out(_enlarged(feats, x)),
        }
