"""A slide with restored pixels laid over it: what any model reads after a restoration.

A restoration is a folder of results: `restored_mask.ome.zarr` says which level-0 pixels were painted,
`restoration.ome.zarr` holds them on the grid of the model that did it. All other pixels are the slide's own, to the
last bit. Where that grid is coarser than level 0, the painted pixels are enlarged linearly, and the outermost
`FEATHER` of them mix with what was there: beyond them nothing changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.resample import apply_taps, make_taps

__all__ = ["FEATHER", "MASK", "PAINTED", "RestoredSource", "restoration_of"]

MASK = "restored_mask.ome.zarr"
PAINTED = "restoration.ome.zarr"

FEATHER = 2
"""Level-0 pixels inside the mask over which what was painted on a coarser grid fades in."""

_PART = 4096  # level-0 pixels on a side that are composed at once for a coarser level


def restoration_of(folder: Path) -> dict[str, Any]:
    """Return what a restoration says of itself, for identities and provenance: model, mask, hashes of its pixels.

    Raises SourceError (WSI684) if the folder holds no finished restoration.
    """
    try:
        record = json.loads((folder / "provenance.json").read_bytes())
        pixels = {k: v for k, v in record["outputs"].items() if k.split("/")[0] in (MASK, PAINTED)}
        digest = hashlib.sha256(json.dumps(pixels, sort_keys=True).encode()).hexdigest()
        return {
            "model": record["key"]["model"],
            "mask": record["key"]["restoration"]["mask"],
            "seed": record["key"]["restoration"]["seed"],
            "sha256": digest,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "WSI684", f"{folder} holds no finished restoration ({error}); restore the slide again"
        ) from error


@final
class RestoredSource(Source):
    """`inner` with the restoration in `folder` laid over it; closes `inner` with itself.

    Raises SourceError (WSI684) if the folder holds no restoration of such an image.
    """

    def __init__(self, inner: Source, folder: str | Path) -> None:
        self._inner, self._folder = inner, Path(folder)
        self.name, self.axes, self.levels = inner.name, inner.axes, inner.levels
        self.dtype, self.channel_names = inner.dtype, inner.channel_names
        self.spacing, self.spacing_error = inner.spacing, inner.spacing_error
        self.bounds, self.frame = inner.bounds, inner.frame
        self._open()
        self.warnings = (
            *inner.warnings,
            f"WSI688 {len(self._boxes)} restored regions are read as if they were tissue",
        )
        self.ref = None
        if inner.ref is not None:
            self.ref = SourceRef(inner.ref.path, {**inner.ref.options, "restored": str(self._folder)})

    def _open(self) -> None:
        import zarr

        try:
            self._mask: Any = zarr.open_array(str(self._folder / MASK / "0"), mode="r")
            self._painted: Any = zarr.open_array(str(self._folder / PAINTED / "0"), mode="r")
            notes = json.loads((self._folder / MASK / "zarr.json").read_bytes())["attributes"]["wsitk"]
            self._scale = tuple(float(s) for s in notes["scale"])
            self._boxes = np.array(notes["boxes"], np.int64).reshape(-1, 4)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        if self._mask.shape != self.levels[0].shape:
            raise SourceError(
                "WSI684",
                f"{self._folder} is the restoration of an image of {self._mask.shape} pixels, {self.name} has "
                f"{self.levels[0].shape}; give the slide that was restored",
            )

    # --- reading -------------------------------------------------------------------------------------

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the slide's pixels with the restored ones in their place."""
        reading = self._inner.read_inside(region, level)
        places = list(self._met(region, level))
        if not places:
            return reading
        pixels = reading.pixels.copy()
        for place in places:
            into = pixels[place.slices(region.start)]
            if level == 0:
                into[:] = self._composed(place, reading.pixels[place.slices(region.start)])[0]
            else:
                for part in _parts(place, self.levels[level].downsample):
                    self._reduced(part, level, pixels[part.slices(region.start)])
        return Reading(pixels, reading.absent)

    def _met(self, region: Region, level: int) -> Iterator[Region]:
        """Yield what the boxes of restored regions share with `region`, in pixels of `level`."""
        factor = np.array(self.levels[level].downsample)
        low = np.floor(self._boxes[:, :2] / factor).astype(np.int64)
        high = np.ceil(self._boxes[:, 2:] / factor).astype(np.int64)
        low, high = np.maximum(low, region.start), np.minimum(high, region.stop)
        for row in np.flatnonzero((high > low).all(axis=1)).tolist():
            yield Region.between(low[row], high[row])

    def _composed(self, region: Region, pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return level-0 pixels with the restored ones in their place, and which these are."""
        reach = region.grow((FEATHER + 1,) * 2).intersect(Region((0, 0), self.levels[0].shape))
        marked = self._read(self._mask, reach) > 0
        mine = marked[region.slices(reach.start)]
        if not mine.any():
            return pixels, mine
        painted = self._enlarged(region)
        if max(self._scale) <= 1.0:
            new = np.floor(painted + np.float32(0.5))
        else:
            share = _rise(marked)[region.slices(reach.start)][..., None]
            new = np.floor(share * painted + (1 - share) * pixels + np.float32(0.5))
        return np.where(mine[..., None], new.astype(self.dtype), pixels), mine

    def _enlarged(self, region: Region) -> NDArray[np.float32]:
        """Return what was painted over a level-0 region, float32 (h, w, 3) in 0..255."""
        shape = self._painted.shape[1:]
        taps = tuple(
            make_taps(a, b, 1.0 / s, n)
            for a, b, s, n in zip(region.start, region.stop, self._scale, shape, strict=True)
        )
        window = Region.between((t.start for t in taps), (t.stop for t in taps))
        pixels = np.moveaxis(self._read(self._painted, window)[:3], 0, -1)
        return np.asarray(apply_taps(np.ascontiguousarray(pixels), taps, np.dtype(np.float32)), np.float32)

    def _reduced(self, part: Region, level: int, into: NDArray[Any]) -> None:
        """Put the means of restored level-0 pixels where a pixel of a coarser level has any."""
        full = self.levels[0].shape
        factors = self.levels[level].downsample
        taps = tuple(
            make_taps(a, b, f, n) for a, b, f, n in zip(part.start, part.stop, factors, full, strict=True)
        )
        window = Region.between((t.start for t in taps), (t.stop for t in taps))
        fine, marked = self._composed(window, self._inner.read_inside(window, 0).pixels)
        if not marked.any():
            return
        hit = apply_taps(marked[..., None].astype(np.float32), taps, np.dtype(np.float32))[..., 0] > 0
        into[hit] = apply_taps(fine, taps, self.dtype)[hit]

    def _read(self, array: Any, region: Region) -> NDArray[np.uint8]:
        try:
            return np.asarray(array[(Ellipsis, *region.slices())])
        except Exception as error:  # zarr and its codecs raise what they like
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> SourceError:
        return SourceError(
            "WSI684",
            f"{self.name}: its restoration in {self._folder} can't be read ({type(error).__name__}: {error}); "
            "restore the slide again with --overwrite",
        )

    # --- the rest ------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return the slide's, with the restoration's model, mask and pixels."""
        return {**self._inner.identity(), "restoration": restoration_of(self._folder)}

    def stamp(self) -> dict[str, Any] | None:
        """Return that of the slide's files: the restoration's own bytes are under checksums."""
        return self._inner.stamp()

    def close(self) -> None:
        """Close the slide."""
        self._inner.close()


def _rise(marked: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how much a painted pixel counts: less than 1 for the outermost ones."""
    import cv2

    depth = cv2.distanceTransform(marked.astype(np.uint8), cv2.DIST_C, 3)
    return np.asarray(np.minimum(depth / np.float32(FEATHER + 1), 1), np.float32)


def _parts(region: Region, factors: tuple[float, ...]) -> Iterator[Region]:
    """Yield parts of a region of a coarser level, each of a bounded number of level-0 pixels."""
    rows, columns = (max(1, int(_PART / f)) for f in factors)
    for y in range(region.start[0], region.stop[0], rows):
        for x in range(region.start[1], region.stop[1], columns):
            yield Region((y, x), (rows, columns)).intersect(region)
