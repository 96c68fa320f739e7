"""What one image's truth, or a prediction of it, says: label maps, or outlines in a plane.

`Labels` are pixels and may have any number of axes. `Outlines` are polygons or points of a whole slide, which is
never drawn in full: two of them are compared block by block, and one is drawn only onto the grid of a label map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Labels", "Outlines", "Packed", "PackedOutlines"]

Array = NDArray[Any]


@final
@dataclass(frozen=True)
class Labels:
    """Objects or classes of one image, as integers per pixel, 0 for background.

    Attributes
    ----------
    layers : integer (L, *shape)
        One map that all classes share (L = 1), or several maps of instances, as in PanNuke.
    names : tuple of str (C,)
        The classes.
    kinds : int64 (M,)
        Position in `names`, -1 for none: of each label value of a shared map (entry 0 is the background's and
        is never used), or of each layer.
    layered : bool
        Which of the two `kinds` means.
    areas : bool
        Whether label values are classes, not objects.
    typed : bool
        Whether the file tells classes apart at all; one that does may still hold none.
    declared : bool
        Whether `names` are all the classes that the file could hold, or only those that were met in it.
    spacing : tuple of float or None
        Size of a pixel for each axis, in `unit`.
    unit : str
        ``um`` or ``mm``; empty if `spacing` is None.
    affine : tuple of float or None
        Of a volume: the 16 numbers from voxels to the patient.
    source : str
        What was read and how, in a few words.
    """

    layers: Array
    names: tuple[str, ...]
    kinds: Array
    layered: bool = False
    areas: bool = False
    typed: bool = True
    declared: bool = False
    spacing: tuple[float, ...] | None = None
    unit: str = ""
    affine: tuple[float, ...] | None = None
    source: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the image."""
        return tuple(self.layers.shape[1:])

    def flat(self) -> Array:
        """Return all objects in one map, whatever their class. Where layers overlap, the later wins."""
        return self._joined(np.arange(len(self.layers)))

    def of(self, name: str) -> Array:
        """Return the objects of one class; an empty map if the image has no such class."""
        if name not in self.names:
            return np.zeros(self.shape, self.layers.dtype)
        mine = self.kinds == self.names.index(name)
        if self.layered:
            return self._joined(np.flatnonzero(mine))
        return np.where(mine[self.layers[0]], self.layers[0], 0)

    def _joined(self, which: Array) -> Array:
        if len(which) == 1:
            return np.asarray(self.layers[which[0]])
        whole, first = np.zeros(self.shape, np.int64), 0
        for layer in self.layers[which]:
            whole = np.where(layer > 0, layer.astype(np.int64) + first, whole)
            first += int(layer.max(initial=0))
        return whole

    def overlapping(self) -> int:
        """Return the number of pixels that more than one layer claims."""
        return int(((self.layers > 0).sum(axis=0) > 1).sum()) if len(self.layers) > 1 else 0

    def points(self) -> tuple[Array, Array]:
        """Return centroids (N, axes) in pixels, and the class of each (N,), -1 for none.

        Pixel ``i`` contributes ``i + 0.5``, as in the outlines.
        """
        from wsitk.metrics.panoptic import centroids

        places = [centroids(layer) + 0.5 for layer in self.layers]
        if self.layered:
            kinds = np.repeat(self.kinds, [len(p) for p in places])
        else:
            values = np.unique(self.layers[0])
            kinds = self.kinds[values[values > 0]]
        return np.concatenate(places), kinds.astype(np.int64)

    def renamed(self, table: Mapping[str, str | None]) -> Labels:
        """Return the same image under other class names; see `Outlines.renamed`."""
        names, index = _rename(self.names, table)
        return replace(self, names=names, kinds=np.append(index, -1)[self.kinds])


class Outlines(ABC):
    """Polygons or points of one image, in level-0 pixels: x to the right, y down.

    Attributes
    ----------
    bounds : float64 (N, 4)
        Left, top, right, bottom of each object.
    centroids_xy : float64 (N, 2)
    kinds : int64 (N,)
        Position in `names`, -1 for none.
    """

    def __init__(
        self,
        bounds: Array,
        centroids_xy: Array,
        kinds: Array,
        names: tuple[str, ...],
        *,
        typed: bool = True,
        declared: bool = False,
        spacing_um: float | None = None,
        source: str = "",
    ) -> None:
        self.bounds = bounds
        self.centroids_xy = centroids_xy
        self.kinds = kinds
        self.names = names
        self.typed = typed
        self.declared = declared
        self.spacing_um = spacing_um
        self.source = source

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    @abstractmethod
    def has_areas(self) -> bool:
        """Return whether the objects are polygons, not mere points."""

    @abstractmethod
    def polygons(self, rows: Array) -> NDArray[np.object_]:
        """Return the shapes of the given rows (ascending), in that order."""

    def renamed(self, table: Mapping[str, str | None]) -> Self:
        """Return the same objects under other class names.

        `table` gives the new name of each class; with None its objects stay, without a class; classes that it
        doesn't name keep theirs. Two classes of one new name become one class.
        """
        names, index = _rename(self.names, table)
        twin = copy(self)
        twin.names, twin.kinds = names, np.append(index, -1)[self.kinds]
        return twin


@final
@dataclass(frozen=True)
class Packed:
    """Some shapes as bytes: shapely's own objects would cost some hundred bytes more for each."""

    bounds: Array
    centroids_xy: Array
    sizes: Array
    wkb: bytes
    has_areas: bool

    @classmethod
    def of(cls, shapes: Array) -> Packed:
        """Pack shapely polygons, multipolygons or points."""
        import shapely

        blobs = shapely.to_wkb(shapes)
        return cls(
            shapely.bounds(shapes).reshape(-1, 4),
            shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2),
            np.array([len(blob) for blob in blobs], np.int64),
            b"".join(blobs),
            bool((shapely.get_dimensions(shapes) == 2).all()),
        )


@final
class PackedOutlines(Outlines):
    """Outlines in memory: about 16 bytes for each vertex and 80 for each object."""

    def __init__(self, pieces: Sequence[Packed], kinds: Array, names: tuple[str, ...], **facts: Any) -> None:
        bounds = np.concatenate([np.zeros((0, 4)), *(p.bounds for p in pieces)])
        centres = np.concatenate([np.zeros((0, 2)), *(p.centroids_xy for p in pieces)])
        super().__init__(bounds, centres, kinds, names, **facts)
        self._areas = all(p.has_areas for p in pieces)
        self._offset = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(p.sizes for p in pieces)]))
        self._wkb = b"".join(p.wkb for p in pieces)

    @property
    def has_areas(self) -> bool:
        return self._areas

    def polygons(self, rows: Array) -> NDArray[np.object_]:
        import shapely

        cut = [self._wkb[self._offset[r] : self._offset[r + 1]] for r in rows]
        return np.asarray(shapely.from_wkb(np.array(cut, object)), object)


def _rename(names: tuple[str, ...], table: Mapping[str, str | None]) -> tuple[tuple[str, ...], Array]:
    """Return the new names, and for each old class the position of its new one, -1 for none."""
    wanted = [table.get(name, name) for name in names]
    new = tuple(dict.fromkeys(name for name in wanted if name is not None))
    return new, np.array([-1 if name is None else new.index(name) for name in wanted], np.int64)
