"""Scribbles as channels: geodesic distances in the CT, inside a box around the drawing.

The conventions are pet-ct-annotate's: GeodisTK's raster scan, intensity alone, three passes; the box has twice the
size of what was drawn, and the rest of the volume takes the largest distance inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wsitk.volumes.guidance.geodesic import geodesic_distance

__all__ = ["BACKGROUND", "FOREGROUND", "NOWHERE", "scale", "scribble_distance", "scribble_distances"]

FOREGROUND, BACKGROUND = 3, 2
"""Labels of upstream's scribbles."""

NOWHERE = 10.0
"""The distance where nothing was drawn."""


def scale(hounsfield: NDArray[np.generic], pet: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the channels (2, z, y, x) that the networks read; nothing is clipped.

    `pet` is in raw stored counts (up to some ten thousand), not SUV: at SUV's scale the networks see nothing.
    """
    return np.stack(
        ((hounsfield.astype(np.float32) + 1024) / 5119, pet.astype(np.float32) / 65535), dtype=np.float32
    )


def scribble_distances(
    ct: NDArray[np.float32], scribbles: NDArray[np.generic], spacing: Sequence[float]
) -> NDArray[np.float32]:
    """Return the distances (2, z, y, x) from foreground (3) and background (2) scribbles in a scaled CT."""
    labels = (FOREGROUND, BACKGROUND)
    return np.stack([scribble_distance(ct, scribbles == label, spacing) for label in labels])


def scribble_distance(
    ct: NDArray[np.float32], seeds: NDArray[np.bool_], spacing: Sequence[float]
) -> NDArray[np.float32]:
    """Return the geodesic distance from `seeds` (z, y, x); `spacing` in millimetres along z, y and x."""
    if not seeds.any():
        return np.full(ct.shape, NOWHERE, np.float32)
    box = _box(seeds)
    # the scan's compatible mode knows upstream's axes, (x, y, z)
    inside = geodesic_distance(
        ct[box].T, seeds[box].T, tuple(spacing)[::-1], iterations=3, cost="geodistk", mode="compatible"
    ).T
    distance = np.full(ct.shape, inside.max(), np.float32)
    distance[box] = inside
    return distance


def _box(seeds: NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the seeds' bounding box, twice as large, within the volume."""
    sides = []
    for axis, size in enumerate(seeds.shape):
        others = tuple(a for a in range(seeds.ndim) if a != axis)
        found = np.flatnonzero(seeds.any(axis=others))
        first, stop = int(found[0]), int(found[-1]) + 1
        more = (stop - first + 1) // 2
        sides.append(slice(max(0, first - more), min(size, stop + more)))
    return tuple(sides)
