"""Fields: exact for constants, equal to the textbook, and the same bytes whatever the order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import FieldSpec
from wsitk.stitch.fields import FieldMerger, FieldPart, FieldStitcher, finish
from wsitk.testing import ConstantModel, IdentityModel, NoiseModel, SyntheticSlide, naive_fields, run_tiles

PLANE = TileGrid(Region((0, 0), (97, 83)), (32, 28), (6, 4), (-3, -5), (2, 2))
VOLUME = TileGrid(Region((0, 0, 0), (24, 31, 21)), (14, 18, 16), (2, 3, 4), (-1, 0, -2), (2, 1, 2))
# A region of interest that starts away from zero, with halos larger than cells: nine tiles on a pixel.
DENSE = TileGrid(Region((11, 7), (31, 40)), (20, 22), (7, 8), (9, 4), (2, 3))
GRIDS = {"plane": PLANE, "volume": VOLUME, "dense": DENSE}
WINDOWS = ["ramp", "hann", "flat", "crop"]


def pixels_of(grid: TileGrid) -> np.ndarray:
    return SyntheticSlide.make(grid.extent.stop, count=20, seed=5).pixels


def said(grid: TileGrid, tile: Tile, channels: int) -> np.ndarray:
    """Return what an unreliable network says: another thing in each tile."""
    spec = FieldSpec("f", ("c",) * channels)
    return NoiseModel(spec, tile=grid.tile, halo=grid.halo).postprocess({}, tile).fields["f"]


def stitch(
    grid: TileGrid, spec: FieldSpec, order: list[int] | None = None, skip: frozenset[int] = frozenset()
) -> dict[int, FieldPart]:
    stitchers = {b.index: FieldStitcher(grid, b, spec) for b in grid.blocks()}
    for i in order or range(len(grid)):
        stitcher = stitchers[grid.block_of(i)]
        if i in skip:
            stitcher.skip(grid[i])
        else:
            stitcher.add(grid[i], said(grid, grid[i], len(spec.channels)))
    return {i: stitcher.finalize() for i, stitcher in stitchers.items()}


def merged(grid: TileGrid, spec: FieldSpec, skip: frozenset[int] = frozenset()) -> np.ndarray:
    return FieldMerger(grid, spec, stitch(grid, spec, skip=skip).get).read(grid.extent)


def textbook(grid: TileGrid, spec: FieldSpec, skip: frozenset[int] = frozenset()) -> np.ndarray:
    model = NoiseModel(spec, tile=grid.tile, halo=grid.halo)
    return naive_fields(np.zeros((*grid.extent.stop, 3), np.uint8), model, grid, skip=skip)[spec.name]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456])
def test_a_constant_comes_back_to_the_last_bit(name: str, window: str, value: float) -> None:
    grid = GRIDS[name]
    model = ConstantModel(value, tile=grid.tile, halo=grid.halo, window=window, channels=("a", "b"))
    field = run_tiles(np.zeros((*grid.extent.stop, 3), np.uint8), model, grid).fields["constant"]
    assert field.shape == (2, *grid.extent.shape)
    assert field.dtype == np.float32
    assert (field == np.float32(value)).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_identity_returns_the_image(name: str, window: str) -> None:
    grid = GRIDS[name]
    pixels = pixels_of(grid)
    field = run_tiles(pixels, IdentityModel(tile=grid.tile, halo=grid.halo, window=window), grid).fields[
        "image"
    ]
    assert field.dtype == np.uint8
    assert np.array_equal(np.moveaxis(field, 0, -1), pixels[grid.extent.slices()])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", GRIDS)
def test_production_equals_the_textbook(name: str, window: str) -> None:
    grid, skip = GRIDS[name], frozenset({1, 4})
    spec = FieldSpec("f", ("a", "b", "c"), window=window, dtype="float32")
    assert merged(grid, spec) == pytest.approx(textbook(grid, spec), abs=1e-6)
    assert merged(grid, spec, skip) == pytest.approx(textbook(grid, spec, skip), abs=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_argmax_equals_the_textbook(name: str) -> None:
    grid = GRIDS[name]
    spec = FieldSpec("f", ("a", "b", "c", "d"), kind="labels", reduction="argmax")
    labels = merged(grid, spec)
    assert labels.shape == (1, *grid.extent.shape)
    assert labels.dtype == np.uint8
    # Where two channels tie to the last bit of float32 the textbook may differ; random values don't.
    assert (labels != textbook(grid, spec)).mean() < 1e-4


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("block", [1, 3, 99])
def test_blocks_change_no_more_than_the_last_bits(name: str, block: int) -> None:
    grid = GRIDS[name]
    other = replace(grid, block=(block,) * grid.extent.ndim)
    spec = FieldSpec("f", ("a", "b"), window="hann", dtype="float32")
    assert merged(other, spec) == pytest.approx(merged(grid, spec), abs=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_order_of_arrival_changes_no_byte(name: str, seed: int) -> None:
    grid, spec = GRIDS[name], FieldSpec("f", ("a", "b"), dtype="float32")
    order = np.random.default_rng(seed).permutation(len(grid)).tolist()
    there, here = stitch(grid, spec), stitch(grid, spec, order)
    for index, part in there.items():
        arrays = here[index].to_arrays()
        assert {k: v.tobytes() for k, v in part.to_arrays().items()} == {
            k: v.tobytes() for k, v in arrays.items()
        }


def test_every_order_of_a_small_block_gives_the_same_bytes() -> None:
    grid = TileGrid(Region((0, 0), (16, 16)), (14, 14), (3, 3), (0, 0), (2, 2))
    spec = FieldSpec("f", ("a",), dtype="float32")
    assert len(grid) == 4
    parts = [stitch(grid, spec, list(order), frozenset({2}))[0] for order in permutations(range(4))]
    assert len({part.done.tobytes() for part in parts}) == 1
    assert all(part.tiles.tolist() == [0, 1, 3] for part in parts)


def test_two_tiles_written_out() -> None:
    # Two tiles of six pixels, halo one, on an image of eight: they share pixels 3 and 4.
    grid = TileGrid(Region((0,), (8,)), (6,), (1,), (0,), (1,))
    spec = FieldSpec("f", ("a",), dtype="float32")
    values = {0: np.full((1, 6), 1, np.float32), 1: np.full((1, 6), 5, np.float32)}
    parts = {}
    for block in grid.blocks():
        stitcher = FieldStitcher(grid, block, spec)
        stitcher.add(grid[block.index], values[block.index])
        parts[block.index] = stitcher.finalize()
    assert (parts[0].region, parts[0].inner) == (Region((0,), (5,)), Region((0,), (3,)))
    assert parts[0].weight.tolist() == [0.75, 0.25]
    assert FieldMerger(grid, spec, parts.get).read(grid.extent).tolist() == [[1, 1, 1, 2, 4, 5, 5, 5]]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("reduction", ["mean", "argmax"])
def test_a_pixel_does_not_depend_on_the_region_it_is_read_with(name: str, reduction: str) -> None:
    grid = GRIDS[name]
    spec = FieldSpec("f", ("a", "b", "c"), reduction=reduction)
    merger = FieldMerger(grid, spec, stitch(grid, spec, skip=frozenset({2})).get)
    whole = merger.read(grid.extent)
    rng = np.random.default_rng(0)
    for _ in range(40):
        low = rng.integers(grid.extent.start, grid.extent.stop)
        region = Region.between(low.tolist(), (low + rng.integers(0, 25, len(low))).tolist())
        region = region.intersect(grid.extent)
        here = (slice(None), *region.slices(grid.extent.start))
        assert np.array_equal(merger.read(region), whole[here])


@pytest.mark.parametrize("window", WINDOWS)
def test_tiles_that_are_not_ok_stay_empty_to_the_pixel(window: str) -> None:
    grid, skip = PLANE, frozenset({0, 3, 7})
    spec = FieldSpec("f", ("a",), window=window, dtype="float32")
    field = merged(grid, spec, skip)
    for tile in grid:
        there = field[(slice(None), *tile.owned.slices())]
        assert (there == 0).all() if tile.index in skip else (there > 0).all()


def test_a_block_without_a_part_is_empty() -> None:
    spec = FieldSpec("f", ("a",), dtype="float32")
    parts = stitch(PLANE, spec)
    gone = PLANE.block_at(3)
    field = FieldMerger(PLANE, spec, lambda i: None if i == 3 else parts[i]).read(PLANE.extent)
    assert (field[(slice(None), *gone.owned.slices())] == 0).all()
    assert (field > 0).sum() == PLANE.extent.size - gone.owned.size


def test_inner_pixels_are_reached_by_no_other_block() -> None:
    for grid in GRIDS.values():
        spec = FieldSpec("f", ("a",), dtype="float32")
        reached = np.zeros(grid.extent.shape, int)
        for block in grid.blocks():
            touched = np.zeros(grid.extent.shape, bool)
            for i in block.tiles:
                touched[grid[i].read.intersect(grid.extent).slices(grid.extent.start)] = True
            reached += touched
        for part in stitch(grid, spec).values():
            assert (reached[part.inner.slices(grid.extent.start)] == 1).all()
            rim = np.zeros(grid.extent.shape, int)
            for box, mean, weight in part.rim():
                rim[box.slices(grid.extent.start)] += 1
                assert mean.shape[1:] == weight.shape == box.shape
            assert rim.max() <= 1
            assert rim.sum() + part.inner.size == part.region.size


def test_parts_survive_storage() -> None:
    spec = FieldSpec("f", ("a", "b"))
    for part in stitch(VOLUME, spec).values():
        again = FieldPart.from_arrays(part.to_arrays())
        assert (again.region, again.inner) == (part.region, part.inner)
        assert all(np.array_equal(v, again.to_arrays()[k]) for k, v in part.to_arrays().items())


def test_the_merger_holds_few_parts_and_loads_each_once_in_a_sweep() -> None:
    grid = TileGrid(Region((0, 0), (400, 60)), (24, 24), (4, 4), (0, 0), (2, 2))
    spec = FieldSpec("f", ("a",))
    parts, loads = stitch(grid, spec), []

    def load(index: int) -> FieldPart:
        loads.append(index)
        return parts[index]

    merger = FieldMerger(grid, spec, load)
    for block in grid.blocks():
        merger.read(block.owned)
        assert len(merger._parts) <= 8
    assert max(loads.count(i) for i in set(loads)) <= 2


def test_a_clipped_array_is_taken_where_the_image_begins() -> None:
    spec = FieldSpec("f", ("a",), dtype="float32")
    parts = {}
    for block in PLANE.blocks():
        stitcher = FieldStitcher(PLANE, block, spec)
        for i in block.tiles:
            tile = PLANE[i]
            seen = tile.read.intersect(PLANE.extent).slices(tile.read.start)
            stitcher.add(tile, said(PLANE, tile, 1)[(slice(None), *seen)])
        parts[block.index] = stitcher.finalize()
    assert np.array_equal(FieldMerger(PLANE, spec, parts.get).read(PLANE.extent), merged(PLANE, spec))


def test_finish_rounds_to_nearest_and_clips() -> None:
    mean = np.array([[-0.1, 0.0, 0.5 / 255 + 1e-6, 1.0, 1.7]], np.float32)
    assert finish(mean, FieldSpec("f", ("a",))).tolist() == [[0, 0, 1, 255, 255]]
    assert finish(mean, FieldSpec("f", ("a",), dtype="uint16")).tolist() == [[0, 0, 129, 65535, 65535]]


def test_misuse_is_refused() -> None:
    spec = FieldSpec("f", ("a", "b"))
    stitcher = FieldStitcher(PLANE, PLANE.block_at(0), spec)
    tile = PLANE[0]
    with pytest.raises(ModelError, match=r"WSI331 .*shape \(1, 32, 28\), wanted \(2, 32, 28\)"):
        stitcher.add(tile, said(PLANE, tile, 1))
    stitcher.add(tile, said(PLANE, tile, 2))
    with pytest.raises(ValueError, match="came before"):
        stitcher.add(tile, said(PLANE, tile, 2))
    with pytest.raises(ValueError, match="not in this block"):
        stitcher.skip(PLANE[len(PLANE) - 1])
    with pytest.raises(ValueError, match="not inside the extent"):
        FieldMerger(PLANE, spec, lambda i: None).read(Region((-1, 0), (4, 4)))
