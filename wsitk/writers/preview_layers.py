"""The layers of `preview.png`: density of nuclei, tissue, tiles and outlines, as arrays.

Everything is at the resolution of the picture; objects are streamed, so memory follows the picture alone.
Coordinates are level-0 pixels unless a name says otherwise; images are RGB, uint8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.writers.parquet import ObjectsFile

__all__ = ["Census", "take_census", "density_layer", "blend", "tile_layer", "outline_tissue", "draw_outlines"]

Array = NDArray[Any]
Color = tuple[int, int, int]

_SUBPIXEL = 4  # bits of fraction that cv2 draws with
_STATUS_COLORS: dict[str, Color] = {
    "unreadable": (214, 40, 57),
    "absent": (157, 78, 221),
    "model_failed": (242, 133, 0),
    "not_done": (120, 120, 120),
}


@dataclass(frozen=True)
class Census:
    """Where the objects are: `density` (classes, H, W) on the picture, `cells` (classes, h, w) per window."""

    counts: Array
    density: Array
    cells: Array


def take_census(
    objects: str | Path,
    classes: int,
    shape: tuple[int, ...],
    scale_xy: tuple[float, float],
    window: tuple[int, int],
    *,
    restored: bool = True,
) -> Census:
    """Count objects by class, by picture pixel, and by window of the shape `window`, in one pass.

    `shape` is the picture's (H, W), `scale_xy` level-0 pixels per picture pixel. Without `restored` those in
    restored pixels are left out.
    """
    height, width = shape
    reach = (height * scale_xy[1], width * scale_xy[0])
    windows = [max(1, int(np.ceil(n / w))) for n, w in zip(reach, window, strict=True)]
    counts = np.zeros(classes, np.int64)
    density = np.zeros((classes, height, width), np.float32)
    cells = np.zeros((classes, *windows), np.int64)
    with ObjectsFile(objects) as table:
        for group in table.groups(["class_id", "centroid_x", "centroid_y", "restored"]):
            kind, x, y, doubtful = (group[name].to_numpy() for name in group.column_names)
            if not restored:
                kind, x, y = kind[~doubtful], x[~doubtful], y[~doubtful]
            counts += np.bincount(kind, minlength=classes)
            for grid, step in ((density, scale_xy[::-1]), (cells, window)):
                rows, columns = (
                    np.clip((v / s).astype(np.int64), 0, n - 1)
                    for v, s, n in zip((y, x), step, grid.shape[1:], strict=True)
                )
                np.add.at(grid, (kind, rows, columns), 1)
    return Census(counts, density, cells)


def density_layer(density: Array, colors: list[Color], tissue: Array) -> tuple[Array, Array]:
    """Return the colour (H, W, 3) and opacity (H, W) of all classes together.

    Where cells are few each is a dot; where they are many the colour is their mixture and the opacity
    grows with their number, towards a limit that lets the tissue show.
    """
    total = float(density.sum())
    room = np.sqrt(max(1.0, float(tissue.sum())) / max(1.0, total))  # picture pixels from cell to cell
    sigma = float(np.clip(0.28 * room, 0.75, 1.6))
    soft = np.stack([cv2.GaussianBlur(layer, (0, 0), sigma) for layer in density])
    mass = soft.sum(axis=0)
    palette = np.asarray(colors, np.float32).reshape(-1, 3)
    color = np.tensordot(soft, palette, axes=(0, 0)) / np.maximum(mass, 1e-9)[..., None]
    peak = 1 / (2 * np.pi * sigma**2)  # of one cell
    crowd = max(peak, float(np.percentile(mass[mass > peak / 20], 98)) if total else peak)
    return color, 0.88 * (1 - np.exp(-2.2 * mass / crowd)).astype(np.float32)


def blend(image: Array, color: Array | Color, alpha: Array | float) -> Array:
    """Return `image` with `color` over it at opacity `alpha` (0 to 1)."""
    weight = np.asarray(alpha, np.float32)[..., None] if np.ndim(alpha) else np.float32(alpha)
    mixed = image * (1 - weight) + np.asarray(color, np.float32) * weight
    return np.asarray(np.clip(np.rint(mixed), 0, 255), np.uint8)


def outline_tissue(image: Array, tissue: Array) -> Array:
    """Return `image` with everything but tissue paled, and a thin line around the tissue."""
    mask = tissue.astype(np.uint8)
    image = np.where(tissue[..., None], image, blend(image, (255, 255, 255), 0.55))
    edges, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    smooth = [_smooth(e) for e in edges if len(e) > 12]
    line = np.zeros_like(mask)
    cv2.polylines(line, smooth, True, 255, 1, cv2.LINE_AA, _SUBPIXEL)
    return blend(image, (38, 70, 83), line / 255 * 0.75)


def _smooth(contour: Array) -> Array:
    """Return a closed contour averaged along itself, in cv2's fixed point: masks are coarse."""
    points = contour[:, 0].astype(np.float64)
    reach = min(4, len(points) // 4)
    ring = np.concatenate([points[-reach:], points, points[:reach]])
    kernel = np.ones(2 * reach + 1) / (2 * reach + 1)
    soft = np.stack([np.convolve(ring[:, k], kernel, "valid") for k in range(2)], axis=1)
    return np.asarray(np.rint(soft * (1 << _SUBPIXEL)), np.int32)[:, None]


def tile_layer(
    image: Array, tiles: Iterable[tuple[Region, str]] | str | Path, scale_xy: tuple[float, float]
) -> tuple[Array, dict[str, Color]]:
    """Return `image` with a faint grid where tiles were computed, and hatching where they could not be.

    The second value names the colour of each status that is hatched somewhere.
    """
    lines = np.zeros(image.shape[:2], np.uint8)
    marks = {name: np.zeros(image.shape[:2], np.uint8) for name in _STATUS_COLORS}
    for status, box in _tile_boxes(tiles, scale_xy):
        if status in marks:
            cv2.rectangle(marks[status], box[:2], box[2:], 255, -1)
        elif status == "ok" and min(box[2] - box[0], box[3] - box[1]) >= 6:
            cv2.rectangle(lines, box[:2], box[2:], 255, 1)
    image = blend(image, (38, 70, 83), lines / 255 * 0.13)
    diagonal = np.add.outer(np.arange(image.shape[0]), np.arange(image.shape[1])) % 8 < 3
    shown = {name: _STATUS_COLORS[name] for name, mark in marks.items() if mark.any()}
    for name, color in shown.items():
        image = blend(image, color, np.where(diagonal, 0.8, 0.25) * (marks[name] > 0))
    return image, shown


def _tile_boxes(
    tiles: Iterable[tuple[Region, str]] | str | Path, scale_xy: tuple[float, float]
) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Yield each tile's status and box (left, top, right, bottom) in picture pixels."""
    for region, status in _read_ledger(tiles) if isinstance(tiles, (str, Path)) else tiles:
        corners = (*region.start[::-1], *region.stop[::-1])
        left, top, right, bottom = (round(v / s) for v, s in zip(corners, scale_xy * 2, strict=True))
        yield status, (left, top, right, bottom)


def _read_ledger(path: str | Path) -> Iterator[tuple[Region, str]]:
    names = ["status", *(f"level0_{kind}_{axis}" for kind in ("start", "shape") for axis in (0, 1))]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=names):
            status, *edges = (batch[name].to_pylist() for name in names)
            for name, y, x, height, width in zip(status, *edges, strict=True):
                yield Region((y, x), (height, width)), name


def draw_outlines(
    patch: Array, window: Region, objects: str | Path, colors: list[Color], *, width: int = 2
) -> tuple[Array, Array]:
    """Return `patch` (the picture of `window`, at any zoom) with outlines, and the counts by class."""
    zoom = np.array([patch.shape[1] / window.shape[1], patch.shape[0] / window.shape[0]])
    counts = np.zeros(len(colors), np.int64)
    fill, lines = patch.copy(), patch.copy()
    soft = np.zeros(patch.shape[:2], np.uint8)
    for kind, outline in _inside(objects, window):
        counts[kind] += 1
        rings = [
            np.rint((shapely.get_coordinates(ring) - window.start[::-1]) * zoom * (1 << _SUBPIXEL)).astype(
                np.int32
            )
            for ring in shapely.get_rings(outline)
        ]
        cv2.fillPoly(fill, rings, colors[kind], cv2.LINE_AA, _SUBPIXEL)
        cv2.polylines(soft, rings, True, 255, width + 2, cv2.LINE_AA, _SUBPIXEL)
        cv2.polylines(lines, rings, True, colors[kind], width, cv2.LINE_AA, _SUBPIXEL)
    body = blend(fill, patch, 0.8)
    edge = (lines != patch).any(axis=2)
    # a pale rim keeps a line apart from tissue of its own colour
    body = blend(body, (255, 255, 255), soft / 255 * 0.35)
    return np.where(edge[..., None], lines, body), counts


def _inside(objects: str | Path, window: Region) -> Iterator[tuple[int, Any]]:
    """Yield class and outline of the objects that touch `window`, one row group at a time."""
    (top, left), (bottom, right) = window.start, window.stop
    with ObjectsFile(objects) as table:
        for group in table.groups(["class_id", "geometry", "bbox"]):
            x0, y0, x1, y1 = (v.to_numpy() for v in group["bbox"].combine_chunks().flatten())
            rows = group.filter(pa.array((x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top)))
            shapes = shapely.from_wkb(rows["geometry"].to_numpy())
            yield from zip(rows["class_id"].to_pylist(), shapes, strict=True)
