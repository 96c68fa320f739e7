"""What a run over a volume leaves: labels that lie on their input to the voxel, in every format, for every reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  (as its manual calls it)
from dicom_check import complaints
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from volume_data import oblique, save_nifti, save_series
from volume_models import Bright

import wsitk
from wsitk.frame import Frame
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.result import Result
from wsitk.settings import Settings
from wsitk.verify import verify

PLAIN: dict[str, Any] = {"threads": 1, "workers": 2, "preview": False, "device": "cpu"}
SHAPE = (20, 34, 40)


def blobs(seed: int = 0) -> NDArray[np.int16]:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    return np.clip(noise * 8000, -1000, 3000).astype(np.int16)


def bright(volume: NDArray[Any]) -> NDArray[np.uint8]:
    return ((volume > 0).astype(np.uint8) + (volume > 1000)).astype(np.uint8)


def run(model: Any, source: Any, out: Path) -> Result:
    return wsitk.run(model, source, out=out, **PLAIN)


def itk(path: Path) -> Any:
    """Return an image, or a folder of slices, as ITK sees it."""
    if path.is_file():
        return sitk.ReadImage(str(path))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
    return reader.Execute()


def save_nrrd(path: Path, volume: NDArray[Any], frame: Frame) -> Path:
    matrix = frame.matrix
    header = {
        "space": "left-posterior-superior",
        "space directions": matrix[:3, 2::-1].T,
        "space origin": matrix[:3, 3],
        "encoding": "gzip",
    }
    nrrd.write(str(path), volume.T, header)
    return path


# --- overlay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flip"), [("nifti", False), ("nifti", True), ("nrrd", True), ("dicom", False)]
)
def test_labels_overlay_an_oblique_anisotropic_input_to_the_voxel(
    kind: str, flip: bool, tmp_path: Path
) -> None:
    frame, volume = oblique(flip=flip), blobs()
    save = {"nifti": save_nifti, "nrrd": save_nrrd, "dicom": save_series}[kind]
    path = save(tmp_path / {"nifti": "a.nii.gz", "nrrd": "a.nrrd", "dicom": "a"}[kind], volume, frame)
    result = run(Bright(), path, tmp_path / "out")
    image, labels = itk(path), itk(result.path / "labels.nii.gz")
    # as ITK judges whether two images may be laid over each other, and tighter
    assert labels.GetSize() == image.GetSize()
    for one, other in ((labels.GetOrigin(), image.GetOrigin()), (labels.GetSpacing(), image.GetSpacing())):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(labels.GetDirection(), image.GetDirection(), atol=1e-5)
    for index in ((0, 0, 0), (39, 33, 19), (7, 30, 2)):
        point = image.TransformIndexToPhysicalPoint(index)
        assert labels.TransformPhysicalPointToIndex(point) == index
    wanted = bright(sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(labels), wanted)
    # as nibabel sees it: in millimetres of RAS
    file = nibabel.load(result.path / "labels.nii.gz")
    np.testing.assert_allclose(file.affine, frame.to_nifti_affine(), rtol=1e-6, atol=1e-4)
    if kind == "nifti":
        np.testing.assert_array_equal(file.affine, nibabel.load(path).affine)
    np.testing.assert_array_equal(np.asarray(file.dataobj).T, wanted)
    # and as we do
    np.testing.assert_array_equal(result.labels.compute(), wanted)
    assert result.label_names == {1: "bright", 2: "glaring"}
    with wsitk.open_source(path) as source:
        assert bright(source.read(source.bounds)).tobytes() == wanted.tobytes()


# --- DICOM SEG of a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_series(tmp_path_factory.mktemp("series") / "ct", blobs(), oblique())


def supervised(model: str, source: Path, out: Path) -> Result:
    """Run a model by name, everything in processes of its own, as the command line does."""
    with Runner(ModelRef(model), out, Settings(**PLAIN)) as runner:
        (row,) = runner.run([Input(source.name, str(source))])
    assert row.status == "done", row.message
    return Result(out / source.name)


def placed(path: Path, frame: Frame, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a SEG's segments as a label map on a grid, frame by frame where their positions say."""
    found = np.zeros(shape, np.uint8)
    seg = pydicom.dcmread(path)
    for plane, group in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient]
        z, y, x = np.asarray(frame.to_index(position))
        assert (round(y, 3), round(x, 3)) == (0, 0)
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[round(float(z))][plane > 0] = number
    return found


def test_a_run_over_a_dicom_series_writes_a_segmentation(series: Path, tmp_path: Path) -> None:
    result = supervised("volume_models:bright", series, tmp_path / "a")
    path = result.path / "labels.dcm"
    wanted = result.labels.compute()
    assert {*np.unique(wanted)} == {0, 1, 2}
    with wsitk.open_source(series) as source:
        assert source.frame is not None
        np.testing.assert_array_equal(placed(path, source.frame, source.shape), wanted)
    seg = highdicom.seg.segread(path)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["bright", "glaring"]
    slices = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in series.iterdir()}
    referenced = {
        i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced <= slices
    # one of the results: sealed, the same in every run, and in this process
    assert "labels.dcm" in result.provenance["outputs"]
    assert result.provenance["remark"] == ""
    assert verify(tmp_path / "a").ok
    again = run(Bright(), series, tmp_path / "b")
    assert (again.path / "labels.dcm").read_bytes() == path.read_bytes()


def test_labels_of_what_is_no_series_make_no_segmentation(tmp_path: Path) -> None:
    result = run(Bright(), save_nifti(tmp_path / "a.nii", blobs()), tmp_path / "out")
    assert not (result.path / "labels.dcm").exists()
    assert result.provenance["remark"] == ""


def test_a_series_that_allows_no_segmentation_is_done_all_the_same(tmp_path: Path) -> None:
    def anonymous(item: pydicom.Dataset, z: int) -> None:
        del item.FrameOfReferenceUID

    bare = save_series(tmp_path / "bare", blobs(), oblique(), anonymous)
    dark = save_series(tmp_path / "dark", np.full(SHAPE, -500, np.int16), oblique())
    for path, said in ((bare, "headers do not allow"), (dark, "nothing is labelled")):
        result = run(Bright(), path, tmp_path / "out")
        assert re.match(rf"no labels\.dcm: WSI531 .*{said}", result.provenance["remark"])
        assert (result.path / "labels.nii.gz").is_file()
        assert not (result.path / "labels.dcm").exists()


def test_channels_beside_a_series_leave_its_headers_alone(series: Path, tmp_path: Path) -> None:
    from wsitk.sources import open_source
    from wsitk.writers.dicom_seg import series_of

    pet = save_nifti(tmp_path / "pet.nii", blobs(1), oblique())
    with open_source(series, also=[pet]) as both:
        assert both.ref is not None
        found = series_of(both.ref)
    assert found is not None
    assert found.shape == SHAPE
    assert len(found.images) == SHAPE[0]
    assert series_of(wsitk.sources.SourceRef(str(pet))) is None


@pytest.mark.slow
def test_hippocampus_in_dicom_is_hippocampus_in_nifti(data: Path, tmp_path: Path) -> None:
    folder = data / "data" / "radiology" / "msd_hippocampus" / "images"
    source = sorted(folder.glob("*.nii.gz"))[0]
    with wsitk.open_source(source) as opened:
        pixels, frame = opened.read(opened.bounds), opened.frame
    assert frame is not None
    volume = np.round(pixels * (2000 / pixels.max()) - 1000).astype(np.int16)
    path = save_series(tmp_path / "mr", volume, frame)
    one = supervised("hippocampus", path, tmp_path / "a")
    two = run("hippocampus", save_nifti(tmp_path / "mr.nii", volume, frame), tmp_path / "b")
    # left-handed or not: a DICOM series has its own direction of z
    a, b = itk(one.path / "labels.nii.gz"), itk(two.path / "labels.nii.gz")
    back = sitk.Resample(a, b, sitk.Transform(), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(b))
    assert two.labels.compute().max() == 2
    assert complaints(one.path / "labels.dcm") == []


# --- as dciodvfy sees it ---------------------------------------------------------------------------------


def test_dciodvfy_of_a_run(series: Path, tmp_path: Path) -> None:
    result = run(Bright(), series, tmp_path)
    assert complaints(result.path / "labels.dcm") == []
