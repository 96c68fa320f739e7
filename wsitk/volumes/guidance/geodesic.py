"""Geodesic distances by raster scans, in two and three dimensions, with the costs of two known packages.

Distance from seeds along the cheapest path, where a step costs its length, the change of intensity, or both
(Toivanen 1996; Criminisi et al. 2008, "GeoS"). The two packages weigh them differently, and scan differently;
either is repeated here to a few float32 digits, since networks are trained on what their package gave:

- ``fastgeodis`` (Asad et al. 2022): a step costs ``weight * |dI| + (1 - weight) * length``. Planes are swept along
  each axis, there and back, each voxel from the nine of the plane before.
- ``geodistk`` (Wang et al. 2018, "DeepIGeoS"): ``length / ((1 - weight) + weight / (|dI| + 1e-5))``. Voxels are
  scanned in raster order, there and back. In volumes its list of neighbours doesn't fit its order of
  scanning, so that some paths grow by one voxel a pass only: ``mode="compatible"`` keeps that, and
  ``mode="textbook"`` looks back in the order of the scan.
- ``marching``: GeodisTK's fast marching, which costs the same without the 1e-5 and ends when no path is cheaper.
  Recorded values of it are of a weight of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsitk.compiled import compiled
from wsitk.errors import UsageError

__all__ = ["FAR", "geodesic_distance"]

FAR = 1e10
"""Distance of what no scan has reached."""

Cost = Literal["fastgeodis", "geodistk", "marching"]
Mode = Literal["compatible", "textbook"]


def geodesic_distance(
    image: ArrayLike,
    seeds: ArrayLike,
    spacing: Sequence[float],
    *,
    weight: float = 1.0,
    iterations: int = 4,
    cost: Cost = "fastgeodis",
    mode: Mode = "textbook",
) -> NDArray[np.float32]:
    """Return each voxel's distance from the nearest seed (float32, the image's shape).

    `image` is a plane or a volume of intensities; `seeds` is true where the distance is 0; `spacing` is the
    length of a step along each axis, in any unit; `weight` of 0 is the length alone, of 1 the intensity alone.
    More `iterations` let paths turn back more often; ``marching`` takes as many as it needs. Where there are no
    seeds, the distance is `FAR`.

    Raises UsageError (WSI080) for shapes, a weight or a spacing that make no sense.
    """
    values = np.ascontiguousarray(image, np.float32)
    where = np.asarray(seeds) != 0
    _check(values, where, spacing, weight, iterations, cost, mode)
    lift = (1,) * (3 - values.ndim) + values.shape  # a plane is a volume of one
    steps = np.array((1.0,) * (3 - values.ndim) + tuple(spacing), np.float64)
    distance = np.where(where, np.float32(0), np.float32(FAR)).astype(np.float32).reshape(lift)
    if cost == "fastgeodis":
        for _ in range(iterations):
            _sweep(distance, values.reshape(lift), steps, np.float32(weight))
    elif cost == "geodistk":
        _raster(distance, values.reshape(lift), steps, weight, 1e-5, iterations, _behind(values.ndim, mode))
    else:  # a scan that changes nothing is the last: no path has more turns than voxels
        _raster(
            distance, values.reshape(lift), steps, weight, 0.0, values.size, _behind(values.ndim, "textbook")
        )
    return distance.reshape(values.shape)


def _check(
    values: NDArray[np.float32],
    where: NDArray[np.bool_],
    spacing: Sequence[float],
    weight: float,
    iterations: int,
    cost: str,
    mode: str,
) -> None:
    wrong = None
    if values.ndim not in (2, 3) or values.shape != where.shape:
        wrong = f"image {values.shape} and seeds {where.shape}; wanted one shape of 2 or 3 axes"
    elif len(spacing) != values.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        wrong = f"spacing {tuple(spacing)}; wanted {values.ndim} lengths above 0"
    elif not 0 <= weight <= 1 or iterations < 1:
        wrong = f"weight {weight} and {iterations} iterations; wanted 0 to 1, and at least 1"
    elif cost not in get_args(Cost) or mode not in get_args(Mode):
        wrong = f"cost {cost!r} in mode {mode!r}; wanted {', '.join(get_args(Cost))}; compatible or textbook"
    elif not np.isfinite(values).all():
        wrong = "an image with values that are not finite; clip or fill them first"
    if wrong:
        raise UsageError("WSI080", f"geodesic distance of {wrong}")


def _behind(ndim: int, mode: str) -> NDArray[np.int64]:
    """Return the 13 neighbours that a forward scan looks at (z, y, x); the backward scan looks at the others.

    The scan runs along x, then y, then z. GeodisTK orders a volume's neighbours by y, then x, then z.
    """
    order = (1, 2, 0) if ndim == 3 and mode == "compatible" else (0, 1, 2)
    steps = (s for s in product((-1, 0, 1), repeat=3) if tuple(s[axis] for axis in order) < (0, 0, 0))
    return np.array(list(steps), np.int64)


def _sweep(
    distance: NDArray[np.float32],
    image: NDArray[np.float32],
    spacing: NDArray[np.float64],
    weight: np.float32,
) -> None:
    """Sweep planes along each axis, there and back, in place; views that change nothing but the axes' order."""
    for axes in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        _planes(distance.transpose(axes), image.transpose(axes), spacing[list(axes)], weight)


@compiled
def _raster(
    distance: NDArray[np.float32],
    image: NDArray[np.float32],
    spacing: NDArray[np.float64],
    weight: float,
    offset: float,
    iterations: int,
    behind: NDArray[np.int64],
) -> None:
    """Scan in raster order and back, in place, until nothing changes, or so many times.

    All of `behind` is a neighbour's place relative to a voxel's; `offset` is added to changes of intensity.
    """
    depth, height, width = distance.shape
    lengths = np.empty(len(behind), np.float32)
    for k in range(len(behind)):
        lengths[k] = np.sqrt(((behind[k] * spacing) ** 2).sum())
    settled = False
    for turn in range(2 * iterations):
        sign = 1 if turn % 2 == 0 else -1
        if sign > 0:
            settled = True
        for i in range(depth * height * width):
            place = i if sign > 0 else depth * height * width - 1 - i
            z, y, x = place // (height * width), place // width % height, place % width
            best = distance[z, y, x]
            for k in range(len(behind)):
                zn, yn, xn = z + sign * behind[k, 0], y + sign * behind[k, 1], x + sign * behind[k, 2]
                if 0 <= zn < depth and 0 <= yn < height and 0 <= xn < width:
                    change = abs(image[z, y, x] - image[zn, yn, xn]) + offset
                    step = 0.0 if weight > 0 else lengths[k]
                    if change > 0:
                        step = lengths[k] / ((1.0 - weight) + weight / change)
                    best = min(best, np.float32(distance[zn, yn, xn] + step))
            settled = settled and best == distance[z, y, x]
            distance[z, y, x] = best
        if sign < 0 and settled:
            break


@compiled
def _planes(
    distance: NDArray[np.float32],
    image: NDArray[np.float32],
    spacing: NDArray[np.float64],
    weight: np.float32,
) -> None:
    """Sweep along the first axis; a voxel is reached from the nine neighbours in the plane before."""
    depth, height, width = distance.shape
    lengths = np.empty((3, 3), np.float32)
    for a in range(3):
        for b in range(3):
            square = spacing[0] ** 2 + ((a - 1) * spacing[1]) ** 2 + ((b - 1) * spacing[2]) ** 2
            lengths[a, b] = (1 - weight) * np.sqrt(square)
    for turn in range(2):
        for step in range(1, depth):
            z = step if turn == 0 else depth - 1 - step
            before = z - 1 if turn == 0 else z + 1
            for y in range(height):
                for x in range(width):
                    best = distance[z, y, x]
                    for a in range(max(0, y - 1), min(height, y + 2)):
                        for b in range(max(0, x - 1), min(width, x + 2)):
                            change = abs(image[z, y, x] - image[before, a, b])
                            cost = weight * change + lengths[a - y + 1, b - x + 1]
                            best = min(best, np.float32(distance[before, a, b] + cost))
                    distance[z, y, x] = best
