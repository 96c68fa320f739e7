"""Segment Anything's image encoder (Kirillov 2023; ViTDet, Li 2022) with its inner tokens brought out.

Built on the `segment_anything` package; what differs is said below. Importing this module imports it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.models.cellvit.config import CellViTConfig
from wsitk.torchvision_guard import ensure_torchvision

ensure_torchvision()
from segment_anything.modeling import image_encoder as upstream  # noqa: E402  (needs the guard first)

__all__ = ["SamEncoder", "RelativeAttention"]

IMAGE = 1024
"""Side of the image that the position embedding covers, in pixels."""

WINDOW = 14
NECK = 256


class RelativeAttention(upstream.Attention):  # type: ignore[misc]  # the package has no types
    """Attention with decomposed relative positions: (B, H, W, C), same out.

    The same sum as the package's, softmax(q k / sqrt(d) + rel_h + rel_w) v, in two fused forms: on the CPU
    the relative terms enter as an additive mask, which is fastest there; elsewhere they are folded into the
    inner product, so that no matrix of tokens by tokens is ever stored.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, _ = x.shape
        query, key, value = self.qkv(x).reshape(n, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        rel_h, rel_w = self.relative_terms(query, h, w)
        attend = masked_attention if x.device.type == "cpu" else folded_attention
        attended = attend(query, key, value, rel_h, rel_w).transpose(1, 2)
        y: Tensor = self.proj(attended.reshape(n, h, w, -1))
        return y

    def relative_terms(self, query: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Return what each row and each column of keys adds to a query's scores: (B, heads, h * w, h | w)."""
        grid = query.reshape(*query.shape[:2], h, w, -1)
        table_h = upstream.get_rel_pos(h, h, self.rel_pos_h)
        table_w = upstream.get_rel_pos(w, w, self.rel_pos_w)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, table_h)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, table_w)
        return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Return the attended values (B, heads, tokens, d), with the relative terms as an additive mask."""
    mask = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def folded_attention(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Return what `masked_attention` returns, in memory linear in the number of tokens.

    A query is extended by its relative terms, a key by the unit vectors of its row and column: their inner
    product is the whole score.
    """
    h, w = rel_h.shape[-1], rel_w.shape[-1]
    rows = torch.eye(h, dtype=key.dtype, device=key.device).repeat_interleave(w, dim=0)
    columns = torch.eye(w, dtype=key.dtype, device=key.device).repeat(h, 1)
    units = torch.cat([rows, columns], dim=1).expand(*key.shape[:2], -1, -1)
    width = query.shape[-1]
    # Fused kernels want a width that is a multiple of 8; zeros change no inner product.
    fill = -(width + h + w) % 8
    query = torch.cat([query * width**-0.5, rel_h.to(query.dtype), rel_w.to(query.dtype)], dim=-1)
    key = torch.cat([key, units], dim=-1)
    return F.scaled_dot_product_attention(F.pad(query, (0, fill)), F.pad(key, (0, fill)), value, scale=1.0)


class SamEncoder(upstream.ImageEncoderViT):  # type: ignore[misc]  # the package has no types
    """SAM's image encoder: (N, 3, H, W), H and W to 1024 -> ([z1..z4], mean of the neck's map (N, 256)).

    The position embedding is cropped at its top left, not resized: a pixel keeps the embedding it has in the
    full image.
    """

    def __init__(self, config: CellViTConfig) -> None:
        super().__init__(
            img_size=IMAGE,
            patch_size=config.patch,
            in_chans=config.input_channels,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=NECK,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=config.global_blocks,
        )
        self.extract_layers = config.extract_layers
        for index, block in enumerate(self.blocks):
            side = IMAGE // config.patch if index in config.global_blocks else WINDOW
            block.attn = RelativeAttention(
                config.embed_dim, config.num_heads, use_rel_pos=True, input_size=(side, side)
            )

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.patch_embed(x)
        h, w = x.shape[1:3]
        x = x + self.pos_embed[:, :h, :w]
        skips = []
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer in self.extract_layers:
                skips.append(x.permute(0, 3, 1, 2))
        neck: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return skips, neck.mean(dim=(2, 3))
