"""What a CellViT network is made of, as data, and the table of the published variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CellViTConfig", "VARIANTS"]

WIDE = 512
"""Embedding width from which the decoder takes its wide form."""


@dataclass(frozen=True, slots=True)
class CellViTConfig:
    """Architecture of a CellViT network (Hörst et al., Medical Image Analysis 2024, and CellViT++ 2025).

    Attributes
    ----------
    family
        Encoder: ``dino`` (plain ViT, as HIPT's ViT-256), ``sam`` (Segment Anything's image encoder) or
        ``timm`` (UNI, Virchow).
    embed_dim, depth, num_heads, mlp_ratio, patch
        Of the transformer; `patch` in pixels.
    extract_layers
        The four blocks, counted from 1, whose tokens feed the decoder.
    global_blocks
        ``sam`` only: blocks, counted from 0, that attend to the whole tile instead of windows of 14 tokens.
    packed_glu, register_tokens
        ``timm`` only: gated feed-forward layers, and extra tokens beside the class token.
    nuclei_classes, tissue_classes
        Number of channels of the type map (background included) and of tissue classes.
    regression
        Whether the binary branch carries two more channels, given as `regression_map`.
    dropout
        Rate after each convolution of the decoder; without effect in evaluation.

    Raises ValueError for numbers that no such network can have.
    """

    family: Literal["dino", "sam", "timm"]
    embed_dim: int
    depth: int
    num_heads: int
    extract_layers: tuple[int, int, int, int]
    mlp_ratio: float = 4.0
    patch: int = 16
    global_blocks: tuple[int, ...] = ()
    packed_glu: bool = False
    register_tokens: int = 0
    nuclei_classes: int = 6
    tissue_classes: int = 19
    input_channels: int = 3
    regression: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "embed_dim": (self.embed_dim, 4096),
            "depth": (self.depth, 64),
            "num_heads": (self.num_heads, 64),
            "nuclei_classes": (self.nuclei_classes, 1024),
            "tissue_classes": (self.tissue_classes, 1024),
            "input_channels": (self.input_channels, 64),
        }
        # The numbers may come from a file: bounds keep a crafted one from asking for terabytes.
        for name, (value, most) in limits.items():
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value}, wanted 1 to {most}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        layers = self.extract_layers
        ascending = all(a < b for a, b in zip((0, *layers), layers, strict=False))
        if len(layers) != 4 or not ascending or layers[-1] > self.depth:
            raise ValueError(f"extract_layers is {layers}, wanted four ascending blocks of 1 to {self.depth}")

    @property
    def skip_widths(self) -> tuple[int, int]:
        """Return the widths of the skip decoders' inner layers, deep one first."""
        return (512, 256) if self.embed_dim >= WIDE else (256, 128)

    @property
    def bottleneck(self) -> int:
        """Return the width of the deepest decoder layer."""
        return 512 if self.embed_dim >= WIDE else 312

    @property
    def largest_tile(self) -> int | None:
        """Return the largest tile side in pixels, or None where the encoder sets no limit."""
        return 64 * self.patch if self.family == "sam" else None

    @property
    def align(self) -> int:
        """Return the number of pixels of which a tile's sides must be multiples."""
        # Patches of 14 pixels ask for no multiple of their own: the network resizes such tiles itself.
        return 16


def _sam(embed_dim: int, depth: int, num_heads: int) -> CellViTConfig:
    quarter = depth // 4
    layers = (quarter, 2 * quarter, 3 * quarter, depth)
    return CellViTConfig(
        "sam", embed_dim, depth, num_heads, layers, global_blocks=tuple(layer - 1 for layer in layers)
    )


def _virchow(register_tokens: int) -> CellViTConfig:
    return CellViTConfig(
        "timm",
        1280,
        32,
        16,
        (8, 16, 24, 32),
        mlp_ratio=5.3375,
        patch=14,
        packed_glu=True,
        register_tokens=register_tokens,
    )


VARIANTS: dict[str, CellViTConfig] = {
    "CellViT-256": CellViTConfig("dino", 384, 12, 6, (3, 6, 9, 12)),
    "CellViT-SAM-B": _sam(768, 12, 12),
    "CellViT-SAM-L": _sam(1024, 24, 16),
    "CellViT-SAM-H": _sam(1280, 32, 16),
    "CellViT-UNI": CellViTConfig("timm", 1024, 24, 16, (6, 12, 18, 24)),
    "CellViT-Virchow": _virchow(0),
    "CellViT-Virchow2": _virchow(4),
}
"""The published variants with PanNuke's classes (6 nuclei with background, 19 tissues)."""
