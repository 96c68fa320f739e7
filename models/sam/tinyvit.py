"""MobileSAM's encoder: TinyViT-5M (Wu et al. 2022) whose last merge keeps the resolution, with SAM's neck.

As published: windows of 7 and 14 tokens, padded with zeros at the right and below.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsitk.torchvision_guard import ensure_torchvision

ensure_torchvision()
from segment_anything.modeling.common import LayerNorm2d  # noqa: E402  (needs the guard)

__all__ = ["MobileEncoder"]


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm."""

    def __init__(self, inside: int, out: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inside, out, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)


class Bottleneck(nn.Module):
    """Three convolutions, the middle one by channel: an inverted bottleneck, or a merge without `residual`."""

    def __init__(self, inside: int, inner: int, out: int, stride: int = 1, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.conv1 = ConvNorm(inside, inner)
        self.conv2 = ConvNorm(inner, inner, 3, stride, groups=inner)
        self.conv3 = ConvNorm(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.residual else y


class WindowAttention(nn.Module):
    """Self-attention in a window, with a learned bias for each (head, |dy|, |dx|): (windows, tokens, C), same out."""

    index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        # computed on the CPU, also while the parameters are on the meta device
        y = torch.arange(window, device="cpu").repeat_interleave(window)
        x = torch.arange(window, device="cpu").repeat(window)
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        # query, key and value of one head lie together
        qkv = self.qkv(self.norm(x)).view(n, tokens, self.heads, -1).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        bias = self.attention_biases[:, self.index].to(query.dtype)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        return out


class Mlp(nn.Module):
    """A perceptron for each token, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return y


class WindowBlock(nn.Module):
    """Attention in windows, a convolution across them, a perceptron: (N, C, H, W), same out."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.mlp = Mlp(width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_conv(x + self._attended(x))
        tokens = x.permute(0, 2, 3, 1)
        y: Tensor = tokens + self.mlp(tokens)
        return y.permute(0, 3, 1, 2)

    def _attended(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.window
        padded = F.pad(x, (0, -w % s, 0, -h % s))
        rows, columns = padded.shape[2] // s, padded.shape[3] // s
        windows = padded.view(n, c, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1)
        y: Tensor = self.attn(windows.reshape(-1, s * s, c)).view(n, rows, columns, s, s, c)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(n, c, rows * s, columns * s)[:, :, :h, :w]


class Stage(nn.Module):
    """Blocks at one resolution, and the merge that follows."""

    def __init__(self, blocks: list[nn.Module], merge: Bottleneck | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = merge

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y if self.downsample is None else self.downsample(y)


class Stem(nn.Module):
    """Two convolutions of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, 32, 3, 2), nn.GELU(), ConvNorm(32, 64, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seq(x)
        return y


def _windowed(width: int, depth: int, heads: int, window: int) -> list[nn.Module]:
    return [WindowBlock(width, heads, window) for _ in range(depth)]


@final
class MobileEncoder(nn.Module):
    """(N, 3, S, S) to (N, out, S / 16, S / 16)."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.patch_embed = Stem()
        first: list[nn.Module] = [Bottleneck(64, 256, 64, residual=True) for _ in range(2)]
        self.layers = nn.ModuleList(
            (
                Stage(first, Bottleneck(64, 128, 128, 2, residual=False)),
                Stage(_windowed(128, 2, 4, 7), Bottleneck(128, 160, 160, 2, residual=False)),
                Stage(_windowed(160, 6, 5, 14), Bottleneck(160, 320, 320, 1, residual=False)),
                Stage(_windowed(320, 2, 10, 7), None),
            )
        )
        self.neck = nn.Sequential(
            nn.Conv2d(320, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        y: Tensor = self.neck(x)
        return y
