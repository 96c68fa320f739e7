"""The plain vision transformer of CellViT-256 and the generic CellViT (Dosovitskiy 2021, Caron 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsitk.models.cellvit.config import CellViTConfig

__all__ = ["PlainEncoder"]

GRID = 14
"""Side of the position embedding's grid: 224 pixels in patches of 16, whatever the tile."""

EPS = 1e-6


class PatchEmbedding(nn.Module):
    """One token for each patch: (N, c, H, W) -> (N, C, H / patch, W / patch)."""

    def __init__(self, channels: int, embed_dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embed_dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


class Attention(nn.Module):
    """Multi-head self-attention: (N, tokens, C), same out."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return y


class Mlp(nn.Module):
    """Token-wise perceptron: (N, tokens, C), same out."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """Pre-norm transformer block: (N, tokens, C), same out."""

    def __init__(self, config: CellViTConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PlainEncoder(nn.Module):
    """ViT with a class token: (N, 3, H, W) -> ([z1..z4], tissue logits). Names as in DINO's checkpoints.

    The skips are the blocks' raw outputs; the final norm serves the tissue head alone.
    """

    def __init__(self, config: CellViTConfig) -> None:
        super().__init__()
        self.extract_layers = config.extract_layers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, config.embed_dim))
        self.patch_embed = PatchEmbedding(config.input_channels, config.embed_dim, config.patch)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.embed_dim, eps=EPS)
        self.head = nn.Linear(config.embed_dim, config.tissue_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def position(self, h: int, w: int) -> Tensor:
        """Return the position embedding of a class token and h x w patches: (1, 1 + h * w, C)."""
        if (h, w) == (GRID, GRID):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).reshape(1, -1, GRID, GRID)
        # DINO interpolates by this factor instead of to a size. The extra 0.1 shifts the samples; weights
        # were trained with that shift, and leaving it out changes the maps by 0.1.
        factor = ((h + 0.1) / GRID, (w + 0.1) / GRID)
        resized = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        patches = self.patch_embed(x)
        h, w = patches.shape[2:]
        token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1) + self.position(h, w)
        skips = []
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x)
            if layer in self.extract_layers:
                skips.append(x[:, 1:].transpose(1, 2).reshape(len(x), -1, h, w))
        return skips, self.head(self.norm(x)[:, 0])
