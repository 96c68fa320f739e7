"""Plain images: what each kind becomes, what they say of their pixel size, and what is refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from sources_data import smooth

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.image import ImageSource


def whole(source: Any) -> Any:
    return source.read(Region((0, 0), source.shape))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "I;16"])
def test_png_modes(tmp_path: Path, mode: str) -> None:
    image = smooth(50, 60)
    picture = Image.fromarray(image)
    if mode == "I;16":
        deep = smooth(50, 60, 1, "u2")[..., 0]
        picture, want = Image.fromarray(deep), deep[..., None]
    else:
        picture = picture.convert(mode)
        target = {"P": "RGB", "1": "L", "LA": "L", "RGBA": "RGB"}.get(mode, mode)
        want = np.asarray(picture.convert(target))
        want = want[..., None] if want.ndim == 2 else want
    picture.save(tmp_path / "a.png")
    with open_source(tmp_path / "a.png") as source:
        assert isinstance(source, ImageSource)
        assert source.dtype == want.dtype
        np.testing.assert_array_equal(whole(source), want)


def test_png_of_48_bits_keeps_them(tmp_path: Path) -> None:
    import imagecodecs

    image = smooth(30, 40, 3, "u2")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    np.testing.assert_array_equal(whole(open_source(tmp_path / "a.png")), image)


def test_transparency(tmp_path: Path) -> None:
    rgba = np.dstack([smooth(20, 20), np.full((20, 20), 255, np.uint8)])
    rgba[:5, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    reading = open_source(tmp_path / "a.png").read_inside(Region((0, 0), (20, 20)), 0)
    assert reading.absent is not None
    assert reading.absent[:5].all()
    assert not reading.absent[5:].any()
    assert (reading.pixels[:5] == 255).all()


def test_jpeg(tmp_path: Path) -> None:
    image = smooth(50, 70)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95, dpi=(300, 300))
    source = open_source(tmp_path / "a.jpg")
    assert np.abs(whole(source).astype(int) - image).mean() < 3
    assert source.spacing_error.startswith("WSI202 a.jpg: jfif.density says 84.6667 x 84.6667")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="WSI102"):
        open_source(tmp_path / "b.jpg")
    Image.fromarray(image).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(SourceError, match="WSI130"):
        open_source(tmp_path / "c.jpg")


def test_jpeg_2000(tmp_path: Path) -> None:
    image = smooth(50, 70)
    Image.fromarray(image).save(tmp_path / "a.jp2")
    np.testing.assert_array_equal(whole(open_source(tmp_path / "a.jp2")), image)
    data = (tmp_path / "a.jp2").read_bytes()
    (tmp_path / "b.jp2").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="WSI102"):
        open_source(tmp_path / "b.jp2")


def test_pixel_size_of_png(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(20, 20))
    picture.save(tmp_path / "a.png", dpi=(25_400 / 0.5, 25_400 / 0.5))
    found = open_source(tmp_path / "a.png").spacing
    assert found is not None
    assert found.um == pytest.approx((0.5, 0.5), rel=1e-5)
    assert found.provenance == "png.pHYs"
    picture.save(tmp_path / "b.png")
    assert open_source(tmp_path / "b.png").spacing_error == (
        "WSI201 b.png: no pixel size found (looked at png.pHYs); give it, e.g. --mpp 0.25"
    )
    assert open_source(tmp_path / "b.png", mpp=0.5).spacing is not None


@pytest.mark.parametrize("kind", ["rgb", "grey", "inverted", "palette", "planar", "bilevel", "u2", "jpeg"])
def test_tiff_without_tiles(tmp_path: Path, kind: str) -> None:
    image, path = smooth(60, 50), tmp_path / "a.tif"
    if kind == "rgb":
        tifffile.imwrite(path, image, photometric="rgb", compression="lzw", rowsperstrip=7)
        want = image
    elif kind == "jpeg":
        tifffile.imwrite(path, image, photometric="rgb", compression="jpeg")
        want = tifffile.imread(path)
    elif kind == "planar":
        tifffile.imwrite(path, np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate")
        want = image
    elif kind == "palette":
        Image.fromarray(image).quantize(64).save(path)
        want = np.asarray(Image.open(path).convert("RGB"))
    elif kind == "bilevel":
        Image.fromarray(image[..., 0]).convert("1").save(path)
        want = np.asarray(Image.open(path).convert("L"))[..., None]
    elif kind == "inverted":
        tifffile.imwrite(path, image[..., 0], photometric="miniswhite")
        want = 255 - image[..., :1]
    else:
        grey = smooth(60, 50, 1, "u2" if kind == "u2" else "u1")
        tifffile.imwrite(path, grey[..., 0], photometric="minisblack")
        want = grey
    with open_source(path) as source:
        assert isinstance(source, ImageSource)
        np.testing.assert_array_equal(whole(source), want)


def test_tiff_colours_without_one_meaning(tmp_path: Path) -> None:
    inks = np.zeros((40, 40, 4), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", inks, photometric="separated")
    with pytest.raises(SourceError, match="WSI130"):
        open_source(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((5, 40, 40), np.uint8), photometric="minisblack")
    with pytest.raises(SourceError, match="WSI130"):
        open_source(tmp_path / "b.tif")


def test_images_too_large_for_one_piece(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(SourceError, match=r"WSI141 a\.png: .*vips tiffsave"):
        open_source(tmp_path / "a.png")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(
        SourceError, match=r"WSI101 a\.png: no reader takes it: not a TIFF; OpenSlide: .*; not a PNG"
    ) as caught:
        open_source(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    image = smooth(40, 40)
    Image.fromarray(image).save(tmp_path / "b.png")
    data = bytearray((tmp_path / "b.png").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "b.png").write_bytes(data)
    with pytest.raises(SourceError, match="WSI101"):
        open_source(tmp_path / "b.png")


def test_system_errors_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"WSI100 none\.svs: No such file or directory"):
        open_source(tmp_path / "none.svs")
    with pytest.raises(SourceError, match=r"WSI100 .* Is a directory"):
        open_source(tmp_path)


def test_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(30, 50)).save(tmp_path / "a.jpg", exif=exif)
    assert open_source(tmp_path / "a.jpg").shape == (30, 50)
