"""What is to be restored of one input, in pieces: whole artifacts, or parts of those too large for one.

An artifact is restored at once, by the tile that holds the middle of its box, with `halo` pixels of what
surrounds it: whoever computes, and whatever else is done, it comes out the same and has no seam. Only one larger
than a tile's cell is cut along the lattice; its parts overlap there, and one fades into the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from wsitk.artifacts.mask import ArtifactMask
from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.grid import TileGrid

__all__ = ["MaskedPiece", "Piece", "Repair", "TilePieces", "plan_repair"]

Bits = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the mask that is restored at once; boxes are in working pixels.

    `parts` are components of the mask; `box` is what the model gets; `core` the owned region of the tile where the
    component was cut, None for whole ones.
    """

    tile: int
    parts: tuple[int, ...]
    box: Region
    core: Region | None = None


@dataclass(frozen=True)
class MaskedPiece:
    """A piece with its masks over `box`: all that is not known, and what this piece answers for."""

    number: int
    box: Region
    unknown: Bits
    own: Bits


class TilePieces(Protocol):
    """The pieces of one tile."""

    def pieces(self) -> tuple[MaskedPiece, ...]:
        """Return them in order."""


@final
@dataclass(frozen=True)
class _Here:
    """The pieces of a tile where the plan is; what is sent to another process are their masks alone."""

    repair: Repair
    tile: int

    def pieces(self) -> tuple[MaskedPiece, ...]:
        """Return them in order."""
        each = enumerate(self.repair.pieces)
        return tuple(self.repair.masked(n) for n, piece in each if piece.tile == self.tile)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _Sent, (
            tuple((p.number, p.box, *map(np.packbits, (p.unknown, p.own))) for p in self.pieces()),
        )


@final
@dataclass(frozen=True)
class _Sent:
    """The same, in the process that computes."""

    packed: tuple[tuple[int, Region, NDArray[np.uint8], NDArray[np.uint8]], ...]

    def pieces(self) -> tuple[MaskedPiece, ...]:
        """Return them in order."""
        return tuple(
            MaskedPiece(n, box, _unpacked(a, box), _unpacked(b, box)) for n, box, a, b in self.packed
        )


def _unpacked(bits: NDArray[np.uint8], box: Region) -> Bits:
    return np.unpackbits(bits, count=box.size).reshape(box.shape).astype(bool)


@dataclass(frozen=True)
class Repair:
    """The mask of an input (over level 0), and its pieces on the working grid.

    `shape` is the input's at level 0, `scale` level-0 pixels per working pixel, `image` and `extent` the whole of it
    and what may be changed (working pixels), `fade` how far the parts of a cut artifact reach into each other.
    """

    mask: ArtifactMask
    shape: tuple[int, ...]
    scale: tuple[float, ...]
    image: Region
    extent: Region
    fade: int
    pieces: tuple[Piece, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed again: several bytes for each pixel of the mask."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Return the component that each pixel of the mask belongs to, 0 for none."""
        return _components(self.mask.codes)[0]

    def at(self, tile: int) -> TilePieces:
        """Return the pieces of a tile, to be computed when they are asked for, or sent."""
        return _Here(self, tile)

    def masked(self, number: int) -> MaskedPiece:
        """Return piece `number` with its masks."""
        piece = self.pieces[number]
        place = self._under(piece.box)
        own = self._to_working(self._parts_over(piece, place), place, piece.box)
        reach = piece.core.grow((self.fade,) * 2) if piece.core else piece.box
        inside = np.zeros(piece.box.shape, bool)
        inside[reach.intersect(self.extent).intersect(piece.box).slices(piece.box.start)] = True
        unknown = self._to_working(self.mask.over(place), place, piece.box)
        return MaskedPiece(number, piece.box, unknown, own & inside)

    def _under(self, box: Region) -> Region:
        """Return the level-0 pixels that a working region shares any area with, or stands for."""
        ends = zip(box.stop, self.image.stop, self.scale, self.shape, strict=True)
        return Region.between(
            (int(np.floor(a * s + 1e-6)) for a, s in zip(box.start, self.scale, strict=True)),
            (n if b == last else min(n, int(np.ceil(b * s - 1e-6))) for b, last, s, n in ends),
        )

    def _to_working(self, marked: Bits, place: Region, box: Region) -> Bits:
        """Return which working pixels of `box` share any area with marked level-0 pixels, which begin at `place`."""
        for axis in range(2):
            # what lies beyond the last working pixel belongs to it
            stop = int(np.ceil(box.stop[axis] * self.scale[axis] - 1e-6)) - place.start[axis]
            marked = np.moveaxis(marked, axis, 0)
            if len(marked) > stop:
                marked = np.concatenate([marked[: stop - 1], marked[stop - 1 :].any(axis=0, keepdims=True)])
            marked = np.moveaxis(marked, 0, axis)
        (sy, sx), (y, x) = self.scale, place.start
        grid = ArtifactMask(("any",), marked.astype(np.uint8), (1 / sy, 1 / sx), (y / sy, x / sx))
        return grid.over(box)

    def weight(self, number: int, region: Region) -> NDArray[np.float32]:
        """Return how much a piece counts over a working region: 1, or less where a cut artifact's parts meet."""
        core = self.pieces[number].core
        if core is None:
            return np.ones(region.shape, np.float32)
        each = [self._ramp(core, region, axis) for axis in range(2)]
        return np.asarray(each[0][:, None] * each[1][None, :], np.float32)

    def _ramp(self, core: Region, region: Region, axis: int) -> NDArray[np.float32]:
        """Return a line that rises from `fade` before the core to `fade` inside it; 1 at the extent's border."""
        width = 2.0 * self.fade
        place = np.arange(region.start[axis], region.stop[axis]) + 0.5
        line = np.ones(len(place))
        if core.start[axis] > self.extent.start[axis]:
            line = np.minimum(line, (place - core.start[axis] + self.fade) / width)
        if core.stop[axis] < self.extent.stop[axis]:
            line = np.minimum(line, (core.stop[axis] + self.fade - place) / width)
        return np.asarray(line.clip(0.0, 1.0), np.float32)

    def level0(self, region: Region) -> Region:
        """Return a working region in level-0 pixels: its edges rounded half up, so that neighbours share them.

        The image's last working pixels stand for what level 0 has beyond them, too.
        """
        start, stop = (
            [int(np.floor(a * s + 0.5)) for a, s in zip(corner, self.scale, strict=True)]
            for corner in (region.start, region.stop)
        )
        ends = zip(stop, region.stop, self.image.stop, self.shape, strict=True)
        return Region.between(start, (n if last == full else min(b, n) for b, last, full, n in ends))

    def own_level0(self, number: int, region: Region) -> Bits:
        """Return which level-0 pixels of `region` a piece answers for; no pixel belongs to two pieces."""
        piece = self.pieces[number]
        own = self._parts_over(piece, region)
        limit = self.level0(self.extent if piece.core is None else piece.core.intersect(self.extent))
        inside = np.zeros(region.shape, bool)
        inside[limit.intersect(region).slices(region.start)] = True
        return own & inside

    def box_level0(self, number: int) -> Region:
        """Return the level-0 box around what a piece answers for."""
        piece = self.pieces[number]
        start, bits = self.shape_of(number)
        limit = self.level0(self.extent if piece.core is None else piece.core.intersect(self.extent))
        edges = []
        for axis in range(2):
            lines = np.flatnonzero(bits.any(axis=1 - axis))
            low, high = (lines[0], lines[-1] + 1) if len(lines) else (0, 0)
            corner, step = self.mask.corner[axis] + start[axis] * self.mask.scale[axis], self.mask.scale[axis]
            edges.append(
                (int(np.floor(corner + low * step + 1e-6)), int(np.ceil(corner + high * step - 1e-6)))
            )
        return Region.between(*zip(*edges, strict=True)).intersect(limit)

    def shape_of(self, number: int) -> tuple[tuple[int, int], Bits]:
        """Return a piece on the mask's own grid: where that window begins there, and its pixels."""
        piece = self.pieces[number]
        limit = self.extent if piece.core is None else piece.core.intersect(self.extent)
        limit = self.level0(piece.box.intersect(limit))
        window, labels = self._window(limit)
        mine = np.isin(labels, piece.parts)
        for axis in range(2):
            step, corner = self.mask.scale[axis], self.mask.corner[axis]
            edges = corner + np.arange(window.start[axis], window.stop[axis] + 1) * step
            inside = (edges[1:] > limit.start[axis] + 1e-6) & (edges[:-1] < limit.stop[axis] - 1e-6)
            mine &= inside[:, None] if axis == 0 else inside[None, :]
        return (window.start[0], window.start[1]), mine

    def kinds(self, number: int) -> tuple[str, ...]:
        """Return the kinds of artifact in a piece."""
        window, labels = self._window(self.level0(self.pieces[number].box))
        codes = self.mask.codes[window.slices()][np.isin(labels, self.pieces[number].parts)]
        bits = int(np.bitwise_or.reduce(codes)) if codes.size else 0
        return tuple(kind for k, kind in enumerate(self.mask.kinds) if bits >> k & 1)

    def key(self) -> dict[str, Any]:
        """Return what the run key holds of the mask."""
        mask = self.mask
        digest = hashlib.sha256(np.ascontiguousarray(mask.codes).tobytes()).hexdigest()
        return {
            "kinds": list(mask.kinds),
            "sha256": digest,
            "scale": list(mask.scale),
            "corner": list(mask.corner),
        }

    def _parts_over(self, piece: Piece, region: Region) -> Bits:
        """Return where a piece's components lie over a level-0 region."""
        mask = self.mask
        window, labels = self._window(region)
        mine = np.isin(labels, piece.parts).astype(np.uint8)
        corner = tuple(c + a * s for c, a, s in zip(mask.corner, window.start, mask.scale, strict=True))
        part = replace(mask, kinds=("own",), codes=mine, corner=(corner[0], corner[1]))
        return part.over(region)

    def _window(self, region: Region) -> tuple[Region, NDArray[np.int32]]:
        """Return the mask's own pixels under a level-0 region, one more on each side, with their components."""
        edges = [
            [(r - c) / s for r, c, s in zip(corner, self.mask.corner, self.mask.scale, strict=True)]
            for corner in (region.start, region.stop)
        ]
        frame = Region((0, 0), self.labels.shape)
        window = Region.between(
            (int(np.floor(e)) - 1 for e in edges[0]), (int(np.ceil(e)) + 1 for e in edges[1])
        )
        window = window.intersect(frame)
        return window, self.labels[window.slices()]


def _components(codes: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return components (8-connected) of the mask, and their boxes (N, 4) as y, x, y stop, x stop; 0 left out."""
    import cv2

    marked = (codes != 0).astype(np.uint8)
    if not marked.size:
        return np.zeros(codes.shape, np.int32), np.zeros((0, 4), np.int32)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(marked, connectivity=8, ltype=cv2.CV_32S)
    left, top, width, height = stats[1:, :4].T
    return np.asarray(labels, np.int32), np.stack([top, left, top + height, left + width], 1)


def plan_repair(
    name: str,
    mask: ArtifactMask,
    shape: tuple[int, ...],
    scale: tuple[float, ...],
    image: Region,
    grid: TileGrid,
) -> Repair:
    """Return the pieces of a mask; `grid` is the lattice of the run, the others are as in `Repair`.

    Raises UsageError (WSI680) if the mask leaves nothing of the extent: there would be nothing to restore it from.
    """
    repair = Repair(mask, shape, scale, image, grid.extent, grid.halo[0] // 2)
    if _covers(repair):
        raise UsageError(
            "WSI680",
            f"{name}: the mask covers everything, so there is nothing to restore it from; draw or find less",
        )
    _, boxes = _components(mask.codes)
    corner, step = np.array(mask.corner), np.array(mask.scale)
    low = np.floor((corner + boxes[:, :2] * step) / scale + 1e-6).astype(int)
    high = np.ceil((corner + boxes[:, 2:] * step) / scale - 1e-6).astype(int)
    low, high = np.maximum(low, grid.extent.start), np.minimum(high, grid.extent.stop)
    seen = (high > low).all(axis=1)
    whole = seen & (high - low <= grid.cell).all(axis=1)
    pieces = [*_whole(low, high, np.flatnonzero(whole), grid, image)]
    for part in np.flatnonzero(seen & ~whole).tolist():
        pieces += _cut(repair, part + 1, Region.between(low[part], high[part]), grid, image)
    return replace(repair, pieces=tuple(sorted(pieces, key=lambda p: (p.tile, p.box, p.parts))))


def _covers(repair: Repair) -> bool:
    """Tell whether the mask marks every pixel of the extent."""
    mask, extent = repair.mask, repair.level0(repair.extent)
    rows, columns = (
        (
            (extent.start[k] - mask.corner[k]) / mask.scale[k],
            (extent.stop[k] - mask.corner[k]) / mask.scale[k],
        )
        for k in (0, 1)
    )
    if min(rows[0], columns[0]) < 0 or rows[1] > mask.codes.shape[0] or columns[1] > mask.codes.shape[1]:
        return False
    window = mask.codes[int(rows[0]) : int(np.ceil(rows[1])), int(columns[0]) : int(np.ceil(columns[1]))]
    return bool(window.size and window.all())


def _whole(
    low: NDArray[Any], high: NDArray[Any], parts: NDArray[Any], grid: TileGrid, image: Region
) -> Iterator[Piece]:
    """Yield components that fit into a cell, those of a tile that lie close together as one piece."""
    middle = (low[parts] + high[parts]) // 2
    place = (middle - grid.origin) // np.array(grid.cell) - grid.first
    tiles = np.ravel_multi_index(tuple(place.clip(0, np.array(grid.counts) - 1).T), grid.counts)
    for tile in np.unique(tiles).tolist():
        groups: list[tuple[Region, list[int]]] = []
        for part in parts[tiles == tile].tolist():
            _join(groups, Region.between(low[part], high[part]), part + 1, grid)
        for box, members in groups:
            yield Piece(tile, tuple(members), _surrounded(box, grid.halo, image))


def _surrounded(box: Region, halo: tuple[int, ...], image: Region) -> Region:
    """Return a box with `halo` pixels around it; where the image ends, as many more on the other side."""
    grown = box.grow(halo)
    spans = []
    for low, high, first, last in zip(grown.start, grown.stop, image.start, image.stop, strict=True):
        start = max(first, min(low, last - (high - low)))
        spans.append((start, min(last, max(high, start + (high - low)))))
    return Region.between(*zip(*spans, strict=True))


def _join(groups: list[tuple[Region, list[int]]], box: Region, part: int, grid: TileGrid) -> None:
    """Put a component to the first group whose surroundings it shares, if both fit into a cell."""
    for k, (other, members) in enumerate(groups):
        joined = Region.between(map(min, box.start, other.start), map(max, box.stop, other.stop))
        fits = all(n <= c for n, c in zip(joined.shape, grid.cell, strict=True))
        if fits and box.grow(grid.halo).intersect(other).size:
            groups[k] = (joined, [*members, part])
            return
    groups.append((box, [part]))


def _cut(repair: Repair, part: int, box: Region, grid: TileGrid, image: Region) -> Iterator[Piece]:
    """Yield the parts of a component that is larger than a cell: one for each tile that owns some of it."""
    spans = []
    for axis in range(2):
        owned = np.array(grid.lines[axis].owned)
        first = int(np.searchsorted(owned, box.start[axis], "right")) - 1
        spans.append(range(max(0, first), int(np.searchsorted(owned, box.stop[axis], "left"))))
    for position in product(*spans):
        tile = grid[grid.index_at(position)]
        piece = Piece(tile.index, (part,), _surrounded(tile.owned, grid.halo, image), tile.owned)
        if repair._parts_over(piece, repair.level0(tile.owned)).any():
            yield piece
