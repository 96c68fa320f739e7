"""What is restored at once: every masked pixel once, whole artifacts whole, and the same wherever it is computed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from wsitk.artifacts import ArtifactMask
from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.repair import Repair, plan_repair


def planned(
    codes: np.ndarray,
    shape: tuple[int, int],
    *,
    mask_scale: float = 1.0,
    corner: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
    extent: Region | None = None,
    tile: int = 40,
    halo: int = 8,
) -> tuple[Repair, TileGrid]:
    mask = ArtifactMask(("fold", "pen"), codes.astype(np.uint8), (mask_scale, mask_scale), corner)
    image = Region((0, 0), tuple(max(1, int(n / scale + 0.5)) for n in shape))
    grid = TileGrid.fit(extent or image, (tile, tile), (halo, halo))
    return plan_repair("a", mask, shape, (scale, scale), image, grid), grid


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int], dict[str, object]]:
    shape = (draw(st.integers(30, 110)), draw(st.integers(30, 110)))
    mask_scale = draw(st.sampled_from([1.0, 2.0, 3.7]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = tuple(int(np.ceil(n / mask_scale)) for n in shape)
    field = ndimage.gaussian_filter(rng.normal(size=grid), draw(st.sampled_from([0.6, 1.5, 4.0])))
    codes = (field > np.quantile(field, draw(st.sampled_from([0.5, 0.8, 0.97])))) * rng.integers(1, 4, grid)
    scale = draw(st.sampled_from([1.0, 2.0, 2.5, 0.8]))
    return codes, shape, {"mask_scale": mask_scale, "scale": scale}


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_masked_pixel_belongs_to_one_piece(
    case: tuple[np.ndarray, tuple[int, int], dict[str, float]],
) -> None:
    codes, shape, options = case
    repair, grid = planned(codes, shape, **options)  # type: ignore[arg-type]  # of a strategy
    whole = Region((0, 0), shape)
    wanted = repair.mask.over(whole)
    count = np.zeros(shape, int)
    for number, piece in enumerate(repair.pieces):
        box = repair.box_level0(number)
        own = repair.own_level0(number, whole)
        assert own.any()
        assert not own.sum() - own[box.slices()].sum()
        count += own
        masked = repair.masked(number)
        assert (masked.unknown | ~masked.own).all()  # what is painted was unknown
        assert all(n <= t for n, t in zip(piece.box.shape, grid.tile, strict=True))
        assert (repair.weight(number, piece.box)[masked.own] > 0).all()
        # every level-0 pixel of the piece has a working pixel that was painted for it
        places = [
            np.minimum(np.floor((np.arange(n) + 0.5) / repair.scale[0]).astype(int), m - 1)
            for n, m in zip(shape, repair.image.shape, strict=True)
        ]
        painted = np.zeros(repair.image.shape, bool)
        painted[piece.box.slices()] = masked.own
        assert (painted[np.ix_(*places)] | ~own).all()
    assert (count == wanted).all()


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 20), st.integers(0, 20))
def test_only_the_extent_is_changed(
    case: tuple[np.ndarray, tuple[int, int], dict[str, float]], top: int, left: int
) -> None:
    codes, shape, options = case
    scale = options["scale"]
    image = Region((0, 0), tuple(max(1, int(n / scale + 0.5)) for n in shape))
    extent = Region.between((top // 2, left // 2), (image.stop[0] - 3, image.stop[1] - 5))
    mask = ArtifactMask(("fold", "pen"), codes.astype(np.uint8), (options["mask_scale"],) * 2)
    assume(not mask.over(Repair(mask, shape, (scale,) * 2, image, extent, 0).level0(extent)).all())
    repair, _ = planned(codes, shape, extent=extent, **options)  # type: ignore[arg-type]  # of a strategy
    allowed = np.zeros(shape, bool)
    allowed[repair.level0(extent).slices()] = True
    whole = Region((0, 0), shape)
    count = sum(
        (repair.own_level0(n, whole).astype(int) for n in range(len(repair.pieces))), np.zeros(shape, int)
    )
    assert (count == (repair.mask.over(whole) & allowed)).all()


def test_an_artifact_on_a_seam_stays_whole_and_one_too_large_is_cut() -> None:
    codes = np.zeros((200, 200), np.uint8)
    codes[20:30, 10:32] = 1  # 22 px, over the line at x = 24
    codes[100:180, 50:54] = 2  # 80 px long, in cells of 24
    repair, grid = planned(codes, (200, 200))
    whole, *parts = sorted(repair.pieces, key=lambda p: p.core is not None)
    assert whole.core is None
    assert whole.box == Region((12, 2), (26, 38))
    corner = np.zeros((200, 200), np.uint8)
    corner[0:2, 195:199] = 1
    (piece,) = planned(corner, (200, 200))[0].pieces
    assert piece.box == Region((0, 180), (18, 20))  # as large as in the middle
    assert [p.core for p in parts] == [grid[p.tile].owned for p in parts]
    assert len(parts) == 4
    assert repair.kinds(repair.pieces.index(whole)) == ("fold",)


def test_weights_of_parts_add_up_to_one() -> None:
    codes = np.ones((120, 130), np.uint8)
    codes[60, 0] = 0
    repair, _ = planned(codes, (120, 130))
    total = np.zeros((120, 130), np.float32)
    for number, piece in enumerate(repair.pieces):
        masked = repair.masked(number)
        total[piece.box.slices()] += repair.weight(number, piece.box) * masked.own
    assert np.allclose(total[codes > 0], 1, atol=1e-6)


def test_specks_that_lie_together_are_one_piece() -> None:
    codes = np.zeros((100, 100), np.uint8)
    codes[10, 10] = codes[12, 13] = codes[15, 10] = 1
    codes[90, 90] = 1
    repair, _ = planned(codes, (100, 100))
    assert [len(p.parts) for p in repair.pieces] == [3, 1]


def test_a_mask_of_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="WSI680 a: the mask covers everything") as refusal:
        planned(np.ones((50, 50)), (50, 50))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="WSI680"):  # of what may be changed
        planned(np.ones((30, 30)), (50, 50), extent=Region((0, 0), (30, 30)))
    hole = np.ones((50, 50))
    hole[7, 7] = 0
    assert planned(hole, (50, 50))[0].pieces


def test_a_mask_of_nothing_has_no_pieces() -> None:
    assert planned(np.zeros((50, 50)), (50, 50))[0].pieces == ()


def test_what_is_sent_is_what_is_there() -> None:
    rng = np.random.default_rng(0)
    repair, _ = planned(rng.random((60, 70)) > 0.9, (120, 140), mask_scale=2.0, scale=2.0)
    for tile in {piece.tile for piece in repair.pieces}:
        here = repair.at(tile)
        there = pickle.loads(pickle.dumps(here))
        for a, b in zip(here.pieces(), there.pieces(), strict=True):
            assert (a.number, a.box) == (b.number, b.box)
            assert np.array_equal(a.unknown, b.unknown)
            assert np.array_equal(a.own, b.own)
    again: Repair = pickle.loads(pickle.dumps(repair))
    assert len(pickle.dumps(repair)) < 100 * len(repair.pieces) + 3 * repair.mask.codes.size
    assert again.key() == repair.key()
    assert np.array_equal(again.labels, repair.labels)
