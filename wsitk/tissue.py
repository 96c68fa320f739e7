"""Where the tissue is: a coarse mask that decides which tiles are worth reading."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources import Origin, borrowed
from wsitk.sources.base import Source
from wsitk.sources.working import WorkingImage

__all__ = ["TissueMask", "everywhere", "find_tissue", "from_geojson", "patch_of", "thumbnail", "thumbnail_of"]

TARGET_UM = 8.0
"""Pixel size of the mask: a nucleus is a pixel, a glass fragment is many."""

MOST_PIXELS = 4_000_000
"""Of the mask: on a slide of more than about 16 x 16 mm its pixels are larger, so that memory has a bound."""

SMALLEST_UM2 = 2_000.0
"""Specks below this area are dirt; a needle-biopsy fragment is ten times larger."""

MARGIN_UM = 32.0
"""The mask grows by this much, so that pale edges of tissue are not lost."""

_WINDOW = 2048

THRESHOLD_RANGE = (0.03, 0.10)
"""Optical density above clear glass: Otsu's choice is held within it. A slide without glass would
otherwise be split through its tissue, and one without tissue through its noise."""


@dataclass(frozen=True)
class TissueMask:
    """A coarse boolean image over level 0.

    `core` is the tissue itself, `mask` the tissue and a margin around it, which is what is read. `scale` is
    the number of level-0 pixels per mask pixel along each axis; `threshold` the optical density above glass
    that was used, None where a person drew the mask.
    """

    mask: NDArray[np.bool_]
    core: NDArray[np.bool_]
    scale: tuple[float, ...]
    threshold: float | None = None

    def touches(self, region: Region) -> bool:
        """Tell whether any tissue lies in `region` (level-0 pixels)."""
        return bool(self.mask[self._window(region)].any())

    def area_um2(self, spacing_um: tuple[float, ...], region: Region) -> float:
        """Return the area of tissue in `region` (level-0 pixels); `spacing_um` is level 0's."""
        pixel = float(np.prod(np.multiply(self.scale, spacing_um)))
        return float(self.core[self._window(region)].sum()) * pixel

    def both(self, other: TissueMask) -> TissueMask:
        """Return the intersection with a mask of the same shape."""
        return TissueMask(self.mask & other.mask, self.core & other.core, self.scale, self.threshold)

    def _window(self, region: Region) -> tuple[slice, ...]:
        spans = zip(region.start, region.stop, self.scale, self.mask.shape, strict=True)
        return tuple(_pixels(a / s, b / s, n) for a, b, s, n in spans)


def _pixels(start: float, stop: float, count: int) -> slice:
    """Return the mask pixels that an interval meets.

    The last pixel answers for what lies just beyond it: the mask's size was rounded.
    """
    if stop <= 0 or start >= count + 1:
        return slice(0, 0)
    low = min(max(0, int(start)), count - 1)
    return slice(low, max(low + 1, min(count, int(np.ceil(stop)))))


def thumbnail(source: Source) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """Return the whole image at about 8 µm per pixel (2-D, H W C), and the level-0 pixels per pixel.

    At most about `MOST_PIXELS`, and read in pieces, so that memory has a bound. Without a known spacing the
    longest side comes out between 1,000 and 2,000 pixels.
    """
    if source.spacing is not None:
        area = math.prod(n * um for n, um in zip(source.shape, source.spacing.um, strict=True))
        finest = max(TARGET_UM, math.sqrt(area / MOST_PIXELS))
        target = tuple(max(finest, um) for um in source.spacing.um)
        image = WorkingImage(source, target, tolerance=0.2)
        channels, dtype = len(source.channel_names), source.dtype
        rows = [
            _legible(lambda region: image.read(region).pixels, r, channels, dtype)
            for r in _strips(image.shape, 256)
        ]
        return np.concatenate(rows), image.scale
    fit = [i for i, level in enumerate(source.levels) if max(level.shape) >= 1000] or [0]
    level = source.levels[fit[-1]]
    step = max(1, max(level.shape) // 1000)
    return _shrunk(source, fit[-1], step), tuple(d * step for d in level.downsample)


def _shrunk(source: Source, number: int, step: int) -> NDArray[np.uint8]:
    """Return a level at one pixel for `step` x `step`, read window by window."""
    side = step * max(1, _WINDOW // step)
    frame = Region((0, 0), source.levels[number].shape)
    rows = []
    for y in range(0, frame.shape[0], side):
        row = []
        for x in range(0, frame.shape[1], side):
            window = Region((y, x), (side, side)).intersect(frame)
            pixels = _legible(
                lambda region: source.read(region, number), window, len(source.channel_names), source.dtype
            )
            row.append(_shrink(pixels, step))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def thumbnail_of(origin: Origin) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """Return the thumbnail of an input that is opened for it; see `thumbnail`."""
    with borrowed(origin) as source:
        return thumbnail(source)


def patch_of(origin: Origin, region: Region) -> NDArray[Any]:
    """Return level-0 pixels; grey where they can't be read, which the ledger says of those tiles."""
    with borrowed(origin) as source:
        try:
            return source.read(region)
        except SourceError:
            return np.full((*region.shape, len(source.channel_names)), 128, source.dtype)


def _legible(
    read: Callable[[Region], NDArray[Any]], region: Region, channels: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return `read(region)`, with grey for what can't be decoded, found by halving.

    Grey counts as tissue: its tiles are tried, and the ledger says what is wrong with them.
    """
    try:
        return read(region)
    except SourceError:
        if max(region.shape) <= 32:
            return np.full((*region.shape, channels), 128, dtype)
    axis = int(np.argmax(region.shape))
    middle = [*region.start]
    middle[axis] += region.shape[axis] // 2
    ends = [middle[k] if k == axis else stop for k, stop in enumerate(region.stop)]
    halves = Region.between(region.start, ends), Region.between(middle, region.stop)
    return np.concatenate([_legible(read, half, channels, dtype) for half in halves], axis)


def _strips(shape: tuple[int, ...], rows: int) -> Iterator[Region]:
    for y in range(0, shape[0], rows):
        yield Region((y, 0), (min(rows, shape[0] - y), shape[1]))


def _shrink(pixels: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    import cv2

    size = (-(-pixels.shape[1] // step), -(-pixels.shape[0] // step))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def find_tissue(pixels: NDArray[np.uint8], scale: tuple[float, ...], um: float | None) -> TissueMask:
    """Return the tissue in a brightfield thumbnail (H, W, 3), whose pixels measure `um` micrometres.

    Glass is the brightest common colour; tissue absorbs more, in any channel. Otsu (1979) on the optical
    density over glass finds the threshold, within `THRESHOLD_RANGE`.
    """
    import cv2

    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.0)
    density = np.zeros(smooth.shape[:2], np.float32)
    bytes_ = np.maximum(np.arange(256, dtype=np.float32), 1.0)
    for k in range(3):  # by a table of 256 entries: the picture may be large
        glass = max(_percentile(smooth[..., k], 95), 200.0)
        table = np.log10(np.float32(glass) / bytes_).clip(0).astype(np.float32)
        np.maximum(density, table[smooth[..., k]], out=density)
    scaled = (density.clip(0, 0.5) * 510).astype(np.uint8)
    otsu = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] / 510
    threshold = float(np.clip(otsu, *THRESHOLD_RANGE))
    pixel_um = um or TARGET_UM
    mask = _drop_specks(density > threshold, SMALLEST_UM2 / pixel_um**2)
    radius = max(1, round(MARGIN_UM / pixel_um))
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
    grown = cv2.dilate(mask.astype(np.uint8), disk).astype(bool)
    return TissueMask(grown, mask, scale, threshold)


def _percentile(values: NDArray[np.uint8], percent: float) -> float:
    """Return a percentile of bytes, interpolated linearly between ranks, from their counts."""
    ranks = np.cumsum(np.bincount(values.ravel(), minlength=256))
    place = percent / 100 * (values.size - 1)
    low, high = (int(np.searchsorted(ranks, n, side="right")) for n in (math.floor(place), math.ceil(place)))
    return low + (high - low) * (place - math.floor(place))


def _drop_specks(mask: NDArray[np.bool_], smallest: float) -> NDArray[np.bool_]:
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= smallest
    keep[0] = False
    return np.asarray(keep[labels], bool)


def everywhere(shape: tuple[int, ...], scale: tuple[float, ...]) -> TissueMask:
    """Return a mask that leaves nothing out."""
    whole = np.ones(shape, bool)
    return TissueMask(whole, whole, scale)


def from_geojson(
    path: str,
    shape: tuple[int, ...],
    scale: tuple[float, ...],
    offset_xy: tuple[float, float] = (0.0, 0.0),
) -> TissueMask:
    """Return the regions drawn in a GeoJSON file (x right, y down) as a mask.

    Coordinates are those of QuPath: level-0 pixels from `offset_xy`, the corner of the scanned bounds.
    Raises UsageError (WSI014) if the file can't be read or holds no polygon.
    """
    import cv2

    mask = np.zeros(shape, np.uint8)
    rings = 0
    try:
        for polygon in _polygons(json.loads(Path(path).read_text("utf-8"))):
            corners = [(np.asarray(r, float)[:, :2] + offset_xy) / scale[::-1] for r in polygon]
            cv2.fillPoly(mask, [np.round(c).astype(np.int32) for c in corners], 1)
            rings += len(corners)
    except (OSError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise UsageError("WSI014", f"{path} is no GeoJSON of regions ({error}); export it again") from error
    if not rings:
        raise UsageError(
            "WSI014", f"{path} holds no Polygon or MultiPolygon; draw regions and export them as GeoJSON"
        )
    drawn = mask.astype(bool)
    return TissueMask(drawn, drawn, scale)


def _polygons(node: object) -> list[list[list[list[float]]]]:
    """Return the coordinates of every polygon in a parsed GeoJSON value, however deep it lies."""
    if isinstance(node, list):
        return [p for item in node for p in _polygons(item)]
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Polygon":
        return [node["coordinates"]]
    if node.get("type") == "MultiPolygon":
        return list(node["coordinates"])
    return [p for k in ("features", "geometry", "geometries") for p in _polygons(node.get(k))]
