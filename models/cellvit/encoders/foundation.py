"""UNI (Chen 2024), Virchow (Vorontsov 2024) and Virchow2 (Zimmermann 2024) as encoders, built on timm.

Importing this module imports timm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from wsitk.models.cellvit.config import CellViTConfig
from wsitk.torchvision_guard import ensure_torchvision

ensure_torchvision()
from timm.layers import GluMlp  # noqa: E402  (needs the guard first)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

__all__ = ["FoundationEncoder"]

IMAGE = 224
"""Side of the image that the position embedding covers, in pixels."""


class FoundationEncoder(VisionTransformer):  # type: ignore[misc]  # timm is not type-checked here
    """timm's ViT: (N, 3, H, W) -> ([z1..z4], tissue logits).

    Skips and the class token are the blocks' raw outputs: the final norm is in the checkpoints but unused.
    H and W are multiples of the patch.
    """

    def __init__(self, config: CellViTConfig) -> None:
        # Virchow's own feed-forward gate is SiLU; CellViT's weights were trained behind GELU.
        gated: dict[str, Any] = {"mlp_layer": partial(GluMlp, gate_last=False)} if config.packed_glu else {}
        super().__init__(
            img_size=IMAGE,
            patch_size=config.patch,
            in_chans=config.input_channels,
            num_classes=config.tissue_classes,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            init_values=1e-5,
            reg_tokens=config.register_tokens,
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            act_layer=nn.GELU,
            **gated,
        )
        self.layer_indices = [layer - 1 for layer in config.extract_layers]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        layers = self.forward_intermediates(
            x, indices=self.layer_indices, return_prefix_tokens=True, intermediates_only=True
        )
        return [tokens for tokens, _ in layers], self.head(layers[-1][1][:, 0])
