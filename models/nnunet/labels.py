"""Names and colours of labels."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from wsitk.model import ObjectClass

__all__ = ["color_of", "label_classes"]

_TURN = 0.6180339887498949
"""The golden ratio's part of a turn: neighbours in a list get far hues, and no two of a hundred the same."""


def color_of(label: int) -> tuple[int, int, int]:
    """Return the colour of label 1, 2, …: the same on every machine, never dark."""
    shade = (label - 1) // 12 % 3
    red, green, blue = colorsys.hsv_to_rgb(
        (label - 1) * _TURN % 1.0, (0.85, 0.6, 0.75)[shade], (0.95, 1.0, 0.75)[shade]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def label_classes(names: Sequence[str]) -> tuple[ObjectClass, ...]:
    """Return the classes of labels 1, 2, …, called `names`."""
    return tuple(ObjectClass(name, color_of(k)) for k, name in enumerate(names, 1))
