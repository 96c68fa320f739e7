"""A slide with restored pixels laid over it: read anywhere, at any level, as if it had been scanned like that."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from painting import masked, write_mask, write_slide

import wsitk
from wsitk.errors import OutputError, SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.restored import RestoredSource
from wsitk.testing import SyntheticSlide
from wsitk.testing.painters import PlacePainter
from wsitk.writers.ome_tiff import write_ome_tiff
from wsitk.writers.ome_zarr import MapChannel, write_maps

SHAPE = (300, 341)
BOXES = [
    ("pen", 10, 12, 30, 25),
    ("fold", 90, 80, 12, 160),
    ("dust", 200, 60, 3, 3),
    ("pen", 320, 281, 21, 19),
]


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return SyntheticSlide.make(SHAPE, count=60, seed=3).pixels


@pytest.fixture(scope="module")
def slide(clean: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_slide(tmp_path_factory.mktemp("slide") / "a.tiff", clean)


@pytest.fixture(scope="module", params=[None, 1.2], ids=["level 0", "coarser"])
def folder(request: pytest.FixtureRequest, slide: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of a restoration, on the slide's grid and on one 2.4 times as coarse."""
    out = tmp_path_factory.mktemp("out")
    mask = write_mask(out / "mask.geojson", BOXES)
    model = PlacePainter(tile=128, halo=16, spacing_um=request.param)
    return wsitk.run(model, slide, out=out, mask=mask, threads=1, ome_tiff=True).path


@pytest.fixture
def over(slide: str, folder: Path) -> Iterator[RestoredSource]:
    with RestoredSource(open_source(slide), folder) as source:
        yield source


def test_it_reads_what_was_written(over: RestoredSource, folder: Path, clean: np.ndarray) -> None:
    pixels = over.read(Region((0, 0), SHAPE))
    written = np.moveaxis(
        np.asarray(zarr.open_array(str(folder / "restored.ome.zarr/0"), mode="r")[:]), 0, -1
    )
    assert np.array_equal(pixels, written)
    inside = masked(SHAPE, BOXES)
    assert np.array_equal(pixels[~inside], clean[~inside])
    assert (pixels[inside] != clean[inside]).any(axis=1).mean() > 0.95


def test_any_window_is_a_part_of_the_whole(slide: str, folder: Path) -> None:
    with RestoredSource(open_source(slide), folder) as over:
        whole = [over.read(Region((0, 0), level.shape), k) for k, level in enumerate(over.levels)]

        @settings(max_examples=40, deadline=None)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            level = data.draw(st.integers(0, len(over.levels) - 1))
            shape = over.levels[level].shape
            start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
            size = tuple(data.draw(st.integers(1, n - a)) for n, a in zip(shape, start, strict=True))
            region = Region(start, size)
            assert np.array_equal(over.read(region, level), whole[level][region.slices()])

        check()


def test_coarser_levels_show_the_means_of_restored_pixels(over: RestoredSource, clean: np.ndarray) -> None:
    fine, inside = over.read(Region((0, 0), SHAPE)), masked(SHAPE, BOXES)
    inner = over._inner
    for level, factor in ((1, 2), (2, 4)):
        shape = over.levels[level].shape
        frame = Region((0, 0), shape)
        got, plain = over.read(frame, level), inner.read(frame, level)
        for y, x in [(y, x) for y in range(shape[0]) for x in range(0, shape[1], 3)]:
            cell = (slice(y * factor, (y + 1) * factor), slice(x * factor, (x + 1) * factor))
            wanted = plain[y, x]
            if inside[cell].any():
                values = fine[cell].reshape(-1, 3).astype(int)
                wanted = (2 * values.sum(axis=0) + len(values)) // (2 * len(values))
            assert np.array_equal(got[y, x], wanted), (level, y, x)


def test_it_is_another_input_than_the_slide(over: RestoredSource, slide: str, folder: Path) -> None:
    with open_source(slide) as plain:
        assert {k: v for k, v in over.identity().items() if k != "restoration"} == plain.identity()
        assert over.stamp() == plain.stamp()
    assert over.identity()["restoration"]["model"] == ["testing-place-painter", "1", ""]
    assert any("WSI688" in line for line in over.warnings)
    assert over.ref is not None
    with open_source(pickle.loads(pickle.dumps(over.ref))) as again:
        assert isinstance(again, RestoredSource)
        assert np.array_equal(again.read(Region((0, 0), (60, 60))), over.read(Region((0, 0), (60, 60))))


def test_a_restoration_of_something_else_is_refused(folder: Path, clean: np.ndarray, tmp_path: Path) -> None:
    other = write_slide(tmp_path / "b.tiff", clean[:200])
    with pytest.raises(SourceError, match=r"WSI684.*give the slide that was restored"):
        open_source(other, restored=folder)
    with pytest.raises(SourceError, match="WSI684"):
        open_source(other, restored=tmp_path)


def test_a_flipped_bit_is_no_pixel(slide: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (victim, *_) = (copy / "restoration.ome.zarr" / "0").rglob("c/*/*/*")
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 16
    victim.write_bytes(data)
    with open_source(slide, restored=copy) as over, pytest.raises(SourceError, match="WSI684"):
        over.read(Region((0, 0), SHAPE))


# --- the TIFF ----------------------------------------------------------------------------------------


def test_openslide_and_ome_see_the_same_pyramid(folder: Path) -> None:
    check_pyramid(folder / "restored.ome.tiff", folder / "restored.ome.zarr", 0.5)


def check_pyramid(path: Path, image: Path, um: float) -> None:
    group = zarr.open_group(str(image), mode="r")
    count = sum(1 for _ in group.array_keys())
    levels = [np.moveaxis(np.asarray(group[str(k)][:]), 0, -1) for k in range(count)]  # type: ignore[index]
    with openslide.OpenSlide(str(path)) as handle:
        assert [d[::-1] for d in handle.level_dimensions] == [v.shape[:2] for v in levels]
        assert float(handle.properties["openslide.mpp-x"]) == pytest.approx(um)
        for number, size in enumerate(handle.level_dimensions):
            assert np.array_equal(
                np.asarray(handle.read_region((0, 0), number, size))[..., :3], levels[number]
            )
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert file.is_bigtiff
        assert len(file.series) == 1
        assert [level.shape for level in file.series[0].levels] == [v.shape for v in levels]
        assert all(np.array_equal(a.asarray(), b) for a, b in zip(file.series[0].levels, levels, strict=True))
    with open_source(path) as source:
        assert source.spacing is not None
        assert source.spacing.um == pytest.approx((um, um))
        assert [v.shape for v in source.levels] == [v.shape[:2] for v in levels]
        assert np.array_equal(source.read(Region((0, 0), source.shape)), levels[0])


@pytest.mark.parametrize("shape", [(1100, 1301), (2300, 600)])
def test_a_pyramid_of_several_levels(shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.integers(-2, 3, (3, *shape)), axis=2).astype(np.uint8)
    channels = [MapChannel(name, (255, 255, 255)) for name in ("red", "green", "blue")]
    write_maps(
        tmp_path / "a.zarr",
        shape,
        np.uint8,
        channels,
        (0.25, 0.25),
        (0.0, 0.0),
        lambda r: pixels[(..., *r.slices())],
    )
    for name in ("a.ome.tiff", "b.ome.tiff"):
        write_ome_tiff(tmp_path / name, tmp_path / "a.zarr", spacing_um=(0.25, 0.25))
    assert (tmp_path / "a.ome.tiff").read_bytes() == (tmp_path / "b.ome.tiff").read_bytes()
    check_pyramid(tmp_path / "a.ome.tiff", tmp_path / "a.zarr", 0.25)


def test_only_colours_of_eight_bits_become_a_tiff(tmp_path: Path) -> None:
    write_maps(
        tmp_path / "a.zarr", (40, 40), np.uint8, [MapChannel("grey", (255, 255, 255))], (1.0, 1.0), (0.0, 0.0),
        lambda region: np.zeros((1, *region.shape), np.uint8),
    )  # fmt: skip
    with pytest.raises(OutputError, match="WSI514"):
        write_ome_tiff(tmp_path / "a.ome.tiff", tmp_path / "a.zarr", spacing_um=None)
