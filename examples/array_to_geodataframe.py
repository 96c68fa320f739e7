# /// script
# requires-python = ">=3.11"
# dependencies = ["wsitk", "pillow"]
# ///
"""An image in memory in, a GeoDataFrame of nuclei out.

python examples/array_to_geodataframe.py                    on a synthetic image
python examples/array_to_geodataframe.py region.png 0.25    on yours, with its pixel size in µm
"""

from __future__ import annotations

import sys
import tempfile
from typing import TYPE_CHECKING

import numpy as np

import wsitk

if TYPE_CHECKING:
    import geopandas


def synthetic() -> np.ndarray:
    """Return 800 × 800 pixels in the colours of H&E, with nuclei that are drawn."""
    from wsitk.testing import SyntheticSlide

    return SyntheticSlide.make((800, 800), count=80, radius=(10.0, 18.0), seed=1).pixels


def nuclei(pixels: np.ndarray, mpp: float) -> geopandas.GeoDataFrame:
    """Return a row for each nucleus; geometry in pixels of the image, x right, y down."""
    with tempfile.TemporaryDirectory() as folder:
        result = wsitk.run(
            "cellvit", pixels, out=folder, spacing=mpp, tissue="none", maps=False, preview=False
        )
        return result.objects  # read now, since the folder goes away


def main() -> None:
    if sys.argv[1:]:
        from PIL import Image

        pixels, mpp = np.asarray(Image.open(sys.argv[1]).convert("RGB")), float(sys.argv[2])
    else:
        pixels, mpp = synthetic(), 0.25
    table = nuclei(pixels, mpp)
    print(table[["class", "probability", "area_um2", "circularity"]].head().to_string(index=False))
    print(f"{len(table)} nuclei, median area {table['area_um2'].median():.1f} µm²")

    # It is geometry, so ask it geometric questions: how far is each nucleus from its nearest neighbour?
    centres = table.set_geometry(table.centroid)
    nearest = centres.sjoin_nearest(centres, distance_col="pixels", exclusive=True)
    print(f"median distance to the nearest neighbour {nearest['pixels'].median() * mpp:.1f} µm")


if __name__ == "__main__":
    main()
