"""A U-Net with dropout of whole feature maps after each double convolution, for any number of channels.

The specification is ours: of the paper (Soleimany et al. 2019, arXiv:1912.00262) only the abstract is public, and
no code. Shape: Ronneberger et al. 2015, arXiv:1505.04597. Dropout of maps: Tompson et al. 2015, arXiv:1411.4280.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["HEADS", "NORMALISE", "RADIUS", "LiverStageUNet", "UNetConfig"]

HEADS = ("foreground", "core")
"""Logits of the head: inside an object, and in its core. Cores of objects that touch don't."""

RADIUS = 51
"""Pixels that a pixel's answer may depend on to each side, at 4 levels."""

NORMALISE = IntensityRule("background")
"""Each channel by the background of the whole field, so that no tile has its own brightness, and 8 and 16 bits,
exposures and gains come to the same."""

Kind = Literal["spatial", "element", "none"]


@dataclass(frozen=True)
class UNetConfig:
    """What the network is.

    Attributes
    ----------
    channels
        Of the input.
    base, levels
        Maps at full resolution, twice as many at each of the ``levels - 1`` coarser ones.
    dropout
        Probability after each double convolution, finest level first; on the way down and on the way up.
    kind
        ``spatial`` drops whole maps; ``element`` drops values (for comparison), ``none`` nothing.
    """

    channels: int = 2
    base: int = 12
    levels: int = 4
    dropout: tuple[float, ...] = (0.1, 0.2, 0.2, 0.2)
    kind: Kind = "spatial"

    def __post_init__(self) -> None:
        if not (self.channels > 0 and 0 < self.base <= 64 and 1 < self.levels <= 6):
            raise ValueError(
                f"channels {self.channels}, base {self.base}, levels {self.levels}; wanted 1 or more, 1 to 64, 2 to 6"
            )
        if len(self.dropout) != self.levels or not all(0 <= p < 1 for p in self.dropout):
            raise ValueError(f"dropout {self.dropout}, wanted {self.levels} numbers from 0 to below 1")
        if self.kind not in ("spatial", "element", "none"):
            raise ValueError(f"kind {self.kind!r}, wanted spatial, element or none")

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the maps at each level, finest first."""
        return tuple(self.base * 2**k for k in range(self.levels))


@final
class DoubleConv(nn.Sequential):
    """Twice: convolution, norm, ReLU.

    The norm is BatchNorm: in evaluation mode it is a fixed line for each map, so that a pixel's answer depends on
    its neighbourhood alone. GroupNorm would take its moments over the tile, and every tile would have its own.
    """

    def __init__(self, inside: int, outside: int) -> None:
        layers: list[nn.Module] = []
        for width in (inside, outside):
            layers += [
                nn.Conv2d(width, outside, 3, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


@final
class LiverStageUNet(nn.Module):
    """The network; `head(decode(encode(x)))` in two parts, so that what comes before chance is computed once.

    Reads (N, channels, H, W) in units of each channel's background (`NORMALISE`), both sides
    multiples of ``2 ** (levels - 1)``; returns ``logits`` (N, 2, H, W), see `HEADS`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.down = nn.ModuleList(
            DoubleConv(a, b) for a, b in zip((config.channels, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[:-1])
        self.join = nn.ModuleList(DoubleConv(2 * w, w) for w in widths[:-1])
        self.drop_down = nn.ModuleList(_dropout(config.kind, p) for p in config.dropout)
        self.drop_up = nn.ModuleList(_dropout(config.kind, p) for p in config.dropout[:-1])
        self.head = nn.Conv2d(widths[0], len(HEADS), 1)

    def prefix(self, x: Tensor) -> Tensor:
        """Return the first double convolution's maps: all that comes before the first dropout."""
        # Parasites are brighter than their surroundings by factors of 3 to 100: differences of logarithms, which
        # turn linear near zero, where there is noise.
        found: Tensor = self.down[0](torch.asinh(x))
        return found

    def suffix(self, first: Tensor) -> Tensor:
        """Return the logits, from what `prefix` returned."""
        kept = [self.drop_down[0](first)]
        for level in range(1, self.config.levels):
            coarse = nn.functional.max_pool2d(kept[-1], 2)
            kept.append(self.drop_down[level](self.down[level](coarse)))
        x = kept.pop()
        for level in reversed(range(self.config.levels - 1)):
            joined = torch.cat([self.up[level](x), kept.pop()], 1)
            x = self.drop_up[level](self.join[level](joined))
        logits: Tensor = self.head(x)
        return logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.suffix(self.prefix(x))}


def _dropout(kind: Kind, p: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.Dropout2d(p) if kind == "spatial" else nn.Dropout(p)
