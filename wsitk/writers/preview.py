"""`preview.png`: one picture of a slide's result, for a person who wants to know whether it is right.

┌ title, facts ────────────────────────┐      ┌ title, facts ────────────────┐
│ overview: tissue, tiles, │  classes  │      │ overview │ classes │ windows │
│ objects                  │           │  or  │          │         │ at high │
├──────────────────────────┴───────────┤      │          │         │ zoom    │
│ three windows at high zoom           │      └──────────────────────────────┘
└──────────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsitk.geometry import Region
from wsitk.model import ObjectClass
from wsitk.writers.base import atomic_file
from wsitk.writers.lettering import text_width, write
from wsitk.writers.preview_layers import (
    Census,
    blend,
    density_layer,
    draw_outlines,
    outline_tissue,
    take_census,
    tile_layer,
)

__all__ = ["draw_preview"]

Array = NDArray[Any]
Color = tuple[int, int, int]

_WIDTH, _MARGIN, _GAP, _TOP = 1800, 40, 24, 150
_PAGE, _INK, _SOFT, _RULE = (255, 255, 255), (29, 37, 44), (104, 116, 126), (224, 229, 233)
_FOOTER = "wsitk · research use only, not for diagnosis"
_WINDOW_UM = 128.0  # width of a window at high zoom
_AFFORDABLE = 1 << 28  # level-0 pixels that are read again when the thumbnail is too coarse to look at


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts go: boxes are (left, top, width, height) in pixels of the page."""

    overview: tuple[int, int, int, int]
    legend: tuple[int, int, int, int]
    windows: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def fit(cls, shape: tuple[int, ...]) -> _Layout:
        """Return windows below a wide image, or beside a tall one."""
        aspect = shape[1] / shape[0]
        if aspect >= 1.1:
            height = round(min(900, 1240 / aspect))
            tall = max(height, 340)
            width = (_WIDTH - 2 * _MARGIN - 2 * _GAP) // 3
            row = _TOP + tall + _GAP
            places = [(_MARGIN + k * (width + _GAP), row, width, width * 3 // 4) for k in range(3)]
            return cls((_MARGIN, _TOP, 1240, height), (1320, _TOP, 440, tall), tuple(places))
        places = [(1340, _TOP + k * 376, 420, 315) for k in range(3)]
        return cls((_MARGIN, _TOP, 830, 1100), (910, _TOP, 390, 1100), tuple(places))


def draw_preview(
    out: str | Path,
    thumbnail: Array,
    scale_xy: tuple[float, float],
    tissue: Array,
    tiles: Iterable[tuple[Region, str]] | str | Path | None,
    objects: str | Path | None,
    classes: Sequence[ObjectClass],
    lines: Sequence[str],
    read_patch: Callable[[Region], Array],
    *,
    spacing_um: float | None = None,
    count_restored: bool = True,
    overwrite: bool = False,
) -> None:
    """Draw `out` (PNG); the same results give the same bytes.

    Parameters
    ----------
    thumbnail
        The whole image, (H, W, 3), at any resolution.
    scale_xy
        Level-0 pixels per pixel of the thumbnail.
    tissue
        Boolean mask of the whole image, at any resolution.
    tiles
        The run's `tiles.parquet`, or (level-0 region, status) of each tile.
    objects
        The run's `objects.parquet`; None for a model that finds none.
    lines
        The title, what is below it, and any number of facts; of ``"Tissue: 3.5 mm²"`` the value stands
        out.
    read_patch
        Returns a level-0 region (y, x) as (h, w, 3): windows at high zoom, and the whole image in strips
        if it is small and the thumbnail coarse.
    spacing_um
        Micrometres per level-0 pixel; without it there are no scale bars.
    count_restored
        Whether objects in restored pixels count with the others.
    """
    extent = (thumbnail.shape[0] * scale_xy[1], thumbnail.shape[1] * scale_xy[0])
    layout = _Layout.fit(thumbnail.shape)
    picture = _overview(thumbnail, extent, layout.overview[2:], read_patch)
    scale = (extent[1] / picture.shape[1], extent[0] / picture.shape[0])
    mask = cv2.resize(tissue.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    colors = [c.color for c in classes] or [_INK]
    shape = _window_shape(spacing_um, extent)
    picture = outline_tissue(picture, mask)
    picture, faults = tile_layer(picture, tiles if tiles is not None else (), scale)
    census = None
    if objects:
        census = take_census(objects, len(colors), picture.shape[:2], scale, shape, restored=count_restored)
    if census is not None:
        picture = blend(picture, *density_layer(census.density, colors, mask))
    windows = _choose(census, shape, extent) if census else []
    page = _Page(layout, lines)
    page.overview(picture, scale, windows, spacing_um)
    if census is not None:
        page.legend(classes, census.counts, reserved=34 * len(faults))
    page.key(faults)
    for index, window in enumerate(windows):
        patch = cv2.resize(_rgb(read_patch(window)), layout.windows[0][2:], interpolation=cv2.INTER_CUBIC)
        drawn, counts = draw_outlines(patch, window, objects, colors) if objects else (patch, np.zeros(1))
        page.window(index, window, drawn, int(counts.sum()), spacing_um)
    with atomic_file(out, overwrite=overwrite) as stream:
        page.finish().save(stream, "PNG", compress_level=6)


def _rgb(pixels: Array) -> Array:
    """Return pixels as uint8 (h, w, 3): one channel becomes grey, of more than three the first count."""
    values = pixels if pixels.ndim == 3 else pixels[..., None]
    values = values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)
    if values.dtype != np.uint8:
        top = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1.0
        values = np.clip(values.astype(np.float32) * (255.0 / top), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(values)


def _overview(
    thumbnail: Array, extent: tuple[float, float], box: tuple[int, ...], read_patch: Callable[[Region], Array]
) -> Array:
    """Return the whole image, as large as fits `box` (width, height)."""
    zoom = min(box[0] / thumbnail.shape[1], box[1] / thumbnail.shape[0])
    width, height = (max(1, round(n * zoom)) for n in thumbnail.shape[1::-1])
    full = (int(extent[0]), int(extent[1]))
    if zoom > 1.5 and full[0] > thumbnail.shape[0] * 1.5 and full[0] * full[1] <= _AFFORDABLE:
        return _from_strips(full, (height, width), read_patch)
    way = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(_rgb(thumbnail), (width, height), interpolation=way))


def _from_strips(
    full: tuple[int, int], shape: tuple[int, int], read_patch: Callable[[Region], Array]
) -> Array:
    """Return the level-0 image shrunk to `shape`, holding a strip of it at a time."""
    out = np.empty((*shape, 3), np.uint8)
    rows = max(1, min(shape[0], (1 << 24) * shape[0] // (full[0] * full[1])))
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        top, bottom = (
            first * full[0] // shape[0],
            max(last * full[0] // shape[0], first * full[0] // shape[0] + 1),
        )
        strip = _rgb(read_patch(Region((top, 0), (bottom - top, full[1]))))
        way = cv2.INTER_AREA if full[1] >= shape[1] else cv2.INTER_CUBIC
        out[first:last] = cv2.resize(strip, (shape[1], last - first), interpolation=way)
    return out


def _window_shape(spacing_um: float | None, extent: tuple[float, float]) -> tuple[int, int]:
    """Return height and width of a window in level-0 pixels: 4 to 3, inside the image."""
    width = 512 if spacing_um is None else round(_WINDOW_UM / spacing_um)
    width = max(4, int(min(width, extent[1], extent[0] * 4 / 3)))
    return max(3, width * 3 // 4), width


def _choose(census: Census, shape: tuple[int, int], extent: tuple[float, float]) -> list[Region]:
    """Return up to three windows: the fullest, the most mixed, and an ordinary one.

    The third has about the median number of objects among the windows that hold any. Where there is one
    class, the second is a fuller one than that: at the third quartile.
    """
    total = census.cells.sum(axis=0)
    share = census.cells / np.maximum(total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=0)
    full = np.sqrt(total)
    middle = float(np.median(total[total > 0])) if total.any() else 0.0
    found: list[tuple[int, int]] = []
    mixed = entropy * full
    if not mixed.any() and total.any():
        mixed = -np.abs(total - np.percentile(total[total > 0], 75))
    for score in (full, mixed, -np.abs(total - middle)):
        ranked = np.where(total > 0, score, -np.inf)
        for row, column in found:  # nor a neighbour: three windows should show three places
            ranked[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = -np.inf
        row, column = divmod(int(ranked.argmax()), ranked.shape[1])
        if np.isfinite(ranked[row, column]):
            found.append((row, column))
    return [
        Region(
            tuple(max(0, min(k * n, int(end) - n)) for k, n, end in zip(place, shape, extent, strict=True)),
            shape,
        )
        for place in found
    ]


class _Page:
    """The sheet of paper; every method draws one of its parts."""

    def __init__(self, layout: _Layout, lines: Sequence[str]) -> None:
        self._layout = layout
        self._image = Image.new("RGB", (_WIDTH, 2000), _PAGE)
        self._draw = ImageDraw.Draw(self._image)
        self._bottom = _TOP
        self._header(lines[0] if lines else "", lines[1] if len(lines) > 1 else "", lines[2:])

    def _write(
        self, x: float, y: float, words: str, size: int, color: Color = _INK, anchor: str = "la"
    ) -> None:
        write(self._draw, (x, y), words, size, color, anchor=anchor)

    def _header(self, title: str, below: str, facts: Sequence[str]) -> None:
        right = float(_WIDTH - _MARGIN)
        pairs = [(name, value) for name, _, value in (fact.rpartition(": ") for fact in facts)]
        # smaller letters before fewer facts; the title keeps a third of the line
        for size in (30, 26, 22, 18):
            widths = [max(text_width(value, size), text_width(name, 18)) + 48 for name, value in pairs]
            if sum(widths) <= _WIDTH * 0.62:
                break
        for (name, value), width in reversed(list(zip(pairs, widths, strict=True)) if pairs else []):
            self._write(right, 68 - size, value, size, anchor="ra")
            self._write(right, 84, name, 18, _SOFT, "ra")
            right -= width
        self._write(_MARGIN, 30, _shorten(title, right - _MARGIN, 42), 42)
        self._write(_MARGIN, 88, _shorten(below, right - _MARGIN, 24), 24, _SOFT)
        self._rule(130)

    def _rule(self, y: int) -> None:
        self._draw.line([(_MARGIN, y), (_WIDTH - _MARGIN, y)], _RULE, 2)

    def overview(
        self, picture: Array, scale: tuple[float, float], windows: Sequence[Region], spacing_um: float | None
    ) -> None:
        """Put the whole image in its place, with the windows marked on it."""
        left, top, wide, _ = self._layout.overview
        height, width = picture.shape[:2]
        left += (wide - width) // 2
        self._image.paste(Image.fromarray(picture), (left, top))
        self._draw.rectangle([left - 1, top - 1, left + width, top + height], None, _RULE)
        for index, window in enumerate(windows):
            (y0, x0), (y1, x1) = window.start, window.stop
            self._mark(
                [left + x0 / scale[0], top + y0 / scale[1], left + x1 / scale[0], top + y1 / scale[1]], index
            )
        if spacing_um:
            self._bar(left + width - 20, top + height - 20, spacing_um * scale[0], width / 4)
        self._bottom = max(self._bottom, top + height)

    def _mark(self, box: list[float], index: int) -> None:
        """Draw a window on the overview: never so small that nobody sees it."""
        grow = max(0.0, (14 - (box[2] - box[0])) / 2)
        inner = [box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow]
        outer = [inner[0] - 2, inner[1] - 2, inner[2] + 2, inner[3] + 2]
        self._draw.rectangle(outer, None, _PAGE, 2)
        self._draw.rectangle(inner, None, _INK, 2)
        self._badge(inner[0] - 4, inner[1] - 4, index, 13)

    def _badge(self, x: float, y: float, index: int, radius: int) -> None:
        self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], _INK, _PAGE, 2)
        self._write(x, y, "ABC"[index], round(radius * 1.3), _PAGE, "mm")

    def _bar(self, right: float, bottom: float, um_per_pixel: float, wanted: float) -> None:
        """Draw a scale bar of a round length that ends at `right`."""
        length = _round_length(wanted * um_per_pixel)
        words = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
        pixels = length / um_per_pixel
        self._draw.rectangle([right - pixels - 2, bottom - 8, right + 2, bottom + 1], _PAGE)
        self._draw.rectangle([right - pixels, bottom - 6, right, bottom - 1], _INK)
        write(self._draw, (right - pixels / 2, bottom - 15), words, 20, _INK, anchor="ms", halo=_PAGE)

    def legend(self, classes: Sequence[ObjectClass], counts: Array, reserved: int) -> None:
        """List the classes: colour, name, count, share; leave `reserved` pixels below."""
        left, y, width, height = self._layout.legend
        total, end = int(counts.sum()), y + height - reserved
        self._write(left, y - 8, f"{total:,}", 52)
        self._write(left, y + 54, "object" if total == 1 else "objects", 22, _SOFT)
        y += 112
        step = max(26, min(72, (end - y) // max(1, len(classes))))
        for kind, count in zip(classes, counts.tolist(), strict=False):
            if y + step > end + 8:
                self._write(left, y, "…", 22, _SOFT)
                break
            self._entry(kind, count, count / max(1, total), (left, y, width, step))
            y += step
        self._bottom = max(self._bottom, y)

    def _entry(self, kind: ObjectClass, count: int, share: float, box: tuple[int, int, int, int]) -> None:
        left, y, width, step = box
        size = 23 if step >= 50 else 18
        right = left + width
        tail = f"{count:,}    {share:.0%}"
        room = width - size * 1.2 - text_width(tail, size) - 12
        self._draw.ellipse([left, y + 6, left + size * 0.7, y + 6 + size * 0.7], kind.color, _INK)
        self._write(left + size * 1.2, y, _shorten(kind.name, room, size), size)
        self._write(right, y, tail, size, _SOFT, "ra")
        if step >= 50:
            base = y + size + 12
            self._draw.rounded_rectangle([left, base, right, base + 7], 3, _RULE)
            if share > 0:
                self._draw.rounded_rectangle(
                    [left, base, left + max(7, width * share), base + 7], 3, kind.color
                )

    def key(self, faults: Mapping[str, Color]) -> None:
        """Explain the hatched tiles, below the classes."""
        left = self._layout.legend[0]
        y = self._layout.legend[1] + self._layout.legend[3] - 34 * len(faults)
        for name, color in faults.items():
            box = [left, y, left + 18, y + 18]
            self._draw.rectangle(box, color, _INK)
            self._write(left + 28, y - 2, f"tiles {name.replace('_', ' ')}", 18, _SOFT)
            y += 34

    def window(self, index: int, window: Region, drawn: Array, count: int, spacing_um: float | None) -> None:
        """Put window `index` in its place, already drawn at the size of that place."""
        left, top, width, height = self._layout.windows[index]
        self._image.paste(Image.fromarray(drawn), (left, top))
        self._badge(left + 26, top + 26, index, 17)
        self._write(left, top + height + 8, f"{count:,} object{'s' * (count != 1)}", 19)
        place = f"x {window.start[1]:,}   y {window.start[0]:,}"
        self._write(left + width, top + height + 8, place, 19, _SOFT, "ra")
        if spacing_um:
            self._bar(left + width - 16, top + height - 14, spacing_um * window.shape[1] / width, width / 5)
        self._bottom = max(self._bottom, top + height + 40)

    def finish(self) -> Image.Image:
        """Return the page, cut below its last part."""
        self._rule(self._bottom + 18)
        self._write(_MARGIN, self._bottom + 32, _FOOTER, 18, _SOFT)
        return self._image.crop((0, 0, _WIDTH, self._bottom + 70))


def _round_length(limit: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is not above `limit`."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(f for f in (1.0, 2.0, 5.0) if f * power <= limit * (1 + 1e-9)) * power


def _shorten(words: str, room: float, size: int) -> str:
    """Return `words`, with as much of the middle left out as it takes to fit `room` pixels."""
    keep = len(words)
    short = words
    while keep > 4 and text_width(short, size) > room:
        keep -= 1
        short = f"{words[: keep - keep // 2]}…{words[len(words) - keep // 2 :]}"
    return short
