"""`plate.png`: plates as people lay them out, a square for each well, coloured by how many objects it holds."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from wsitk.sources.plate import Well
from wsitk.writers.lettering import text_width, write

__all__ = ["draw_plates"]

Color = tuple[int, int, int]

_FORMATS = ((2, 3), (4, 6), (8, 12), (16, 24), (32, 48))
_WIDTH, _MARGIN, _TITLE, _BAR = 900, 56, 60, 46
_PAGE, _INK, _SOFT, _EMPTY = (255, 255, 255), (29, 37, 44), (104, 116, 126), (238, 240, 242)
# From dark to light with even steps of lightness, legible without colour vision (viridis, at six places).
_SCALE = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))


def draw_plates(plates: Mapping[str, Mapping[Well, int | None]]) -> bytes:
    """Return a PNG with all plates, one below the other; None is a well that failed.

    One scale, from 0 to the largest count, holds for all of them.
    """
    counts = [n for wells in plates.values() for n in wells.values() if n is not None]
    top = max(1, *counts) if counts else 1
    panels = [_panel(plate, wells, top) for plate, wells in plates.items()]
    page = Image.new("RGB", (_WIDTH, sum(p.height for p in panels) + _BAR + 30), _PAGE)
    below = 0
    for panel in panels:
        page.paste(panel, (0, below))
        below += panel.height
    _legend(ImageDraw.Draw(page), below, top)
    stream = io.BytesIO()
    page.save(stream, "PNG")
    return stream.getvalue()


def _panel(plate: str, wells: Mapping[Well, int | None], top: int) -> Image.Image:
    """Return one plate, in the smallest usual format that holds its wells."""
    last = max(w.row for w in wells), max(w.column for w in wells)
    rows, columns = next(f for f in _FORMATS if last[0] < f[0] and last[1] < f[1])
    edge = (_WIDTH - 2 * _MARGIN) // columns
    edge = min(edge, 96)
    panel = Image.new("RGB", (_WIDTH, _TITLE + 28 + rows * edge + 16), _PAGE)
    draw = ImageDraw.Draw(panel)
    write(draw, (_MARGIN, 14), _shortened(plate, _WIDTH - 2 * _MARGIN), 22, _INK)
    small = max(8, min(16, round(edge * 0.55)))
    for column in range(columns):
        middle = _MARGIN + (column + 0.5) * edge
        write(draw, (middle, _TITLE + 14), str(column + 1), small, _SOFT, anchor="mm")
    for row in range(rows):
        middle = _TITLE + 28 + (row + 0.5) * edge
        write(draw, (_MARGIN - 8, middle), Well(row, 0).letters, small, _SOFT, anchor="rm")
        for column in range(columns):
            corner = (_MARGIN + column * edge, _TITLE + 28 + row * edge)
            _square(draw, corner, edge, wells, Well(row, column), top)
    return panel


def _square(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    edge: int,
    wells: Mapping[Well, int | None],
    well: Well,
    top: int,
) -> None:
    """Draw a well: its colour and its count, a cross if it failed, pale if it is not there."""
    left, above = corner
    box = [left + 1, above + 1, left + edge - 2, above + edge - 2]
    count = wells.get(well)
    color = _EMPTY if count is None else _color(count / top)
    draw.rectangle(box, color)
    if well in wells and count is None:
        draw.line([box[0], box[1], box[2], box[3]], (192, 80, 77), 2)
        draw.line([box[0], box[3], box[2], box[1]], (192, 80, 77), 2)
    size = min(18, round(edge * 0.3))
    if count is not None and size >= 8 and text_width(f"{count:,}", size) < edge - 4:
        ink = _PAGE if sum(color) < 380 else _INK
        write(draw, (left + edge / 2, above + edge / 2), f"{count:,}", size, ink, anchor="mm")


def _color(share: float) -> Color:
    """Return the colour of a count as a share of the largest."""
    places = np.linspace(0, 1, len(_SCALE))
    red, green, blue = (
        round(float(np.interp(share, places, channel))) for channel in zip(*_SCALE, strict=True)
    )
    return red, green, blue


def _legend(draw: ImageDraw.ImageDraw, above: int, top: int) -> None:
    """Draw the scale below the plates."""
    for step in range(256):
        draw.rectangle([_MARGIN + step, above, _MARGIN + step, above + 14], _color(step / 255))
    write(draw, (_MARGIN, above + 20), "0", 15, _SOFT)
    write(draw, (_MARGIN + 256, above + 20), f"{top:,}", 15, _SOFT, anchor="ra")
    write(draw, (_MARGIN + 276, above - 1), "objects in a well; a cross: failed", 15, _SOFT)


def _shortened(words: str, width: int) -> str:
    """Return the end of a name that is too long to be written."""
    while text_width(words, 22) > width:
        words = "..." + words.removeprefix("...")[4:]
    return words
