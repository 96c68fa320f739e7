"""DICOM: series ordered in space and checked against ITK, multi-frame files, radiographs, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  (as its manual calls it)
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, SecondaryCaptureImageStorage
from volume_data import SERIES, ct_slice, multiframe, noise, oblique, save_series, whole

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.dicom_series import DicomSeriesSource
from wsitk.sources.discover import companions, expand_inputs
from wsitk.sources.xray import XRaySource

CR_STORAGE = "1.2.840.10008.5.1.4.1.1.1"


def as_itk(folder: Path) -> Any:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def volume(depth: int = 9) -> Any:
    return noise(depth, 12, 10, low=-1024, high=3071)


def test_a_series_is_ordered_in_space(tmp_path: Path) -> None:
    stored, frame = volume(), oblique()
    save_series(tmp_path / "ct", stored, frame)
    (item,) = expand_inputs([tmp_path]).items
    assert item.name == "ct"
    with open_source(item.path) as source:
        assert isinstance(source, DicomSeriesSource)
        assert (source.axes, source.dtype) == (("z", "y", "x"), np.int16)
        assert source.frame is not None
        np.testing.assert_array_equal(whole(source), stored)
        np.testing.assert_allclose(source.frame.matrix, frame.matrix, atol=1e-6)
        assert source.spacing is not None
        assert source.spacing.provenance == "dicom.ImagePositionPatient"
        np.testing.assert_allclose(source.spacing.um, (5000, 800, 700))
        image = as_itk(tmp_path / "ct")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), stored)
        place = image.TransformIndexToPhysicalPoint((9, 11, 8))
        np.testing.assert_allclose(source.frame.to_world((8, 11, 9)), place, atol=1e-3)
        part = Region((3, 2, 1), (4, 5, 6))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, stored[part.slices()])
        with pickle.loads(pickle.dumps(source)) as copy:
            np.testing.assert_array_equal(whole(copy), stored)
            assert copy.identity() == source.identity()
    with pytest.raises(SourceError, match="WSI112"):
        whole(source)
    with open_source(tmp_path / "ct") as source:  # the folder itself
        assert source.shape == stored.shape
    assert len(companions(item.path)) == len(stored)


def test_slope_and_intercept_of_each_slice(tmp_path: Path) -> None:
    stored, frame = volume(), oblique()

    def change(item: Dataset, z: int) -> None:
        item.RescaleSlope, item.RescaleIntercept = repr(0.5 + z), repr(-z / 4)

    save_series(tmp_path, stored, frame, change)
    with open_source(tmp_path) as source:
        assert source.dtype == np.float32
        z = np.arange(len(stored)).reshape(-1, 1, 1)
        want = (stored.astype(np.float64) + 1024) * (0.5 + z) - z / 4
        np.testing.assert_array_equal(whole(source), want.astype(np.float32))


def test_bits_beyond_the_stored_ones_are_overlays(tmp_path: Path) -> None:
    stored, frame = volume(3), oblique()

    def change(item: Dataset, z: int) -> None:
        raw = np.frombuffer(item.PixelData, "<u2") | 0x8000
        item.PixelData = raw.tobytes()

    save_series(tmp_path, stored, frame, change)
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(whole(source), stored)


CODECS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "jpeg-lossless": ("1.2.840.10008.1.2.4.70", lambda a: imagecodecs.ljpeg_encode(a, bitspersample=12)),
    "jpeg-ls": ("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
    "jpeg-2000": (
        "1.2.840.10008.1.2.4.90",
        lambda a: imagecodecs.jpeg2k_encode(a, reversible=True, level=0, codecformat="J2K"),
    ),
}


@pytest.mark.parametrize("codec", [*CODECS, "rle"])
def test_compressed_series(tmp_path: Path, codec: str) -> None:
    stored, frame = volume(4), oblique()

    def change(item: Dataset, z: int) -> None:
        if codec == "rle":
            item.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
            return
        syntax, encode = CODECS[codec]
        data = encode(np.frombuffer(item.PixelData, "<u2").reshape(item.Rows, item.Columns))
        item.PixelData = encapsulate([data])
        item["PixelData"].is_undefined_length = True
        item.file_meta.TransferSyntaxUID = UID(syntax)

    save_series(tmp_path, stored, frame, change)
    with open_source(tmp_path) as source:
        np.testing.assert_array_equal(whole(source), stored)


def test_a_codestream_larger_than_its_header_says(tmp_path: Path) -> None:
    def change(item: Dataset, z: int) -> None:
        data = imagecodecs.jpeg2k_encode(np.zeros((2000, 2000), np.uint16), codecformat="J2K")
        item.PixelData = encapsulate([data])
        item["PixelData"].is_undefined_length = True
        item.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.90")

    save_series(tmp_path, volume(2), oblique(), change)
    with open_source(tmp_path) as source, pytest.raises(SourceError, match=r"^WSI111 .*\(2000, 2000\)"):
        whole(source)


def moved(z_at: int, by: tuple[float, float, float]) -> Callable[[Dataset, int], None]:
    def change(item: Dataset, z: int) -> None:
        if z == z_at:
            shift = oblique().directions @ np.array(by)
            item.ImagePositionPatient = [
                f"{float(p) + s:.9f}"[:16] for p, s in zip(item.ImagePositionPatient, shift, strict=True)
            ]

    return change


def setting(z_at: int, **fields: Any) -> Callable[[Dataset, int], None]:
    def change(item: Dataset, z: int) -> None:
        if z == z_at:
            for key, value in fields.items():
                setattr(item, key, value)

    return change


def tilted(item: Dataset, z: int) -> None:
    shift = oblique().directions @ np.array([0, 0.9 * z, 0])
    item.ImagePositionPatient = [
        f"{float(p) + s:.9f}"[:16] for p, s in zip(item.ImagePositionPatient, shift, strict=True)
    ]


def dropping(keyword: str) -> Callable[[Dataset, int], None]:
    def change(item: Dataset, z: int) -> None:
        delattr(item, keyword)

    return change


@pytest.mark.parametrize(
    ("change", "skip", "message"),
    [
        (None, (4,), "WSI122 .*a gap of 10.000 mm .*1 slices are missing"),
        (None, (3, 4), "WSI122 .*2 slices are missing"),
        (moved(4, (-5.0, 0, 0)), (), "WSI123 .*lie in one place"),
        (moved(8, (2.5, 0, 0)), (), "WSI124 .*7.500 mm apart, others 5.000"),
        (setting(4, PixelSpacing=[0.8, 0.75]), (), "WSI124 .*pixel spacing"),
        (setting(4, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), (), "WSI125 .*orientation"),
        (setting(4, Rows=10, Columns=12), (), "WSI126 .*size"),
        (setting(4, PixelRepresentation=1), (), "WSI126 .*type"),
        (dropping("ImagePositionPatient"), (), "WSI127 "),
        (dropping("PixelSpacing"), (), "WSI127 "),
        (tilted, (), "WSI143 .*sideways"),
        (setting(4, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), (), "WSI115 "),
        (setting(4, Rows=1200), (), "WSI102 "),
        (setting(4, Rows=0), (), "WSI115 "),
        (setting(4, RescaleSlope=0), (), "WSI115 "),
        (setting(4, SamplesPerPixel=3, PhotometricInterpretation="RGB"), (), "WSI118 "),
        (setting(4, BitsAllocated=64), (), "WSI118 "),
    ],
)
def test_what_makes_no_grid_is_refused(
    tmp_path: Path, change: Callable[[Dataset, int], None] | None, skip: tuple[int, ...], message: str
) -> None:
    save_series(tmp_path, volume(), oblique(), change, skip)
    with pytest.raises(SourceError, match=f"^{message}") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    assert "A^B" not in str(caught.value)


def test_rounded_positions_are_one_grid(tmp_path: Path) -> None:
    """Scanners write positions with two digits."""

    def change(item: Dataset, z: int) -> None:
        item.ImagePositionPatient = [f"{float(p):.2f}" for p in item.ImagePositionPatient]

    save_series(tmp_path, volume(), oblique((0.7, 0.8, 0.7)), change)
    with open_source(tmp_path) as source:
        assert source.frame is not None
        np.testing.assert_allclose(source.frame.spacing_mm, (0.7, 0.8, 0.7), atol=2e-3)


def test_one_slice_has_its_thickness(tmp_path: Path) -> None:
    save_series(tmp_path, volume(1), oblique())
    with open_source(tmp_path) as source:
        assert source.spacing is not None
        assert source.spacing.provenance == "dicom.SliceThickness"
        np.testing.assert_allclose(source.spacing.um, (5000, 800, 700))
    save_series(tmp_path, volume(1), oblique(), dropping("SliceThickness"))
    with pytest.raises(SourceError, match=r"^WSI127 "):
        open_source(tmp_path)


def test_multi_frame(tmp_path: Path) -> None:
    stored, frame = volume(6), oblique()
    order = [3, 0, 5, 1, 4, 2]
    multiframe(stored, frame, order).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with open_source(tmp_path / "a.dcm") as source:
        assert isinstance(source, DicomSeriesSource)
        np.testing.assert_array_equal(whole(source), stored)
        assert source.frame is not None
        np.testing.assert_allclose(source.frame.matrix, frame.matrix, atol=1e-6)
    item = multiframe(stored, frame, order)
    del item.PerFrameFunctionalGroupsSequence[2]
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match=r"^WSI115 .*6 frames, and places for 5"):
        open_source(tmp_path / "a.dcm")


def test_series_are_told_apart(tmp_path: Path) -> None:
    save_series(tmp_path / "mixed", volume(3), oblique())
    other = ct_slice(volume(1)[0], oblique(), 0, 9, SeriesInstanceUID=f"{SERIES}.0.9")
    other.save_as(tmp_path / "mixed" / "other.dcm", enforce_file_format=True)
    report = ct_slice(volume(1)[0], oblique(), 0, 8, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.22")
    report.save_as(tmp_path / "mixed" / "report.dcm", enforce_file_format=True)
    capture = ct_slice(volume(1)[0], oblique(), 0, 8, SOPClassUID=SecondaryCaptureImageStorage)
    capture.save_as(tmp_path / "mixed" / "1.2.3.45", enforce_file_format=True)  # a screenshot: modality CT
    radiograph(noise(5, 6, low=0, high=4000)).save_as(
        tmp_path / "mixed" / "1.2.3.4", enforce_file_format=True
    )
    found = expand_inputs([tmp_path])
    assert [i.name for i in found.items] == ["mixed/001.dcm", "mixed/1.2.3.4", "mixed/other.dcm"]
    assert dict(found.skipped) == {
        "DICOM, but no image that is read": 2, "further files of a DICOM series": 2,
    }  # fmt: skip
    readers = []
    for item in found.items:
        with open_source(item.path) as source:
            readers.append((type(source).__name__, source.shape))
    assert readers == [
        ("DicomSeriesSource", (3, 12, 10)), ("XRaySource", (5, 6)), ("DicomSeriesSource", (1, 12, 10)),
    ]  # fmt: skip
    with pytest.raises(SourceError, match=r"^WSI129 mixed: holds 2 series"):
        open_source(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"^WSI100 empty: "):
        open_source(tmp_path / "empty")


def test_deflated_and_unknown_syntaxes_are_refused(tmp_path: Path) -> None:
    item = ct_slice(volume(1)[0], oblique(), 0, 1)
    item.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1.99")
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match=r"^WSI1(01|28) "):
        open_source(tmp_path / "a.dcm")
    item = ct_slice(volume(1)[0], oblique(), 0, 1)
    item.PixelData = encapsulate([b"\0" * 100])
    item["PixelData"].is_undefined_length = True
    item.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.102")  # MPEG-4
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(SourceError, match=r"^WSI128 .*4.102"):
        open_source(tmp_path / "a.dcm")


def test_damaged_slices_end_in_coded_errors(tmp_path: Path) -> None:
    """Cut and flip a slice anywhere: it is refused by code, or read; nothing else comes out."""
    save_series(tmp_path, volume(2), oblique())
    path = tmp_path / "001.dcm"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    said: list[SourceError] = []
    for trial in range(60):
        bad = bytearray(good)
        if trial % 3 == 0:
            del bad[int(rng.integers(132, len(good))) :]
        else:
            for at in rng.integers(132, len(good) - 240, 3):
                bad[at] = int(rng.integers(256))
        path.write_bytes(bad)
        try:
            with open_source(tmp_path / "002.dcm") as source:
                whole(source)
        except SourceError as error:
            said.append(error)
    assert len(said) > 20
    assert all(e.code.startswith("WSI1") and "\n" not in e.message for e in said)


# --- radiographs


def radiograph(pixels: Any, **fields: Any) -> Dataset:
    item = ct_slice(pixels.astype(np.int32) - 1024, oblique(), 0, 1)
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(item, key)
    item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = UID(CR_STORAGE)
    item.Modality = "CR"
    item.PixelSpacing = [0.15, 0.15]
    for key, value in fields.items():
        setattr(item, key, value)
    return item


def table(first: int, values: list[int], bits: int) -> list[Dataset]:
    item = Dataset()
    item.add_new(0x00283002, "US", [len(values), first, bits])
    item.add_new(0x00283006, "US", values)
    return [item]


def test_radiographs(tmp_path: Path) -> None:
    stored = noise(20, 30, low=0, high=4096)
    path = tmp_path / "a.dcm"

    def read(**fields: Any) -> Any:
        radiograph(stored, **fields).save_as(path, enforce_file_format=True)
        with open_source(path) as source:
            assert isinstance(source, XRaySource)
            assert (source.axes, source.channel_names, source.frame) == (
                ("y", "x", "c"),
                ("intensity",),
                None,
            )
            assert source.spacing is not None
            np.testing.assert_allclose(source.spacing.um, (150, 150))
            part = Region((2, 3), (5, 7))
            np.testing.assert_array_equal(source.read_inside(part, 0).pixels, whole(source)[part.slices()])
            return whole(source)[..., 0]

    plain = read()
    assert plain.dtype == np.uint16
    np.testing.assert_array_equal(plain, stored)
    np.testing.assert_array_equal(read(PhotometricInterpretation="MONOCHROME1"), 4095 - stored)
    window = {"WindowCenter": 1000, "WindowWidth": 500}
    # PS3.3 C.11.2.1.2.1, over the 12 stored bits
    want = np.clip(((stored.astype(np.float64) - 999.5) / 499 + 0.5) * 4095, 0, 4095)
    got = read(**window)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_allclose(
        read(**window, PhotometricInterpretation="MONOCHROME1"), 4095 - want, atol=1e-3
    )
    scaled = {"RescaleSlope": 2, "RescaleIntercept": -100, "RescaleType": "US"}
    np.testing.assert_allclose(read(**scaled), stored * 2.0 - 100)
    np.testing.assert_allclose(
        read(**scaled, PhotometricInterpretation="MONOCHROME1"), 2 * 4095 - 200 - (stored * 2.0 - 100)
    )
    curve = [int(255 * (k / 4095) ** 0.5) for k in range(4096)]
    np.testing.assert_allclose(read(VOILUTSequence=table(0, curve, 8)), np.array(curve)[stored])
    np.testing.assert_allclose(
        read(VOILUTSequence=table(0, curve, 8), PhotometricInterpretation="MONOCHROME1"),
        255 - np.array(curve)[stored],
    )


def test_radiographs_say_how_large_a_pixel_is(tmp_path: Path) -> None:
    item = radiograph(noise(4, 5, low=0, high=100))
    del item.PixelSpacing
    item.ImagerPixelSpacing = [0.2, 0.2]
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with open_source(tmp_path / "a.dcm") as source:
        assert source.spacing is not None
        assert (source.spacing.um, source.spacing.provenance) == ((200, 200), "dicom.ImagerPixelSpacing")
    del item.ImagerPixelSpacing
    item.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with open_source(tmp_path / "a.dcm") as source:
        assert source.spacing is None
        assert source.spacing_error.startswith("WSI201 a.dcm: no pixel size found (looked at PixelSpacing,")


def test_real_radiographs(data: Path) -> None:
    folder = data / "data" / "radiology" / "cxr"
    items = {i.name: i.path for i in expand_inputs([folder]).items}
    assert len(items) == 4
    bright, dark = (next(p for n, p in items.items() if n.startswith(s)) for s in ("1.2.276", "Fake"))
    with open_source(bright) as one, open_source(dark) as other:
        itk = sitk.GetArrayFromImage(sitk.ReadImage(str(bright)))[0]
        # two JPEG decoders may differ by a grey value
        assert np.abs(whole(one)[..., 0].astype(int) - itk.astype(int)).max() <= 1
        np.testing.assert_array_equal(whole(other), 255 - whole(one))
        assert one.spacing is not None
        assert one.spacing.um == (168, 168)


def test_a_real_series(data: Path) -> None:
    """The chest CT of the wheel pyluna-radiology 0.1.2, where it has been unpacked."""
    folders = sorted((data / "data" / "radiology").glob("**/SCANS/3/DICOM"))
    if not folders:
        pytest.skip("needs the chest CT of pyluna-radiology 0.1.2 below data/radiology")
    with open_source(folders[0]) as source:
        np.testing.assert_array_equal(whole(source), sitk.GetArrayFromImage(as_itk(folders[0])))


def test_pydicom_reads_what_we_write_in_tests(tmp_path: Path) -> None:
    """Guard the generator itself: pydicom's own arithmetic agrees with the volume."""
    stored = volume(2)
    save_series(tmp_path, stored, oblique())
    found = sorted(os.listdir(tmp_path))
    values = [pydicom.dcmread(tmp_path / f).pixel_array.astype(int) - 1024 for f in found]
    assert {v.sum() for v in values} == {int(s.astype(int).sum()) for s in stored}
