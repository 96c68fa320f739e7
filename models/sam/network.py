"""Segment Anything in three sizes of encoder: SAM, SAM-Med2D with its adapters, MobileSAM.

Kirillov et al. 2023, "Segment Anything", ICCV; Cheng et al. 2023, "SAM-Med2D", arXiv 2308.16184; Zhang et al. 2023,
"Faster Segment Anything", arXiv 2306.14289. Built on the `segment_anything` package; names of modules are
upstream's, so that checkpoints load unchanged. Importing this module imports the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn

from wsitk.models.sam.tinyvit import MobileEncoder
from wsitk.torchvision_guard import ensure_torchvision

ensure_torchvision()
from segment_anything.modeling import (  # noqa: E402  (needs the guard)
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling import image_encoder as upstream  # noqa: E402

__all__ = ["Family", "Sam", "SamConfig", "best", "config_of", "decode"]

Family = Literal["sam", "sam-med2d", "mobile-sam"]

PATCH = 16
WIDTH = 256
"""Channels of an image's embedding."""

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Normalisation of RGB in 0..255."""

_DEPTHS = {768: (12, 12, (2, 5, 8, 11)), 1024: (24, 16, (5, 11, 17, 23)), 1280: (32, 16, (7, 15, 23, 31))}


@dataclass(frozen=True)
class SamConfig:
    """A family, the side of its images in pixels, and the width of its transformer."""

    family: Family
    size: int
    width: int = 0

    @property
    def name(self) -> str:
        """Return what the model is called: ``sam-b``, ``sam-med2d``, …"""
        letters = {768: "b", 1024: "l", 1280: "h"}
        return f"sam-{letters[self.width]}" if self.family == "sam" else self.family


@final
class Adapter(nn.Module):
    """SAM-Med2D's adapter: channels weighed by their means, then a bottleneck in space; (N, H, W, C), same out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, width // 4, bias=False),
            nn.ReLU(),
            nn.Linear(width // 4, width, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weighed = x * self.channel(x.mean(dim=(1, 2)))[:, None, None]
        inner = self.spatial(weighed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.norm(x + inner)
        return y


class AdaptedBlock(upstream.Block):  # type: ignore[misc]  # the package has no types
    """SAM's transformer block with an adapter beside its perceptron."""

    def __init__(self, width: int, heads: int, window: int, side: int) -> None:
        super().__init__(
            width,
            heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            input_size=(side, side),
        )
        self.Adapter = Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        y = self.norm1(x)
        if self.window_size:
            y, padded = upstream.window_partition(y, self.window_size)
        y = self.attn(y)
        if self.window_size:
            y = upstream.window_unpartition(y, self.window_size, padded, (h, w))
        x = x + y
        y = self.norm2(x)
        out: Tensor = x + self.mlp(y) + self.Adapter(y)
        return out


def _encoder(config: SamConfig) -> nn.Module:
    if config.family == "mobile-sam":
        return MobileEncoder(WIDTH)
    depth, heads, whole = _DEPTHS[config.width]
    encoder: nn.Module = upstream.ImageEncoderViT(
        img_size=config.size,
        patch_size=PATCH,
        embed_dim=config.width,
        depth=depth,
        num_heads=heads,
        out_chans=WIDTH,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=whole,
    )
    if config.family == "sam-med2d":
        side = config.size // PATCH
        windows = [0 if k in whole else 14 for k in range(depth)]
        encoder.blocks = nn.ModuleList(AdaptedBlock(config.width, heads, w, side) for w in windows)
    return encoder


@final
class Sam(nn.Module):
    """Maps normalised images (N, 3, S, S) to ``embedding`` (N, 256, S / 16, S / 16); `decode` makes masks of one."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        side = config.size // PATCH
        self.image_encoder = _encoder(config)
        self.prompt_encoder = PromptEncoder(WIDTH, (side, side), (config.size, config.size), mask_in_chans=16)
        self.mask_decoder = MaskDecoder(
            transformer_dim=WIDTH,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.image_encoder(image)}


def decode(
    network: Sam,
    embedding: Tensor,
    points: tuple[Tensor, Tensor] | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    *,
    several: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return low-resolution logits (P, M, S / 4, S / 4) and predicted IoU (P, M) for P prompts on one image.

    `embedding` is (1, 256, s, s); `points` are coordinates (P, K, 2) as (x, y) pixels and labels (P, K), 1 for
    inside, 0 for outside, -1 for none; `boxes` (P, 4) as (x, y, x, y); `masks` (P, 1, S / 4, S / 4). M is 3 where
    `several`, else 1.
    """
    count = next((len(v) for v in (boxes, masks) if v is not None), 1) if points is None else len(points[0])
    sparse, dense = network.prompt_encoder(points, boxes, masks)
    logits, iou = network.mask_decoder(
        image_embeddings=embedding,
        image_pe=network.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse.expand(count, -1, -1),
        dense_prompt_embeddings=dense.expand(count, -1, -1, -1),
        multimask_output=several,
    )
    return logits, iou


def best(logits: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """Return each prompt's mask of the highest predicted IoU: (P, 1, h, w) and (P,).

    Upstream's SAM-Med2D indexes the masks of all prompts by all choices, which is right for one prompt alone.
    """
    choice = iou.argmax(dim=1)
    row = torch.arange(len(iou), device=iou.device)
    return logits[row, choice][:, None], iou[row, choice]


def config_of(state: Mapping[str, Tensor]) -> SamConfig | None:
    """Return the family that a checkpoint's tensors belong to, judged by names and shapes; None if to none."""
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return SamConfig("mobile-sam", 1024)
    place = state.get("image_encoder.pos_embed")
    if place is None or place.ndim != 4 or place.shape[3] not in _DEPTHS:
        return None
    adapted = any(".Adapter." in name for name in state)
    return SamConfig("sam-med2d" if adapted else "sam", int(place.shape[1]) * PATCH, int(place.shape[3]))
