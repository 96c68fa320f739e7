"""Joining pieces: what the distance maps know of one nucleus becomes one, what they know of two stays two."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.models.cellvit.hover import HoverSettings, segment
from wsitk.models.cellvit.joining import _solidity, join
from wsitk.models.cellvit.training.targets import hv_target
from wsitk.models.cellvit.watershed import HV_STEPS

UNIT = float(HV_STEPS)


def disc(shape: tuple[int, int], y: float, x: float, ry: float, rx: float | None = None) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return ((rows - y) / ry) ** 2 + ((columns - x) / (rx or ry)) ** 2 <= 1


def joined(pieces: np.ndarray, nuclei: np.ndarray, gain: float = 0.01, solidity: float = 0.85) -> np.ndarray:
    """Return the pieces after joining, the maps being those of `nuclei`."""
    labels = np.pad(pieces, 1).astype(np.int32)
    hv = np.rint(hv_target(nuclei) * UNIT).astype(np.int16)
    join(labels, hv, UNIT, gain, solidity)
    return labels[1:-1, 1:-1]


def test_the_halves_of_a_nucleus_become_one() -> None:
    nucleus = disc((40, 40), 20, 20, 12, 9).astype(np.int32)
    halves = nucleus + (nucleus & (np.arange(40) > 20)[:, None])
    assert len(np.unique(halves)) == 3
    np.testing.assert_array_equal(joined(halves, nucleus), nucleus)


def test_four_quarters_become_one() -> None:
    nucleus = disc((40, 40), 20, 20, 12).astype(np.int32)
    quarters = np.where(nucleus > 0, 1 + (np.arange(40) > 20)[:, None] + 2 * (np.arange(40) > 20), 0)
    np.testing.assert_array_equal(joined(quarters, nucleus), nucleus)


def test_two_nuclei_that_touch_stay_two() -> None:
    left, right = disc((40, 60), 20, 20, 10), disc((40, 60), 20, 40, 10)
    two = np.where(left, 1, np.where(right, 2, 0)).astype(np.int32)
    np.testing.assert_array_equal(joined(two, two), two)


def test_the_maps_of_one_nucleus_do_not_join_what_is_not_convex() -> None:
    left, right = disc((40, 60), 20, 20, 10), disc((40, 60), 20, 36, 10)
    two = np.where(left, 1, np.where(right, 2, 0)).astype(np.int32)
    one = (two > 0).astype(np.int32)
    np.testing.assert_array_equal(joined(two, one, solidity=0.97), two)
    np.testing.assert_array_equal(joined(two, one, solidity=0.5), one)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=7))
def test_solidity_is_that_of_the_hull_of_the_squares(rows: list[list[bool]]) -> None:
    import shapely

    mask = np.array(rows)
    if not mask.any():
        return
    squares = [shapely.box(x, y, x + 1, y + 1) for y, x in zip(*np.nonzero(mask), strict=True)]
    hull = shapely.convex_hull(shapely.union_all(squares))
    padded = np.pad(mask, 1)
    pixels = np.flatnonzero(padded).astype(np.int64)
    first = np.array([0, 0, len(pixels)])
    found = _solidity(1, 0, np.zeros(2, np.int32), first, pixels, padded.shape[1])
    np.testing.assert_allclose(found, mask.sum() / hull.area)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy maps of some nuclei that touch: probability and distances."""
    rng = np.random.default_rng(seed)
    nuclei = np.zeros((90, 90), np.int32)
    for number in range(1, 12):
        where = disc(nuclei.shape, *rng.uniform(12, 78, 2), *rng.uniform(5, 12, 2))
        nuclei[where & (nuclei == 0)] = number
    hv = hv_target(nuclei) + rng.normal(0, 0.25, (2, 90, 90)).astype(np.float32)
    return (nuclei > 0).astype(np.float32), hv.astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(0, 9))
def test_a_shift_shifts_the_result(seed: int, dy: int, dx: int) -> None:
    chosen = HoverSettings(join_solidity=0.85)
    prob, hv = scene(seed)
    here = segment(prob, hv, 0.25, chosen)
    wide = segment(
        np.pad(prob, [(dy, 9 - dy), (dx, 9 - dx)]),
        np.pad(hv, [(0, 0), (dy, 9 - dy), (dx, 9 - dx)]),
        0.25,
        chosen,
    )
    np.testing.assert_array_equal(wide[dy : dy + 90, dx : dx + 90], here)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_joining_only_joins(seed: int) -> None:
    prob, hv = scene(seed)
    few = segment(prob, hv, 0.25, HoverSettings(join_solidity=0.85, min_object_um2=0.5))
    many = segment(prob, hv, 0.25, HoverSettings(min_object_um2=0.5))
    assert few.max() <= many.max()
    inside = many > 0
    pairs = np.unique(np.stack([many[inside], few[inside]]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]  # every piece lies in one nucleus
