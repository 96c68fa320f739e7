"""`preview.png`: one picture of a slide's result, for a person who wants to know whether it is right.

    ┌ title, facts ────────────────────────┐      ┌ title, facts ────────────────┐
    │ overview: tissue, tiles, │  classes  │      │ overview │ classes │ windows │
    │ objects                  │           │  or  │          │         │ at high │
    ├──────────────────────────┴───────────┤      │          │         │ zoom    │
    │ three windows at high zoom           │      └──────────────────────────────┘
    └──────────────────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wsitk.geometry import Region
from wsitk.model import ObjectClass
from wsitk.writers.base import atomic_file
from wsitk.writers.preview_layers import (
    Census,
    blend,
    density_layer,
    draw_outlines,
    outline_tissue,
    take_census,
    tile_layer,
)

__all__ = ["PreviewText", "draw_preview"]

Array = NDArray[Any]
Color = tuple[int, int, int]

_WIDTH, _MARGIN, _GAP = 1800, 40, 24
_OVERVIEW = (1240, 900)  # largest width and height
_INSETS = 3
_PAGE, _INK, _SOFT, _RULE = (255, 255, 255), (29, 37, 44), (104, 116, 126), (224, 229, 233)
_ACCENTS: tuple[Color, ...] = ((20, 20, 20), (20, 20, 20), (20, 20, 20))
_FOOTER = "wsitk · research use only, not for diagnosis"


@dataclass(frozen=True)
class PreviewText:
    """What the picture says: the input's name, the model's, and facts such as ("Tissue", "12.4 mm²")."""

    title: str
    model: str
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def draw_preview(
    out: str | Path,
    thumbnail: Array,
    scale_xy: tuple[float, float],
    tissue: Array,
    tiles: str | Path | None,
    objects: str | Path,
    classes: Sequence[ObjectClass],
    text: PreviewText,
    read_patch: Callable[[Region], Array],
    *,
    spacing_um: float | None = None,
    overwrite: bool = False,
) -> None:
    """Draw `out` (PNG); the same results give the same bytes.

    Parameters
    ----------
    thumbnail
        The whole image, uint8 (H, W, 3), at any resolution from about 1000 pixels up.
    scale_xy
        Level-0 pixels per pixel of the thumbnail.
    tissue
        Boolean mask of the whole image, at any resolution.
    tiles, objects
        The `tiles.parquet` and `objects.parquet` of the run.
    read_patch
        Returns a level-0 region (y, x) as uint8 (h, w, 3); called for the windows at high zoom.
    spacing_um
        Micrometres per level-0 pixel; without it there are no scale bars.
    """
    picture, scale = _fit(thumbnail, scale_xy, _OVERVIEW)
    mask = cv2.resize(tissue.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    shape = _window_shape(spacing_um, thumbnail.shape[:2], scale_xy)
    census = take_census(objects, max(1, len(classes)), picture.shape[:2], scale, Region((0, 0), shape))
    colors = [c.color for c in classes]
    windows = _choose(census, shape, (thumbnail.shape[0] * scale_xy[1], thumbnail.shape[1] * scale_xy[0]))
    picture = outline_tissue(picture, mask)
    if tiles is not None:
        picture = tile_layer(picture, tiles, scale)
    picture = blend(picture, *density_layer(census.density, colors or [(0, 0, 0)], mask))
    page = _Page(picture, text, classes, census.counts)
    page.overview(scale, windows, spacing_um)
    page.legend()
    for index, window in enumerate(windows):
        page.inset(index, len(windows), window, read_patch(window), objects, colors, spacing_um)
    with atomic_file(out, overwrite=overwrite) as stream:
        page.finish().save(stream, "PNG", compress_level=9)


def _fit(image: Array, scale_xy: tuple[float, float], box: tuple[int, int]) -> tuple[Array, tuple[float, float]]:
    """Return `image` resized to fit `box` (width, height), and the level-0 pixels per new pixel."""
    height, width = image.shape[:2]
    zoom = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)
    return resized, (scale_xy[0] * width / size[0], scale_xy[1] * height / size[1])


def _window_shape(
    spacing_um: float | None, shape: tuple[int, ...], scale_xy: tuple[float, float]
) -> tuple[int, int]:
    """Return height and width of a zoomed window in level-0 pixels: about 100 µm, inside the image."""
    width = 512 if spacing_um is None else round(128 / spacing_um)
    limit = min(shape[1] * scale_xy[0], shape[0] * scale_xy[1] * 4 / 3)
    width = max(4, int(min(width, limit)))
    return max(3, int(width * 3 / 4)), width


def _choose(census: Census, shape: tuple[int, int], extent: tuple[float, float]) -> list[Region]:
    """Return up to three windows: the fullest, then the most mixed, then the one that stands for most.

    The third has the median number of cells among the windows that hold any.
    """
    total = census.cells.sum(axis=0)
    share = census.cells / np.maximum(total, 1)
    entropy = -(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum(axis=0)
    full = np.sqrt(total)
    middle = float(np.median(total[total > 0])) if total.any() else 0.0
    scores = (full * 1.0, entropy * full, -np.abs(total - middle) * 1.0)
    found: list[tuple[int, int]] = []
    for score in scores[:_INSETS]:
        ranked = np.where(total > 0, score, -np.inf)
        for row, column in found:  # nor a neighbour: three windows should show three places
            ranked[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = -np.inf
        best = np.unravel_index(int(ranked.argmax()), ranked.shape)
        if np.isfinite(ranked[best]):
            found.append((int(best[0]), int(best[1])))
    starts = [
        tuple(max(0, min(place * size, int(limit) - size)) for place, size, limit in zip(at, shape, extent, strict=True))
        for at in found
    ]
    return [Region(start, shape) for start in starts]


class _Page:
    """The sheet of paper; every method draws one of its parts."""

    def __init__(
        self, picture: Array, text: PreviewText, classes: Sequence[ObjectClass], counts: Array
    ) -> None:
        self._picture = picture
        self._text = text
        self._classes = classes
        self._counts = counts
        self._top = 150
        self._row = self._top + max(picture.shape[0], 330) + _GAP
        inset = (_WIDTH - 2 * _MARGIN - 2 * _GAP) // 3
        self._inset = (inset, inset * 3 // 4)
        self._image = Image.new("RGB", (_WIDTH, self._row + self._inset[1] + 100), _PAGE)
        self._draw = ImageDraw.Draw(self._image)
        self._bottom = self._row
        self._header()

    def _write(self, xy: tuple[float, float], words: str, size: int, color: Color = _INK, **options: Any) -> None:
        self._draw.text(xy, words, color, ImageFont.load_default(size), **options)

    def _header(self) -> None:
        self._write((_MARGIN, 30), _shorten(self._text.title, 60), 42)
        self._write((_MARGIN, 88), self._text.model, 24, _SOFT)
        right = _WIDTH - _MARGIN
        for name, value in reversed(self._text.facts):
            width = max(self._draw.textlength(w, ImageFont.load_default(s)) for w, s in ((value, 30), (name, 18)))
            self._write((right, 38), value, 30, anchor="ra")
            self._write((right, 84), name, 18, _SOFT, anchor="ra")
            right -= round(width) + 48
        self._draw.line([(_MARGIN, 130), (_WIDTH - _MARGIN, 130)], _RULE, 2)

    def overview(self, scale: tuple[float, float], windows: Sequence[Region], spacing_um: float | None) -> None:
        """Put the whole image at the left, with the windows marked on it."""
        height, width = self._picture.shape[:2]
        left = _MARGIN + (_OVERVIEW[0] - width) // 2
        self._image.paste(Image.fromarray(self._picture), (left, self._top))
        self._draw.rectangle([left - 1, self._top - 1, left + width, self._top + height], None, _RULE)
        for index, window in enumerate(windows):
            box = [
                left + window.start[1] / scale[0],
                self._top + window.start[0] / scale[1],
                left + window.stop[1] / scale[0],
                self._top + window.stop[0] / scale[1],
            ]
            self._mark(box, "ABC"[index])
        if spacing_um:
            self._bar(left + width - 20, self._top + height - 24, spacing_um * scale[0], width / 5)

    def _mark(self, box: list[float], letter: str) -> None:
        """Draw a window on the overview: never so small that nobody sees it."""
        grow = max(0.0, (14 - (box[2] - box[0])) / 2)
        box = [box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow]
        self._draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], None, (255, 255, 255), 2)
        self._draw.rectangle(box, None, _INK, 2)
        self._badge(box[0] - 4, box[1] - 4, letter, 11)

    def _badge(self, x: float, y: float, letter: str, radius: int) -> None:
        self._draw.ellipse([x - radius, y - radius, x + radius, y + radius], _INK, (255, 255, 255), 2)
        self._write((x, y), letter, round(radius * 1.35), (255, 255, 255), anchor="mm")

    def _bar(self, right: float, bottom: float, um_per_pixel: float, wanted: float) -> None:
        """Draw a scale bar of a round length that ends at `right`."""
        length = _round_length(wanted * um_per_pixel)
        pixels = length / um_per_pixel
        words = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
        box = [right - pixels, bottom - 5, right, bottom]
        self._draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], (255, 255, 255))
        self._draw.rectangle(box, _INK)
        self._write(
            (right - pixels / 2, bottom - 12), words, 20, anchor="ms", stroke_width=3, stroke_fill=(255, 255, 255)
        )

    def legend(self) -> None:
        """List the classes at the right: colour, name, count, share."""
        left, right, y = _MARGIN + _OVERVIEW[0] + _GAP + 16, _WIDTH - _MARGIN, self._top + 4
        total = int(self._counts.sum())
        self._write((left, y), f"{total:,}", 52)
        self._write((left, y + 60), "objects" if total != 1 else "object", 22, _SOFT)
        y += 116
        room = (self._row - _GAP - y) // max(1, len(self._classes))
        step = max(24, min(74, room))
        for kind, count in zip(self._classes, self._counts.tolist(), strict=False):
            if y + step > self._row - _GAP + 8:
                self._write((left, y), "…", 22, _SOFT)
                break
            self._entry(kind, count, total, (left, right), y, step)
            y += step

    def _entry(
        self, kind: ObjectClass, count: int, total: int, span: tuple[int, int], y: int, step: int
    ) -> None:
        left, right = span
        share = count / total if total else 0.0
        size = 24 if step >= 50 else 17
        self._draw.ellipse([left, y + 5, left + size * 0.7, y + 5 + size * 0.7], kind.color, _INK)
        self._write((left + size * 1.2, y), _shorten(kind.name, 26), size)
        self._write((right, y), f"{count:,}   {share:.0%}", size, _SOFT, anchor="ra")
        if step >= 50:
            base = y + size + 12
            self._draw.rounded_rectangle([left, base, right, base + 8], 4, _RULE)
            if share > 0:
                self._draw.rounded_rectangle([left, base, left + max(8, (right - left) * share), base + 8], 4, kind.color)

    def inset(
        self,
        index: int,
        count: int,
        window: Region,
        patch: Array,
        objects: str | Path,
        colors: list[Color],
        spacing_um: float | None,
    ) -> None:
        """Put window `index` of `count` below, at high zoom, with outlines."""
        width, height = self._inset
        left = _MARGIN + index * (width + _GAP)
        large = cv2.resize(patch, (width, height), interpolation=cv2.INTER_CUBIC)
        drawn, counts = draw_outlines(large, window, objects, colors)
        self._image.paste(Image.fromarray(drawn), (left, self._row))
        self._badge(left + 24, self._row + 24, "ABC"[index], 17)
        self._bottom = self._row + height + 36
        place = f"x {window.start[1]:,}  y {window.start[0]:,}"
        self._write((left, self._row + height + 8), f"{int(counts.sum()):,} objects", 20)
        self._write((left + width, self._row + height + 8), place, 20, _SOFT, anchor="ra")
        if spacing_um:
            self._bar(left + width - 18, self._row + height - 18, spacing_um * window.shape[1] / width, width / 5)

    def finish(self) -> Image.Image:
        """Return the page, cut below its last part."""
        y = self._bottom + 18
        self._draw.line([(_MARGIN, y), (_WIDTH - _MARGIN, y)], _RULE, 2)
        self._write((_MARGIN, y + 14), _FOOTER, 18, _SOFT)
        return self._image.crop((0, 0, _WIDTH, y + 52))


def _round_length(limit: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is not above `limit`."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(f for f in (1, 2, 5) if f * power <= limit * (1 + 1e-9)) * power)


def _shorten(words: str, limit: int) -> str:
    return words if len(words) <= limit else f"{words[: limit // 2 - 1]}…{words[-(limit // 2) :]}"
