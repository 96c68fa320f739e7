"""Labels on the input's own grid: NIfTI, NGFF and DICOM SEG overlay their input to the voxel, as ITK sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  (as its manual calls it)
import zarr
from dicom_check import complaints
from volume_data import multiframe, noise, oblique, save_nifti, save_series, whole

from wsitk.errors import OutputError, SourceError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.writers.base import tree_sha256
from wsitk.writers.dicom_seg import Maker, Series, kind_for, series_of, write_dicom_seg
from wsitk.writers.labels import Code, LabelClass, write_ngff
from wsitk.writers.nifti import write_nifti

LIVER = LabelClass(1, "liver", (200, 90, 40), Code("SCT", "10200004", "Liver"))
LESION = LabelClass(7, "lesion", (250, 220, 0))
CLASSES = (LESION, LIVER)  # in any order
MAKER = Maker("test-model", "1.0", "wsitk 0.1")


def labels_of(shape: tuple[int, ...]) -> Any:
    labels = np.zeros(shape, np.uint8)
    labels[1:5, 2:9, 1:8] = 1
    labels[3:6, 4:7, 3:6] = 7
    return labels


def reader(labels: Any) -> Any:
    return lambda region: labels[region.slices()]


# --- NIfTI


@pytest.mark.parametrize("flip", [False, True], ids=["right-handed", "left-handed"])
def test_nifti_overlays_an_oblique_anisotropic_input(tmp_path: Path, flip: bool) -> None:
    frame = oblique(flip=flip)
    path = save_nifti(tmp_path / "in.nii.gz", noise(9, 12, 10), frame)
    with open_source(path) as source:
        assert source.frame is not None
        labels = labels_of(source.shape)
        write_nifti(tmp_path / "labels.nii.gz", source.shape, source.frame, CLASSES, reader(labels))
    image, mask = nibabel.load(path), nibabel.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(mask.affine, image.affine)  # to the last bit
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, labels)
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_xyzt_units()[0] == "mm"
    assert mask.header.get_intent()[0] == "label"
    np.testing.assert_allclose(mask.get_qform(), mask.get_sform(), atol=1e-3)
    one, other = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    # ITK's own test for two images that may be overlaid
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.Mask(one, other > 0)) != 0,
        (labels > 0) & (sitk.GetArrayFromImage(one) != 0),
    )
    assert other.GetSpacing() == pytest.approx(one.GetSpacing(), rel=1e-6)
    with open_source(tmp_path / "labels.nii.gz") as again:
        np.testing.assert_array_equal(whole(again), labels)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (1 << 16, np.uint32)])
def test_nifti_takes_the_smallest_type_and_the_same_bytes(tmp_path: Path, largest: int, dtype: Any) -> None:
    labels = np.zeros((7, 8, 9), np.int64)
    labels[3, 4, 5] = largest
    classes = [LabelClass(largest, "last", (1, 2, 3))]
    asked = []

    def read(region: Region) -> Any:
        asked.append(region.shape[0])
        return labels[region.slices()]

    for depth, threads in ((None, 1), (1, 3), (3, 2)):
        write_nifti(
            tmp_path / f"{depth}.nii.gz", labels.shape, oblique(), classes, read, depth=depth, threads=threads
        )
    assert asked == [7, *[1] * 7, 3, 3, 1]
    assert len({tree_sha256(tmp_path / f"{d}.nii.gz") for d in (None, 1, 3)}) == 1
    found = nibabel.load(tmp_path / "1.nii.gz")
    assert found.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(found.dataobj).T, labels)
    write_nifti(tmp_path / "plain.nii", labels.shape, oblique(), classes, read)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "plain.nii"))), labels)


def test_nifti_of_sheared_and_of_long_volumes(tmp_path: Path) -> None:
    matrix = oblique((3, 2, 1)).matrix
    matrix[0, 0] += 0.7
    write_nifti(
        tmp_path / "a.nii", (4, 5, 6), Frame.from_matrix(matrix), CLASSES, reader(np.zeros((4, 5, 6), int))
    )
    found = nibabel.load(tmp_path / "a.nii")
    assert (int(found.header["qform_code"]), int(found.header["sform_code"])) == (0, 1)
    np.testing.assert_allclose(found.affine, Frame.from_matrix(matrix).to_nifti_affine(), rtol=1e-6)
    labels = np.zeros((2, 2, 40_000), np.uint8)
    labels[1, 1, 39_999] = 7
    write_nifti(tmp_path / "b.nii.gz", labels.shape, oblique(), CLASSES, reader(labels))
    found = nibabel.load(tmp_path / "b.nii.gz")
    assert isinstance(found, nibabel.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(found.dataobj).T, labels)


def test_bad_labels_leave_nothing_behind(tmp_path: Path) -> None:
    shape = (9, 12, 10)
    for bad in (
        lambda region: np.zeros((1, 2, 3), np.uint8),
        lambda region: np.zeros(region.shape, np.float32),
        lambda region: np.full(region.shape, 8),
        lambda region: np.full(region.shape, -1),
    ):
        with pytest.raises(OutputError, match=r"^WSI513 "):
            write_nifti(tmp_path / "a.nii.gz", shape, oblique(), CLASSES, bad)
        with pytest.raises(OutputError, match=r"^WSI513 "):
            write_ngff(tmp_path / "a.ome.zarr", shape, (1, 1, 1), CLASSES, bad)
    for classes in ((), (LIVER, LIVER), (LabelClass(0, "x", (0, 0, 0)),)):
        with pytest.raises(OutputError, match=r"^WSI514 "):
            write_nifti(tmp_path / "a.nii.gz", shape, oblique(), classes, reader(labels_of(shape)))

    def fails(region: Region) -> Any:
        raise SourceError("WSI111", "gone")

    with pytest.raises(SourceError, match=r"^WSI111 "):
        write_nifti(tmp_path / "a.nii.gz", shape, oblique(), CLASSES, fails)
    assert list(tmp_path.iterdir()) == []
    write_nifti(tmp_path / "a.nii.gz", shape, oblique(), CLASSES, reader(labels_of(shape)))
    with pytest.raises(OutputError, match=r"^WSI510 "):
        write_nifti(tmp_path / "a.nii.gz", shape, oblique(), CLASSES, reader(labels_of(shape)))


# --- NGFF


def test_ngff_labels_have_names_colours_and_checksums(tmp_path: Path) -> None:
    labels = labels_of((9, 12, 10))
    path = tmp_path / "labels.ome.zarr"
    write_ngff(path, labels.shape, (5000, 800, 700), CLASSES, reader(labels), frame=oblique())
    group = zarr.open_group(str(path), mode="r")
    np.testing.assert_array_equal(group["0"][:], labels)
    ome: Any = group.attrs["ome"]
    assert ome["image-label"]["colors"] == [
        {"label-value": 1, "rgba": [200, 90, 40, 255]},
        {"label-value": 7, "rgba": [250, 220, 0, 255]},
    ]
    assert ome["image-label"]["properties"][1] == {"label-value": 7, "name": "lesion"}
    (scale, shift) = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert (scale["scale"], shift["translation"]) == ([5000, 800, 700], [0, 0, 0])
    ours: Any = group.attrs["wsitk"]
    assert Frame.from_matrix(ours["frame"]["zyx_to_lps_mm"]) == oblique()
    codecs = json.loads((path / "0" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert codecs[-1]["name"] == "crc32c"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about its own future
        from ome_zarr_models import open_ome_zarr

        open_ome_zarr(group)


# --- DICOM SEG


def seg_volume(path: Path) -> tuple[Any, Any]:
    """Return the segments of a binary SEG as (z, y, x) by position along the normal, and the dataset."""
    seg = highdicom.seg.segread(path)
    return seg.get_volume(combine_segments=True), seg


@pytest.mark.parametrize("layout", ["slices", "frames"])
def test_dicom_seg_overlays_an_oblique_series(tmp_path: Path, layout: str) -> None:
    stored, frame = noise(9, 12, 10, low=-1024, high=3000), oblique()
    folder = tmp_path / "ct"
    if layout == "slices":
        save_series(folder, stored, frame)
    else:
        folder.mkdir()
        item = multiframe(stored, frame, [4, 8, 0, 1, 7, 2, 6, 3, 5])
        item.save_as(folder / "a.dcm", enforce_file_format=True)
    labels = labels_of(stored.shape)
    path = tmp_path / "labels.dcm"
    with open_source(folder) as source:
        write_dicom_seg(path, Series.of(source), CLASSES, reader(labels), MAKER)
        write_dicom_seg(tmp_path / "again.dcm", Series.of(source), CLASSES, reader(labels), MAKER)
    assert path.read_bytes() == (tmp_path / "again.dcm").read_bytes()
    got, seg = seg_volume(path)
    # the box of the labelled slices, placed in the patient by highdicom, against our frame
    numbers = np.where(labels == 7, 2, labels)
    affine = np.asarray(got.affine)
    for index in np.argwhere(got.array):
        world = affine @ np.array([*index, 1.0])
        place = np.rint(frame.to_index(world[:3])).astype(int)
        np.testing.assert_allclose(frame.to_world(place), world[:3], atol=1e-3)
        assert numbers[tuple(place)] == got.array[tuple(index)]
    assert (got.array > 0).sum() == (numbers > 0).sum()
    one, two = seg.SegmentSequence
    assert (one.SegmentLabel, two.SegmentLabel) == ("liver", "lesion")
    assert one.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert two.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99WSITK"
    assert two.TrackingID == "label 7"
    assert seg.PatientID == "1"
    assert seg.FrameOfReferenceUID


def test_itk_sees_the_seg_where_the_series_is(tmp_path: Path) -> None:
    """Segment 1 as plain slices through SimpleITK, on the grid of the series."""
    stored, frame = noise(9, 12, 10, low=-1024, high=3000), oblique()
    save_series(tmp_path / "ct", stored, frame)
    labels = np.zeros(stored.shape, np.uint8)
    labels[:, 2:9, 1:8] = 1  # in every slice, so that ITK, which reads no gaps, sees one grid
    with open_source(tmp_path / "ct") as source:
        write_dicom_seg(tmp_path / "labels.dcm", Series.of(source), (LIVER,), reader(labels), MAKER)
    series = sitk.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image, seg = series.Execute(), pydicom.dcmread(tmp_path / "labels.dcm")
    planes = seg.pixel_array
    for plane, group in zip(planes, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient]
        x, y, z = image.TransformPhysicalPointToIndex(position)
        assert (x, y) == (0, 0)
        np.testing.assert_array_equal(plane, labels[z])


def test_dicom_seg_says_what_it_cannot(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", noise(9, 12, 10, low=-1024, high=3000), oblique())
    shape = (9, 12, 10)
    with open_source(tmp_path / "ct") as source:
        with pytest.raises(OutputError, match=r"^WSI531 .*nothing is labelled"):
            write_dicom_seg(
                tmp_path / "a.dcm", Series.of(source), CLASSES, reader(np.zeros(shape, int)), MAKER
            )
        with pytest.raises(OutputError, match=r"^WSI513 .*values \[3\] belong to no class"):
            write_dicom_seg(tmp_path / "a.dcm", Series.of(source), CLASSES, reader(np.full(shape, 3)), MAKER)

    def anonymous(item: pydicom.Dataset, z: int) -> None:
        del item.FrameOfReferenceUID
        del item.StudyInstanceUID

    save_series(tmp_path / "bare", noise(9, 12, 10, low=-1024, high=3000), oblique(), anonymous)
    with open_source(tmp_path / "bare") as source, pytest.raises(OutputError, match=r"^WSI531 "):
        write_dicom_seg(tmp_path / "a.dcm", Series.of(source), CLASSES, reader(labels_of(shape)), MAKER)
    assert not list(tmp_path.glob("*a.dcm*"))


def test_label_maps(tmp_path: Path) -> None:
    save_series(tmp_path / "ct", noise(9, 12, 10, low=-1024, high=3000), oblique())
    labels = labels_of((9, 12, 10))
    with open_source(tmp_path / "ct") as source:
        write_dicom_seg(
            tmp_path / "a.dcm", Series.of(source), CLASSES, reader(labels), MAKER, kind="labelmap"
        )
    got, _ = seg_volume(tmp_path / "a.dcm")
    assert (got.array > 0).sum() == (labels > 0).sum()


@pytest.mark.parametrize(("count", "kind"), [(32, "binary"), (33, "labelmap")])
def test_dciodvfy_has_nothing_against_either_kind(tmp_path: Path, count: int, kind: str) -> None:
    """Up to 32 classes are a bit each."""
    classes = [LabelClass(k, f"class {k}", (k, 2 * k, 200)) for k in range(1, count + 1)]
    assert kind_for(classes) == kind
    save_series(tmp_path / "ct", noise(9, 12, 10, low=-1024, high=3000), oblique())
    labels = np.arange(1080, dtype=np.uint8).reshape(9, 12, 10) % (count + 1)
    with open_source(tmp_path / "ct") as source:
        series = series_of(source)
    assert series is not None
    write_dicom_seg(tmp_path / "a.dcm", series, classes, reader(labels), MAKER, kind=kind_for(classes))
    assert complaints(tmp_path / "a.dcm", kind) == []
