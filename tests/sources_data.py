"""Small images and TIFF files with known pixels, and ways to damage them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray


def smooth(height: int, width: int, channels: int = 3, dtype: str = "u1") -> NDArray[Any]:
    """Return an image that lossy codecs keep nearly as it is: waves and a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(y / (17 + 3 * c)) + np.cos(x / (23 - 2 * c)) + x / width for c in range(channels)]
    image = (np.stack(waves, axis=-1) + 2) / 5
    return np.asarray((image * np.iinfo(dtype).max).astype(dtype))


def write_pyramid(
    path: Path, image: NDArray[Any], *, levels: int = 1, tile: int = 64, subifds: bool = False, **options: Any
) -> Path:
    """Write a tiled TIFF whose level k is every 2**k-th pixel of `image`."""
    options = {
        "tile": (tile, tile),
        "photometric": "rgb" if image.shape[-1] >= 3 else "minisblack",
        **options,
    }
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as writer:
        writer.write(image, subifds=levels - 1 if subifds else 0, **options)
        for level in range(1, levels):
            reduced = np.ascontiguousarray(image[:: 2**level, :: 2**level])
            kept = {
                k: v for k, v in options.items() if k not in ("description", "resolution", "resolutionunit")
            }
            writer.write(reduced, subfiletype=1, **kept)
    return path


def tile_places(path: Path, page: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offsets and byte counts of the tiles of a page."""
    with tifffile.TiffFile(path) as file:
        return tuple(file.pages[page].dataoffsets), tuple(file.pages[page].databytecounts)


def set_tag(path: Path, code: int, index: int, value: int, page: int = 0) -> None:
    """Overwrite one number of a tag in place, such as the length of one tile."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages[page].tags[code]
        size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        offset, order = tag.valueoffset + index * size, "little" if file.byteorder == "<" else "big"
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(size, "little" if order == "little" else "big"))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
