"""Does the grid show? The same slide under three grids: do the objects agree, is there a seam to see?

    python benchmarks/tiling_invariance.py SLIDE [--roi x,y,w,h] [--model cellvit]

Prints, for each pair of grids, how many objects match at IoU > 0.8, and for each grid the density of objects
near seams over that elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import geopandas
import numpy as np
import shapely

import wsitk
from wsitk.geometry import Region
from wsitk.grid import TileGrid

GRIDS = ((1536, 128), (1024, 128), (2048, 256))
"""Tile and halo: seams at different places, and different lattice origins."""

BAND = 16
"""Pixels on each side of a seam that count as near it."""


def matched(left: geopandas.GeoDataFrame, right: geopandas.GeoDataFrame) -> int:
    """Return how many objects of `left` have a partner in `right` with IoU > 0.8; partners are unique then."""
    a, b = left.geometry.to_numpy(), right.geometry.to_numpy()
    i, j = shapely.STRtree(b).query(a, predicate="intersects")
    shared = shapely.area(shapely.intersection(a[i], b[j]))
    union = shapely.area(a[i]) + shapely.area(b[j]) - shared
    return int((shared / union > 0.8).sum())


def near_seam(objects: geopandas.GeoDataFrame, grid: TileGrid, scale: float) -> int:
    """Return how many centroids lie within BAND working pixels of one of the grid's seams."""
    place = (objects[["centroid_y", "centroid_x"]].to_numpy() / scale - np.array(grid.origin)) % np.array(
        grid.cell
    )
    return int(((place < BAND) | (place > np.array(grid.cell) - BAND)).any(axis=1).sum())


def seam_density(
    own: geopandas.GeoDataFrame, others: list[geopandas.GeoDataFrame], grid: TileGrid, scale: float
) -> float:
    """Return the density of objects near a grid's seams over that elsewhere, relative to the same places.

    Tissue is uneven, so the places are compared with themselves: in the other grids' results they are not
    seams. 1 means that the seams do not show.
    """

    def odds(objects: geopandas.GeoDataFrame) -> float:
        near = near_seam(objects, grid, scale)
        return near / (len(objects) - near)

    return odds(own) / float(np.mean([odds(o) for o in others]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slide")
    parser.add_argument("--roi", default="", help="x,y,width,height in level-0 pixels")
    parser.add_argument("--model", default="cellvit")
    given = parser.parse_args()
    roi = tuple(int(n) for n in given.roi.split(",")) if given.roi else None
    model = wsitk.load_model(given.model)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for tile, halo in GRIDS:
            out = Path(folder) / f"{tile}-{halo}"
            result = wsitk.run(
                model,
                given.slide,
                out=out,
                tile=tile,
                halo=halo,
                roi=roi,
                maps=False,
                geojson=False,
                preview=False,
            )
            results[tile, halo] = result.objects
            print(f"tile {tile} halo {halo}: {len(result.objects):,} objects")
            scale = result.provenance["working_spacing_um"][0] / result.provenance["spacing_um"][0]
    for tile, halo in GRIDS:
        extent = Region((0, 0), (1 << 20, 1 << 20))
        grid = TileGrid.fit(extent, (tile, tile), (halo, halo), align=model.spec.align)
        others = [objects for key, objects in results.items() if key != (tile, halo)]
        ratio = seam_density(results[tile, halo], others, grid, scale)
        near = near_seam(results[tile, halo], grid, scale)
        print(
            f"tile {tile} halo {halo}: density near seams over elsewhere {ratio:.3f} ({near:,} objects near)"
        )
    for first, second in combinations(results, 2):
        a, b = results[first], results[second]
        both = matched(a, b)
        print(
            f"{first} and {second}: {both:,} match; {both / len(a):.2%} of the one, {both / len(b):.2%} of the other; "
            f"counts differ by {abs(len(a) - len(b)) / max(len(a), len(b)):.2%}"
        )


if __name__ == "__main__":
    main()
