"""Volumes through the one engine: the same labels as nnU-Net's rules applied to the whole volume at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from nnunet_reference import predict, resample, sliding_mean
from numpy.typing import NDArray
from radiology_fill import load_filled
from scipy.ndimage import gaussian_filter
from volume_models import MIRROR, NAMES, Chunked, Net, Whole, organs, spec_of

import wsitk
from wsitk.blocks import OpenBlock
from wsitk.errors import ModelError
from wsitk.frame import Frame
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.model import FieldSpec, TileModel
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.settings import Settings
from wsitk.sources import open_source
from wsitk.volumes.nnunet_rules import IntensityRule, Moments, nonzero_box, resampling, tile_starts

PLAIN: dict[str, Any] = {"threads": 1, "workers": 2, "preview": False}


def volume(shape: tuple[int, ...] = (37, 30, 52), seed: int = 0) -> NDArray[np.int16]:
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return (smooth * 3000).astype(np.int16)


def labels_of(path: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(str(path / "labels.ome.zarr" / "0"), mode="r")[:])


def judge(labels: NDArray[Any], scores: NDArray[Any]) -> None:
    """Fail unless labels are the argmax of scores (K, ...) but where the two largest lie within 1e-4."""
    two = np.sort(scores, axis=0)[-2:]
    clear = two[1] - two[0] > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(labels[clear], scores.argmax(0)[clear])


def run(model: TileModel, source: Any, out: Path, **settings: Any) -> Path:
    return wsitk.run(model, source, out=out, **{**PLAIN, **settings}).path


# --- windows ---------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 200), st.sampled_from([0.25, 0.3, 0.5, 0.7, 1.0]))
def test_windows_begin_where_nnunets_do(size: int, tile: int, step: float) -> None:
    grid = TileGrid.sliding(Region((0,), (size,)), (tile,), step)
    assert grid.starts == tile_starts((size,), (tile,), step)
    assert [t.owned.stop[0] for t in grid][:-1] == [t.owned.start[0] for t in grid][1:]


# --- equal to the whole volume ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Whole, Chunked])
@pytest.mark.parametrize("shape", [(37, 30, 52), (9, 40, 20), (16, 16, 32)])
def test_the_engine_equals_a_naive_sliding_window(kind: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    net, pixels = Net(5), volume(shape)
    _, scores = predict(net, pixels[None].astype(np.float32), (16, 16, 32))
    spec = spec_of(normalise=(IntensityRule("none"),))
    path = run(kind(net, spec), open_source(pixels, axes="zyx", mpp=1000.0), tmp_path)
    judge(labels_of(path), scores)


@pytest.mark.parametrize("mirror", [(), MIRROR])
def test_a_chunked_head_says_what_the_whole_says(mirror: tuple[int, ...], tmp_path: Path) -> None:
    net, pixels = Net(5), volume()
    spec = spec_of(normalise=(IntensityRule("zscore"),))
    one = labels_of(run(Whole(net, spec, mirror), pixels, tmp_path / "a"))
    two = labels_of(run(Chunked(net, spec, mirror), pixels, tmp_path / "b"))
    moments = Moments.of(pixels)
    data = IntensityRule("zscore").numbers(moments)(pixels)[None]
    _, scores = predict(net, data, (16, 16, 32), mirror=mirror)
    judge(one, scores)
    judge(two, scores)


def preprocessed(pixels: NDArray[Any], spacing: Any, target: Any) -> tuple[NDArray[np.float32], Any]:
    box = nonzero_box(pixels)
    assert box is not None
    data = pixels[box.slices()][None].astype(np.float32)
    data = resample(data, resampling(box.shape, spacing, target))
    return IntensityRule("zscore").numbers(Moments.of(data))(data), box


@pytest.mark.parametrize(
    ("spacing", "target"),
    [
        ((1.0, 0.8, 0.8), (1.5, 1.2, 1.1)),
        ((3.0, 0.9, 0.9), (1.5, 1.5, 1.5)),
        ((1.0, 1.0, 1.0), (1.2, 0.7, 0.9)),
    ],
)
def test_cropped_resampled_normalised_and_back(spacing: Any, target: Any, tmp_path: Path) -> None:
    pixels = volume((33, 40, 44))
    pixels[:4], pixels[:, :, 40:] = 0, 0
    net = Net(5)
    data, box = preprocessed(pixels, spacing, target)
    _, scores = predict(net, data, (16, 16, 32))
    back = resampling(data.shape[1:], target, spacing, order=1)
    back = replace(back, shape=box.shape, axis=resampling(box.shape, spacing, target).axis)
    wanted = resample(scores, back)
    spec = spec_of(
        spacing=tuple(1000 * t for t in target),
        interpolation="cubic",
        crop=True,
        normalise=(IntensityRule("zscore"),),
    )
    source = open_source(pixels, axes="zyx", mpp=[1000 * s for s in spacing])
    path = run(Chunked(net, spec), source, tmp_path)
    labels = labels_of(path)
    judge(labels[box.slices()], wanted)
    outside = labels.copy()
    outside[box.slices()] = 0
    assert not outside.any()


def test_a_fast_model_takes_the_nearest_label(tmp_path: Path) -> None:
    from scipy.ndimage import zoom

    pixels, net = volume((30, 34, 40)), Net(5)
    data, box = preprocessed(pixels, (1.0, 1.0, 1.0), (1.3, 1.2, 0.9))
    found, _ = predict(net, data, (16, 16, 32))
    factors = [n / m for n, m in zip(box.shape, found.shape, strict=True)]
    wanted = zoom(found, factors, order=0, mode="nearest", grid_mode=True)
    spec = spec_of(
        spacing=(1300.0, 1200.0, 900.0), interpolation="cubic", normalise=(IntensityRule("zscore"),)
    )
    spec = replace(spec, fields=(replace(spec.fields[0], restore="nearest"),))
    labels = labels_of(run(Whole(net, spec), open_source(pixels, axes="zyx", mpp=1000.0), tmp_path))
    assert (labels != wanted).mean() < 1e-3  # near ties


def test_regions_may_overlap(tmp_path: Path) -> None:
    pixels, net = volume(), Net(3)
    field = FieldSpec(
        "organs",
        ("whole", "core", "rim"),
        kind="labels",
        reduction="argmax",
        window="gaussian",
        threshold=0.0,
    )
    field = replace(field, regions=(1, 3, 2))
    spec = spec_of(fields=(field,), classes=(), normalise=(IntensityRule("zscore"),))
    labels = labels_of(run(Chunked(net, spec), pixels, tmp_path))
    data = IntensityRule("zscore").numbers(Moments.of(pixels))(pixels)[None]

    def one(tile: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(net(torch.from_numpy(tile[None]))[0].numpy())

    scores = sliding_mean(one, data, (16, 16, 32))
    wanted = np.zeros(pixels.shape, np.uint8)
    for score, label in zip(scores, (1, 3, 2), strict=True):
        wanted[score > 0] = label
    clear = (np.abs(scores) > 1e-4).all(axis=0)
    assert np.array_equal(labels[clear], wanted[clear])


# --- nnU-Net's own vectors -------------------------------------------------------------------------------


def stunet() -> torch.nn.Module:
    from wsitk.models.stunet.network import STUNet, STUNetConfig

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = STUNet(STUNetConfig(16, classes=5))
            load_filled(self.net)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)["logits"]

    return Logits()


@pytest.mark.parametrize("case", ["notta", "nogauss", "small", pytest.param("tta", marks=pytest.mark.slow)])
def test_nnunets_own_predictions_come_out(case: str, data: Path, tmp_path: Path) -> None:
    """`prob_*` are recorded probabilities, `seg_*` labels; see golden/radiology/nnunet_v1."""
    file = data / "golden" / "radiology" / "nnunet_v1" / "golden.npz"
    with np.load(file, allow_pickle=False) as golden:
        pixels, wanted = golden["vol"][0], golden[f"seg_{case}"]
    if case == "small":
        pixels = pixels[tuple(slice(0, n) for n in wanted.shape)]
    mirror = MIRROR if case == "tta" else ()
    spec = spec_of(tile=(32, 32, 64))
    if case == "nogauss":
        spec = replace(spec, fields=(replace(spec.fields[0], window="flat"),))
    labels = labels_of(run(Whole(stunet(), spec, mirror), pixels, tmp_path))
    assert (labels != wanted).mean() < 1e-4


# --- in any order, after any death, in any process -------------------------------------------------------


def tree(path: Path) -> dict[str, bytes]:
    names = ("labels.ome.zarr", "labels.nii.gz", "tiles.parquet", "provenance.json")
    files = [f for n in names for f in ([path / n] if (path / n).is_file() else (path / n).rglob("*"))]
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.is_file()}


def test_a_run_that_was_stopped_anywhere_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, net = volume((45, 20, 40)), Net(5)
    model = Chunked(net, spec_of(spacing=(1300.0, 1500.0, 900.0), interpolation="cubic"))
    source = open_source(pixels, axes="zyx", mpp=1000.0)
    whole = tree(run(model, source, tmp_path / "whole"))
    contents = OpenBlock.contents
    for stop in (1, 3):

        def dying(self: OpenBlock, stop: int = stop) -> Any:
            if self.task.block == stop:
                raise MemoryError("killed here")
            return contents(self)

        out = tmp_path / str(stop)
        monkeypatch.setattr(OpenBlock, "contents", dying)
        with pytest.raises(wsitk.errors.WorkError, match="killed here"):
            run(model, source, out)
        monkeypatch.setattr(OpenBlock, "contents", contents)
        assert tree(run(model, source, out)) == whole
    # two parts, each of which computes again what the other had
    for part in (0, 1):
        path = run(model, source, tmp_path / "parts", part=(part, 2))
    assert tree(path) == whole
    assert not list((tmp_path / "whole").rglob("*.part"))


def test_workers_change_no_byte(tmp_path: Path) -> None:
    model, pixels = Whole(Net(5), spec_of()), volume().astype(np.float32)
    one = tree(run(model, pixels, tmp_path / "1", workers=1))
    four = tree(run(model, pixels, tmp_path / "4", workers=4))
    assert one == four


class NotHere(Whole):
    """Answers with no number where the volume is 77."""

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().predict(batch)
        return {n: v * float("nan") if (batch == 77).any() else v for n, v in outputs.items()}


def test_a_tile_that_failed_owns_nothing_but_zeros(tmp_path: Path) -> None:
    pixels = np.clip(volume((32, 32, 64)), 80, None).astype(np.float32)
    pixels[0, 0, 0] = 77
    spec = replace(spec_of(), fields=(FieldSpec("organs", NAMES[1:3], kind="labels", reduction="argmax"),))
    spec = replace(spec, fields=(replace(spec.fields[0], regions=(1, 2), threshold=-1.0),))
    net = Net(2)
    path = run(NotHere(net, spec), pixels, tmp_path, max_unreadable=1.0)
    labels = labels_of(path)
    assert not labels[:12, :12, :24].any()  # owned by the tile that failed
    assert labels[12:].all()
    assert labels[:12, 12:].all()
    assert labels[:12, :12, 24:].all()


# --- on the input's own grid -----------------------------------------------------------------------------


def oblique() -> Frame:
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("zyx", (20, -10, 5), degrees=True).as_matrix()
    return Frame.from_axes((-31.5, 12.25, 400.0), turn[:, ::-1], (2.5, 0.8, 0.8))


def write_nifti(path: Path, pixels: NDArray[Any], frame: Frame) -> Path:
    import nibabel

    image = nibabel.Nifti1Image(pixels.transpose(2, 1, 0), frame.to_nifti_affine())
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = volume((20, 40, 44))
    pixels[:, :3] = 0
    return write_nifti(tmp_path_factory.mktemp("scan") / "ct.nii.gz", pixels, oblique())


def test_labels_lie_on_an_oblique_anisotropic_nifti(scan: Path, tmp_path: Path) -> None:
    import nibabel

    result = wsitk.run(organs(), scan, out=tmp_path / "out", **PLAIN)
    made = nibabel.load(result.path / "labels.nii.gz")
    assert np.allclose(made.affine, nibabel.load(scan).affine, atol=1e-5)
    labels = labels_of(result.path)
    assert np.array_equal(np.asarray(made.dataobj).transpose(2, 1, 0), labels)
    facts = result.provenance["labels"]
    for value, name in enumerate(NAMES[1:], 1):
        count = int((labels == value).sum())
        assert facts[name]["voxels"] == count
        assert facts[name]["volume_mm3"] == pytest.approx(count * 2.5 * 0.8 * 0.8, rel=1e-5)
    assert result.provenance["objects"] == {}
    # an array says the same, it only has no place in space
    pixels = np.asarray(nibabel.load(scan).dataobj).transpose(2, 1, 0)
    memory = open_source(pixels, axes="zyx", mpp=(2500.0, 800.0, 800.0))
    assert np.array_equal(labels_of(run(organs(), memory, tmp_path / "array")), labels)


def test_a_process_of_its_own_gives_the_same_bytes(scan: Path, tmp_path: Path) -> None:
    trees = []
    for supervise in (True, False):
        out = tmp_path / str(supervise)
        chosen = Settings(**PLAIN, supervise=supervise)
        (row,) = Runner(ModelRef("volume_models:organs"), out, chosen).run([Input("ct", str(scan))])
        assert row.status == "done", row.message
        assert row.voxels["liver"] > 0
        trees.append(tree(out / "ct"))
    assert trees[0] == trees[1]


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(ModelError, match="WSI337"):
        spec_of(fields=(FieldSpec("f", ("x",) * 300, reduction="argmax"),))
    with pytest.raises(ModelError, match="WSI337"):
        spec_of(fields=(FieldSpec("f", ("x", "y"), reduction="argmax", regions=(1,)),))
    with pytest.raises(ModelError, match="WSI338"):
        spec_of(
            fields=(FieldSpec("f", ("x",), reduction="argmax"), FieldSpec("g", ("x",), reduction="argmax"))
        )
    with pytest.raises(ModelError, match="WSI339"):
        spec_of(spacing=(1.0, 1.0, 1.0), crop=True)
    with pytest.raises(ValueError, match="halo"):
        spec_of(halo=(1, 1, 1))
    assert Settings().block == 3  # of slides; a volume's block is a layer
