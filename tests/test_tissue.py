"""The tissue mask: glass is left out, tissue never, whatever the share of either."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources.array import ArraySource
from wsitk.tissue import _percentile, everywhere, find_tissue, from_geojson, thumbnail


def slide(tissue: np.ndarray, glass: int = 240) -> np.ndarray:
    """Return a thumbnail: pink noise where `tissue`, clear glass elsewhere."""
    rng = np.random.default_rng(0)
    pixels = np.full((*tissue.shape, 3), glass, np.int16) + rng.integers(-2, 3, (*tissue.shape, 3))
    pink = np.array([205, 150, 190]) + rng.integers(-20, 20, (*tissue.shape, 3))
    return np.where(tissue[..., None], pink, pixels).clip(0, 255).astype(np.uint8)


def box(shape: tuple[int, int], *where: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[where] = True
    return mask


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_tissue_is_found_and_glass_is_not(share: float) -> None:
    side = int(200 * share**0.5)
    truth = box((200, 200), slice(0, side), slice(0, side))
    found = find_tissue(slide(truth), (16.0, 16.0), 8.0).mask
    assert found[truth].all()
    assert found[~truth].mean() < 0.1 / max(1 - share, 0.1)


def test_a_slide_that_is_all_tissue_is_all_tissue() -> None:
    assert find_tissue(slide(np.ones((100, 100), bool)), (16.0, 16.0), 8.0).mask.all()


def test_clear_glass_holds_no_tissue() -> None:
    assert not find_tissue(slide(np.zeros((100, 100), bool)), (16.0, 16.0), 8.0).mask.any()


def test_specks_of_dirt_are_left_out() -> None:
    truth = box((100, 100), slice(50, 53), slice(50, 53))
    assert not find_tissue(slide(truth), (16.0, 16.0), 8.0).mask.any()


def test_touches_looks_at_level_0_regions() -> None:
    mask = find_tissue(slide(box((100, 100), slice(40, 60), slice(40, 60))), (10.0, 10.0), 8.0)
    assert mask.touches(Region((390, 390), (20, 20)))
    assert not mask.touches(Region((0, 0), (200, 200)))
    assert not mask.touches(Region((-500, -500), (100, 100)))


def test_a_geojson_draws_the_mask(tmp_path: Path) -> None:
    ring = [[100, 200], [300, 200], [300, 400], [100, 400], [100, 200]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    path = tmp_path / "roi.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    mask = from_geojson(str(path), (100, 100), (10.0, 10.0))
    assert mask.touches(Region((210, 110), (5, 5)))
    assert not mask.touches(Region((110, 210), (5, 5)))


def test_a_geojson_without_polygons_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "point.geojson"
    path.write_text('{"type": "Point", "coordinates": [1, 2]}')
    with pytest.raises(UsageError, match="WSI014"):
        from_geojson(str(path), (10, 10), (1.0, 1.0))


def test_area_counts_mask_pixels() -> None:
    mask = everywhere((10, 20), (4.0, 4.0))
    assert mask.area_um2((0.5, 0.5), Region((0, 0), (40, 80))) == pytest.approx(10 * 20 * 4)
    assert mask.area_um2((0.5, 0.5), Region((0, 0), (20, 40))) == pytest.approx(5 * 10 * 4)


def test_area_is_that_of_the_tissue_without_its_margin() -> None:
    truth = box((100, 100), slice(20, 60), slice(20, 60))
    mask = find_tissue(slide(truth), (16.0, 16.0), 8.0)
    area = mask.area_um2((0.5, 0.5), Region((0, 0), (1600, 1600)))
    assert area == pytest.approx(truth.sum() * 64, rel=0.1)


def test_regions_drawn_in_qupath_count_from_the_scanned_bounds(tmp_path: Path) -> None:
    path = tmp_path / "roi.geojson"
    path.write_text('{"type": "Polygon", "coordinates": [[[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]]}')
    mask = from_geojson(str(path), (100, 100), (10.0, 10.0), offset_xy=(500.0, 300.0))
    assert mask.touches(Region((310, 510), (5, 5)))
    assert not mask.touches(Region((10, 10), (5, 5)))


def test_the_last_pixel_answers_for_what_lies_just_beyond_it() -> None:
    mask = everywhere((24, 24), (16.0, 16.0))
    assert mask.touches(Region((384, 0), (7, 391)))


@settings(max_examples=50)
@given(arrays(np.uint8, st.integers(1, 60)), st.floats(0, 100))
def test_a_percentile_from_counts_is_numpys(values: np.ndarray, percent: float) -> None:
    assert _percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-9)


def test_the_thumbnail_of_a_huge_slide_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.tissue.MOST_PIXELS", 400)
    pixels = np.full((900, 1600, 3), 240, np.uint8)
    pixels[300:600, 400:1200] = (150, 60, 140)
    with ArraySource(pixels, axes=("y", "x", "c"), spacing=1.0) as source:
        small, scale = thumbnail(source)
        assert small.shape[0] * small.shape[1] <= 440
        mask = find_tissue(small, scale, float(np.mean(scale)))
    assert mask.touches(Region((400, 600), (50, 50)))
    assert not mask.touches(Region((0, 0), (50, 50)))


def test_a_thumbnail_without_a_pixel_size_is_the_mean_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.tissue._WINDOW", 100)
    pixels = np.random.default_rng(0).integers(0, 255, (2300, 3100, 3), np.uint8)
    with ArraySource(pixels, axes=("y", "x", "c")) as source:
        small, scale = thumbnail(source)
    assert scale == (3.0, 3.0)
    wanted = pixels[:2298, :3099].reshape(766, 3, 1033, 3, 3).mean(axis=(1, 3))
    # the last windows hold a part of a square, over which their pixels are stretched
    assert np.abs(small[:759, :1023] - wanted[:759, :1023]).max() <= 1
