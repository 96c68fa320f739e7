"""Tiled TIFF decoded directly: every codec and kind of pixel, and every way a file is damaged."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from sources_data import overwrite, set_tag, smooth, tile_places, write_pyramid

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.tiff import TiffSource

OFFSETS, COUNTS = 324, 325


def whole(source: Any, level: int = 0) -> Any:
    return source.read(Region((0, 0), source.levels[level].shape), level)


@pytest.mark.parametrize("subifds", [False, True])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_levels(tmp_path: Path, subifds: bool, bigtiff: bool) -> None:
    image = smooth(203, 330)
    path = write_pyramid(
        tmp_path / "a.tiff", image, levels=3, subifds=subifds, bigtiff=bigtiff, compression="zlib"
    )
    with open_source(path, reader="tiff") as source:
        assert [x.shape for x in source.levels] == [(203, 330), (102, 165), (51, 83)]
        assert [x.downsample for x in source.levels] == [(1, 1), (2, 2), (4, 4)]
        assert source.levels[0].chunk == (64, 64)
        assert source.axes == ("y", "x", "c")
        for level in range(3):
            np.testing.assert_array_equal(whole(source, level), image[:: 2**level, :: 2**level])
        region = Region((60, 100), (70, 200))
        np.testing.assert_array_equal(source.read(region), image[region.slices()])


@pytest.mark.parametrize(
    "options",
    [
        {"compression": None},
        {"compression": "lzw"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib"},
        {"compression": "deflate", "predictor": True},
        {"compression": "zstd"},
        {"compression": "packbits"},
        {"compression": "lzma"},
        {"compression": "jpeg2000"},
        {"compression": "jpeg"},
        {"compression": "jpeg", "subsampling": (1, 1)},
        {"compression": "webp"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_codecs(tmp_path: Path, options: dict[str, Any]) -> None:
    image = smooth(150, 170)
    path = write_pyramid(tmp_path / "a.tiff", image, **options)
    with open_source(path) as source:
        assert isinstance(source, TiffSource)
        got = whole(source)
    np.testing.assert_array_equal(got, tifffile.imread(path))  # another path through the same codecs
    assert np.abs(got.astype(int) - image).mean() <= (3 if options["compression"] in ("jpeg", "webp") else 0)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2), (2, 1)])
def test_pixels_equal_those_of_openslide(tmp_path: Path, subsampling: tuple[int, int]) -> None:
    image = smooth(256, 320)
    image[::3, ::5] = 255 - image[::3, ::5]
    path = write_pyramid(tmp_path / "a.tiff", image, levels=2, compression="jpeg", subsampling=subsampling)
    with open_source(path, reader="tiff") as ours, open_source(path, reader="openslide") as theirs:
        assert [x.shape for x in ours.levels] == [x.shape for x in theirs.levels]
        for level in range(2):
            np.testing.assert_array_equal(whole(ours, level), whole(theirs, level))


@pytest.mark.parametrize(("channels", "dtype"), [(1, "u1"), (1, "u2"), (3, "u2")])
def test_grey_and_16_bits_stay_as_they_are(tmp_path: Path, channels: int, dtype: str) -> None:
    image = smooth(100, 90, channels, dtype)
    stored = image if channels == 3 else image[..., 0]
    photometric = "rgb" if channels == 3 else "minisblack"
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, stored, tile=(32, 32), photometric=photometric, compression="zlib", byteorder=">")
    with open_source(path) as source:
        assert source.dtype == image.dtype
        assert len(source.channel_names) == channels
        np.testing.assert_array_equal(whole(source), image)


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = np.dstack([smooth(64, 64), np.full((64, 64), 255, np.uint8)])
    image[:10, :, 3] = 0
    image[10:20, :, 3] = 128
    path = write_pyramid(tmp_path / "a.tiff", image, tile=32, extrasamples=["unassalpha"])
    with open_source(path) as source:
        reading = source.read_inside(Region((0, 0), (64, 64)), 0)
        assert source.channel_names == ("red", "green", "blue")
        assert (reading.pixels[:10] == 255).all()
        half = 255 - (255 - image[10:20, :, :3].astype(float)) * 128 / 255
        np.testing.assert_allclose(reading.pixels[10:20], half, atol=0.5001)
        np.testing.assert_array_equal(reading.pixels[20:], image[20:, :, :3])
        assert reading.absent is not None
        assert reading.absent[:10].all()
        assert not reading.absent[10:].any()
        assert source.read_inside(Region((30, 0), (9, 9)), 0).absent is None


@pytest.mark.parametrize("tag", [OFFSETS, COUNTS], ids=["offset", "count"])
def test_missing_tiles_are_absent_and_white(tmp_path: Path, tag: int) -> None:
    image = smooth(200, 200)
    path = write_pyramid(tmp_path / "a.tiff", image, compression="jpeg", levels=2)
    set_tag(path, tag, 5, 0)  # tile (1, 1) of level 0
    with open_source(path) as source:
        reading = source.read_inside(Region((0, 0), (200, 200)), 0)
        assert reading.absent is not None
        want = np.zeros((200, 200), np.bool_)
        want[64:128, 64:128] = True
        np.testing.assert_array_equal(reading.absent, want)
        assert (reading.pixels[want] == 255).all()
        assert source.read_inside(Region((0, 0), (64, 200)), 0).absent is None


def test_a_damaged_tile_is_an_error_each_time_and_no_other_tile_suffers(tmp_path: Path) -> None:
    image = smooth(256, 256)
    image += np.random.default_rng(0).integers(0, 30, image.shape, dtype=np.uint8)
    path = write_pyramid(tmp_path / "a.svs", image, tile=128, compression="jpeg")
    good = whole(open_source(path))
    offsets, counts = tile_places(path)
    overwrite(path, offsets[1] + counts[1] // 2, np.random.default_rng(1).bytes(200))
    with open_source(path) as source:
        for _ in range(2):
            with pytest.raises(SourceError, match=r"WSI111 a\.svs: level 0 tile \(0,1\): "):
                source.read(Region((0, 0), (256, 256)))
            for corner in [(0, 0), (128, 0), (128, 128)]:
                region = Region(corner, (128, 128))
                np.testing.assert_array_equal(source.read(region), good[region.slices()])


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "zlib", "lzw", "zstd", "webp", None])
def test_a_tile_cut_short_is_an_error(tmp_path: Path, compression: str | None) -> None:
    path = write_pyramid(tmp_path / "a.tiff", smooth(128, 128), compression=compression)
    _, counts = tile_places(path)
    set_tag(path, COUNTS, 2, counts[2] // 2)
    with open_source(path) as source:
        source.read(Region((0, 0), (64, 128)))
        with pytest.raises(SourceError, match=r"WSI111 .* tile \(1,0\)"):
            source.read(Region((64, 0), (64, 64)))


def test_a_file_cut_short_is_refused_at_once(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", smooth(512, 512), compression="zlib", levels=2)
    data = path.read_bytes()
    seen = set()
    for size in [0, 1, 4, 8, 16, 100, len(data) // 3, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(SourceError) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)
        seen.add(caught.value.code)
    assert "WSI102" in seen
    path = write_pyramid(tmp_path / "b.tiff", smooth(512, 512), compression="zlib")
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(
        SourceError, match=r"ends at [\d,]+ bytes but tile \(\d+,\d+\) of level \d needs [\d,]+"
    ):
        open_source(path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", smooth(256, 256))
    offsets, _ = tile_places(path)
    with open_source(path) as source:
        with open(path, "r+b") as file:
            file.truncate(offsets[9])
        with pytest.raises(SourceError, match=r"WSI111 .* cut after it was opened"):
            source.read(Region((192, 192), (10, 10)))


def test_levels_that_are_no_reductions_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tiff"
    with tifffile.TiffWriter(path) as writer:
        for shape in [(256, 256, 3), (40, 200, 3), (128, 128, 3)]:
            writer.write(smooth(*shape), tile=(64, 64), photometric="rgb", subfiletype=int(shape[0] != 256))
    with open_source(path) as source:
        assert [x.shape for x in source.levels] == [(256, 256), (128, 128)]
        np.testing.assert_array_equal(whole(source, 1), smooth(128, 128))
    assert "WSI120 a.tiff: level 1 is (40, 200), not a reduction of (256, 256)" in caplog.text


def test_stacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    stack = np.zeros((4, 128, 128), np.uint16)
    tifffile.imwrite(path, stack, tile=(64, 64), photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(SourceError, match=r"WSI130 .* 4 planes"):
        open_source(path)


@pytest.mark.parametrize(("code", "value", "want"), [(256, 2**31, "WSI140"), (322, 2**14 * 16, "WSI141")])
def test_absurd_sizes_are_refused_before_decoding(tmp_path: Path, code: int, value: int, want: str) -> None:
    path = write_pyramid(tmp_path / "a.tiff", smooth(64, 64), tile=64, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[code].overwrite(value, dtype=4)
        other = 257 if code == 256 else 323
        file.pages[0].tags[other].overwrite(value, dtype=4)
    with pytest.raises(SourceError, match=want):
        open_source(path)


def test_bombs_decode_to_a_tile_at_most(tmp_path: Path) -> None:
    import imagecodecs

    path = write_pyramid(tmp_path / "a.tiff", smooth(64, 64), compression="zlib", metadata=None)
    bomb = imagecodecs.zlib_encode(bytes(50 << 20))
    offset = path.stat().st_size
    with open(path, "ab") as file:
        file.write(bomb)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[OFFSETS].overwrite(offset, dtype=4)
        file.pages[0].tags[COUNTS].overwrite(len(bomb), dtype=4)
    with open_source(path) as source, pytest.raises(SourceError, match="WSI111"):
        source.read(Region((0, 0), (64, 64)))


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp"])
def test_frames_larger_than_their_tile_are_errors(tmp_path: Path, compression: str) -> None:
    large = write_pyramid(tmp_path / "large.tiff", smooth(256, 256), tile=256, compression=compression)
    offsets, counts = tile_places(large)
    frame = large.read_bytes()[offsets[0] : offsets[0] + counts[0]]
    path = write_pyramid(tmp_path / "a.tiff", smooth(64, 64), compression=compression, metadata=None)
    offset = path.stat().st_size
    with open(path, "ab") as file:
        file.write(frame)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[OFFSETS].overwrite(offset, dtype=4)
        file.pages[0].tags[COUNTS].overwrite(len(frame), dtype=4)
    with open_source(path) as source, pytest.raises(SourceError, match=r"WSI111 .* larger than its tile"):
        source.read(Region((0, 0), (64, 64)))


def test_threads_read_the_same(tmp_path: Path) -> None:
    image = smooth(400, 400)
    path = write_pyramid(tmp_path / "a.tiff", image, tile=32, compression="zlib")
    rng = np.random.default_rng(0)
    corners = [tuple(int(n) for n in rng.integers(0, 300, 2)) for _ in range(200)]
    with TiffSource(str(path), cache_bytes=100_000) as source, ThreadPoolExecutor(8) as pool:
        regions = [Region(c, (100, 100)) for c in corners]
        for region, pixels in zip(regions, pool.map(source.read, regions), strict=True):
            np.testing.assert_array_equal(pixels, image[region.slices()])
        assert source._cache._used <= 100_000
        assert source._cache._used == sum(t.nbytes for t in source._cache._tiles.values())


def test_a_stale_handle_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(64, 64)
    path = write_pyramid(tmp_path / "a.tiff", image)
    failures, used, real = [2], set(), os.pread

    def flaky(number: int, count: int, offset: int) -> bytes:
        used.add(number)
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(number, count, offset)

    with open_source(path) as source:
        monkeypatch.setattr(os, "pread", flaky)
        np.testing.assert_array_equal(whole(source), image)
        assert len(used) > 1
    failures[0] = 3
    words = r"WSI150 a\.tiff: Stale file handle at byte [\d,]+, 3 tries"
    with open_source(path) as source, pytest.raises(SourceError, match=words):
        whole(source)


def test_mutants_give_our_errors_and_nothing_else(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"compression": c} for c in ("jpeg", "zlib", "lzw", "jpeg2000", "webp", None)
    ]
    kinds += [{"subifds": True}, {"bigtiff": True}]
    path, image = tmp_path / "a.tiff", smooth(150, 150)
    seeds = [write_pyramid(path, image, levels=2, **kind).read_bytes() for kind in kinds]
    rng, codes = np.random.default_rng(0), set()
    for number in range(160):
        data = bytearray(seeds[number % len(seeds)])
        for place in rng.integers(0, 700 if number % 3 else len(data), int(rng.integers(1, 6))):
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            with open_source(path, reader="tiff") as source:
                for level, stated in enumerate(source.levels):
                    source.read(Region((0, 0), tuple(min(n, 2000) for n in stated.shape)), level)
        except SourceError as error:
            codes.add(error.code if "\n" not in str(error) else str(error))
    assert (
        {"WSI101", "WSI102", "WSI111"} <= codes <= {f"WSI1{n}" for n in ("01", "02", "11", "30", "40", "41")}
    )


def test_close_and_pickle(tmp_path: Path) -> None:
    image = smooth(100, 100)
    path = write_pyramid(tmp_path / "a.tiff", image)
    source = open_source(path, mpp=0.5, name="mine")
    again = pickle.loads(pickle.dumps(source))
    assert (type(again), again.name, again.spacing) == (TiffSource, "mine", source.spacing)
    assert again.identity() == source.identity()
    reference = open_source(pickle.loads(pickle.dumps(source.ref)))
    np.testing.assert_array_equal(whole(reference), image)
    before = threading.active_count()
    source.close()
    source.close()
    with pytest.raises(SourceError, match="WSI112"):
        whole(source)
    assert threading.active_count() == before
    again.close()
    reference.close()


def test_identity_tells_files_apart(tmp_path: Path) -> None:
    image = smooth(300, 300)
    path = write_pyramid(tmp_path / "a.tiff", image)
    first = open_source(path).identity()
    assert str(tmp_path) not in str(first)
    copy = tmp_path / "b" / "a.tiff"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert open_source(copy).identity() == first
    overwrite(copy, copy.stat().st_size - 1000, b"\x01\x02\x03")
    assert open_source(copy).identity() != first
