"""The elements of a mask's surface that pass between its pixels, and their lengths (2-D) or areas (3-D).

A surfel sits at a corner where 2x2 (2x2x2) pixels meet that are not all alike. Which of them belong to the
mask says what the surface through the corner is: in 2-D a piece of the contour through the edges' midpoints,
in 3-D the triangles of marching cubes (Lorensen & Cline 1987). So DeepMind's surface-distance counts.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError

__all__ = ["surfel_sizes"]

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def surfel_sizes(mask: Mask, steps: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Corners (n, axes) that the mask's surface passes, in C order, and the size of each piece.

    Corner `i` lies between pixels `i - 1` and `i`; beyond the array all is background. `steps` is the size of
    a pixel along each axis; sizes come in its unit, squared in 3-D. Raises UsageError WSI808 for other axes.
    """
    if mask.ndim not in (2, 3):
        raise UsageError("WSI808", f"surfels are made of 2 or 3 axes, got {mask.ndim}; take surface='border'")
    codes = _codes(mask)
    corners = np.argwhere((codes > 0) & (codes < 2 ** (2**mask.ndim) - 1))
    table = _lengths(steps) if mask.ndim == 2 else _areas(steps)
    return corners, table[codes[tuple(corners.T)]]


def _codes(mask: Mask) -> npt.NDArray[np.uint8]:
    """For each corner a bit for each pixel around it, the first pixel's the highest."""
    padded = np.pad(mask, 1)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    bits = 2**mask.ndim
    for k, offset in enumerate(np.ndindex(*(2,) * mask.ndim)):
        window = tuple(slice(o, o + n) for o, n in zip(offset, codes.shape, strict=True))
        codes |= padded[window].astype(np.uint8) << np.uint8(bits - 1 - k)
    return codes


def _lengths(steps: Floats) -> Floats:
    """Length of the contour for each of the 16 codes; bits 3 2 / 1 0 are the upper and the lower row."""
    height, width = steps
    slope = float(np.hypot(height, width)) / 2
    table = np.full(16, slope)  # a single pixel, or all but one
    table[[0, 15]] = 0.0
    table[[0b1100, 0b0011]] = width
    table[[0b1010, 0b0101]] = height
    table[[0b1001, 0b0110]] = 2 * slope
    return table


def _areas(steps: Floats) -> Floats:
    """Area of the triangles for each of the 256 codes."""
    faces = np.prod(steps) / steps
    return np.array([np.linalg.norm(triangles * faces, axis=1).sum() for triangles in _triangles()])


@cache
def _triangles() -> tuple[Floats, ...]:
    """Area vectors (n, 3) of the triangles of each code, for cubes of side 1.

    A code and its complement have the same surface, but marching cubes cuts some of them differently; the
    one with fewer pixels of the mask is taken for both, as DeepMind's table does.
    """
    from skimage.measure import marching_cubes

    table = [np.zeros((0, 3))] * 256
    for code in range(1, 255):
        fewer = min(code, 255 - code, key=lambda c: (c.bit_count(), c))
        cube = (fewer >> np.arange(7, -1, -1) & 1).reshape(2, 2, 2).astype(np.float32)
        vertices, faces, _, _ = marching_cubes(cube, 0.5, method="lorensen")
        corners = vertices[faces].astype(np.float64)
        table[code] = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2
    return tuple(table)
