"""Arrays as sources: axes, lazy arrays, identity."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
import zarr.storage

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources import open_source

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "axes", "want"),
    [
        ((5, 6), None, ("y", "x")),
        ((5, 6, 3), None, ("y", "x", "c")),
        ((4, 6, 7), None, ("z", "y", "x")),
        ((2, 6, 7), "cyx", ("y", "x", "c")),
        ((2, 4, 6, 7), "czyx", ("z", "y", "x", "c")),
        ((4, 6, 7, 2), "zyxc", ("z", "y", "x", "c")),
    ],
)
def test_axes(shape: tuple[int, ...], axes: str | None, want: tuple[str, ...]) -> None:
    array = RNG.integers(0, 255, shape, dtype=np.uint8)
    source = open_source(array, axes=axes)
    assert source.axes == want
    whole = source.read(Region((0,) * source.ndim, source.shape))
    expected = np.moveaxis(array, 0, -1) if axes in ("cyx", "czyx") else array
    np.testing.assert_array_equal(whole, expected)
    region = Region((1,) * source.ndim, (3,) * source.ndim)
    np.testing.assert_array_equal(source.read(region), expected[region.slices()])


@pytest.mark.parametrize("axes", ["xy", "yyx", "yxq", "zy", "cx"])
def test_axes_that_make_no_sense(axes: str) -> None:
    with pytest.raises(UsageError, match="WSI020"):
        open_source(np.zeros((4, 4) if len(axes) == 2 else (4, 4, 4), np.uint8), axes=axes)


def test_what_is_no_image() -> None:
    for thing in (np.zeros(5, np.uint8), np.zeros((0, 5), np.uint8), 7, np.zeros((2, 2, 2, 2), np.uint8)):
        with pytest.raises(UsageError, match="WSI020"):
            open_source(thing)
    source = open_source(np.zeros((5, 5), np.uint8))
    assert open_source(source) is source
    with pytest.raises(UsageError, match="WSI020"):
        open_source(source, mpp=0.5)


def test_beyond_the_image_is_filled() -> None:
    array = RNG.integers(0, 255, (6, 7, 3), dtype=np.uint8)
    got = open_source(array).read(Region((-2, -1), (10, 10)), fill=9)
    np.testing.assert_array_equal(got, np.pad(array, ((2, 2), (1, 2), (0, 0)), constant_values=9))
    assert (open_source(array).read(Region((50, 50), (3, 3))) == 255).all()


def test_lazy_arrays() -> None:
    array = RNG.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    stored = zarr.create_array(zarr.storage.MemoryStore(), shape=array.shape, chunks=(16, 8, 3), dtype="u1")
    stored[:] = array
    lazies: list[tuple[Any, tuple[int, ...]]] = [
        (stored, (16, 8)),
        (da.from_array(array, (20, 25, 3)), (20, 25)),
    ]
    for lazy, chunk in lazies:
        source = open_source(lazy, mpp=0.5)
        assert source.levels[0].chunk == chunk
        region = Region((7, 9), (20, 30))
        np.testing.assert_array_equal(source.read(region), array[region.slices()])
        assert source.identity()["sha256"] == open_source(array).identity()["sha256"]


def test_reads_are_copies() -> None:
    array = np.zeros((8, 8), np.uint8)
    open_source(array).read(Region((0, 0), (8, 8)))[:] = 1
    assert not array.any()


def test_identity_and_close() -> None:
    array = RNG.integers(0, 255, (30, 30, 3), dtype=np.uint8)
    source = open_source(array, name="a")
    other = array.copy()
    other[29, 29, 2] ^= 1
    assert source.identity() != open_source(other, name="a").identity()
    assert source.identity() == open_source(array.copy(), name="a").identity()
    with source:
        pass
    with pytest.raises(SourceError, match="WSI112"):
        source.read(Region((0, 0), (2, 2)))


@pytest.mark.parametrize(
    ("shape", "mpp", "code"),
    [
        ((9, 9), 0.04, "WSI202"),
        ((9, 9), (0.5, 0.52), "WSI202"),
        ((9, 9), None, "WSI201"),
        ((9, 9), (1, 1, 1), "WSI202"),
        ((9, 9, 9), 0.5, "WSI202"),
        ((9, 9, 9), 30_000.0, "WSI202"),
        ((9, 9, 9), (5000, 700.0, 700), ""),
        ((9, 9), 0.25, ""),
    ],
)
def test_spacing(shape: tuple[int, ...], mpp: Any, code: str) -> None:
    source = open_source(np.zeros(shape, np.uint8), mpp=mpp)
    assert source.spacing_error.startswith(code)
    assert (source.spacing is None) == bool(code)
    if source.spacing is not None:
        assert source.spacing.provenance == "--mpp"
