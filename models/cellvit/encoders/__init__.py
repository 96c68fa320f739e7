"""The encoders: tokens of four depths, and what the tissue head reads.

Every encoder's ``forward(x: (N, 3, H, W))`` returns ``([z1, z2, z3, z4], tissue)``, where each z is
(N, C, h, w). `tissue` are logits (N, classes) for ``dino`` and ``timm``, whose head is part of the encoder,
and the mean of the neck's map (N, 256) for ``sam``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from wsitk.models.cellvit.config import CellViTConfig

__all__ = ["build_encoder"]


def build_encoder(config: CellViTConfig) -> nn.Module:
    """Return the encoder that `config` describes, with fresh weights."""
    # Each library costs seconds to import, so it is imported by the network that needs it.
    if config.family == "sam":
        from wsitk.models.cellvit.encoders.sam import SamEncoder

        return SamEncoder(config)
    if config.family == "timm":
        from wsitk.models.cellvit.encoders.foundation import FoundationEncoder

        return FoundationEncoder(config)
    from wsitk.models.cellvit.encoders.vit import PlainEncoder

    return PlainEncoder(config)
