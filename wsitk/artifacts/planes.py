"""What a detector sees of a slide: some numbers for each pixel of a coarse grid, gathered in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources import Origin, borrowed
from wsitk.sources.base import Source
from wsitk.sources.spacing import require_spacing
from wsitk.sources.working import WorkingImage

__all__ = ["DETAIL_LIMIT_UM", "DETAIL_UM", "GRID_UM", "Planes", "measure", "measured"]

GRID_UM = 8.0
"""Pixel size of the grid: a nucleus is a pixel, as in the tissue mask."""

DETAIL_UM = 1.0
"""Pixel size at which sharpness and specks are measured; edges of nuclei are about 1 µm wide."""

DETAIL_LIMIT_UM = 1.25
"""Coarser pixels say nothing of sharpness."""

MAX_PIXELS = 1 << 24
"""Pixels of the grid: 32 mm square at 8 µm. Beyond this its pixels grow."""

_WINDOW = 1024  # detail pixels on a side, about
_HALO = 16  # detail pixels that the widest filter sees beyond a window
_CLEAR = 24  # grey values below white: a window without more holds nothing to measure

Array = NDArray[Any]


@dataclass(frozen=True)
class Planes:
    """A slide in numbers, on a grid whose pixels measure `um` micrometres.

    Attributes
    ----------
    rgb
        (y, x, 3) uint8: the mean colour.
    fine, coarse
        (y, x) float32: mean squared detail of 1 to 2 µm and of 2 to 4 µm, in squared grey values; zero in
        clear glass, and everywhere if the slide's pixels are coarser than DETAIL_LIMIT_UM.
    darkest
        (y, x) uint8: the brightest channel of the darkest spot of about 3 µm. Stained tissue lets some colour
        through, dirt does not.
    seen
        (y, x) bool: what could be read.
    scale
        Level-0 pixels per grid pixel (y, x).
    um
        Micrometres per grid pixel, the mean over both axes.
    name, level0_um, bounds
        The slide's name, its pixel size (y, x), and the scanned area in level-0 pixels.
    """

    rgb: NDArray[np.uint8]
    fine: NDArray[np.float32]
    coarse: NDArray[np.float32]
    darkest: NDArray[np.uint8]
    seen: NDArray[np.bool_]
    scale: tuple[float, float]
    um: float
    name: str
    level0_um: tuple[float, float]
    bounds: Region
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Return the grid's (rows, columns)."""
        return self.seen.shape[0], self.seen.shape[1]


def measure(source: Source, grid_um: float = GRID_UM) -> Planes:
    """Return the planes of a slide at about `grid_um` micrometres per pixel.

    Memory holds the planes, 13 bytes for each grid pixel, and one window. Windows that can't be read are
    left white, marked in `seen`, and counted in a warning (WSI665). Raises UsageError (WSI664) for what is
    no brightfield slide, SpacingError (WSI201, WSI202) without a usable pixel size.
    """
    if source.ndim != 2 or source.dtype != np.uint8 or len(source.channel_names) != 3:
        raise UsageError(
            "WSI664",
            f"{source.name}: artifacts are looked for in brightfield slides, (y, x, RGB) of 8 bits; "
            f"this is {''.join(source.axes)} {source.dtype} with {len(source.channel_names)} channels",
        )
    um = require_spacing(source).um
    fine_enough = max(um) <= DETAIL_LIMIT_UM
    image = WorkingImage(source, (max(DETAIL_UM, *um),) * 2, tolerance=0.25)
    assert image.spacing is not None  # require_spacing has seen to it
    step = _step(image.shape, image.spacing, grid_um)
    shape = ceil(image.shape[0] / step), ceil(image.shape[1] / step)
    planes = Planes(
        np.full((*shape, 3), 255, np.uint8),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.full(shape, 255, np.uint8),
        np.ones(shape, np.bool_),
        (image.scale[0] * step, image.scale[1] * step),
        sqrt(prod(image.spacing)) * step,
        source.name,
        (um[0], um[1]),
        source.bounds,
    )
    lost = sum(not _fill(planes, image, part, step, fine_enough) for part in _windows(shape, step))
    if not lost:
        return planes
    share = 1 - float(planes.seen.mean())
    text = (
        f"WSI665 {source.name}: {lost} windows ({share:.1%}) can't be read; no artifacts are looked for there"
    )
    return Planes(**{**vars(planes), "warnings": (text,)})


def measured(origin: Origin, grid_um: float) -> Planes:
    """Return the planes of an input that is opened for it: what a reading process is asked for."""
    with borrowed(origin) as source:
        return measure(source, grid_um)


def _step(shape: tuple[int, ...], um: tuple[float, ...], grid_um: float) -> int:
    """Return how many detail pixels make a grid pixel along each axis."""
    step = max(1, round(grid_um / sqrt(prod(um))))
    while ceil(shape[0] / step) * ceil(shape[1] / step) > MAX_PIXELS:
        step += 1
    return step


def _windows(shape: tuple[int, int], step: int) -> Iterator[Region]:
    side = max(1, _WINDOW // step)
    whole = Region((0, 0), shape)
    for y in range(0, shape[0], side):
        for x in range(0, shape[1], side):
            yield Region((y, x), (side, side)).intersect(whole)


def _fill(planes: Planes, image: WorkingImage, part: Region, step: int, fine_enough: bool) -> bool:
    """Measure one window (in grid pixels); tell whether it could be read."""
    here = part.slices()
    wide = Region.between((a * step for a in part.start), (b * step for b in part.stop)).grow((_HALO, _HALO))
    try:
        pixels = image.read(wide).pixels
    except SourceError:
        planes.seen[here] = False
        return False
    inner = pixels[_HALO:-_HALO, _HALO:-_HALO]
    planes.rgb[here] = np.rint(_means(inner.astype(np.float32), step)).astype(np.uint8)
    if pixels.min() >= 255 - _CLEAR:
        return True
    # clear pixels of this window are left as they would be in a clear window: windows must not show
    clear = _cells(inner.min(-1), step).min((1, 3)) >= 255 - _CLEAR
    planes.darkest[here] = np.where(clear, 255, _cells(_brightest(pixels), step).min((1, 3)))
    if fine_enough:
        for plane, band in zip((planes.fine, planes.coarse), _bands(pixels), strict=True):
            plane[here] = np.where(clear, 0, _means(band, step))
    return True


def _cells(pixels: Array, step: int) -> Array:
    """Return (rows, step, columns, step, ...): the detail pixels of each grid pixel."""
    rows, columns, *rest = pixels.shape
    return pixels.reshape(rows // step, step, columns // step, step, *rest)


def _means(pixels: Array, step: int) -> Array:
    return np.asarray(_cells(pixels, step).mean((1, 3)))


def _brightest(pixels: Array) -> NDArray[np.uint8]:
    """Return the brightest channel, smoothed over about 3 µm, without the halo."""
    import cv2

    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.2).max(-1)
    return np.asarray(smooth[_HALO:-_HALO, _HALO:-_HALO], np.uint8)


def _bands(pixels: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the squared detail between Gaussians of 0.7, 1.4 and 2.8 pixels, without the halo."""
    import cv2

    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    levels = [cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (0.7, 1.4, 2.8)]
    fine, coarse = (np.square(a - b)[_HALO:-_HALO, _HALO:-_HALO] for a, b in pairwise(levels))
    return fine, coarse
