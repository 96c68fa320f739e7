"""Where the pixel size comes from, and when it is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources_data import smooth, write_pyramid

from wsitk.errors import SpacingError
from wsitk.geometry import Spacing
from wsitk.sources import open_source, require_spacing
from wsitk.sources.spacing import judge, parse_number

APERIO = "Aperio Image Library v10\r\n100x100 JPEG/RGB Q=30|AppMag = 40|MPP = {}|Left = 3"
OME = (
    '<?xml version="1.0"?>{}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="100" SizeY="100" SizeC="3" SizeZ="1" '
    'SizeT="1" {}><Channel ID="C:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
)


def spacing_of(folder: Path, **options: object) -> tuple[Spacing | None, str]:
    path = write_pyramid(folder / "a.tiff", smooth(100, 100), metadata=None, **options)
    with open_source(path) as source:
        return source.spacing, source.spacing_error


@pytest.mark.parametrize(("text", "um"), [("0.2457", 0.2457), ("0,2457", 0.2457), (" 0.5 ", 0.5)])
def test_aperio(tmp_path: Path, text: str, um: float) -> None:
    assert spacing_of(tmp_path, description=APERIO.format(text)) == (Spacing((um, um), "aperio.MPP"), "")


@pytest.mark.parametrize("text", ["0", "-0.25", "nan", "1e6", "250", "twenty", ""])
def test_absurd_values_are_refused_and_quoted(tmp_path: Path, text: str) -> None:
    found, error = spacing_of(tmp_path, description=APERIO.format(text))
    assert found is None
    assert error.startswith("WSI202 a.tiff: aperio.MPP says ")
    assert "--mpp 0.25" in error


def test_magnification_is_no_pixel_size(tmp_path: Path) -> None:
    text = APERIO.replace("|MPP = {}", "")
    found, error = spacing_of(tmp_path, description=text)
    assert found is None
    assert error.startswith(
        "WSI201 a.tiff: no pixel size found (looked at aperio.MPP, OME PhysicalSizeX, tiff.X"
    )


@pytest.mark.parametrize(
    ("attributes", "um"),
    [
        ('PhysicalSizeX="0.5" PhysicalSizeY="0.504"', (0.504, 0.5)),
        ('PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="500" PhysicalSizeYUnit="nm"', (0.5, 0.5)),
        ('PhysicalSizeX="0.0005" PhysicalSizeXUnit="mm" PhysicalSizeY="0.5"', (0.5, 0.5)),
        ('PhysicalSizeX="0.5"', (0.5, 0.5)),
    ],
)
def test_ome(tmp_path: Path, attributes: str, um: tuple[float, float]) -> None:
    found, error = spacing_of(tmp_path, description=OME.format("", attributes), resolution=(1000, 1000))
    assert error == ""
    assert found is not None
    assert found.um == pytest.approx(um)
    assert found.provenance == "OME PhysicalSizeX"


def test_ome_with_an_unknown_unit_or_entities(tmp_path: Path) -> None:
    found, error = spacing_of(
        tmp_path, description=OME.format("", 'PhysicalSizeX="0.5" PhysicalSizeXUnit="pixel"')
    )
    assert found is None
    assert error.startswith("WSI202")
    entities = '<!DOCTYPE x [<!ENTITY a "0.5">]>'
    found, error = spacing_of(tmp_path, description=OME.format(entities, 'PhysicalSizeX="&a;"'))
    assert found is None
    assert error.startswith("WSI201")


@pytest.mark.parametrize(
    ("resolution", "unit", "code"),
    [
        ((20_000, 20_000), "centimeter", ""),
        ((50_800, 50_800), "inch", ""),
        ((72, 72), "inch", "WSI202"),
        ((20_000, 30_000), "centimeter", "WSI202"),
        ((20_000, 20_000), "none", "WSI201"),
        ((0, 0), "centimeter", "WSI201"),
    ],
)
def test_resolution_tags(tmp_path: Path, resolution: tuple[int, int], unit: str, code: str) -> None:
    found, error = spacing_of(tmp_path, resolution=resolution, resolutionunit=unit)
    assert error.startswith(code)
    assert found == (None if code else Spacing((0.5, 0.5), "tiff.XResolution"))


def test_what_the_caller_says_comes_first(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tiff", smooth(100, 100), description=APERIO.format("0.25"), metadata=None
    )
    assert open_source(path, mpp=0.5).spacing == Spacing((0.5, 0.5), "--mpp")
    assert open_source(path, mpp=(0.5, 0.505)).spacing == Spacing((0.5, 0.505), "--mpp")
    assert open_source(path, mpp=250).spacing_error.startswith("WSI202 a.tiff: --mpp says 250 x 250")


def test_require_spacing(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tiff", smooth(100, 100), description=APERIO.format("896"), metadata=None
    )
    with pytest.raises(SpacingError) as caught:
        require_spacing(open_source(path))
    assert caught.value.code == "WSI202"
    assert str(caught.value) == (
        "WSI202 a.tiff: aperio.MPP says 896 x 896 µm per pixel, which is not within 0.05 to 20; "
        "give the true size, e.g. --mpp 0.25"
    )
    assert require_spacing(open_source(path, mpp=0.25)).um == (0.25, 0.25)


def test_anisotropy_has_its_limit_at_two_percent() -> None:
    assert judge("a", [Spacing((0.5, 0.509), "x")], ())[0] is not None
    assert "differ by 2.4%" in judge("a", [Spacing((0.5, 0.512), "x")], ())[1]
    assert judge("a", [Spacing((0.5, 0.9), "x")], (), 2)[0] is None
    assert judge("a", [Spacing((5000.0, 700.0, 700.0), "x")], (), 3)[0] is not None


def test_numbers() -> None:
    assert parse_number("1,5") == 1.5
    for text in ("", "x", "1,2,3", "0.25 um"):
        assert parse_number(text) != parse_number(text)
