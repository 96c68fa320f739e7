"""Volumes as channels of one, and the box of the foreground, against slow references."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  (as its manual calls it)
from scipy import ndimage
from volume_data import noise, save_nifti, turn, whole

from wsitk.errors import SourceError, UsageError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.sources import foreground as module
from wsitk.sources import open_source
from wsitk.sources.channels import ChannelSource
from wsitk.sources.foreground import foreground

CT = Frame.from_axes((-30, 10, 5), turn(10, 5, -8)[:, ::-1], (3.0, 1.0, 0.9))
PET = Frame.from_axes((-33, 8, 0), turn(8, 0, -10)[:, ::-1], (4.0, 2.2, 2.4))


def saved(tmp_path: Path) -> tuple[Path, Path]:
    ct = save_nifti(tmp_path / "ct.nii.gz", noise(12, 30, 28), CT)
    pet = save_nifti(tmp_path / "pet.nii.gz", noise(10, 14, 13, low=0).astype(np.float32), PET)
    return ct, pet


def test_channels_are_interpolated_on_the_first_grid(tmp_path: Path) -> None:
    ct, pet = saved(tmp_path)
    with open_source(ct, also=[pet]) as source:
        assert isinstance(source, ChannelSource)
        assert (source.axes, source.channel_names) == (("z", "y", "x", "c"), ("ct", "pet"))
        assert source.dtype == np.float32
        got = whole(source)
        itk = [sitk.ReadImage(str(p)) for p in (ct, pet)]
        np.testing.assert_array_equal(got[..., 0], sitk.GetArrayFromImage(itk[0]))
        want = sitk.GetArrayFromImage(sitk.Resample(itk[1], itk[0], sitk.Transform(), sitk.sitkLinear, 0.0))
        differs = np.abs(got[..., 1] - want) > 0.05
        # ITK's border is of the same width; a voxel on its very edge may fall to either side
        assert differs.mean() < 2e-3
        part = Region((3, 4, 5), (7, 20, 9))
        np.testing.assert_array_equal(source.read_inside(part, 0).pixels, got[part.slices()])
        with pickle.loads(pickle.dumps(source)) as copy:
            np.testing.assert_array_equal(whole(copy), got)
            assert copy.identity() == source.identity()
        assert source.read(Region((-1, 0, 0), (2, 2, 2)), fill=0).shape == (2, 2, 2, 2)


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ct, pet = saved(tmp_path)
    with open_source(ct, also=[pet]) as source:
        one = whole(source)
        monkeypatch.setattr("wsitk.sources.channels._BLOCK", 5)
        np.testing.assert_allclose(whole(source), one, rtol=1e-6, atol=1e-3)


def test_equal_grids_keep_their_type(tmp_path: Path) -> None:
    one = save_nifti(tmp_path / "t1.nii", noise(4, 5, 6), CT)
    two = save_nifti(tmp_path / "t2.nii", noise(4, 5, 6, 2, seed=1), CT)
    with open_source(one, also=[two]) as source:
        assert source.dtype == np.int16
        assert source.channel_names == ("t1", "t2 channel 0", "t2 channel 1")
        np.testing.assert_array_equal(whole(source)[..., 0], noise(4, 5, 6))
        np.testing.assert_array_equal(whole(source)[..., 1:], noise(4, 5, 6, 2, seed=1))


def test_what_cannot_be_channels(tmp_path: Path) -> None:
    ct, _ = saved(tmp_path)
    away = save_nifti(tmp_path / "away.nii", noise(4, 5, 6), CT.cropped((0, 0, 500)))
    with pytest.raises(SourceError, match=r"^WSI145 .*away.nii lies wholly outside"):
        open_source(ct, also=[away])
    from PIL import Image

    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match=r"^WSI144 "):
        open_source(ct, also=[tmp_path / "a.png"])
    with pytest.raises(UsageError, match="WSI020"):
        open_source(np.zeros((3, 3, 9)), also=[ct])


def naive(volume: Any) -> Region:
    """Return nnU-Net's box: filled first, then bounded."""
    mask = (volume != 0) if volume.ndim == 3 else (volume != 0).any(axis=-1)
    places = np.argwhere(ndimage.binary_fill_holes(mask))
    return Region.between(places.min(axis=0).tolist(), (places.max(axis=0) + 1).tolist())


@pytest.mark.parametrize("channels", [0, 2])
def test_the_box_of_what_is_not_zero(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_BYTES", 4000)
    rng = np.random.default_rng(1)
    for _ in range(10):
        volume = np.zeros((20, 18, 16, channels) if channels else (20, 18, 16), np.int16)
        for place in rng.integers(2, 14, (3, 3)):
            volume[tuple(slice(p, p + 3) for p in place)] = 5
        volume[8:12, 8:12, 8:12] = 0
        axes = "zyxc" if channels else "zyx"
        with open_source(volume, axes=axes, mpp=1000) as source:
            assert foreground(source) == naive(volume)
    with open_source(np.zeros((5, 6, 7)), axes="zyx") as source:
        assert foreground(source) == Region((0, 0, 0), (5, 6, 7))
    with open_source(np.zeros((5, 6)), axes="yx") as flat, pytest.raises(UsageError, match="WSI020"):
        foreground(flat)


def test_the_body_without_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_BYTES", 200_000)
    volume = np.full((40, 120, 130), -1000, np.int16)
    z, y, x = np.ogrid[:40, :120, :130]
    volume[((y - 60) / 30.0) ** 2 + ((x - 64) / 40.0) ** 2 + 0 * z < 1] = 40
    volume[:, 50:70, 60:70] = -900  # lung
    volume[:, 110:113, :] = 100  # the table, 3 mm thick
    with open_source(volume, axes="zyx", mpp=1000) as source:
        box = foreground(source, "body")
        assert (box.start[0], box.stop[0]) == (0, 40)
        for axis, (low, high) in ((1, (30, 90)), (2, (24, 104))):
            assert low - 9 <= box.start[axis] <= low + 1
            assert high - 1 <= box.stop[axis] <= high + 9


def test_a_real_body(data: Path) -> None:
    with open_source(data / "data/radiology/totalseg/example_ct.nii.gz") as source:
        box = foreground(source, "body")
        assert Region((0, 0, 0), source.shape).contains(box)
    with open_source(data / "data/radiology/totalseg/example_seg_fast_force_split.nii.gz") as labels:
        assert box.contains(foreground(labels))
