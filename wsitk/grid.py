"""Tiles, and the arrangement of tiles over an extent: integer arithmetic only, no I/O, no torch.

read   ┌───────────────┐      owned regions partition the extent: nothing twice, nothing missed.
       │   owned       │      read = the lattice cell + halo on each side, constant in size; it may
       │  ┌─────────┐  │      reach beyond the image, where the source pads.
       │  │         │  │
       │  └─────────┘  │
       └───────────────┘
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from math import ceil, prod

from wsitk.geometry import Region
from wsitk.volumes.nnunet_rules import tile_starts

__all__ = ["Block", "Line", "Tile", "TileGrid"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A window that the network reads, and the part of it that this tile answers for."""

    index: int
    owned: Region
    read: Region


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring tiles that are computed, committed and resumed together."""

    index: int
    tiles: tuple[int, ...]
    owned: Region
    read: Region


@dataclass(frozen=True, slots=True)
class Line:
    """The tiles along one axis: where each begins to read, and between which pixels each owns."""

    read: tuple[int, ...]
    owned: tuple[int, ...]
    """One more than there are tiles: tile k owns ``[owned[k], owned[k + 1])``."""


@dataclass(frozen=True)
class TileGrid:
    """A concrete arrangement of tiles over `extent`, all in pixels of the working grid.

    The lattice has cells of ``tile - 2 * halo`` pixels with a corner at `origin` (which may lie outside
    the extent). A tile's `owned` region is its cell clipped to the extent. `block` is the number of tiles
    along each axis of a `Block`. Where `starts` names the places at which tiles begin to read along each
    axis, these replace the lattice, and a tile owns what lies nearest to its middle.
    """

    extent: Region
    tile: tuple[int, ...]
    halo: tuple[int, ...]
    origin: tuple[int, ...]
    block: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if any(n == 0 for n in self.extent.shape):
            raise ValueError(f"the extent is empty: {self.extent}")
        lengths = {len(v) for v in (self.extent.shape, self.tile, self.halo, self.origin, self.block)}
        if len(lengths) != 1:
            raise ValueError(f"extent, tile, halo, origin and block differ in length: {sorted(lengths)}")
        if any(s < 1 for s in self.cell):
            raise ValueError(f"tile {self.tile} leaves nothing inside a halo of {self.halo}")

    @classmethod
    def fit(
        cls,
        extent: Region,
        tile: tuple[int, ...],
        halo: tuple[int, ...],
        *,
        align: tuple[int, ...] | None = None,
        block: tuple[int, ...] | None = None,
    ) -> TileGrid:
        """Return a grid whose `read` windows all start at multiples of `align` from the image's corner.

        A network whose inner windows have that period then sees the same partition of the image under
        every grid. Raises ValueError if the lattice cell is not a multiple of `align`.
        """
        period = align or (1,) * extent.ndim
        cell = tuple(t - 2 * h for t, h in zip(tile, halo, strict=True))
        if any(c < 1 or c % p for c, p in zip(cell, period, strict=True)):
            raise ValueError(f"tile - 2 * halo must be a positive multiple of {period}, got {cell}")
        origin = tuple(a - (a - h) % p for a, h, p in zip(extent.start, halo, period, strict=True))
        return cls(extent, tile, halo, origin, block or (1,) * extent.ndim)

    @classmethod
    def sliding(
        cls,
        extent: Region,
        tile: tuple[int, ...],
        step: float = 0.5,
        *,
        block: tuple[int, ...] | None = None,
    ) -> TileGrid:
        """Return windows that stay inside the extent, spread evenly, at most ``step * tile`` apart.

        nnU-Net's rule (Isensee et al. 2021, supplement): n = ceil((size - tile) / (tile * step)) + 1 windows,
        the k-th beginning at round(k * (size - tile) / (n - 1)). An extent shorter than the tile gets one
        window around its middle, and the source pads.
        """
        inside = tile_starts(extent.shape, tile, step)
        starts = tuple(tuple(a + k for k in places) for a, places in zip(extent.start, inside, strict=True))
        zero = (0,) * extent.ndim
        return cls(extent, tile, zero, zero, block or (1,) * extent.ndim, starts)

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Return where tiles read and own along each axis."""
        return tuple(self._line(axis) for axis in range(self.extent.ndim))

    def _line(self, axis: int) -> Line:
        low, high = self.extent.start[axis], self.extent.stop[axis]
        if self.starts is None:
            corner, cell = self.origin[axis] + self.first[axis] * self.cell[axis], self.cell[axis]
            begins = [corner + k * cell for k in range(self.counts[axis])]
            return Line(tuple(b - self.halo[axis] for b in begins), (low, *begins[1:], high))
        places, half = self.starts[axis], self.tile[axis] / 2
        middles = [(a + b) / 2 + half for a, b in pairwise(places)]
        return Line(places, (low, *(ceil(m) for m in middles), high))

    @cached_property
    def cell(self) -> tuple[int, ...]:
        """Return the lattice step: the size of an unclipped owned region."""
        return tuple(t - 2 * h for t, h in zip(self.tile, self.halo, strict=True))

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Return the lattice index of the tile that owns the extent's first pixel."""
        return tuple((a - o) // c for a, o, c in zip(self.extent.start, self.origin, self.cell, strict=True))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return the number of tiles along each axis."""
        if self.starts is not None:
            return tuple(len(places) for places in self.starts)
        ends = zip(self.extent.stop, self.origin, self.cell, self.first, strict=True)
        return tuple((b - 1 - o) // c - f + 1 for b, o, c, f in ends)

    def __len__(self) -> int:
        return prod(self.counts)

    def __iter__(self) -> Iterator[Tile]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Tile:
        """Return tile `index` in C order; raises IndexError outside ``0 .. len - 1``."""
        position = self.position(index)
        spans = [(line.owned[k], line.owned[k + 1]) for line, k in zip(self.lines, position, strict=True)]
        owned = Region.between(*zip(*spans, strict=True))
        return Tile(index, owned, Region(self._read_start(position), self.tile))

    def _read_start(self, position: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(line.read[k] for line, k in zip(self.lines, position, strict=True))

    def position(self, index: int) -> tuple[int, ...]:
        """Return the place of tile `index` along each axis."""
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        place = []
        for count in reversed(self.counts):
            index, rest = divmod(index, count)
            place.append(rest)
        return tuple(reversed(place))

    def index_at(self, position: tuple[int, ...]) -> int:
        """Return the index of the tile at `position`; the inverse of `position()`."""
        index = 0
        for k, count in zip(position, self.counts, strict=True):
            if not 0 <= k < count:
                raise IndexError(f"tile position {position} of {self.counts}")
            index = index * count + k
        return index

    def overlapping(self, region: Region) -> Iterator[Tile]:
        """Yield, in index order, the tiles whose `read` window overlaps `region`."""
        ranges = [
            range(bisect_right(line.read, a - t), bisect_left(line.read, b))
            for a, b, t, line in zip(region.start, region.stop, self.tile, self.lines, strict=True)
        ]
        for position in product(*ranges):
            tile = self[self.index_at(position)]
            if tile.read.intersect(region).size:
                yield tile

    @cached_property
    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks along each axis."""
        return tuple(-(-n // b) for n, b in zip(self.counts, self.block, strict=True))

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks in C order."""
        return (self.block_at(i) for i in range(prod(self.block_counts)))

    def block_at(self, index: int) -> Block:
        """Return block `index` in C order of blocks."""
        if not 0 <= index < prod(self.block_counts):
            raise IndexError(f"block {index} of {prod(self.block_counts)}")
        place, rest = [], index
        for count in reversed(self.block_counts):
            rest, k = divmod(rest, count)
            place.append(k)
        ranges = [
            range(k * b, min((k + 1) * b, n))
            for k, b, n in zip(reversed(place), self.block, self.counts, strict=True)
        ]
        tiles = tuple(self.index_at(p) for p in product(*ranges))
        first, last = self[tiles[0]], self[tiles[-1]]
        owned = Region.between(first.owned.start, last.owned.stop)
        return Block(index, tiles, owned, Region.between(first.read.start, last.read.stop))

    def block_of(self, tile: int) -> int:
        """Return the index of the block that holds tile `tile`."""
        index = 0
        for k, b, n in zip(self.position(tile), self.block, self.block_counts, strict=True):
            index = index * n + k // b
        return index
