"""OpenSlide behind our contract: errors that do not stick, holes, bounds, levels of any downsample."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from PIL import Image
from sources_data import overwrite, set_tag, smooth, tile_places, write_pyramid

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.openslide import OpenSlideSource


def whole(source: Any, level: int = 0) -> Any:
    return source.read(Region((0, 0), source.levels[level].shape), level)


def noisy(path: Path, **options: Any) -> Path:
    image = smooth(256, 256)
    image += np.random.default_rng(0).integers(0, 30, image.shape, dtype=np.uint8)
    return write_pyramid(path, image, tile=128, compression="jpeg", **options)


def test_the_library_is_the_fixed_one() -> None:
    version = tuple(int(n) for n in openslide.__library_version__.split(".")[:3])
    assert version >= (4, 0, 1)  # CVE-2026-48977: a crafted BIF writes where it likes


def test_an_error_does_not_stick(tmp_path: Path) -> None:
    path = noisy(tmp_path / "a.tiff")
    good = whole(open_source(path, reader="openslide"))
    offsets, counts = tile_places(path)
    overwrite(path, offsets[1] + counts[1] // 2, np.random.default_rng(1).bytes(200))
    raw = openslide.OpenSlide(path)
    with pytest.raises(openslide.OpenSlideError):
        raw.read_region((128, 0), 0, (128, 128))
    with pytest.raises(openslide.OpenSlideError):  # what this test is about: a good tile, the same handle
        raw.read_region((0, 0), 0, (128, 128))
    raw.close()
    with open_source(path, reader="openslide") as source:
        for _ in range(2):
            with pytest.raises(
                SourceError, match=r"WSI111 a\.tiff: level 0, rows 0 to 128, columns 128 to 256"
            ):
                source.read(Region((0, 128), (128, 128)))
            for corner in [(0, 0), (128, 0), (128, 128)]:
                region = Region(corner, (128, 128))
                np.testing.assert_array_equal(source.read(region), good[region.slices()])


def test_a_passing_error_is_mended_by_a_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = noisy(tmp_path / "a.tiff")
    with OpenSlideSource(str(path)) as source:
        want, calls = whole(source), []
        real = openslide.OpenSlide.read_region

        def once(self: Any, *arguments: Any) -> Any:
            calls.append(self)
            if len(calls) == 1:
                raise openslide.OpenSlideError("input/output error")
            return real(self, *arguments)

        monkeypatch.setattr(openslide.OpenSlide, "read_region", once)
        np.testing.assert_array_equal(whole(source), want)
        assert len(calls) == 2
        assert calls[0] is not calls[1]


def test_missing_tiles_are_absent_and_white(tmp_path: Path) -> None:
    path = noisy(tmp_path / "a.tiff")
    for code in (324, 325):
        set_tag(path, code, 3, 0)
    with open_source(path, reader="openslide") as source, open_source(path, reader="tiff") as direct:
        reading = source.read_inside(Region((0, 0), (256, 256)), 0)
        want = direct.read_inside(Region((0, 0), (256, 256)), 0)
        assert reading.absent is not None
        assert want.absent is not None
        assert reading.absent[128:, 128:].all()
        assert not reading.absent[:128].any()
        np.testing.assert_array_equal(reading.absent, want.absent)
        np.testing.assert_array_equal(reading.pixels, want.pixels)


def test_half_transparent_pixels_are_mixed_with_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = noisy(tmp_path / "a.tiff")
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = [100, 0, 255, 128]
    rgba[1] = [10, 20, 30, 255]
    rgba[1, 2] = 0
    monkeypatch.setattr(openslide.OpenSlide, "read_region", lambda *_: Image.fromarray(rgba))
    with OpenSlideSource(str(path)) as source:
        reading = source.read_inside(Region((0, 0), (2, 3)), 0)
    assert reading.pixels[0, 0].tolist() == [177, 127, 255]
    assert reading.pixels[1].tolist() == [[10, 20, 30], [10, 20, 30], [255, 255, 255]]
    assert reading.absent is not None
    assert np.argwhere(reading.absent).tolist() == [[1, 2]]


def test_levels_of_uneven_downsample_do_not_depend_on_the_window(tmp_path: Path) -> None:
    image = smooth(1283, 1171)
    image += np.random.default_rng(0).integers(0, 30, image.shape, dtype=np.uint8)
    path = write_pyramid(tmp_path / "a.tiff", image, levels=4)
    with open_source(path, reader="openslide") as source:
        assert not float(openslide.OpenSlide(path).level_downsamples[3]).is_integer()
        assert source.levels[3].downsample == (8, 8)
        everything = whole(source, 3)
        rng = np.random.default_rng(1)
        for _ in range(20):
            y, x = (int(n) for n in rng.integers(0, 80, 2))
            region = Region((y, x), (60, 60))
            np.testing.assert_array_equal(source.read(region, 3), everything[region.slices()])


def test_bounds_and_pixel_size_from_properties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = noisy(tmp_path / "a.tiff")

    def opened(**properties: str) -> OpenSlideSource:
        stated = {f"openslide.{k.replace('_', '-')}": v for k, v in properties.items()}
        monkeypatch.setattr(openslide.OpenSlide, "properties", stated)
        return OpenSlideSource(str(path))

    inside = {"bounds_x": "10", "bounds_y": "20", "bounds_width": "100", "bounds_height": "50"}
    assert opened(**inside).bounds == Region((20, 10), (50, 100))
    assert opened(**{**inside, "bounds_width": "9999"}).bounds == Region((20, 10), (50, 246))
    for nonsense in (
        {**inside, "bounds_width": "-3"},
        {**inside, "bounds_x": "twelve"},
        {**inside, "bounds_x": "999"},
        {},
    ):
        assert opened(**nonsense).bounds == Region((0, 0), (256, 256))
    found = opened(mpp_x="0.5", mpp_y="0.504").spacing
    assert found is not None
    assert (found.um, found.provenance) == ((0.504, 0.5), "openslide.mpp-x")
    assert opened(mpp_x="0.5", mpp_y="0.9").spacing_error.startswith("WSI202")
    assert opened(objective_power="40").spacing_error == (
        "WSI201 a.tiff: no pixel size found (looked at openslide.mpp-x, openslide.mpp-y); give it, e.g. --mpp 0.25"
    )


def test_levels_that_are_no_reductions_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = noisy(tmp_path / "a.tiff")
    monkeypatch.setattr(openslide.OpenSlide, "level_dimensions", ((256, 256), (2_097_792, 512), (64, 64)))
    monkeypatch.setattr(openslide.OpenSlide, "level_downsamples", (1.0, 1.0, 4.0))
    with OpenSlideSource(str(path)) as source:
        assert [x.shape for x in source.levels] == [(256, 256), (64, 64)]
        assert source._native_level == [0, 2]
    assert "WSI120 a.tiff: level 1 is (512, 2097792)" in caplog.text


def test_threads_and_handles(tmp_path: Path) -> None:
    path = noisy(tmp_path / "a.tiff")
    with OpenSlideSource(str(path)) as source:
        want = whole(source)
        rng = np.random.default_rng(0)
        regions = [Region(tuple(int(n) for n in rng.integers(0, 100, 2)), (150, 150)) for _ in range(60)]
        with ThreadPoolExecutor(4) as pool:
            for region, pixels in zip(regions, pool.map(source.read, regions), strict=True):
                np.testing.assert_array_equal(pixels, want[region.slices()])
        assert 1 <= len(source._idle) <= 4
        again = pickle.loads(pickle.dumps(source))
        assert isinstance(again, OpenSlideSource)
        np.testing.assert_array_equal(whole(again), want)
        again.close()
    assert source._idle == []
    with pytest.raises(SourceError, match="WSI112"):
        whole(source)
