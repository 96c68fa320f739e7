"""Charts of curves, as PNG and as SVG, from one description; the same bytes on every machine.

Pillow draws them, and a few lines write them as SVG: three kinds of plain chart are not worth a plotting library, which
would also bring fonts and defaults of its own that change with its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.writers.base import atomic_file

__all__ = ["COLORS", "Chart", "Curve", "draw_charts"]

Array = NDArray[Any]
Color = tuple[int, int, int]

COLORS: tuple[Color, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90),
)  # fmt: skip
"""Okabe and Ito's colours: told apart with any colour vision."""

_SIDE, _LEFT, _TOP, _BOTTOM, _RIGHT = 420, 78, 58, 70, 22
_LINE = 22  # of the legend
_INK, _SOFT, _RULE = (29, 37, 44), (104, 116, 126), (224, 229, 233)
_POINTS = 400  # of a curve that are drawn
_FINE = 3  # shapes are drawn so much larger and shrunk: smooth edges


@final
@dataclass(frozen=True)
class Curve:
    """One line of a chart: `x` and `y` (N,); `kind` ``dots`` marks its points too, ``guide`` is thin and dashed."""

    name: str
    x: Array
    y: Array
    color: Color
    kind: Literal["line", "dots", "guide"] = "line"


@final
@dataclass(frozen=True)
class Chart:
    """Curves over 0..1 with a common upper end of y, and shares as bars along the bottom."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    top: float = 1.0
    bars: tuple[float, ...] = ()


def draw_charts(stem: Path, charts: Sequence[Chart]) -> None:
    """Write `charts` side by side as ``STEM.png`` and ``STEM.svg``. Raises OutputError as `atomic_file`."""
    shapes = [shape for k, chart in enumerate(charts) for shape in _shapes(chart, k * _width())]
    size = (_width() * len(charts), max(_height(chart) for chart in charts))
    with atomic_file(stem.with_suffix(".svg"), overwrite=True) as stream:
        stream.write(_svg(shapes, size).encode())
    with atomic_file(stem.with_suffix(".png"), overwrite=True) as stream:
        _picture(shapes, size).save(stream, "PNG")


@final
@dataclass(frozen=True)
class _Shape:
    """What both writers know: a line through points, a filled box, or words."""

    kind: Literal["line", "dashes", "box", "dot", "words"]
    points: tuple[tuple[float, float], ...]
    color: Color
    size: float = 1.0
    words: str = ""
    anchor: str = "la"


def _width() -> int:
    return _LEFT + _SIDE + _RIGHT


def _height(chart: Chart) -> int:
    return _TOP + _SIDE + _BOTTOM + _LINE * len(chart.curves)


def _shapes(chart: Chart, left: float) -> list[_Shape]:
    """Return everything of one chart, whose corner is at (`left`, 0)."""
    x0, y0 = left + _LEFT, float(_TOP)

    def place(x: float, y: float) -> tuple[float, float]:
        return round(x0 + x * _SIDE, 2), round(y0 + (1 - min(1.0, y / chart.top)) * _SIDE, 2)

    found = [_Shape("words", ((x0, 16.0),), _INK, 19, chart.title)]
    for k, share in enumerate(chart.bars):
        (a, top), (b, bottom) = place(k / len(chart.bars), 0), place((k + 1) / len(chart.bars), 0)
        found.append(_Shape("box", ((a + 1, top - share * 0.3 * _SIDE), (b - 1, bottom)), _RULE))
    for tick in np.linspace(0, 1, 6).tolist():
        found.append(_Shape("line", (place(0, tick * chart.top), place(1, tick * chart.top)), _RULE))
        x, y = place(tick, 0)
        found.append(_Shape("words", ((x, y + 8),), _SOFT, 14, f"{tick:.1f}", "ma"))
        x, y = place(0, tick * chart.top)
        found.append(_Shape("words", ((x - 8, y),), _SOFT, 14, f"{tick * chart.top:.3g}", "rm"))
    found.append(_Shape("line", (place(0, chart.top), place(0, 0), place(1, 0)), _INK))
    x, y = place(0.5, 0)
    found.append(_Shape("words", ((x, y + 30),), _INK, 16, chart.x, "ma"))
    found.append(_Shape("words", ((x0, y0 - 20),), _INK, 15, chart.y))
    for k, curve in enumerate(chart.curves):
        points = tuple(place(a, b) for a, b in _thinned(curve))
        kind: Literal["line", "dashes"] = "dashes" if curve.kind == "guide" else "line"
        width = 1.2 if curve.kind == "guide" else 2.0
        found.append(_Shape(kind, points, curve.color, width))
        if curve.kind == "dots":
            found += [_Shape("dot", (point,), curve.color, 4.0) for point in points]
        line = y0 + _SIDE + 66 + k * _LINE
        found.append(_Shape(kind, ((x0, line), (x0 + 26, line)), curve.color, width))
        found.append(_Shape("words", ((x0 + 34, line),), _INK, 14, curve.name, "lm"))
    return found


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """Return the points that are drawn, evenly along x; the ends always."""
    held = np.isfinite(curve.x) & np.isfinite(curve.y)
    x, y = curve.x[held], curve.y[held]
    if len(x) > _POINTS:
        place = np.searchsorted(x, np.linspace(x[0], x[-1], _POINTS))
        rows = np.unique(np.clip(np.concatenate([[0], place, [len(x) - 1]]), 0, len(x) - 1))
        x, y = x[rows], y[rows]
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _svg(shapes: Sequence[_Shape], size: tuple[int, int]) -> str:
    """Return the shapes as SVG: no script, no style sheet, no font of its own."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}"'
        f' viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
    ]
    for shape in shapes:
        color = "#{:02x}{:02x}{:02x}".format(*shape.color)
        if shape.kind in ("line", "dashes"):
            dashes = ' stroke-dasharray="6 5"' if shape.kind == "dashes" else ""
            path = " ".join(f"{x:g},{y:g}" for x, y in shape.points)
            lines.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{shape.size:g}"{dashes}/>'
            )
        elif shape.kind == "box":
            (a, b), (c, d) = shape.points
            lines.append(
                f'<rect x="{a:.2f}" y="{b:.2f}" width="{c - a:.2f}" height="{d - b:.2f}" fill="{color}"/>'
            )
        elif shape.kind == "dot":
            ((x, y),) = shape.points
            lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{shape.size:g}" fill="{color}"/>')
        else:
            ((x, y),) = shape.points
            anchor = {"l": "start", "m": "middle", "r": "end"}[shape.anchor[0]]
            drop = {"a": 0.93, "m": 0.355}[shape.anchor[1]] * shape.size  # as `lettering` has it
            lines.append(
                f'<text x="{x:g}" y="{y + drop:.2f}" font-size="{shape.size:g}" text-anchor="{anchor}"'
                f' fill="{color}">{escape(shape.words)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _picture(shapes: Sequence[_Shape], size: tuple[int, int]) -> Any:
    """Return the shapes as a Pillow image: lines smooth, words sharp."""
    from PIL import Image, ImageDraw

    from wsitk.writers.lettering import write

    page = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), (255, 255, 255))
    pen = ImageDraw.Draw(page)
    for shape in shapes:
        points = [(x * _FINE, y * _FINE) for x, y in shape.points]
        width = max(1, round(shape.size * _FINE))
        if shape.kind == "line" and len(points) > 1:
            pen.line(points, shape.color, width, joint="curve")
        elif shape.kind == "dashes":
            for start, stop in _dashes(points, 6 * _FINE, 5 * _FINE):
                pen.line([start, stop], shape.color, width)
        elif shape.kind == "box" and points[1][1] > points[0][1]:
            pen.rectangle(points, shape.color)
        elif shape.kind == "dot":
            (x, y), r = points[0], shape.size * _FINE
            pen.ellipse([x - r, y - r, x + r, y + r], shape.color)
    page = page.resize(size, Image.Resampling.BOX)
    pen = ImageDraw.Draw(page)
    for shape in shapes:
        if shape.kind == "words":
            write(pen, shape.points[0], shape.words, round(shape.size), shape.color, anchor=shape.anchor)
    return page


def _dashes(
    points: Sequence[tuple[float, float]], on: float, off: float
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the dashes along a line through `points`; each part begins with a whole one."""
    found = []
    for (xa, ya), (xb, yb) in pairwise(points):
        length = float(np.hypot(xb - xa, yb - ya))
        for start in np.arange(0.0, length, on + off).tolist():
            t, u = start / length, min(1.0, (start + on) / length)
            found.append(((xa + t * (xb - xa), ya + t * (yb - ya)), (xa + u * (xb - xa), ya + u * (yb - ya))))
    return found
