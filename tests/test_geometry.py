"""Boxes: exact integer arithmetic, checked against sets of points."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsitk.geometry import Region, Spacing


@st.composite
def region_pairs(draw: st.DrawFn) -> tuple[Region, Region]:
    ndim = draw(st.integers(1, 3))
    start, shape = st.integers(-4, 4), st.integers(0, 4)
    return tuple(
        Region(tuple(draw(start) for _ in range(ndim)), tuple(draw(shape) for _ in range(ndim)))
        for _ in range(2)
    )


def points(region: Region) -> set[tuple[int, ...]]:
    return set(product(*map(range, region.start, region.stop)))


@given(region_pairs())
def test_intersection_holds_the_common_points(pair: tuple[Region, Region]) -> None:
    a, b = pair
    assert points(a.intersect(b)) == points(a) & points(b)
    assert a.intersect(b).size == len(points(a) & points(b))


@given(region_pairs())
def test_contains_is_subset(pair: tuple[Region, Region]) -> None:
    a, b = pair
    if b.size:
        assert a.contains(b) == (points(b) <= points(a))


@given(region_pairs(), st.integers(0, 3))
def test_grow_and_shrink_are_inverse(pair: tuple[Region, Region], margin: int) -> None:
    region = pair[0]
    by = (margin,) * region.ndim
    grown = region.grow(by)
    assert grown.shape == tuple(n + 2 * margin for n in region.shape)
    assert grown.grow(tuple(-m for m in by)) == region


@given(region_pairs())
def test_a_point_is_inside_as_its_pixel_is(pair: tuple[Region, Region]) -> None:
    a, b = pair
    for point in points(b):
        assert a.has_point(tuple(x + 0.5 for x in point)) == (point in points(a))
        assert a.has_point(point) == (point in points(a))


@given(region_pairs())
def test_slices_are_relative_to_an_origin(pair: tuple[Region, Region]) -> None:
    a, b = pair
    for part, start, stop, base in zip(a.slices(b.start), a.start, a.stop, b.start, strict=True):
        assert (part.start, part.stop) == (start - base, stop - base)


def test_between_is_empty_where_stop_lies_before_start() -> None:
    assert Region.between((2, 5), (4, 3)) == Region((2, 5), (2, 0))


def test_a_region_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Region((0, 0), (1,))
    with pytest.raises(ValueError, match="negative"):
        Region((0,), (-1,))


def test_mean_spacing_is_geometric() -> None:
    assert Spacing((1.0, 4.0), "test").mean == pytest.approx(2.0)
