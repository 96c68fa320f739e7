"""ArtiFusion's denoiser: a U-Net of Swin blocks in which time is one more token of every window.

After the paper (He et al. 2023, "Artifact Restoration in Histology Images with Diffusion Probabilistic Models",
MICCAI) with the published code's numbers. Parameters have that code's names and order, so that its state dicts
load unchanged. Tokens are kept as (N, H, W, C) throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Denoiser", "DenoiserConfig", "time_embedding"]


@dataclass(frozen=True)
class DenoiserConfig:
    """The network's shape; the defaults are the published one.

    Attributes
    ----------
    size
        Side of the image in pixels; a multiple of ``patch * 2 ** (len(depths) - 1)``.
    patch
        Side of the pixels that make one token.
    width
        Channels at the finest level; each coarser one has twice as many.
    depths, heads
        Blocks, and heads of attention, at each level.
    window
        Side of an attention window in tokens; levels that are no larger have one window.
    drop_path
        Share of residual branches dropped in training at the deepest block; linear from 0 before it.
    time_channels
        Length of the sinusoid that time is first turned into.
    """

    size: int = 256
    patch: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 8
    drop_path: float = 0.1
    time_channels: int = 128

    def __post_init__(self) -> None:
        levels = len(self.depths)
        unit = self.patch * 2 ** (levels - 1)
        if levels < 2 or len(self.heads) != levels or self.size % unit:
            raise ValueError(f"{levels} depths, {len(self.heads)} heads, size {self.size} (unit {unit})")
        for level, heads in enumerate(self.heads):
            side = self.size // self.patch // 2**level
            if side > self.window and side % self.window:
                raise ValueError(f"level {level} is {side} tokens wide, no multiple of {self.window}")
            if (self.width * 2**level) % heads:
                raise ValueError(f"level {level}: {self.width * 2**level} channels, {heads} heads")


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Return (N, channels): cosines, then sines, of `t` (N,) at frequencies from 1 to 1/10000."""
    half = channels // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@final
class WindowAttention(nn.Module):
    """Attention inside windows, with a bias for each relative position; the time token has none."""

    relative_position_index: Tensor

    def __init__(self, channels: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", _relative_positions(window))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        """Return (N, K, L, C) for `windows` of that shape, `time` (N, C) and `mask` (K, L, L), added to scores."""
        n, k, length, c = windows.shape
        tokens = torch.cat([windows, time[:, None, None].expand(n, k, 1, c)], dim=2)
        qkv = self.qkv(tokens).view(n, k, length + 1, 3, self.heads, c // self.heads)
        q, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        bias = bias if mask is None else bias + mask[:, None]
        # the time token sees all and is seen by all
        bias = F.pad(bias, (0, 1, 0, 1)).to(q.dtype)
        # its own output is dropped, so it asks for nothing
        found = F.scaled_dot_product_attention(q[..., :length, :], key, value, bias[..., :length, :])
        projected: Tensor = self.proj(found.transpose(2, 3).reshape(n, k, length, c))
        return projected


def _relative_positions(window: int) -> Tensor:
    """Return (L, L): for each pair of tokens the row of the bias table that its offset has."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    down, right = y[:, None] - y[None], x[:, None] - x[None]
    return (down + window - 1) * (2 * window - 1) + right + window - 1


@final
class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


@final
class SwinBlock(nn.Module):
    """Attention in windows, shifted or not, then an MLP; both on a residual path."""

    attn_mask: Tensor | None

    def __init__(
        self, channels: int, side: int, heads: int, window: int, shifted: bool, time_width: int, drop: float
    ) -> None:
        super().__init__()
        self.window = min(window, side)
        self.shift = self.window // 2 if shifted and side > window else 0
        self.drop = drop
        mask = _shift_mask(side, self.window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, channels))
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, self.window, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self._kept(self._attended(self.norm1(x), self.emb_layers(time)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _attended(self, x: Tensor, time: Tensor) -> Tensor:
        side, shift = x.shape[1], self.shift
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = _joined(self.attn(_windows(x, self.window), time, self.attn_mask), side)
        return x.roll((shift, shift), (1, 2)) if shift else x

    def _kept(self, branch: Tensor) -> Tensor:
        """Drop whole samples of a residual branch in training (stochastic depth)."""
        if not self.training or not self.drop:
            return branch
        keep = 1 - self.drop
        return branch * (torch.rand(len(branch), 1, 1, 1, device=branch.device) < keep) / keep


def _windows(x: Tensor, window: int) -> Tensor:
    """Return the windows (N, K, window², C) of (N, H, W, C), row by row."""
    n, h, w, c = x.shape
    x = x.view(n, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(n, -1, window * window, c)


def _joined(windows: Tensor, side: int) -> Tensor:
    """Undo `_windows`."""
    n, _, length, c = windows.shape
    window = math.isqrt(length)
    x = windows.view(n, side // window, side // window, window, window, c)
    return x.transpose(2, 3).reshape(n, side, side, c)


def _shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Return (K, L, L): -100 between tokens of a shifted window that come from opposite borders, else 0."""
    band = torch.zeros(side)
    band[side - window : side - shift] = 1
    band[side - shift :] = 2
    zone = _windows((3 * band[:, None] + band[None]).view(1, side, side, 1), window)[0, :, :, 0]
    return torch.where(zone[:, None] != zone[:, :, None], -100.0, 0.0)


@final
class PatchEmbed(nn.Module):
    """Pixels to tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))
        return out


@final
class Merge(nn.Module):
    """Four tokens to one of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        # down before right: the order in which the published weights want them
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


@final
class Expand(nn.Module):
    """One token to `factor` squared ones, of ``outputs`` channels each."""

    def __init__(self, channels: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(channels, factor * factor * outputs, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, _ = x.shape
        f = self.factor
        x = self.expand(x).view(n, h, w, f, f, -1).transpose(2, 3)
        out: Tensor = self.norm(x.reshape(n, h * f, w * f, -1))
        return out


@final
class Down(nn.Module):
    """A level on the way down: blocks, then fewer tokens (but for the last)."""

    def __init__(self, blocks: list[SwinBlock], channels: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if last else nn.Sequential(Merge(channels))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        out: Tensor = self.downsample(x)
        return out


@final
class Up(nn.Module):
    """A level on the way up: blocks, then more tokens (but for the last)."""

    def __init__(self, blocks: list[SwinBlock], channels: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = nn.Identity() if last else nn.Sequential(Expand(channels, channels // 2, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        out: Tensor = self.upsample(x)
        return out


@final
class Denoiser(nn.Module):
    """Predicts the noise in an image, and how much of it a step back should add again.

    ``forward(x, t)`` takes `x` float (N, 3, size, size) in about -1..1 and `t` (N,), times on the scale of 0 to
    1000; it returns (N, 6, size, size): three channels of noise, three that interpolate log variances (-1 the
    smallest, 1 the largest). Samples of a batch don't see each other.
    """

    def __init__(self, config: DenoiserConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DenoiserConfig()
        levels, hidden = len(c.depths), 4 * c.time_channels
        # one name in the published code for each of these: they decide what a state dict looks like
        self.time_embed = nn.Sequential(
            nn.Linear(c.time_channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.input_blocks = nn.ModuleList(
            nn.Sequential(Down(_blocks(c, level), c.width * 2**level, level == levels - 1))
            for level in range(levels)
        )
        self.patch_embed = PatchEmbed(c.patch, c.width)
        top = c.width * 2 ** (levels - 1)
        ups: list[nn.Module] = [nn.Sequential(Expand(top, top // 2, 2))]
        joins: list[nn.Module] = [nn.Sequential(nn.Identity())]
        for level in reversed(range(levels - 1)):
            channels = c.width * 2**level
            ups.append(nn.Sequential(Up(_blocks(c, level), channels, level == 0)))
            joins.append(nn.Sequential(nn.Linear(2 * channels, channels)))
        self.output_blocks_layers_up = nn.ModuleList(ups)
        self.output_blocks_concat_back_dim = nn.ModuleList(joins)
        self.norm = nn.LayerNorm(top)
        self.norm_up = nn.LayerNorm(c.width)
        self.up = Expand(c.width, c.width, c.patch)
        self.output = nn.Sequential(nn.Conv2d(c.width, 6, 1, bias=False))
        self.apply(_initialise)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_embed(time_embedding(t, self.config.time_channels).to(x.dtype))
        x = self.patch_embed(x)
        skips = []
        for stage in self.input_blocks:
            skips.append(x)
            x = stage[0](x, time)  # type: ignore[index]  # a Sequential of one, for the name's sake
        x = self.output_blocks_layers_up[0](self.norm(x))
        pairs = zip(self.output_blocks_concat_back_dim, self.output_blocks_layers_up, strict=True)
        for k, (join, stage) in enumerate(pairs):
            if k == 0:
                continue
            x = stage[0](join(torch.cat([x, skips[-1 - k]], -1)), time)  # type: ignore[index]  # as above
        out: Tensor = self.output(self.up(self.norm_up(x)).permute(0, 3, 1, 2))
        return out


def _blocks(c: DenoiserConfig, level: int) -> list[SwinBlock]:
    """Return the blocks of one level; way down and way up are alike."""
    before, count = sum(c.depths[:level]), c.depths[level]
    last = max(1, sum(c.depths) - 1)
    return [
        SwinBlock(
            c.width * 2**level,
            c.size // c.patch // 2**level,
            c.heads[level],
            c.window,
            shifted=k % 2 == 1,
            time_width=4 * c.time_channels,
            drop=c.drop_path * (before + k) / last,
        )
        for k in range(count)
    ]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
