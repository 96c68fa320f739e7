"""as_zarr and as_dask show the same pixels as read, lazily, and write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from sources_data import smooth, write_pyramid

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.base import Source
from wsitk.sources.working import WorkingImage
from wsitk.sources.zarr_view import SourceStore


@pytest.fixture
def slide(tmp_path: Path) -> Source:
    path = write_pyramid(tmp_path / "a.tiff", smooth(301, 400), levels=3, compression="zlib")
    return open_source(path, mpp=0.5)


def test_zarr_holds_the_pyramid(slide: Source) -> None:
    group = slide.as_zarr()
    assert sorted(group.array_keys()) == ["0", "1", "2"]
    for number, level in enumerate(slide.levels):
        array = group[str(number)]
        assert isinstance(array, zarr.Array)
        assert array.shape == (3, *level.shape)
        assert array.chunks == (3, 64, 64)
        assert array.metadata.dimension_names == ("c", "y", "x")  # type: ignore[union-attr]  # zarr v3 only
        want = np.moveaxis(slide.read(Region((0, 0), level.shape), number), -1, 0)
        np.testing.assert_array_equal(np.asarray(array[:]), want)
        np.testing.assert_array_equal(np.asarray(array[1, 13:71, 5:66]), want[1, 13:71, 5:66])


def test_zarr_decodes_only_what_is_asked_for(slide: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Region] = []
    real = slide.read_inside
    monkeypatch.setattr(slide, "read_inside", lambda r, n: (asked.append(r), real(r, n))[1])
    array: Any = slide.as_zarr()["0"]
    assert asked == []
    _ = array[:, 70:80, 10:20]
    assert asked == [Region((64, 0), (64, 64))]


def test_zarr_cannot_be_written(slide: Source) -> None:
    group = slide.as_zarr()
    array: Any = group["0"]
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        group.create_array("x", shape=(1,), dtype="u1")
    with pytest.raises(ValueError, match="read-only"):
        group.attrs["x"] = 1
    assert group.store.read_only


def test_ngff_metadata_is_valid_and_in_micrometres(slide: Source) -> None:
    image = pytest.importorskip("ome_zarr_models.v05.image")
    model = image.Image.from_zarr(slide.as_zarr())
    scale = model.attributes.ome.multiscales[0]
    assert [a.name for a in scale.axes] == ["c", "y", "x"]
    assert [a.unit for a in scale.axes] == [None, "micrometer", "micrometer"]
    steps = [d.coordinateTransformations for d in scale.datasets]
    assert [s[0].scale for s in steps] == [[1, 0.5, 0.5], [1, 1, 1], [1, 2, 2]]
    # The centre of a level's first pixel lies (2**k - 1) / 2 level-0 pixels from that of level 0.
    assert [s[1].translation for s in steps[1:]] == [[0, 0.25, 0.25], [0, 0.75, 0.75]]


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("axes", ["yx", "yxc", "zyx", "zyxc"])
def test_zarr_of_any_array(axes: str, dtype: str) -> None:
    shape = tuple({"z": 9, "y": 20, "x": 30, "c": 2}[a] for a in axes)
    array = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    with open_source(array, axes=axes) as source:
        stored: Any = source.as_zarr()["0"]
        want = np.moveaxis(array, -1, 0) if "c" in axes else array[None]
        np.testing.assert_array_equal(np.asarray(stored[:]), want)
        assert stored.dtype == np.dtype(dtype)


async def collect(keys: Any) -> list[str]:
    return [key async for key in keys]


def test_store_lists_what_exists(slide: Source) -> None:
    import asyncio

    from zarr.core.buffer import default_buffer_prototype

    store = SourceStore(slide)
    keys = asyncio.run(collect(store.list()))
    assert len(keys) == len(set(keys)) == 4 + 5 * 7 + 3 * 4 + 2 * 2
    for key in keys:
        assert asyncio.run(store.exists(key)), key
    for key in ["0/c/0/5/0", "0/c/1/0/0", "3/c/0/0/0", "0/c/0/0", "0/c/0/x/0", "a", "", "0/c/0/-1/0"]:
        assert not asyncio.run(store.exists(key)), key
        assert asyncio.run(store.get(key, default_buffer_prototype())) is None
    assert asyncio.run(collect(store.list_dir(""))) == ["zarr.json", "0", "1", "2"]
    assert asyncio.run(collect(store.list_dir("1"))) == ["zarr.json", "c"]
    assert asyncio.run(collect(store.list_dir("2/c/0"))) == ["0", "1"]
    assert SourceStore(slide) == store


def test_store_serves_parts_of_chunks(slide: Source) -> None:
    import asyncio

    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
    from zarr.core.buffer import default_buffer_prototype

    store, prototype = SourceStore(slide), default_buffer_prototype()

    def get(request: Any = None) -> bytes:
        buffer = asyncio.run(store.get("0/c/0/1/1", prototype, request))
        assert buffer is not None
        return buffer.to_bytes()

    whole = get()
    assert len(whole) == 3 * 64 * 64
    assert get(RangeByteRequest(10, 50)) == whole[10:50]
    assert get(OffsetByteRequest(100)) == whole[100:]
    assert get(SuffixByteRequest(7)) == whole[-7:]
    parts = asyncio.run(
        store.get_partial_values(prototype, [("0/c/0/1/1", RangeByteRequest(0, 3)), ("x", None)])
    )
    assert [p and p.to_bytes() for p in parts] == [whole[:3], None]


def test_dask_of_a_level(slide: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.sources.dask_view._EDGE", 100)
    for number, level in enumerate(slide.levels):
        lazy = slide.as_dask(level=number)
        assert lazy.shape == (*level.shape, 3)
        assert lazy.chunksize == (*(min(128, n) for n in level.shape), 3)
        np.testing.assert_array_equal(lazy.compute(), slide.read(Region((0, 0), level.shape), number))
    region = Region((50, 60), (130, 70))
    np.testing.assert_array_equal(slide.as_dask()[50:180, 60:130].compute(), slide.read(region))


@pytest.mark.parametrize("um", [0.5, 0.7, 1.0, 1.9, (1.5, 3.0)])
def test_dask_of_a_spacing(slide: Source, um: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.sources.dask_view._EDGE", 50)
    lazy = slide.as_dask(spacing=um)
    assert len(lazy.chunks[0]) > 1
    working = WorkingImage(slide, um if isinstance(um, tuple) else (um, um), tolerance=0)
    want = working.read(Region((0, 0), working.shape)).pixels
    np.testing.assert_array_equal(lazy.compute(), want)


def test_dask_of_a_volume() -> None:
    array = np.random.default_rng(0).integers(0, 255, (20, 300, 150), dtype=np.uint8)
    source = open_source(array, axes="zyx", mpp=(2000.0, 1000.0, 1000.0))
    lazy = source.as_dask(level=0)
    assert lazy.chunksize == (20, 300, 150)
    np.testing.assert_array_equal(lazy.compute(), array)
    halves = source.as_dask(spacing=2000.0)
    assert halves.shape == (20, 150, 75)
    want = (array.reshape(20, 150, 2, 75, 2).sum((2, 4), dtype=int) + 2) // 4
    np.testing.assert_array_equal(halves.compute(), want)


def test_dask_refuses_what_makes_no_sense(slide: Source) -> None:
    for options in ({"level": 0, "spacing": 0.5}, {"level": 3}, {"level": -1}):
        with pytest.raises(UsageError, match="WSI024"):
            slide.as_dask(**options)  # type: ignore[arg-type]  # a dict of mixed values
