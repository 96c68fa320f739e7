# /// script
# requires-python = ">=3.11"
# dependencies = ["wsitk"]
# ///
"""A slide as a zarr group and as a dask array: any level, any pixel size, decoded on demand.

python examples/slide_as_zarr_and_dask.py              on a small pyramid, made here
python examples/slide_as_zarr_and_dask.py slide.svs    on yours
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import wsitk


def make_pyramid(path: Path) -> None:
    """Write a tiled TIFF of three levels, 0.25 µm per pixel."""
    import tifffile

    from wsitk.testing import SyntheticSlide

    pixels = SyntheticSlide.make((2048, 1536), count=200, radius=(10.0, 18.0), seed=2).pixels
    with tifffile.TiffWriter(path) as file:
        for level in range(3):
            per_cm = 1e4 / (0.25 * 2**level)
            file.write(
                np.ascontiguousarray(pixels[:: 2**level, :: 2**level]),
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
            )


def explore(path: Path) -> None:
    """Print what the slide looks like through each door."""
    with wsitk.open_source(path) as source:
        print(f"{source.name}: {source.spacing}")

        # zarr: the pyramid as it is stored. napari, vizarr and any zarr reader can stream it.
        group = source.as_zarr()
        scales = group.attrs["ome"]["multiscales"][0]["datasets"]
        for dataset in scales:
            array = group[dataset["path"]]
            micrometres = dataset["coordinateTransformations"][0]["scale"]
            print(f"  zarr {dataset['path']}: {array.shape}, chunks {array.chunks}, scale {micrometres}")

        # dask: a level, or the whole slide at a pixel size of your choice. Nothing is read yet.
        coarse = source.as_dask(spacing=4.0)
        print(f"  dask at 4 µm: {coarse.shape} in {coarse.npartitions} chunks")

        # Now the pixels are decoded, chunk by chunk: where is it darker than glass, and how much of it is?
        dark = coarse.mean(axis=2) < 200
        print(f"  {float(dark.mean().compute()):.1%} of the slide is darker than glass")


def main() -> None:
    if sys.argv[1:]:
        explore(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pyramid.tiff")
        make_pyramid(path)
        explore(path)


if __name__ == "__main__":
    main()
