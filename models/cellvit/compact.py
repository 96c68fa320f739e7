"""The compact CellViT: a TinyViT encoder under a narrow, shared UNETR-like decoder.

The shape follows CellViT (Hörst et al. 2024): a transformer encoder whose intermediate features feed skip
decoders, and one decoder branch per map. Three things differ. The encoder is TinyViT-5M (Wu et al. 2022) as
MobileSAM trained it, the skips are computed once for both branches, and every attention window is 8 tokens
wide.

Images come and maps leave at 0.25 µm/px, because at 0.5 an outline cannot be better than an eighth of a
nucleus' area; but what decides where nuclei are can be seen at 0.5, at a quarter of the cost. So the encoder
sees means of 2 x 2 pixels, the pixels themselves join at the finest skip, and the header computes 4 x 4 pixels
for each of its positions.

Windows of 8 at strides 16 and 32 span 128 and 256 pixels, so shifting the image by 256 pixels shifts the maps
by 256 pixels (apart from the border): an engine that aligns its tiles to that lattice has no seams but those
of the border.

Nothing here looks at a whole tile: no global attention, no position embedding, no per-tile normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Normalisation of RGB in [0, 1]: what the encoder was pretrained with."""

SPACING = 0.25
"""Micrometres per pixel of what it reads and of what it returns."""

LATTICE = 256
"""Height and width must be multiples of this; shifts by it leave the prediction unchanged."""

PADDING: Final = "reflect"
"""What convolutions see beyond a tile. Zeros are an edge that attention carries inwards window by window: with
them the maps 128 pixels inside a tile moved ten times as far as with a mirror image, and objects with them."""

WINDOW = 8
DROPOUT = 0.1
FOLD = 4
"""Side of the squares of pixels that the finest skip reads, and the header writes, at one position."""


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm."""

    def __init__(self, inside: int, outside: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(
            inside, outside, size, stride, size // 2, groups=groups, bias=False, padding_mode=PADDING
        )
        self.bn = nn.BatchNorm2d(outside)


class InvertedBottleneck(nn.Module):
    """MBConv with a fourfold expansion: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(y))


class Merge(nn.Module):
    """Patch merging: (N, C, H, W) -> (N, C', H / stride, W / stride)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, outside)
        self.conv2 = ConvNorm(outside, outside, 3, stride, groups=outside)
        self.conv3 = ConvNorm(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Self-attention in windows of 8 x 8 tokens with a learned bias per (head, |dy|, |dx|)."""

    index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, WINDOW * WINDOW))
        y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y).abs() * WINDOW + (x[:, None] - x).abs()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, 64, C) -> the same shape."""
        n, tokens, width = x.shape
        # Upstream keeps query, key and value of one head together, so heads come before the split.
        qkv = self.qkv(self.norm(x)).view(n, tokens, self.heads, -1).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        bias = self.attention_biases[:, self.index].to(query.dtype)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Token-wise perceptron with a fourfold hidden layer, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))  # type: ignore[no-any-return]


class WindowBlock(nn.Module):
    """Window attention, a depthwise convolution across the windows, a perceptron: (N, C, H, W), same out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads)
        self.mlp = Mlp(width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        grid = (n, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c)
        tokens: Tensor = x.permute(0, 2, 3, 1)
        windows = tokens.reshape(n, grid[1], WINDOW, grid[2], WINDOW, c).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, WINDOW * WINDOW, c)).view(grid).transpose(2, 3)
        tokens = tokens + attended.reshape(n, h, w, c)
        x = self.local_conv(tokens.permute(0, 3, 1, 2))
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.mlp(tokens)
        return tokens.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks at one resolution; the merge that follows belongs to it, as in the published checkpoints."""

    def __init__(self, width: int, depth: int, heads: int | None, merge: tuple[int, int] | None) -> None:
        super().__init__()
        blocks = [WindowBlock(width, heads) if heads else InvertedBottleneck(width) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if merge is None else Merge(width, *merge)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on to the next stage, and this stage's features."""
        feature = self.blocks(x)
        return self.downsample(feature), feature


class TinyViTEncoder(nn.Module):
    """TinyViT-5M with MobileSAM's strides, on means of 2 x 2 pixels.

    (N, 3, H, W) -> features of 32, 64, 128, 160 and 320 channels at strides 4, 8, 16, 32 and 32.
    """

    widths = (32, 64, 128, 160, 320)

    def __init__(self) -> None:
        super().__init__()
        self.stem1 = ConvNorm(3, 32, 3, 2)
        self.stem2 = ConvNorm(32, 64, 3, 2)
        self.layers = nn.ModuleList(
            [
                Stage(64, 2, None, (128, 2)),
                Stage(128, 2, 4, (160, 2)),
                Stage(160, 6, 5, (320, 1)),
                Stage(320, 2, 10, None),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        half = F.gelu(self.stem1(F.avg_pool2d(x, 2)))
        x, features = self.stem2(half), [half]
        for stage in self.layers:
            x, feature = stage(x)
            features.append(feature)
        return features


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU, dropout of whole channels: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, inside: int, outside: int, size: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, size, padding=size // 2, bias=False, padding_mode=PADDING),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Dropout2d(DROPOUT),
        )

    def convolved(self, x: Tensor) -> Tensor:
        """Return what the dropout layer gets."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x

    def dropped(self, x: Tensor) -> Tensor:
        """Return what the dropout layer lets through."""
        y: Tensor = self[-1](x)
        return y


class Branch(nn.Module):
    """One output map: thrice double the resolution, append the skip, convolve; then a sub-pixel header.

    The header computes the 16 pixels of every position at 1 µm at once, which costs a twelfth of what a decoder
    at full resolution costs and sees the same image detail (see `decoder0`).
    """

    def __init__(self, deep: int, skips: tuple[int, ...], widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        inputs = (deep, *widths[:-1])
        self.up = nn.ModuleList([nn.ConvTranspose2d(i, o, 2, 2) for i, o in zip(inputs, widths, strict=True)])
        self.fuse = nn.ModuleList([ConvBlock(o + s, o) for o, s in zip(widths, skips, strict=True)])
        self.header = nn.Conv2d(widths[-1], FOLD * FOLD * classes, 3, padding=1, padding_mode=PADDING)

    def forward(self, deep: Tensor, skips: list[Tensor]) -> Tensor:
        x = deep
        for up, fuse, skip in zip(self.up, self.fuse, skips, strict=True):
            x = fuse(torch.cat([skip, up(x)], dim=1))
        return F.pixel_shuffle(self.header(x), FOLD)


class CompactCellViT(nn.Module):
    """Nucleus segmentation at 0.25 µm/px.

    Input (N, 3, H, W), RGB in [0, 1] normalised by MEAN and STD, H and W multiples of LATTICE. Output:
    `nuclei_binary_map` (N, 2, H, W), logits of background and nucleus, and `hv_map` (N, 2, H, W), the signed
    horizontal and vertical distance to the nucleus' centre of mass in [-1, 1]. With `types` above 0 there is
    `nuclei_type_map` (N, types + 1, H, W) too, logits of background and of each type.
    """

    def __init__(self, types: int = 0) -> None:
        super().__init__()
        deep, skips, widths = 128, (64, 48, 32), (96, 64, 40)
        stem, quarter, eighth, *coarse = TinyViTEncoder.widths
        self.encoder = TinyViTEncoder()
        self.decoder3 = ConvBlock(sum(coarse), deep, 1)
        self.decoder2 = ConvBlock(eighth, skips[0], 1)
        self.decoder1 = ConvBlock(quarter, skips[1], 1)
        # The image itself, folded to 1 µm without loss (3 x 4 x 4 channels), beside the stem.
        self.decoder0 = ConvBlock(stem + 3 * FOLD * FOLD, skips[2], 1)
        self.nuclei_binary_map_decoder = Branch(deep, skips, widths, 2)
        self.hv_map_decoder = Branch(deep, skips, widths, 2)
        # Names need less detail than outlines: the branch is narrower, a third of the others' cost.
        self.nuclei_type_map_decoder = Branch(deep, skips, (64, 40, 24), types + 1) if types else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.suffix(self.prefix(x))

    def prefix(self, x: Tensor) -> dict[str, Tensor]:
        """Return what has no dropout: the skips, finest first, and the deepest features."""
        half, quarter, eighth, middle, last = self.encoder(x)
        pixels = F.pixel_unshuffle(x, FOLD).to(half.dtype)
        return {
            "finest": self.decoder0.convolved(torch.cat([half, pixels], dim=1)),
            "quarter": self.decoder1.convolved(quarter),
            "eighth": self.decoder2.convolved(eighth),
            "deep": self.decoder3.convolved(torch.cat([middle, last], dim=1)),
        }

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the maps, from what `prefix` returned."""
        deep = self.decoder3.dropped(features["deep"])
        skips = [
            self.decoder2.dropped(features["eighth"]),
            self.decoder1.dropped(features["quarter"]),
            self.decoder0.dropped(features["finest"]),
        ]
        maps = {
            "nuclei_binary_map": self.nuclei_binary_map_decoder(deep, skips),
            "hv_map": self.hv_map_decoder(deep, skips),
        }
        if self.nuclei_type_map_decoder is not None:
            maps["nuclei_type_map"] = self.nuclei_type_map_decoder(deep, skips)
        return maps


def compact_cellvit(types: int = 0) -> CompactCellViT:
    """The network with fresh weights; `types` is the number of nucleus types, 0 for none."""
    return CompactCellViT(types)


def encoder_state(mobile_sam: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a MobileSAM checkpoint that `TinyViTEncoder` wants, with the windows resized to 8."""
    prefix, state = "image_encoder.", {}
    for key, value in mobile_sam.items():
        name = key.removeprefix(prefix)
        if name == key or name.startswith(("neck.", "head.", "norm_head.")):
            continue
        name = name.replace("patch_embed.seq.0.", "stem1.").replace("patch_embed.seq.2.", "stem2.")
        state[name] = resize_bias(value) if name.endswith("attention_biases") else value
    return state


def resize_bias(bias: Tensor) -> Tensor:
    """(heads, w * w) biases by |dy|, |dx| -> (heads, 64): offsets that are missing take the nearest known."""
    size = round(bias.shape[1] ** 0.5)
    keep = torch.arange(WINDOW).clamp(max=size - 1)
    return bias.view(-1, size, size)[:, keep][:, :, keep].flatten(1)
