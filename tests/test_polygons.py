"""Outlines and shape measures: random masks against naive references and shapely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.objects import ObjectTable
from wsitk.polygons import SHAPE_COLUMNS, RingTable, rings, shapes, to_shapely

Array = NDArray[Any]

GOLDEN = Path(__file__).parent / "golden" / "cellvit"
SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12))
MASKS = arrays(np.bool_, SIDES).filter(lambda mask: bool(mask.any()))
LABELS = arrays(np.int32, SIDES, elements=st.integers(0, 4)).filter(lambda labels: bool(labels.any()))
EVERYWHERE = np.ones((3, 3), int)


def table_of(mask: Array, origin: tuple[int, int] = (0, 0)) -> ObjectTable:
    return ObjectTable.from_labels(mask.astype(np.int32), origin=origin)


def nuclei() -> ObjectTable:
    labels = np.load(GOLDEN / "post_nuclei_256.npz")["gt_label"].astype(np.int32)
    return ObjectTable.from_labels(labels, origin=(1000, -300))


def corners(mask: Array) -> int:
    """Count the corners of the pixel outline; where two pixels meet diagonally there are two."""
    m = np.pad(mask, 1).astype(int)
    total = m[:-1, :-1] + m[1:, :-1] + m[:-1, 1:] + m[1:, 1:]
    diagonal = (total == 2) & (m[:-1, :-1] == m[1:, 1:])
    return int(np.isin(total, (1, 3)).sum() + 2 * diagonal.sum())


def ring_sum(xy: Array) -> float:
    return float(0.5 * (xy[:-1, 0] * xy[1:, 1] - xy[1:, 0] * xy[:-1, 1]).sum())


@given(MASKS)
def test_an_outline_is_the_pixel_union_with_its_corners_cut(mask: Array) -> None:
    y, x = np.nonzero(mask)
    union = shapely.union_all(shapely.box(x, y, x + 1, y + 1))
    (geometry,) = to_shapely(rings(table_of(mask)))
    assert shapely.is_valid(geometry)
    # Corners are cut by triangles of one eighth, inwards or outwards; nothing else differs.
    assert shapely.symmetric_difference(geometry, union).area == pytest.approx(corners(mask) / 8)


@given(MASKS)
def test_components_and_holes_are_those_of_four_connectivity(mask: Array) -> None:
    outlines = rings(table_of(mask))
    components = ndimage.label(mask)[1]
    holes = ndimage.label(np.pad(~mask, 1, constant_values=True), EVERYWHERE)[1] - 1
    assert np.diff(outlines.object_offset).tolist() == [components]
    assert len(outlines.ring_offset) - 1 == components + holes
    (geometry,) = to_shapely(outlines)
    assert geometry.area == pytest.approx(mask.sum() - 0.5 * components + 0.5 * holes)
    assert geometry.geom_type == ("Polygon" if components == 1 else "MultiPolygon")


@given(MASKS)
def test_rings_are_closed_oriented_and_without_collinear_points(mask: Array) -> None:
    outlines = rings(table_of(mask))
    first = set(outlines.polygon_offset[:-1].tolist())
    for r in range(len(outlines.ring_offset) - 1):
        xy = outlines.xy[outlines.ring_offset[r] : outlines.ring_offset[r + 1]]
        assert np.array_equal(xy[0], xy[-1])
        assert len(np.unique(xy[:-1], axis=0)) == len(xy) - 1 >= 4
        assert (ring_sum(xy) > 0) == (r in first)
        step = np.diff(np.vstack([xy, xy[1]]), axis=0)
        assert np.all(step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0] != 0)


@given(MASKS, st.floats(0.3, 9.0), st.floats(0.3, 9.0), st.floats(-1e5, 1e5))
def test_scaled_polygons_survive_rounding_to_a_hundredth(
    mask: Array, sx: float, sy: float, shift: float
) -> None:
    (geometry,) = to_shapely(rings(table_of(mask)), (sx, sy), (shift, -shift))
    rounded = shapely.set_precision(geometry, 0.01)
    assert shapely.is_valid(rounded)
    assert rounded.geom_type == geometry.geom_type
    assert rounded.area == pytest.approx(geometry.area, rel=0.2)
    # Rounding alone, without the repair that set_precision does, must not break a ring either.
    assert shapely.is_valid(shapely.transform(geometry, lambda xy: np.round(xy, 2)))


@given(MASKS)
def test_no_two_parts_of_an_outline_come_nearer_than_the_docstring_says(mask: Array) -> None:
    (geometry,) = to_shapely(rings(table_of(mask)))
    assert shapely.minimum_clearance(geometry) >= 0.7


@given(LABELS)
def test_objects_beside_each_other_do_not_overlap(labels: Array) -> None:
    geometries = to_shapely(rings(ObjectTable.from_labels(labels)))
    assert len(geometries) == len(np.unique(labels[labels > 0]))
    covered = shapely.union_all(geometries).area
    assert covered == pytest.approx(sum(g.area for g in geometries))


@given(LABELS, st.integers(-50, 50), st.integers(-50, 50))
def test_outlines_move_with_the_origin_and_do_not_depend_on_the_other_rows(
    labels: Array, dy: int, dx: int
) -> None:
    still, moved = (rings(ObjectTable.from_labels(labels, origin=o)) for o in ((0, 0), (dy, dx)))
    assert np.array_equal(still.xy + np.array([dx, dy]), moved.xy)
    table = ObjectTable.from_labels(labels)
    alone = [rings(table.take(np.array([row]))).xy for row in range(len(table))]
    assert np.array_equal(np.concatenate(alone), still.xy)


def test_one_pixel_is_a_diamond() -> None:
    outlines = rings(table_of(np.ones((1, 1)), origin=(7, 3)))
    assert sorted(outlines.xy[:-1].tolist()) == [[3.0, 7.5], [3.5, 7.0], [3.5, 8.0], [4.0, 7.5]]


def test_a_component_inside_the_hole_of_another_is_its_own_polygon() -> None:
    mask = np.ones((7, 7), bool)
    mask[1:6, 1:6] = False
    mask[3, 3] = True
    outlines = rings(table_of(mask))
    assert outlines.polygon_offset.tolist() == [0, 2, 3]
    (geometry,) = to_shapely(outlines)
    assert shapely.is_valid(geometry)
    assert geometry.area == pytest.approx(25.0 - 0.5)


def test_an_empty_table_gives_empty_arrays() -> None:
    outlines = rings(ObjectTable.empty(2))
    assert len(outlines) == 0
    assert len(to_shapely(outlines)) == 0
    assert all(len(v) == 0 for v in shapes(ObjectTable.empty(2), (0.5, 0.5)).values())


def test_three_dimensions_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI065"):
        rings(ObjectTable.empty(3))


def test_many_objects_outgrow_the_first_buffers() -> None:
    """A checkerboard is the worst case: a component for each pixel, all in one row of the table."""
    mask = np.indices((61, 61)).sum(axis=0) % 2 == 0
    outlines = rings(table_of(mask))
    assert len(outlines.polygon_offset) - 1 == mask.sum()
    assert len(outlines.xy) == 5 * mask.sum()
    assert shapely.is_valid(to_shapely(outlines)).all()


def test_real_nuclei_are_valid_polygons_of_their_size() -> None:
    table = nuclei()
    geometries = to_shapely(rings(table), (1.97, 1.97), (0.3, -12.7))
    assert shapely.is_valid(geometries).all()
    assert np.allclose(shapely.area(geometries) / 1.97**2, table.size, atol=1.0)
    centre = shapely.get_coordinates(shapely.centroid(geometries))
    assert np.allclose((centre - (0.3, -12.7)) / 1.97, table.anchor[:, ::-1], atol=0.2)


@given(MASKS, st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_measures_agree_with_shapely_and_scikit_image(mask: Array, sy: float, sx: float) -> None:
    from skimage.measure import regionprops

    table = table_of(mask)
    found = {name: values[0] for name, values in shapes(table, (sy, sx)).items()}
    assert tuple(found) == SHAPE_COLUMNS
    (geometry,) = to_shapely(rings(table), (sx, sy))
    outer = shapely.union_all([shapely.Polygon(p.exterior) for p in shapely.get_parts(geometry)])
    length = sum(p.exterior.length for p in shapely.get_parts(geometry))
    points = shapely.get_coordinates(geometry)
    reach = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1)).max()
    (region,) = regionprops(mask.astype(np.uint8), spacing=(sy, sx))
    assert found["area_px"] == mask.sum()
    assert found["area_um2"] == pytest.approx(mask.sum() * sx * sy)
    assert found["perimeter_um"] == pytest.approx(length)
    assert found["solidity"] == pytest.approx(geometry.area / geometry.convex_hull.area)
    assert found["max_diameter_um"] == pytest.approx(reach)
    assert found["equivalent_diameter_um"] == pytest.approx(region.equivalent_diameter_area)
    # Nested components count twice among the outer rings, as their lengths do.
    assert 0 < found["circularity"] <= 1
    assert found["circularity"] >= 4 * np.pi * outer.area / length**2 - 1e-9
    moments = (
        np.cov(np.stack(np.nonzero(mask)) * [[sy], [sx]], bias=True) if mask.sum() > 1 else np.zeros((2, 2))
    )
    spread = np.linalg.eigvalsh(moments + np.diag([sy**2, sx**2]) / 12)
    assert found["major_axis_um"] == pytest.approx(4 * np.sqrt(spread[1]))
    assert found["minor_axis_um"] == pytest.approx(4 * np.sqrt(max(0.0, spread[0])), abs=1e-6)
    assert found["eccentricity"] == pytest.approx(np.sqrt(max(0.0, 1 - spread[0] / spread[1])), abs=1e-6)


def test_a_disc_measures_as_a_disc() -> None:
    y, x = np.mgrid[-40:41, -40:41]
    found = shapes(table_of(x**2 + y**2 <= 36.0**2), (0.5, 0.5))
    assert found["equivalent_diameter_um"][0] == pytest.approx(36.0, rel=0.01)
    assert found["major_axis_um"][0] == pytest.approx(36.0, rel=0.01)
    assert found["max_diameter_um"][0] == pytest.approx(36.5, rel=0.01)
    assert found["perimeter_um"][0] == pytest.approx(1.055 * 36 * np.pi, rel=0.02)
    assert found["circularity"][0] == pytest.approx(0.9, abs=0.02)
    assert found["eccentricity"][0] < 0.05
    assert found["solidity"][0] > 0.98


def test_given_outlines_spare_a_second_tracing() -> None:
    table = nuclei()
    outlines: RingTable = rings(table)
    one, other = shapes(table, (0.25, 0.25)), shapes(table, (0.25, 0.25), outlines)
    assert all(np.array_equal(one[name], other[name]) for name in SHAPE_COLUMNS)
