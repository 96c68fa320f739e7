"""Text on a picture, in the font that Pillow carries: the same letters on every machine.

That font has no micro sign and no superscripts, so the few that we need are put together from what it has.
"""

from __future__ import annotations

import re
from functools import lru_cache

from PIL import ImageDraw, ImageFont

__all__ = ["write", "text_width"]

Color = tuple[int, int, int]

_RAISED = {"²": "2", "³": "3"}
_OTHERS = str.maketrans({"μ": "µ", "–": "-", "—": "-", "−": "-"})  # a Greek mu, and dashes


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _pieces(words: str, size: int) -> list[tuple[str, int]]:
    """Return runs of one font size; a micro sign and a superscript are runs of their own."""
    runs = re.split("([µ²³])", words.translate(_OTHERS))
    return [(run, round(size * 0.62) if run in _RAISED else size) for run in runs if run]


def _advance(run: str, size: int) -> float:
    return float(_font(size).getlength(_RAISED.get(run, "u" if run == "µ" else run)))


def text_width(words: str, size: int) -> float:
    """Return the width of `words` in pixels."""
    return sum(_advance(run, small) for run, small in _pieces(words, size))


def write(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    words: str,
    size: int,
    color: Color,
    *,
    anchor: str = "la",
    halo: Color | None = None,
) -> None:
    """Write one line at `xy`.

    `anchor` is Pillow's: left, middle or right, then ascender, middle or baseline. `halo` is the colour of
    a rim that keeps the words legible on a picture.
    """
    left = xy[0] - text_width(words, size) * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]]
    # Aileron's capitals are 0.71 of its size, its ascender 0.93
    baseline = xy[1] + size * {"a": 0.93, "m": 0.355, "s": 0.0}[anchor[1]]
    for layer, rim in ((halo, 3), (color, 0)):
        if layer is None:
            continue
        x = left
        for run, small in _pieces(words, size):
            lift = size * 0.3 if run in _RAISED else 0.0
            letters = _RAISED.get(run, "u" if run == "µ" else run)
            draw.text((x, baseline - lift), letters, layer, _font(small), anchor="ls", stroke_width=rim)
            if run == "µ":
                _tail(draw, x, baseline, size, layer, rim)
            x += _advance(run, small)


def _tail(draw: ImageDraw.ImageDraw, x: float, baseline: float, size: int, color: Color, rim: int) -> None:
    """Lengthen the left stem of a ``u`` below the line, which makes it a micro sign."""
    stem = x + size * 0.065
    width = max(1.0, size * 0.07)
    box = [stem - rim, baseline - size * 0.2 - rim, stem + width + rim - 1, baseline + size * 0.2 + rim]
    draw.rectangle([round(v) for v in box], color)
