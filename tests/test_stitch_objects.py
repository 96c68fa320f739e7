"""Objects at seams: the truth, once each, whatever the grid, the blocks, the order and the noise."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.objects import ObjectTable
from wsitk.stitch.objects import each_block, merge_objects, select
from wsitk.testing import OracleModel, SyntheticSlide, naive_merge, naive_objects, read_tile, run_tiles

PLANE = (230, 190)
PLANE_GRIDS = [
    TileGrid(Region((0, 0), PLANE), (80, 72), (20, 20), (0, 0), (2, 2)),
    TileGrid(Region((0, 0), PLANE), (64, 90), (20, 22), (-13, -5), (3, 1)),
    TileGrid.fit(Region((0, 0), PLANE), (112, 112), (24, 24), align=(16, 16), block=(1, 2)),
]
VOLUME = (58, 66, 50)
VOLUME_GRIDS = [
    TileGrid(Region((0, 0, 0), VOLUME), (48, 48, 48), (13, 13, 13), (0, 0, 0), (1, 2, 2)),
    TileGrid(Region((0, 0, 0), VOLUME), (52, 44, 50), (13, 12, 14), (-5, -9, -3), (2, 2, 2)),
    TileGrid(Region((0, 0, 0), VOLUME), (58, 60, 46), (15, 14, 13), (-20, -1, 0), (2, 1, 3)),
]
CASES = {"plane": PLANE_GRIDS, "volume": VOLUME_GRIDS}


@pytest.fixture(scope="module", params=["plane", "volume"])
def case(request: pytest.FixtureRequest) -> tuple[SyntheticSlide, list[TileGrid]]:
    grids = CASES[request.param]
    radius = (3.0, 8.0) if request.param == "plane" else (3.0, 5.5)
    return SyntheticSlide.make(grids[0].extent.shape, grids=grids, count=60, radius=radius, seed=11), grids


def model_for(grid: TileGrid, **options: object) -> OracleModel:
    return OracleModel(tile=grid.tile, halo=grid.halo, **options)


def selections(slide: SyntheticSlide, model: OracleModel, grid: TileGrid, band: float) -> list[ObjectTable]:
    """Return what each tile puts forward."""
    tables = []
    for tile in grid:
        pixels = read_tile(slide.pixels, tile.read, model.spec)
        objects = model.postprocess({"pixels": np.moveaxis(pixels, -1, 0).astype(np.float32)}, tile).objects
        assert objects is not None
        tables.append(select(objects, tile, grid, band))
    return tables


def merged(grid: TileGrid, tables: Sequence[ObjectTable]) -> ObjectTable:
    stored = {b.index: ObjectTable.concat([tables[i] for i in b.tiles]) for b in grid.blocks()}
    return ObjectTable.concat(
        [ObjectTable.empty(grid.extent.ndim, ("number",)), *merge_objects(grid, stored.get)]
    )


def by_anchor(table: ObjectTable) -> ObjectTable:
    return table.take(np.lexsort((table.tile, *table.anchor.T[::-1])))


def same_objects(a: ObjectTable, b: ObjectTable, *, but: tuple[str, ...] = ()) -> bool:
    """Tell whether two tables hold the same objects to the last bit, in whatever order."""
    left, right = by_anchor(a).to_arrays(), by_anchor(b).to_arrays()
    return all(np.array_equal(left[k], right[k]) for k in left if k not in but)


def test_the_image_says_who_is_who(case: tuple[SyntheticSlide, list[TileGrid]]) -> None:
    slide, grids = case
    truth = slide.truth
    assert len(truth) > 60
    # At every inner corner of every grid there is a nucleus, or half of one, within three pixels.
    for grid in grids:
        for corner in (t.owned.start for t in grid if 0 not in t.owned.start):
            around = Region(corner, (0,) * len(corner)).grow((3,) * len(corner)).intersect(grid.extent)
            assert slide.labels[around.slices()].any()
    crossing = [((truth.start < c) & (truth.start + truth.shape > c)).any() for c in grids[0].cell]
    assert all(crossing)


def test_the_oracle_returns_exactly_the_truth(case: tuple[SyntheticSlide, list[TileGrid]]) -> None:
    slide, grids = case
    for grid in grids:
        found = run_tiles(slide.pixels, model_for(grid), grid, band=4).objects
        assert found is not None
        truth = replace(
            slide.truth,
            class_id=found.class_id,
            probability=found.probability,
            columns={"number": np.arange(1, len(slide.truth) + 1, dtype=np.float32)},
        )
        assert same_objects(found, truth, but=("tile", "cut", "class_id", "probability"))
        assert (found.class_id == found.columns["number"] % 2).all()


def test_the_oracle_equals_the_whole_image_in_one_piece(case: tuple[SyntheticSlide, list[TileGrid]]) -> None:
    slide, grids = case
    whole = naive_objects(slide.pixels, model_for(grids[0]))
    for border in ("reflect", "constant"):
        found = run_tiles(slide.pixels, model_for(grids[1], border=border), grids[1]).objects
        assert found is not None
        assert same_objects(found, whole, but=("tile", "cut"))


@pytest.mark.parametrize("seed", range(2))
def test_jittered_views_lose_nothing_and_double_nothing(seed: int) -> None:
    for grids, radius, count in ((PLANE_GRIDS, (5.0, 8.0), 40), (VOLUME_GRIDS, (6.0, 7.0), 10)):
        extent = grids[0].extent
        slide = SyntheticSlide.make(extent.shape, grids=grids, count=count, radius=radius, seed=seed)
        # A sliver at the image's border may be shifted out of it altogether: not this test's subject.
        box = slide.truth
        inside = ((box.start > 2) & (box.start + box.shape < np.array(extent.shape) - 2)).all(axis=1)
        wanted = set((np.flatnonzero(inside) + 1).tolist())
        assert len(wanted) > 5
        for grid in grids:
            found = run_tiles(slide.pixels, model_for(grid, jitter=1, seed=seed), grid, band=4).objects
            assert found is not None
            numbers = [n for n in found.columns["number"].astype(int).tolist() if n in wanted]
            assert sorted(numbers) == sorted(wanted)


@pytest.mark.parametrize("jitter", [0, 1, 3])
def test_production_equals_the_quadratic_reference(jitter: int) -> None:
    for grids in CASES.values():
        slide = SyntheticSlide.make(
            grids[0].extent.shape, grids=grids[:1], count=30, radius=(2.0, 4.0), seed=3
        )
        for grid in grids[1:]:
            tables = selections(slide, model_for(grid, jitter=jitter), grid, band=4)
            assert same_objects(merged(grid, tables), naive_merge(grid, tables))


def test_neither_blocks_nor_row_order_change_the_objects() -> None:
    grid = PLANE_GRIDS[0]
    slide = SyntheticSlide.make(PLANE, grids=[grid], count=150, radius=(2.0, 7.0), seed=4)
    tables = selections(slide, model_for(grid, jitter=2), grid, band=5)
    wanted = merged(grid, tables)
    rng = np.random.default_rng(0)
    shuffled = [table.take(rng.permutation(len(table))) for table in tables]
    again = merged(grid, shuffled)
    assert all(np.array_equal(v, again.to_arrays()[k]) for k, v in wanted.to_arrays().items())
    for block in ((1, 1), (1, 9), (9, 1), (3, 2)):
        assert same_objects(merged(replace(grid, block=block), tables), wanted)


def test_objects_come_in_block_order_then_by_anchor() -> None:
    grid = PLANE_GRIDS[0]
    slide = SyntheticSlide.make(PLANE, grids=[grid], count=100, seed=6)
    tables = selections(slide, model_for(grid), grid, band=4)
    stored = {b.index: ObjectTable.concat([tables[i] for i in b.tiles]) for b in grid.blocks()}
    blocks = []
    for table in merge_objects(grid, stored.get):
        (block,) = {grid.block_of(i) for i in table.tile.tolist()}
        blocks.append(block)
        assert table.anchor.tolist() == sorted(table.anchor.tolist())
    assert blocks == sorted(set(blocks))


@pytest.mark.parametrize(("halo", "alive"), [(4, 2), (12, 3)])
def test_only_neighbouring_rows_are_in_memory(halo: int, alive: int) -> None:
    # Cells of 16 pixels: with a halo of 12 a window reaches beyond the next row but not the one after.
    cell = 16
    extent = Region((0, 0), (12 * cell, 2 * cell))
    grid = TileGrid(extent, (cell + 2 * halo,) * 2, (halo, halo), (0, 0), (1, 2))
    slide = SyntheticSlide.make(extent.shape, grids=[grid], radius=(2.0, 3.5), seed=1)
    tables = selections(slide, model_for(grid), grid, band=3)
    loads: list[int] = []
    living: list[weakref.ref[np.ndarray]] = []
    most = 0

    def load(index: int) -> ObjectTable:
        nonlocal most
        loads.append(index)
        fresh = ObjectTable.concat(
            [ObjectTable.empty(2, ("number",)), *(tables[i] for i in grid.block_at(index).tiles)]
        )
        living.append(weakref.ref(fresh.bits))
        most = max(most, sum(r() is not None for r in living))
        return fresh

    lag = 0
    for table in merge_objects(grid, load):
        lag = max(lag, loads[-1] - grid.block_of(int(table.tile[0])))
    assert loads == list(range(12))
    assert lag <= alive - 1
    assert most <= alive


def lone(
    anchor_yx: tuple[int, int], tile: int, grid: TileGrid, radius: int = 3, stretch: int = 0
) -> ObjectTable:
    """Return a box-shaped object around a point, as `tile` sees it; `stretch` pixels longer to the right."""
    shape = (2 * radius, 2 * radius + stretch)
    origin = (anchor_yx[0] - radius, anchor_yx[1] - radius)
    box = Region(origin, shape).intersect(grid[tile].read)
    return ObjectTable.from_labels(np.ones(box.shape, np.uint8), origin=box.start, tile=tile)


# Two tiles side by side: cells of 40, halo 12; the seam lies at x = 40.
PAIR = TileGrid(Region((0, 0), (40, 80)), (64, 64), (12, 12), (0, 0), (1, 1))


def resolve(objects: Sequence[ObjectTable]) -> ObjectTable:
    """Select and merge what the two tiles of `PAIR` say."""
    tables = []
    for tile in PAIR:
        mine = ObjectTable.concat([ObjectTable.empty(2), *(o for o in objects if o.tile[0] == tile.index)])
        tables.append(select(mine, tile, PAIR, 6))
    found = list(merge_objects(PAIR, dict(enumerate(tables)).get))
    return ObjectTable.concat([ObjectTable.empty(2), *found])


def test_both_own_it_the_more_central_view_stays() -> None:
    views = [lone((20, 39), 0, PAIR, radius=5), lone((20, 42), 1, PAIR, radius=5)]
    assert resolve(views).anchor.tolist() == [[20, 42]]
    views = [lone((20, 37), 0, PAIR, radius=5), lone((20, 40), 1, PAIR, radius=5)]
    assert resolve(views).anchor.tolist() == [[20, 37]]


def test_neither_owns_it_one_view_stays() -> None:
    views = [lone((20, 41), 0, PAIR), lone((20, 39), 1, PAIR)]
    assert len(resolve(views)) == 1


def test_what_the_owner_does_not_see_is_not_there() -> None:
    assert len(resolve([lone((20, 41), 0, PAIR)])) == 0
    assert len(resolve([lone((20, 39), 1, PAIR)])) == 0


def test_two_neighbours_are_not_one() -> None:
    assert len(resolve([lone((20, 37), 0, PAIR), lone((20, 43), 1, PAIR)])) == 2


def test_a_view_that_is_cut_yields_to_the_whole_one() -> None:
    # 24 pixels long from x = 32: tile 0 (reads to 52) cuts it at 52, its anchor 42 there, 44 in truth.
    long = {t: lone((20, 35), t, PAIR, stretch=18) for t in (0, 1)}
    assert resolve(list(long.values())).region(0) == Region((17, 32), (6, 24))
    # Here the cut view's anchor is its owner's, and the whole one's isn't: still the whole one stays.
    views = [lone((20, 35), 0, PAIR, stretch=14), lone((20, 34), 1, PAIR, radius=4, stretch=0)]
    shorter = resolve(views)
    assert not shorter.cut.any()


def test_an_object_cut_by_the_image_stays() -> None:
    edge = ObjectTable.from_labels(np.ones((6, 4), np.uint8), origin=(20, 0), tile=0)
    found = resolve([edge])
    assert len(found) == 1
    assert not found.cut[0]


def test_a_merged_view_from_next_door_does_not_double_a_nucleus_deep_inside() -> None:
    # Tile 1 takes two nuclei for one and owns the result; its mask reaches far into tile 0.
    nucleus = lone((20, 32), 0, PAIR, radius=2)
    other = lone((20, 50), 1, PAIR, radius=2)
    both = ObjectTable.from_labels(np.ones((4, 22), np.uint8), origin=(18, 30), tile=1)
    found = resolve([nucleus, both])
    assert len(found) == 1
    assert len(resolve([nucleus, other])) == 2


def test_select_cuts_masks_at_the_image_before_it_asks_for_the_anchor() -> None:
    tile = PAIR[0]
    # A nucleus at the border and its mirror image: 3 of 10 rows are real.
    mirrored = ObjectTable.from_labels(np.ones((10, 4), np.uint8), origin=(-7, 10)).with_columns(
        x=np.array([2.0])
    )
    outside = ObjectTable.from_labels(np.ones((3, 3), np.uint8), origin=(-5, 30)).with_columns(
        x=np.array([3.0])
    )
    plain = ObjectTable.from_labels(np.ones((2, 2), np.uint8), origin=(9, 9)).with_columns(x=np.array([4.0]))
    kept = select(ObjectTable.concat([outside, mirrored, plain]), tile, PAIR, 6)
    assert kept.columns["x"].tolist() == [2, 4]
    assert kept.region(0) == Region((0, 10), (3, 4))
    assert kept.anchor.tolist() == [[1.5, 12], [10, 10]]
    assert kept.size.tolist() == [12, 4]
    assert not kept.cut.any()


def test_select_at_a_region_of_interest_keeps_nuclei_whole() -> None:
    # The image is larger than the extent: nuclei at the extent's border are not cut to it.
    grid = TileGrid(Region((50, 50), (40, 40)), (64, 64), (12, 12), (50, 50), (1, 1))
    across = ObjectTable.from_labels(np.ones((6, 4), np.uint8), origin=(48, 60))
    beyond = ObjectTable.from_labels(np.ones((6, 4), np.uint8), origin=(46, 60))
    kept = select(ObjectTable.concat([across, beyond]), grid[0], grid, 6, image=Region((0, 0), (500, 500)))
    assert [kept.region(i) for i in range(len(kept))] == [Region((48, 60), (6, 4))]


def test_select_says_what_the_window_cuts() -> None:
    tile = PAIR[0]
    left = ObjectTable.from_labels(np.ones((4, 4), np.uint8), origin=(10, 48))
    near = ObjectTable.from_labels(np.ones((4, 3), np.uint8), origin=(20, 48))
    kept = select(ObjectTable.concat([left, near]), tile, PAIR, 12)
    assert kept.cut.tolist() == [True, False]
    assert kept.tile.tolist() == [0, 0]


def test_select_keeps_own_objects_and_a_band() -> None:
    dots = [
        ObjectTable.from_labels(np.ones((1, 1), np.uint8), origin=(5, x)) for x in (0, 39, 40, 45, 46, 50)
    ]
    table = ObjectTable.concat(dots)
    assert select(table, PAIR[0], PAIR, 6).start[:, 1].tolist() == [0, 39, 40, 45]
    assert select(table, PAIR[0], PAIR, (0, 6)).start[:, 1].tolist() == [0, 39, 40, 45]
    assert select(table, PAIR[0], PAIR, 0).start[:, 1].tolist() == [0, 39]


def test_objects_outside_the_window_are_a_models_error() -> None:
    far = ObjectTable.from_labels(np.ones((2, 2), np.uint8), origin=(70, 10))
    with pytest.raises(ModelError, match="WSI333"):
        select(far, PAIR[0], PAIR, 6)


def test_nothing_in_nothing_out() -> None:
    assert list(merge_objects(PAIR, lambda i: None)) == []
    assert list(merge_objects(PAIR, lambda i: ObjectTable.empty(2))) == []
    assert len(select(ObjectTable.empty(2), PAIR[0], PAIR, 6)) == 0


def test_objects_of_an_exclusive_model_are_not_compared() -> None:
    grid = TileGrid.fit(Region((0, 0), (64, 64)), (32, 32), (8, 8))
    labels = np.ones((20, 20), np.int32)
    same = [ObjectTable.from_labels(labels, origin=(10, 10), tile=k) for k in (0, 1)]
    blocks = {0: ObjectTable.concat(same)}
    (table,) = each_block(grid, blocks.get)
    assert len(table) == 2
    assert sum(len(t) for t in merge_objects(grid, blocks.get)) == 1
