"""Volumes that lie otherwise than a model was trained on; linear interpolation; tiles that nobody wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import zoom
from volume_data import noise
from volume_models import Net, Whole, spec_of

import wsitk
from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.sources.array import ArraySource
from wsitk.sources.nifti import NiftiSource
from wsitk.sources.view import ViewRules
from wsitk.sources.volume_grid import VolumeGrid, view_of
from wsitk.volumes.nnunet_rules import IntensityRule


def saved(path: Path, volume: np.ndarray, codes: str) -> Path:
    """Save a volume (x, y, z) in RAS, stored in another orientation."""
    image = nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 1.0, 1.0]))
    ras = nibabel.orientations.axcodes2ornt("RAS")
    turn = nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), path)
    return path


@pytest.mark.parametrize("codes", ["LAS", "RPS", "LPI"])
def test_labels_are_the_same_however_the_volume_is_stored(codes: str, tmp_path: Path) -> None:
    volume = noise(64, 32, 32).astype(np.int16)
    spec = spec_of(orientation="RAS", interpolation="linear", normalise=(IntensityRule("zscore"),))
    found = []
    for stored in ("RAS", codes):
        path = saved(tmp_path / f"{stored}.nii.gz", volume, stored)
        result = wsitk.run(
            Whole(Net(5), spec), path, out=tmp_path / stored, threads=1, workers=1, preview=False
        )
        labels = nibabel.load(result.path / "labels.nii.gz")
        assert nibabel.aff2axcodes(labels.affine) == tuple(stored), "labels lie as the input does"
        found.append(np.asarray(nibabel.as_closest_canonical(labels).dataobj))
    assert len(np.unique(found[0])) > 2
    # moments are summed in another order, which may turn a tie
    assert (found[0] != found[1]).mean() < 1e-3
    unturned = replace(spec, orientation="")
    result = wsitk.run(
        Whole(Net(5), unturned), path, out=tmp_path / "as it is", threads=1, workers=1, preview=False
    )
    other = np.asarray(nibabel.as_closest_canonical(nibabel.load(result.path / "labels.nii.gz")).dataobj)
    assert (other != found[0]).mean() > 0.05, "the network is no friend of mirrors, or this proves nothing"


def test_axes_in_another_order_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "sagittal.nii.gz", noise(16, 16, 16).astype(np.int16), "ASR")
    with NiftiSource(str(path)) as source, pytest.raises(SourceError, match=r"WSI135 .*not axial.*RAS"):
        view_of(source, ViewRules(None, orientation="RAS"))


def test_linear_is_scipys_linear() -> None:
    volume = noise(9, 14, 12).astype(np.float32)
    with ArraySource(volume, axes=("z", "y", "x"), spacing=(3000.0, 1000.0, 1000.0)) as source:
        view = view_of(source, ViewRules((1500.0, 2000.0, 1000.0), way="linear"))
        grid = VolumeGrid(source, view)
        got = grid.read(Region((0, 0, 0), grid.shape)).pixels[..., 0]
    wanted = zoom(volume, (2, 0.5, 1), order=1, mode="nearest", grid_mode=True)
    assert got.shape == (18, 7, 12)
    np.testing.assert_allclose(got, wanted, atol=1e-3)


class Choosy(Whole):
    """Wants the tiles in the left half only."""

    def wants(self, tile: Tile) -> bool:
        return tile.read.start[2] < 32


def test_a_tile_that_is_not_wanted_is_neither_read_nor_run(tmp_path: Path) -> None:
    field = replace(spec_of().fields[0], kind="field", reduction="mean", window="ramp", activation="")
    spec = spec_of(step=0.0, tile=(16, 16, 32), fields=(field,))
    with ArraySource(noise(16, 16, 64).astype(np.float32), axes=("z", "y", "x")) as source:
        result = wsitk.run(Choosy(Net(5), spec), source, out=tmp_path, threads=1, workers=1)
    maps = np.asarray(result.maps)
    assert maps[..., :32].any()
    assert not maps[..., 32:].any()
