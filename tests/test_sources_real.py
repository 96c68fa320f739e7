"""Real slides: what each file of the data set opens as, and the same pixels by every way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sources_data import overwrite, tile_places

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.discover import expand_inputs
from wsitk.sources.working import WorkingImage

CMU, TCGA = "cmu-1-small-region.svs", "TCGA-DU-6399-01A-01-TS1.svs"

# name -> reader, shape, downsamples, pixel size or the code of its refusal
OUTCOMES: dict[str, tuple[str, tuple[int, int], list[int], float | str]] = {
    TCGA: ("TiffSource", (13835, 31872), [1, 4, 16], 0.2457),
    CMU: ("TiffSource", (2967, 2220), [1], 0.499),
    "boxes.tiff": ("TiffSource", (250, 300), [1, 2, 4, 8], "WSI202"),
    "slide.tiff": ("TiffSource", (2500, 2500), [1, 2, 4, 8, 16, 32], "WSI202"),
    "dicom_cmu1": ("OpenSlideSource", (2967, 2220), [1], 0.499),
    "openslide_fixtures/boxes.png": ("ImageSource", (250, 300), [1], "WSI201"),
    "openslide_fixtures/boxes-no-icc.png": ("ImageSource", (250, 300), [1], "WSI201"),
    "openslide_fixtures/😐.png": ("ImageSource", (250, 300), [1], "WSI201"),
    "openslide_fixtures/boxes.tiff": ("TiffSource", (250, 300), [1, 2, 4, 8], "WSI202"),
    "openslide_fixtures/boxes_0.dcm": ("OpenSlideSource", (16, 16), [1], 0.499),
    "openslide_fixtures/small.svs": ("TiffSource", (16, 16), [1], 0.499),
    "openslide_fixtures/😐.svs": ("TiffSource", (16, 16), [1], 0.499),
    "openslide_fixtures/unreadable.svs": ("TiffSource", (16, 16), [1], 0.499),
}


def test_every_file_opens_or_says_why(data: Path) -> None:
    found = {item.name: item.path for item in expand_inputs([data / "data" / "wsi"]).items}
    assert {n for n in found if not n.startswith("ome/")} == {*OUTCOMES, "openslide_fixtures/unopenable.tiff"}
    for name, (kind, shape, steps, spacing) in OUTCOMES.items():
        with open_source(found[name]) as source:
            assert (type(source).__name__, source.shape) == (kind, shape), name
            assert [x.downsample for x in source.levels] == [(s, s) for s in steps], name
            if isinstance(spacing, str):
                assert source.spacing is None, name
                assert source.spacing_error.startswith(spacing), name
            else:
                assert source.spacing is not None, name
                assert source.spacing.um == pytest.approx((spacing, spacing)), name
    with pytest.raises(
        SourceError, match=r"WSI101 unopenable\.tiff: no reader takes it: TIFF compression 52479"
    ) as caught:
        open_source(found["openslide_fixtures/unopenable.tiff"])
    assert "\n" not in str(caught.value)


def test_a_junk_resolution_tag_is_refused(data: Path) -> None:
    with open_source(data / "data/wsi/slide.tiff") as source:
        assert source.spacing_error == (
            "WSI202 slide.tiff: tiff.XResolution says 896.056 x 896.056 µm per pixel, which is not within 0.05 to 20; "
            "give the true size, e.g. --mpp 0.25"
        )


def test_an_unreadable_tile_is_an_error_not_black(data: Path) -> None:
    words = r"WSI111 unreadable\.svs: level 0 tile \(0,0\): Corrupt JPEG data"
    path = data / "data/wsi/openslide_fixtures/unreadable.svs"
    with open_source(path) as source, pytest.raises(SourceError, match=words):
        source.read(Region((0, 0), (16, 16)))


@pytest.mark.parametrize("name", [CMU, "slide.tiff", "boxes.tiff", "openslide_fixtures/small.svs"])
def test_direct_pixels_equal_those_of_openslide(data: Path, name: str) -> None:
    path = data / "data/wsi" / name
    with open_source(path, reader="tiff") as ours, open_source(path, reader="openslide") as theirs:
        region = Region((0, 0), tuple(min(n, 1500) for n in ours.shape))
        np.testing.assert_array_equal(ours.read(region), theirs.read(region))


def test_jpeg_2000_equals_that_of_openslide_within_one(data: Path) -> None:
    path = data / "data/wsi" / TCGA
    with open_source(path, reader="tiff") as ours, open_source(path, reader="openslide") as theirs:
        for corner in [(6400, 3600), (10_000, 17_600)]:
            region = Region(corner, (300, 400))
            a, b = ours.read(region).astype(int), theirs.read(region).astype(int)
            assert a.std() > 5
            assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG-2000", "JPEG", "LZW", "zlib"])
def test_ome_tiff(data: Path, kind: str) -> None:
    import tifffile

    (path,) = (data / "data/wsi/ome").glob(f"XYC_-compression_{kind}_-*.ome.tiff")
    with open_source(path) as source:
        assert source.shape == (512, 512)
        assert source.spacing_error.startswith("WSI201")
        whole = source.read(Region((0, 0), (512, 512)))
    np.testing.assert_array_equal(whole, tifffile.imread(path))
    assert whole.std() > 10


def test_dicom_and_svs_of_one_region_agree(data: Path) -> None:
    with open_source(data / "data/wsi" / CMU) as svs:
        (item,) = expand_inputs([data / "data/wsi/dicom_cmu1"]).items
        with open_source(item.path, name=item.name) as series:
            assert (item.name, series.spacing) == ("dicom_cmu1", open_source(item.path).spacing)
            region = Region((700, 500), (400, 300))
            a, b = svs.read(region).astype(int), series.read(region).astype(int)
            assert a.std() > 5
            assert np.abs(a - b).mean() < 3  # its maker compressed it again
            assert series.identity()["files"] == 4


def test_working_image_of_a_slide_equals_block_means(data: Path) -> None:
    with open_source(data / "data/wsi" / TCGA) as source:
        working = WorkingImage(source, (0.5, 0.5))
        assert (working.level, working.factor, working.scale) == (0, (2, 2), (2, 2))
        got = working.read(Region((2500, 4500), (100, 120))).pixels
        raw = source.read(Region((5000, 9000), (200, 240))).reshape(100, 2, 120, 2, 3)
        np.testing.assert_array_equal(got, (raw.sum((1, 3), dtype=int) + 2) // 4)
        assert WorkingImage(source, (1.0, 1.0)).level == 1
        assert WorkingImage(source, (8.0, 8.0)).level == 2
    with open_source(data / "data/wsi" / CMU) as source:
        assert WorkingImage(source, (0.5, 0.5)).factor == (1, 1)


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
@pytest.mark.parametrize("name", [CMU, TCGA])
def test_a_damaged_tile_costs_that_tile_only(data: Path, tmp_path: Path, name: str, reader: str) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes((data / "data/wsi" / name).read_bytes())
    index, columns = (40, 10) if name == CMU else (3000, 133)
    row, column = divmod(index, columns)
    bad = Region((row * 240, column * 240), (240, 240))
    near = Region((row * 240, (column + 1) * 240), (240, 240))
    with open_source(path, reader=reader) as source:
        good = source.read(near)
    offsets, counts = tile_places(path)
    overwrite(path, offsets[index] + counts[index] // 2, b"\xff\x93" * 100)
    with open_source(path, reader=reader) as source:
        for _ in range(2):
            with pytest.raises(SourceError, match="WSI111"):
                source.read(bad)
            np.testing.assert_array_equal(source.read(near), good)


@pytest.mark.parametrize("size", [0, 1, 4, 8, 16, 1000, 300_000, 1_900_000])
def test_a_slide_cut_short_is_refused(data: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes((data / "data/wsi" / CMU).read_bytes()[:size])
    with pytest.raises(SourceError, match=r"WSI10[12]") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
