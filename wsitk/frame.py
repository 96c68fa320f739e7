"""Where a volume lies in the patient: from voxel indices to millimetres, and what each file format calls it.

World coordinates are **LPS** (x to the patient's left, y to the back, z to the head; millimetres), as in
DICOM, ITK and NRRD; NIfTI's RAS differs in the sign of x and y. Indices are in the source's own order,
(z, y, x), and name voxel centres, as all of those formats do. Only signs change and columns swap places on the
way to NIfTI and back, so an affine survives to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["DicomGeometry", "Frame"]

Matrix = NDArray[np.float64]

_RIGHT_ANGLE = 1e-4  # of the cosine between two axes: what rounding to float32 or six digits leaves


@dataclass(frozen=True, slots=True)
class DicomGeometry:
    """A grid in DICOM's words: cosines of rows and columns, (row, column) spacing, step, first position; mm."""

    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, float]
    slice_spacing: float
    position: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Frame:
    """The affine map from indices (z, y, x) to LPS millimetres (x, y, z), as the rows of a 4 x 4 matrix.

    Raises ValueError unless the matrix is finite, has an inverse, and ends in (0, 0, 0, 1).
    """

    rows: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        matrix = np.asarray(self.rows, np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise ValueError(f"wanted a finite 4 x 4 matrix, got {matrix.tolist()}")
        if matrix[3].tolist() != [0.0, 0.0, 0.0, 1.0]:
            raise ValueError(f"the last row must be 0 0 0 1, got {matrix[3].tolist()}")
        lengths = np.linalg.norm(matrix[:3, :3], axis=0)
        # relative to the voxel, so that micrometres are judged as metres are
        if lengths.min() == 0 or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-6:
            raise ValueError("the axes lie in one plane, or one has no length")

    @classmethod
    def from_matrix(cls, matrix: ArrayLike) -> Frame:
        """Return the frame of a 4 x 4 matrix from (z, y, x, 1) to LPS millimetres."""
        values = np.asarray(matrix, np.float64) + 0.0  # no negative zeros: equal frames print alike
        if values.shape != (4, 4):
            raise ValueError(f"wanted a 4 x 4 matrix, got shape {values.shape}")
        return cls(tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in values))

    @classmethod
    def from_axes(
        cls, origin_mm: ArrayLike, directions: ArrayLike, spacing_mm: Sequence[float] | ArrayLike
    ) -> Frame:
        """Return the frame with `origin_mm` (LPS), unit vectors of z, y, x in columns, and their steps."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.asarray(directions, np.float64) * np.asarray(spacing_mm, np.float64)
        matrix[:3, 3] = np.asarray(origin_mm, np.float64)
        return cls.from_matrix(matrix)

    @classmethod
    def from_nifti_affine(cls, affine: ArrayLike) -> Frame:
        """Return the frame of an affine from (i, j, k) = (x, y, z) to RAS millimetres."""
        return cls.from_matrix(_swap(np.asarray(affine, np.float64)))

    @property
    def matrix(self) -> Matrix:
        """Return the 4 x 4 matrix: (z, y, x, 1) to (x, y, z, 1) in LPS millimetres."""
        return np.asarray(self.rows, np.float64)

    @property
    def origin_mm(self) -> tuple[float, ...]:
        """Return the centre of voxel (0, 0, 0) in LPS millimetres."""
        return tuple(row[3] for row in self.rows[:3])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Return the distance of neighbouring voxels along z, y, x, in millimetres."""
        return tuple(math.sqrt(sum(row[k] ** 2 for row in self.rows[:3])) for k in range(3))

    @property
    def spacing_um(self) -> tuple[float, ...]:
        """Return the distance of neighbouring voxels along z, y, x, in micrometres."""
        return tuple(1000.0 * s for s in self.spacing_mm)

    @property
    def directions(self) -> Matrix:
        """Return the unit vectors of the axes z, y, x as the columns of a 3 x 3 matrix."""
        return np.asarray(self.matrix[:3, :3] / np.asarray(self.spacing_mm))

    @property
    def is_rectangular(self) -> bool:
        """Tell whether the axes stand at right angles; they do not after a tilted gantry."""
        cosines = self.directions.T @ self.directions
        return bool(np.abs(cosines - np.eye(3)).max() < _RIGHT_ANGLE)

    def to_nifti_affine(self) -> Matrix:
        """Return the affine from (i, j, k) = (x, y, z) to RAS millimetres."""
        return _swap(self.matrix)

    def to_dicom(self) -> DicomGeometry:
        """Return the frame as DICOM states it; raises ValueError if its axes are not at right angles.

        The direction from slice to slice is not stored there: it is the cross product of rows and columns,
        so a frame of the other hand keeps its place only if slices are stored with positions of their own.
        """
        if not self.is_rectangular:
            raise ValueError("DICOM holds no sheared grid")
        along_z, along_y, along_x = self.spacing_mm
        cosines = self.directions
        x, y, z = self.origin_mm
        orientation = tuple(float(v) for v in (*cosines[:, 2], *cosines[:, 1]))
        return DicomGeometry(orientation, (along_y, along_x), along_z, (x, y, z))

    def to_world(self, indices: ArrayLike) -> Matrix:
        """Return LPS millimetres (..., 3) of indices (..., 3), which may lie between voxels."""
        return np.asarray(indices, np.float64) @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def to_index(self, world_mm: ArrayLike) -> Matrix:
        """Return indices (z, y, x) of points in LPS millimetres."""
        offset = np.asarray(world_mm, np.float64) - self.matrix[:3, 3]
        return np.asarray(offset @ np.linalg.inv(self.matrix[:3, :3]).T)

    def index_map(self, other: Frame) -> Matrix:
        """Return the 4 x 4 matrix from indices of this frame to indices of `other`, over the same world."""
        return np.asarray(np.linalg.solve(other.matrix, self.matrix))

    def cropped(self, start: Sequence[float]) -> Frame:
        """Return the frame of the box whose first voxel is `start`."""
        matrix = self.matrix
        matrix[:3, 3] = self.to_world(start)
        return Frame.from_matrix(matrix)

    def scaled(self, factor: Sequence[float]) -> Frame:
        """Return the frame of a grid with `factor` voxels of this one per voxel; the outer edges coincide.

        Its voxel k covers ``[k * factor, (k + 1) * factor)`` of this grid, so its first centre lies at
        ``(factor - 1) / 2``: the rule of `WorkingImage`.
        """
        factors = np.asarray(factor, np.float64)
        matrix = self.matrix
        matrix[:3, 3] = self.to_world((factors - 1) / 2)
        matrix[:3, :3] *= factors
        return Frame.from_matrix(matrix)

    def same_grid(self, other: Frame, shape: Sequence[int], tolerance: float = 1e-3) -> bool:
        """Tell whether all corners of a volume of `shape` differ by less than `tolerance` voxels."""
        corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), indexing="ij")).reshape(3, -1).T
        return bool(np.abs(other.to_index(self.to_world(corners)) - corners).max() < tolerance)

    def to_json(self) -> dict[str, Any]:
        """Return the matrix as plain JSON, with what it means."""
        return {"zyx_to_lps_mm": [list(row) for row in self.rows]}


def _swap(matrix: Matrix) -> Matrix:
    """Reverse the order of the index axes, and negate world x and y; its own inverse."""
    swapped = matrix[:, [2, 1, 0, 3]].copy()
    swapped[:2] *= -1
    return np.asarray(swapped + 0.0)
