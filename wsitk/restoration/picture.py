"""`before_after.png`: the largest restored regions as they were and as they became, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wsitk.geometry import Region
from wsitk.writers.base import atomic_file
from wsitk.writers.lettering import write
from wsitk.writers.restored import KIND_COLORS, RestoredRegion

__all__ = ["SIDE", "draw_before_after"]

SIDE = 560
"""Pixels of the longer side of one picture."""

_MARGIN, _GAP, _TOP, _LINE = 40, 24, 130, 36
_PAGE, _INK, _SOFT = (255, 255, 255), (29, 37, 44), (104, 116, 126)
_ROWS = 4
_FOOTER = "wsitk · research use only, not for diagnosis · restored pixels are a guess, not a measurement"

Pair = tuple[NDArray[Any], NDArray[Any]]


def draw_before_after(
    out: Path,
    regions: Sequence[RestoredRegion],
    image: Region,
    lines: Sequence[str],
    look: Callable[[Region], Pair],
    *,
    spacing_um: float | None,
    overwrite: bool = False,
) -> None:
    """Draw the largest few of `regions`, with some of what surrounds them; the outline is that of the mask.

    `look` returns a level-0 region before and after, (h, w, 3); `lines` are the title and what is below it.
    """
    chosen = sorted((r for r in regions if r.status == "restored"), key=lambda r: (-r.pixels, r.number))[
        :_ROWS
    ]
    rows = [_row(region, image, look) for region in chosen]
    width = 2 * SIDE + _GAP + 2 * _MARGIN
    heights = [before.shape[0] + _LINE + _GAP for before, _ in rows]
    page = Image.new("RGB", (width, _TOP + max(sum(heights), _LINE) + _MARGIN), _PAGE)
    pen = ImageDraw.Draw(page)
    write(pen, (_MARGIN, 36), lines[0], 28, _INK)
    for place, line in enumerate(lines[1:3]):
        write(pen, (_MARGIN, 74 + 24 * place), line, 16, _SOFT)
    top = _TOP
    for region, (before, after), height in zip(chosen, rows, heights, strict=True):
        for place, (word, picture) in enumerate((("before", before), ("after", after))):
            left = _MARGIN + place * (SIDE + _GAP)
            page.paste(Image.fromarray(picture), (left, top))
            write(pen, (left, top + picture.shape[0] + 8), _caption(word, region, spacing_um), 14, _SOFT)
        top += height
    if not chosen:
        write(pen, (_MARGIN, _TOP), "nothing was restored", 18, _SOFT)
    write(pen, (_MARGIN, page.height - 28), _FOOTER, 12, _SOFT)
    with atomic_file(out, overwrite=overwrite) as stream:
        page.save(stream, "PNG", compress_level=6)


def _row(region: RestoredRegion, image: Region, look: Callable[[Region], Pair]) -> Pair:
    """Return one region before and after, `SIDE` pixels long, its outline drawn on the former."""
    margin = max(32, max(region.box.shape) // 4)
    box = region.box.grow((margin, margin)).intersect(image)
    before, after = look(box)
    factor = SIDE / max(before.shape[:2])
    rule = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    size = (min(SIDE, round(before.shape[1] * factor)), min(SIDE, round(before.shape[0] * factor)))
    pictures = [np.ascontiguousarray(cv2.resize(p, size, interpolation=rule)) for p in (before, after)]
    color = KIND_COLORS[region.kinds[0] if region.kinds else "other"]
    scale = np.array(size) / box.shape[::-1]
    parts = region.outline.geoms if hasattr(region.outline, "geoms") else [region.outline]
    rings = [np.asarray(p.exterior.coords) for p in parts] + [
        np.asarray(h.coords) for p in parts for h in p.interiors
    ]
    corner = np.array(box.start[::-1])
    cv2.polylines(
        pictures[0],
        [np.rint((r - corner) * scale).astype(np.int32) for r in rings],
        True,
        color,
        1,
        cv2.LINE_AA,
    )
    return pictures[0], pictures[1]


def _caption(word: str, region: RestoredRegion, spacing_um: float | None) -> str:
    """Return what is written below one picture."""
    size = f"{region.box.shape[1]} by {region.box.shape[0]} px"
    if spacing_um is not None:
        size = f"{region.box.shape[1] * spacing_um:.0f} by {region.box.shape[0] * spacing_um:.0f} µm"
    return f"region {region.number}, {word}: {', '.join(region.kinds) or 'other'}, {size}"
