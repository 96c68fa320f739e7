"""NIfTI and NRRD: voxels and places as SimpleITK and nibabel have them, and what is refused."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as its manual calls it)
from hypothesis import given
from hypothesis import strategies as st
from volume_data import noise, oblique, patch, save_nifti, turn, whole

from wsitk.errors import SourceError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.sources import open_source, raw_volume
from wsitk.sources.discover import companions, expand_inputs
from wsitk.sources.nifti import NiftiSource
from wsitk.sources.nrrd import NrrdSource


def check_place(frame: Frame, path: Path, shape: tuple[int, ...], tolerance: float = 1e-4) -> None:
    """Compare corners and a middle with where ITK puts them (LPS millimetres)."""
    image = sitk.ReadImage(str(path))
    for index in [(0, 0, 0), tuple(n - 1 for n in shape), (shape[0] // 2, 0, shape[2] // 3)]:
        want = image.TransformIndexToPhysicalPoint([int(k) for k in reversed(index)])
        np.testing.assert_allclose(frame.to_world(index), want, atol=tolerance)


# --- frames


angles = st.floats(-180, 180)
sizes = st.floats(0.01, 20)


@given(angles, angles, angles, sizes, sizes, sizes, st.booleans())
def test_frames_round_trip(a: float, b: float, c: float, u: float, v: float, w: float, flip: bool) -> None:
    directions = turn(a, b, c)
    directions[:, 0] *= -1 if flip else 1
    frame = Frame.from_axes((1.5, -2.25, 300.125), directions, (u, v, w))
    assert Frame.from_nifti_affine(frame.to_nifti_affine()) == frame  # bit for bit: signs and places only
    assert frame.is_rectangular
    np.testing.assert_allclose(frame.spacing_mm, (u, v, w), rtol=1e-12)
    indices = np.array([[0, 0, 0], [3, 1, 4], [-2.5, 0.5, 9]])
    np.testing.assert_allclose(frame.to_index(frame.to_world(indices)), indices, atol=1e-6)
    np.testing.assert_allclose(frame.cropped((2, 3, 4)).to_world((0, 0, 0)), frame.to_world((2, 3, 4)))
    # edges of a coarser grid are edges of this one
    coarse = frame.scaled((2, 3, 1.5))
    np.testing.assert_allclose(
        coarse.to_world((-0.5, -0.5, -0.5)), frame.to_world((-0.5, -0.5, -0.5)), atol=1e-9
    )
    np.testing.assert_allclose(coarse.to_world((1.5, 0.5, 1.5)), frame.to_world((3.5, 2.5, 2.5)), atol=1e-9)
    again = frame.index_map(coarse) @ np.array([3.5, 2.5, 2.5, 1])
    np.testing.assert_allclose(again, [1.5, 0.5, 1.5, 1], atol=1e-6)


def test_a_frame_must_be_one() -> None:
    for bad in (np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3), np.diag([1, 1, 1, 2])):
        with pytest.raises(ValueError, match=r"matrix|row|axes"):
            Frame.from_matrix(bad)
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    frame = Frame.from_matrix(sheared)
    assert not frame.is_rectangular
    with pytest.raises(ValueError, match="sheared"):
        frame.to_dicom()


# --- NIfTI


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", "<i4", "<f4", ">f4", "<f8", "<u4", "<i8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_types(tmp_path: Path, dtype: str, suffix: str) -> None:
    volume = noise(7, 9, 11, low=0, high=120).astype(dtype)
    path = tmp_path / f"a{suffix}"
    image = nibabel.Nifti1Image(volume.T, oblique().to_nifti_affine(), dtype=np.dtype(dtype))
    if dtype.startswith(">"):
        header = nibabel.Nifti1Header(endianness=">")
        header.set_data_dtype(np.dtype(dtype))
        image = nibabel.Nifti1Image(volume.T, oblique().to_nifti_affine(), header)
    nibabel.save(image, path)
    with open_source(path) as source:
        assert isinstance(source, NiftiSource)
        assert source.axes == ("z", "y", "x")
        assert source.dtype == (np.float32 if "f" in dtype else np.dtype(dtype).newbyteorder("="))
        np.testing.assert_array_equal(whole(source), volume.astype(source.dtype))
        part = Region((2, 3, 4), (4, 1, 6))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, volume[part.slices()])
        assert source.frame is not None
        check_place(source.frame, path, source.shape)
        np.testing.assert_allclose(source.spacing.um, (5000, 800, 700), rtol=1e-6)
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(whole(copy), whole(source))
        assert copy.identity() == source.identity()
        copy.close()
    with pytest.raises(SourceError, match="WSI112"):
        whole(source)


def test_nifti_2_and_empty_regions(tmp_path: Path) -> None:
    volume = noise(4, 5, 6)
    nibabel.save(nibabel.Nifti2Image(volume.T, np.diag([2, 3, 4, 1.0])), tmp_path / "a.nii")
    with open_source(tmp_path / "a.nii") as source:
        np.testing.assert_array_equal(whole(source), volume)
        assert source.spacing.um == (4000, 3000, 2000)
        assert source.read_inside(Region((1, 1, 1), (0, 2, 2)), 0).pixels.shape == (0, 2, 2)


def test_nifti_slope_and_intercept(tmp_path: Path) -> None:
    volume = noise(4, 5, 6)
    path = save_nifti(tmp_path / "a.nii", volume)
    for slope, intercept in [(0.5, -3.25), (1.0, -1024.0), (2.5e-3, 0.0)]:
        patch(path, 112, struct.pack("<ff", slope, intercept))
        with open_source(path) as source:
            assert source.dtype == np.float32
            want = nibabel.load(path).get_fdata(dtype=np.float64).T.astype(np.float32)
            np.testing.assert_array_equal(whole(source), want)
    for nothing in ((0.0, 7.0), (np.nan, 0.0), (1.0, 0.0)):
        patch(path, 112, struct.pack("<ff", *nothing))
        with open_source(path) as source:
            assert source.dtype == np.int16
            np.testing.assert_array_equal(whole(source), volume)
    patch(path, 112, struct.pack("<ff", 2.0, np.inf))
    with pytest.raises(SourceError, match="WSI115"):
        open_source(path)


@pytest.mark.parametrize("extra", [(3,), (1, 3)], ids=["series", "vectors"])
def test_nifti_of_several_volumes(tmp_path: Path, extra: tuple[int, ...]) -> None:
    volume = noise(4, 5, 6, 3)
    data = np.ascontiguousarray(volume.transpose(2, 1, 0, 3)).reshape(6, 5, 4, *extra)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    with open_source(tmp_path / "a.nii.gz") as source:
        assert source.axes == ("z", "y", "x", "c")
        assert len(source.channel_names) == 3
        np.testing.assert_array_equal(whole(source), volume)
        part = Region((1, 2, 3), (2, 2, 2))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, volume[part.slices()])
        assert source.as_dask(level=0).shape == (4, 5, 6, 3)


def test_nifti_places(tmp_path: Path) -> None:
    volume = noise(4, 5, 6)
    good, other = oblique((4, 2, 1)), oblique((4, 2, 1)).cropped((1, 0, 0))
    header = nibabel.Nifti1Image(volume.T, None).header

    def saved(sform: Frame | None, qform: Frame | None) -> Any:
        image = nibabel.Nifti1Image(volume.T, None, header)
        image.set_sform(sform.to_nifti_affine() if sform else None, code=2 if sform else 0)
        image.set_qform(qform.to_nifti_affine() if qform else None, code=1 if qform else 0)
        image.header["pixdim"][1:4] = (1, 2, 4)
        nibabel.save(image, tmp_path / "a.nii")
        codes = struct.pack("<hh", 1 if qform else 0, 2 if sform else 0)  # nibabel sets what it likes
        patch(tmp_path / "a.nii", 80, struct.pack("<3f", 1, 2, 4))
        return open_source(patch(tmp_path / "a.nii", 252, codes))

    with saved(good, good) as source:
        assert (source.spacing.provenance, source.warnings) == ("nifti.sform", ())
        np.testing.assert_allclose(source.frame.matrix, good.matrix, rtol=1e-6, atol=1e-5)
    with saved(None, good) as source:
        assert source.spacing.provenance == "nifti.qform"
        np.testing.assert_allclose(source.frame.matrix, good.matrix, rtol=1e-5, atol=1e-5)
        check_place(source.frame, tmp_path / "a.nii", source.shape)
    with saved(good, other) as source:  # both stated, 4 mm apart
        assert source.spacing.provenance == "nifti.sform"
        assert [w[:6] for w in source.warnings] == ["WSI117"]
        np.testing.assert_allclose(source.frame.matrix, good.matrix, rtol=1e-6, atol=1e-5)
    with saved(None, None) as source:
        assert source.spacing.provenance == "nifti.pixdim"
        assert source.spacing.um == (4000, 2000, 1000)


def test_nifti_units(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", noise(3, 4, 5), Frame.from_matrix(np.diag([50, 40, 30, 1.0])))
    for unit, factor in ((0, 1), (1, 1000), (2, 1), (3, 1e-3)):
        patch(path, 123, bytes([unit]))
        with open_source(path) as source:
            if unit < 3:  # 50 mm, or metres: no volume has such voxels
                assert source.spacing is None
                assert source.spacing_error.startswith("WSI202")
            np.testing.assert_allclose(source.frame.spacing_mm, np.multiply((50, 40, 30), factor))


@pytest.mark.parametrize(
    ("offset", "data", "code"),
    [
        (40, struct.pack("<8h", 3, 3000, 3000, 3000, 1, 1, 1, 1), "WSI102"),  # more than there is
        (40, struct.pack("<8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1), "WSI140"),
        (40, struct.pack("<8h", 3, -5, 5, 5, 1, 1, 1, 1), "WSI115"),
        (40, struct.pack("<8h", 2, 6, 5, 1, 1, 1, 1, 1), "WSI118"),
        (40, struct.pack("<8h", 5, 2, 2, 2, 2, 2, 1, 1), "WSI118"),
        (70, struct.pack("<h", 128), "WSI118"),  # RGB
        (70, struct.pack("<h", 32), "WSI118"),  # complex
        (70, struct.pack("<h", 9999), "WSI115"),
        (108, struct.pack("<f", 1e9), "WSI102"),  # voxels start behind the end
        (108, struct.pack("<f", -4.0), "WSI115"),
        (108, struct.pack("<f", np.nan), "WSI115"),
        (280, struct.pack("<4f", 0, 0, 0, 0), "WSI115"),  # a singular sform
        (280, struct.pack("<4f", np.nan, 0, 0, 0), "WSI115"),
        (344, b"ni1\0", "WSI118"),
        (344, b"xxx\0", "WSI101"),
        (123, b"\x07", "WSI115"),
    ],
)
def test_nifti_headers_that_lie(tmp_path: Path, offset: int, data: bytes, code: str) -> None:
    path = patch(save_nifti(tmp_path / "a.nii", noise(4, 5, 6)), offset, data)
    with pytest.raises(SourceError, match=f"^{code} a.nii: ") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(SourceError, match=f"^{code} "):
        open_source(packed)


def test_compressed_volumes_that_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", noise(20, 30, 40))
    data = path.read_bytes()
    for end in (3, 200, len(data) // 2, len(data) - 6):
        path.write_bytes(data[:end])
        with pytest.raises(SourceError, match=r"^WSI1(01|02) "):
            open_source(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(SourceError, match=r"^WSI1(02|16) "):
        open_source(path)
    # more behind the voxels than the header says
    monkeypatch.setattr(raw_volume, "_SLACK_BYTES", 4096)
    path.write_bytes(gzip.compress(gzip.decompress(data) + bytes(1 << 20)))
    with pytest.raises(SourceError, match=r"^WSI115 "):
        open_source(path)
    # and a claim that this stream cannot hold is refused before unpacking
    path.write_bytes(
        gzip.compress(
            patch_bytes(gzip.decompress(data)[:400], 40, struct.pack("<8h", 3, *[8000] * 3, *[1] * 4))
        )
    )
    monkeypatch.setattr(raw_volume, "_inflate_into", None)
    with pytest.raises(SourceError, match=r"^WSI102 .* cannot hold"):
        open_source(path)


def patch_bytes(content: bytes, offset: int, data: bytes) -> bytes:
    return content[:offset] + data + content[offset + len(data) :]


def test_large_volumes_unpack_into_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = noise(20, 30, 40)
    path = save_nifti(tmp_path / "a.nii.gz", volume)
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    monkeypatch.setattr(raw_volume, "KEPT_BYTES", 100)
    with open_source(path) as source:
        assert os.listdir(room) == []
        assert source._voxels._descriptor is not None
        np.testing.assert_array_equal(whole(source), volume)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Room)
    with pytest.raises(SourceError, match=r"^WSI119 .*TMPDIR"):
        open_source(path)
    monkeypatch.setattr(raw_volume, "_MAX_UNPACKED", 100)
    with pytest.raises(SourceError, match=r"^WSI141 "):
        open_source(path)


class Room:
    free = 0


def test_a_file_that_shrinks_is_unreadable(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", noise(20, 30, 40))
    with open_source(path) as source:
        os.truncate(path, 2000)
        with pytest.raises(SourceError, match=r"^WSI111 "):
            whole(source)


# --- NRRD


def nrrd_header(frame: Frame, **more: Any) -> dict[str, Any]:
    matrix = frame.matrix
    return {
        "space": "left-posterior-superior",
        "space directions": matrix[:3, 2::-1].T,
        "space origin": matrix[:3, 3],
        "kinds": ["domain"] * 3,
        **more,
    }


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_nrrd_types(tmp_path: Path, encoding: str, dtype: str) -> None:
    volume = noise(5, 6, 7, low=0, high=200).astype(dtype)
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), volume.T, nrrd_header(oblique(), encoding=encoding))
    with open_source(path) as source:
        assert isinstance(source, NrrdSource)
        np.testing.assert_array_equal(whole(source), volume.astype(source.dtype))
        assert source.frame is not None
        check_place(source.frame, path, source.shape)
        np.testing.assert_allclose(source.spacing.um, (5000, 800, 700))
        part = Region((1, 2, 3), (2, 3, 4))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, volume[part.slices()])
        with pickle.loads(pickle.dumps(source)) as copy:
            np.testing.assert_array_equal(whole(copy), whole(source))


@pytest.mark.parametrize("space", ["right-anterior-superior", "left-anterior-superior", "RAS"])
def test_nrrd_spaces(tmp_path: Path, space: str) -> None:
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), noise(5, 6, 7).T, nrrd_header(oblique(), space=space))
    with open_source(path) as source:
        assert source.frame is not None
        check_place(source.frame, path, source.shape)


@pytest.mark.parametrize("last", [True, False], ids=["planar", "interleaved"])
def test_nrrd_channels(tmp_path: Path, last: bool) -> None:
    volume = noise(5, 6, 7, 3)
    vectors = oblique().matrix[:3, 2::-1].T
    none = np.full((1, 3), np.nan)
    stored = volume.transpose(2, 1, 0, 3) if last else volume.transpose(3, 2, 1, 0)
    rows = np.concatenate([vectors, none] if last else [none, vectors])
    kinds = ["domain"] * 3
    kinds.insert(3 if last else 0, "list" if last else "vector")
    nrrd.write(
        str(tmp_path / "a.nrrd"), stored, {**nrrd_header(oblique()), "space directions": rows, "kinds": kinds}
    )
    with open_source(tmp_path / "a.nrrd") as source:
        assert source.axes == ("z", "y", "x", "c")
        np.testing.assert_array_equal(whole(source), volume)
        part = Region((1, 2, 3), (2, 3, 4))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, volume[part.slices()])


def test_detached_nrrd_stays_in_its_folder(tmp_path: Path) -> None:
    volume = noise(5, 6, 7)
    home = tmp_path / "home"
    home.mkdir()
    nrrd.write(str(home / "a.nhdr"), volume.T, nrrd_header(oblique(), encoding="raw"))
    assert {p.name for p in home.iterdir()} == {"a.nhdr", "a.raw"}
    with open_source(home / "a.nhdr") as source:
        np.testing.assert_array_equal(whole(source), volume)
        assert source.identity()["files"] == 2
    assert [p.name for p in companions(home / "a.nhdr")] == ["a.nhdr", "a.raw"]
    assert [i.name for i in expand_inputs([home]).items] == ["a.nhdr"]

    text = (home / "a.nhdr").read_text()
    (tmp_path / "secret.raw").write_bytes((home / "a.raw").read_bytes())
    (home / "link.raw").symlink_to(tmp_path / "secret.raw")
    for evil in ("../secret.raw", str(tmp_path / "secret.raw"), "link.raw", "x/../a.raw", "..", "C:\\a.raw"):
        (home / "evil.nhdr").write_text(text.replace("a.raw", evil))
        with pytest.raises(SourceError, match=r"^WSI121 "):
            open_source(home / "evil.nhdr")
        assert companions(home / "evil.nhdr") == [home / "evil.nhdr"]
    for several in ("LIST", "a%03d.raw 1 5 1"):
        (home / "evil.nhdr").write_text(text.replace("a.raw", several))
        with pytest.raises(SourceError, match=r"^WSI118 "):
            open_source(home / "evil.nhdr")
    (home / "a.raw").unlink()
    with pytest.raises(SourceError, match=r"^WSI100 "):
        open_source(home / "a.nhdr")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("sizes: 7 6 5", "sizes: 70 60 50", "WSI102"),
        ("sizes: 7 6 5", "sizes: 70000 60000 50000", "WSI140"),
        ("sizes: 7 6 5", "sizes: -7 6 5", "WSI101"),
        ("sizes: 7 6 5", "sizes: 7 6", "WSI115"),
        ("type: int16", "type: block", "WSI118"),
        ("encoding: raw", "encoding: ascii", "WSI118"),
        ("encoding: raw", "encoding: raw\nbyte skip: -2", "WSI118"),
        ("endian: little", "content: x", "WSI115"),
        ("space: left-posterior-superior", "space: scanner-xyz-time", "WSI118"),
        ("dimension: 3", "content: y", "WSI115"),
        ("(", "(nan*", "WSI115"),
    ],
)
def test_nrrd_headers_that_lie(tmp_path: Path, old: str, new: str, code: str) -> None:
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), noise(5, 6, 7).T, nrrd_header(oblique(), encoding="raw"))
    head, _, data = path.read_bytes().partition(b"\n\n")
    text = head.decode().replace("type: short", "type: int16")
    assert old in text
    path.write_bytes(text.replace(old, new).encode() + b"\n\n" + data)
    with pytest.raises(SourceError, match=f"^{code} a.nrrd: ") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_nrrd_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"NRRD0004\n" + b"# x\n" * (1 << 19))
    with pytest.raises(SourceError, match=r"^WSI115 "):
        open_source(path)
    path.write_bytes(b"NRRD0004\n# nothing\n\n")
    with pytest.raises(SourceError, match=r"^WSI115 .*lacks"):
        open_source(path)


# --- found in folders, and real


def test_volumes_are_found(tmp_path: Path) -> None:
    save_nifti(tmp_path / "b.nii.gz", noise(2, 3, 4))
    save_nifti(tmp_path / "a.NII", noise(2, 3, 4))
    (tmp_path / "notes.gz").write_bytes(gzip.compress(b"x"))
    found = expand_inputs([tmp_path])
    assert [i.name for i in found.items] == ["a.NII", "b.nii.gz"]
    assert dict(found.skipped) == {"not a slide or image (.gz)": 1}
    with pytest.raises(SourceError, match=r"WSI101 notes\.gz: no reader takes it: not a TIFF;.*not a NIfTI"):
        open_source(tmp_path / "notes.gz")


@pytest.mark.parametrize(
    "name",
    ["totalseg/example_ct.nii.gz", "totalseg/example_mr_sm.nii.gz", "totalseg/example_seg.nii.gz",
     "pyradiomics/brain1_image.nrrd", "pyradiomics/breast1_label.nrrd"],
)  # fmt: skip
def test_real_volumes(data: Path, name: str) -> None:
    path = data / "data" / "radiology" / name
    with open_source(path) as source:
        np.testing.assert_array_equal(whole(source), sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        assert source.frame is not None
        assert source.spacing is not None
        check_place(source.frame, path, source.shape)
