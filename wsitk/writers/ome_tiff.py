"""`restored.ome.tiff`: an image as a pyramid that OpenSlide and QuPath open, no pixel changed.

The levels are written twice over, in one place: as SubIFDs of the first page, which is where OME-TIFF 6 keeps its
pyramid (Bio-Formats, QuPath), and as pages of their own after it, marked as reduced images, which is where OpenSlide
looks. Both chains lead to the same bytes. Tiles are deflated without loss.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import OutputError
from wsitk.writers.base import atomic_file

__all__ = ["write_ome_tiff"]

TILE = 512
_SUBIFDS = 330
_NEXT = 8  # bytes of an offset in BigTIFF


def write_ome_tiff(
    path: str | Path,
    image: str | Path,
    *,
    spacing_um: tuple[float, float] | None,
    overwrite: bool = False,
) -> None:
    """Write the NGFF image `image`, (3, y, x) uint8 at each level, as a BigTIFF; memory is a row of its shards.

    `spacing_um` is (y, x) at level 0. Raises OutputError: WSI510 to WSI512 as `atomic_file`, WSI514 if the image is not
    RGB of 8 bits.
    """
    import tifffile
    import zarr

    group = zarr.open_group(str(image), mode="r")
    said: Any = group.attrs.asdict()
    levels: list[Any] = [group[d["path"]] for d in said["ome"]["multiscales"][0]["datasets"]]
    # OME wants a name for the file; one drawn at random would be another one in every run
    name = uuid.uuid5(
        uuid.NAMESPACE_URL, "urn:wsitk:image " + json.dumps([said, levels[0].shape], sort_keys=True)
    )
    if levels[0].dtype != np.uint8 or levels[0].shape[0] != 3 or levels[0].ndim != 3:
        raise OutputError(
            "WSI514", f"{path}: wanted an RGB image of 8 bits, got {levels[0].shape} {levels[0].dtype}"
        )
    options: dict[str, Any] = {
        "tile": (TILE, TILE), "photometric": "rgb", "planarconfig": "contig", "compression": "adobe_deflate",
        "compressionargs": {"level": 6}, "predictor": 2, "maxworkers": 1, "dtype": np.uint8,
    }  # fmt: skip
    with atomic_file(path, overwrite=overwrite) as stream:
        with tifffile.TiffWriter(_Unnamed(stream), bigtiff=True, ome=True) as writer:
            for number, level in enumerate(levels):
                shape = (*level.shape[1:], 3)
                first: dict[str, Any] = (
                    {"subfiletype": 1} if number else _head(len(levels) - 1, spacing_um, name)
                )
                writer.write(
                    _tiles(level), shape=shape, **options, **first, **_resolution(spacing_um, 2**number)
                )
        _chain(stream)


class _Unnamed:
    """A file that is known by its descriptor, whose number tifffile would take for a name."""

    def __init__(self, stream: BinaryIO) -> None:
        self.read, self.write, self.seek, self.tell = stream.read, stream.write, stream.seek, stream.tell
        self.flush, self.truncate = stream.flush, stream.truncate
        self.readinto = getattr(stream, "readinto", None)


def _head(below: int, spacing_um: tuple[float, float] | None, name: uuid.UUID) -> dict[str, Any]:
    """Return what only the first page has: room for the levels below, and OME's metadata."""
    metadata: dict[str, Any] = {"axes": "YXS", "UUID": f"urn:uuid:{name}", "Creator": "wsitk"}
    if spacing_um is not None:
        metadata |= {
            "PhysicalSizeX": spacing_um[1],
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": spacing_um[0],
            "PhysicalSizeYUnit": "µm",
        }
    return {"subifds": below, "metadata": metadata}


def _resolution(spacing_um: tuple[float, float] | None, factor: int) -> dict[str, Any]:
    if spacing_um is None:
        return {}
    per_cm = (1e4 / (spacing_um[1] * factor), 1e4 / (spacing_um[0] * factor))
    return {"resolution": per_cm, "resolutionunit": "CENTIMETER"}


def _tiles(level: Any) -> Iterator[NDArray[np.uint8]]:
    """Yield the tiles (h, w, 3) of a level, row by row; a row of the array's shards is read at a time."""
    _, height, width = level.shape
    step = max(TILE, (level.shards or level.chunks)[1] // TILE * TILE)
    for top in range(0, height, step):
        band = np.moveaxis(np.asarray(level[:, top : top + step]), 0, -1)
        for y in range(0, len(band), TILE):
            for x in range(0, width, TILE):
                yield np.ascontiguousarray(band[y : y + TILE, x : x + TILE])


def _chain(stream: BinaryIO) -> None:
    """Let the first page be followed by its SubIFDs, in order."""
    first = _read(stream, 8)
    count, offsets = _subifds(stream, first)
    places = [first, *offsets]
    for here, there in zip(places, [*offsets, 0], strict=True):
        entries = _read(stream, here)
        stream.seek(here + 8 + 20 * entries)
        stream.write(struct.pack("<Q", there))
    stream.seek(0, 2)
    assert count == len(offsets)


def _subifds(stream: BinaryIO, page: int) -> tuple[int, list[int]]:
    """Return how many SubIFDs a page names, and where they are."""
    for entry in range(_read(stream, page)):
        place = page + 8 + 20 * entry
        stream.seek(place)
        tag, _, count = struct.unpack("<HHQ", stream.read(12))
        if tag == _SUBIFDS:
            values = place + 12 if count == 1 else _read(stream, place + 12)
            return count, [_read(stream, values + _NEXT * k) for k in range(count)]
    return 0, []


def _read(stream: BinaryIO, place: int) -> int:
    """Return the 64-bit number at a place of a little-endian BigTIFF."""
    stream.seek(place)
    (value,) = struct.unpack("<Q", stream.read(8))
    return int(value)
