"""The seam resolver's parts: conflicting pairs against brute force, the order, the greedy choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.objects import ObjectTable
from wsitk.stitch.seams import DROPPED, KEPT, UNDECIDED, Frames, conflicts, priority, settle


def random_table(rng: np.random.Generator, ndim: int, count: int, span: int) -> ObjectTable:
    """Return objects of random boxes and speckled masks from five tiles, some of them large."""
    tables = []
    for _ in range(count):
        high = 24 if rng.random() < 0.1 else 7
        shape = rng.integers(1, high, ndim)
        mask = rng.random(shape) < 0.8
        mask[(0,) * ndim] = mask[(-1,) * ndim] = True
        origin = tuple(rng.integers(-span, span, ndim).tolist())
        # One object, though it may be in pieces: a single label over the whole box.
        table = ObjectTable.from_labels(mask.astype(np.uint8), origin=origin, tile=int(rng.integers(5)))
        tables.append(table)
    return ObjectTable.concat([ObjectTable.empty(ndim), *tables])


def pixels(table: ObjectTable, row: int) -> set[tuple[int, ...]]:
    return set(map(tuple, (np.argwhere(table.mask(row)) + table.start[row]).tolist()))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), ndim=st.integers(1, 3), count=st.integers(0, 30))
def test_conflicts_equal_brute_force(seed: int, ndim: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, ndim, count, span=12)
    fresh = rng.random(count) < 0.5
    masks = [pixels(table, row) for row in range(count)]
    wanted = {
        frozenset((a, b))
        for a in range(count)
        for b in range(a)
        if table.tile[a] != table.tile[b]
        and (fresh[a] or fresh[b])
        and 2 * len(masks[a] & masks[b]) > min(len(masks[a]), len(masks[b]))
    }
    found = [frozenset(pair) for pair in conflicts(table, fresh).tolist()]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_half_is_not_more_than_half() -> None:
    two = ObjectTable.from_labels(np.array([[1, 1]]), tile=0)
    shifted = ObjectTable.from_labels(np.array([[1, 1]]), origin=(0, 1), tile=1)
    inside = ObjectTable.from_labels(np.array([[1]]), origin=(0, 1), tile=2)
    both = np.ones(2, bool)
    assert len(conflicts(ObjectTable.concat([two, shifted]), both)) == 0
    assert conflicts(ObjectTable.concat([two, inside]), both).tolist() in ([[0, 1]], [[1, 0]])


def test_objects_of_one_tile_never_conflict() -> None:
    mask = ObjectTable.from_labels(np.ones((3, 3), int), tile=4)
    assert len(conflicts(ObjectTable.concat([mask, mask]), np.ones(2, bool))) == 0


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_frames_equal_the_grid(ndim: int) -> None:
    extent = Region((3, -2, 5)[:ndim], (29, 31, 17)[:ndim])
    grid = TileGrid(extent, (12, 11, 9)[:ndim], (2, 3, 1)[:ndim], (1, 0, 4)[:ndim], (2,) * ndim)
    frames = Frames.of(grid, np.arange(len(grid)))
    for tile in grid:
        assert tuple(frames.owned_start[tile.index]) == tile.owned.start
        assert tuple(frames.owned_stop[tile.index]) == tile.owned.stop
        assert tuple(frames.read_start[tile.index]) == tile.read.start
        assert tuple(frames.read_stop[tile.index]) == tile.read.stop


def test_the_order_of_objects() -> None:
    grid = TileGrid(Region((0,), (20,)), (14,), (2,), (0,), (1,))
    dot = ObjectTable.from_labels(np.array([1]))

    def seen(anchor: float, tile: int, cut: bool = False) -> ObjectTable:
        return replace(dot, anchor=np.array([[anchor]]), tile=np.array([tile], np.int32), cut=np.array([cut]))

    # Tile 0 owns 0..10 and reads -2..12, tile 1 owns 10..20 and reads 8..22.
    best_to_worst = [
        seen(5.0, 0),  # owned, 7 pixels inside
        seen(15.5, 1),  # owned, 6.5 inside
        seen(9.0, 0),  # owned, 3 inside
        seen(11.0, 1),  # as far inside, but a higher coordinate
        seen(10.5, 0),  # another's
        seen(5.0, 0, cut=True),
        seen(10.5, 0, cut=True),
    ]
    shuffled = np.random.default_rng(0).permutation(len(best_to_worst))
    place, owner = priority(grid, ObjectTable.concat([best_to_worst[i] for i in shuffled]))
    assert place.tolist() == shuffled.tolist()
    assert owner.tolist() == [bool(i not in (4, 6)) for i in shuffled]


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 25), parts=st.integers(1, 4))
def test_settling_in_parts_equals_greedy_at_once(seed: int, count: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    place = rng.permutation(count)
    pairs = np.array([(a, b) for a in range(count) for b in range(a) if rng.random() < 0.15], np.int64)
    pairs = pairs.reshape(-1, 2)
    kept: set[int] = set()
    for row in np.argsort(place).tolist():
        rivals = {int(x) for pair in pairs.tolist() if row in pair for x in pair if x != row}
        if not rivals & kept:
            kept.add(row)
    # Objects arrive in parts; an object is ready once no later part has a rival for it.
    part = np.sort(rng.integers(0, parts, count))
    latest = part.copy()
    for a, b in pairs.tolist():
        latest[a], latest[b] = max(latest[a], part[b]), max(latest[b], part[a])
    state, edges = np.full(count, UNDECIDED, np.int8), np.zeros((0, 2), np.int64)
    for now in range(parts):
        arrived = pairs[part[pairs].max(axis=1) == now] if len(pairs) else pairs
        before = state.copy()
        edges = settle(state, np.concatenate([edges, arrived]), place, (latest <= now) & (part <= now))
        assert (state[before != UNDECIDED] == before[before != UNDECIDED]).all()
    assert set(np.flatnonzero(state == KEPT).tolist()) == kept
    assert (state != UNDECIDED).all()
    assert (state == DROPPED).sum() == count - len(kept)
