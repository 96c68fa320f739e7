"""CXAS: upstream's network and numbers, whole radiographs only, official containers as they are."""

from __future__ import annotations

import csv
import json
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from radiology_fill import fill, load_filled, uniform
from torch import Tensor, nn
from torch.nn import functional as F

import wsitk
from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.cxas import model as cxas_model
from wsitk.models.cxas.anatomy import (
    COLUMNS,
    Anatomy,
    cardiothoracic_ratio,
    nearest,
    spine_centre_distance,
    structure_names,
    write_measurements,
)
from wsitk.models.cxas.model import MEAN, STD, CXASModel, analyse, cxas, from_checkpoint, is_ours, unit_pixels
from wsitk.models.cxas.network import CXAS
from wsitk.sources import open_source
from wsitk.sources.array import ArraySource
from wsitk.torchfile import read_tensors

GOLDEN = Path(__file__).parent / "golden" / "radiology" / "cxas"
FEATURES = json.loads((GOLDEN / "features.json").read_text())["cases"]


@pytest.fixture(scope="module")
def empty() -> CXAS:
    """Return the network without weights."""
    with torch.device("meta"):
        return CXAS()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def normalised(gray: Tensor) -> Tensor:
    return (gray.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(
        1, 3, 1, 1
    )


def drawn(boxes: dict[str, list[int]], side: int = 512) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return masks of boxes (top, bottom, left, right) by label id."""
    masks = np.zeros((159, side, side), np.bool_)
    for label, (top, bottom, left, right) in boxes.items():
        masks[int(label), top:bottom, left:right] = True
    return masks


# --- the network ---------------------------------------------------------------------------------------


def test_the_state_has_upstreams_names_and_shapes_in_its_order(empty: CXAS) -> None:
    wanted = [line.split() for line in (GOLDEN / "keys.txt").read_text().splitlines()]
    found = [
        [name, str(t.dtype).removeprefix("torch."), "x".join(map(str, t.shape)) or "scalar"]
        for name, t in empty.state_dict().items()
    ]
    assert found == wanted
    assert sum(p.numel() for p in empty.parameters()) == 73_380_191


def test_the_first_stages_give_the_golden_features(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        backbone = CXAS().backbone
    x = normalised(torch.from_numpy(golden["128x160_gray"]))
    for index, stage in enumerate(backbone.backbone):
        if index == 2:
            break
        names = {n: f"backbone.backbone.layer{index}.{n}" for n in stage.state_dict()}
        state = {
            n: torch.from_numpy(fill(full, tuple(stage.state_dict()[n].shape))) for n, full in names.items()
        }
        stage.load_state_dict(state, assign=True)
        with torch.inference_mode():
            x = stage.eval()(x)
        _agrees(golden, f"128x160_feats_{index + 1}_map", x)


@pytest.mark.slow
def test_the_network_gives_the_golden_vectors(golden: dict[str, Any], data: Path) -> None:
    with torch.device("meta"):
        network = CXAS()
    network = network.to_empty(device="cpu")
    load_filled(network)
    with torch.inference_mode():
        found = network(normalised(torch.from_numpy(golden["128x160_gray"])))
    for name in ("feats_3_map", "feats_4_map", "feats_last_map", "feats_pooled", "feats", "logits"):
        _agrees(golden, f"128x160_{name}", found[name])
    _statistics(golden, "128x160", found["logits"])
    with np.load(data / "golden" / "radiology" / "cxas" / "golden.npz") as file:
        large = dict(file)
    with torch.inference_mode():
        found = network(normalised(torch.from_numpy(_signal("cxas.512x512", (1, 1, 512, 512)))))
    for name in ("feats_1_map", "feats_last_map", "feats_pooled", "feats", "logits"):
        _agrees(large, f"512x512_{name}", found[name])
    _statistics(large, "512x512", found["logits"])


def _agrees(golden: dict[str, Any], name: str, found: Tensor) -> None:
    wanted = golden[f"{name}_val"]
    got = found.numpy().ravel()[golden[f"{name}_idx"]]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def _statistics(golden: dict[str, Any], name: str, logits: Tensor) -> None:
    values = logits.double()
    stats = [values.mean(), values.std(correction=0), values.min(), values.max(), values.abs().sum()]
    np.testing.assert_allclose([float(s) for s in stats], golden[f"{name}_stats"], rtol=1e-3, atol=1e-5)
    # a logit nearer to 0 than the tolerance may lie on either side
    doubtful = (values.abs() < 1e-4).sum(dim=(0, 2, 3)).numpy()
    area = (logits > 0).sum(dim=(0, 2, 3)).numpy()
    assert (np.abs(area - golden[f"{name}_area"]) <= doubtful).all()


def _signal(name: str, shape: tuple[int, ...], passes: int = 6) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the golden vectors' input of that name: smoothed noise of 0 to 1."""
    v = uniform("input:" + name, int(np.prod(shape))).reshape(shape)
    for _ in range(passes):
        for axis in (a for a, n in enumerate(shape) if n > 4):
            wide = np.concatenate([v.take([0], axis), v, v.take([-1], axis)], axis)
            parts = [wide.take(range(k, k + shape[axis]), axis) for k in range(3)]
            v = (parts[0] + parts[1] + parts[2]) / 3.0
    return np.asarray((v - v.min()) / max(v.max() - v.min(), 1e-12), np.float32)


# --- a stand-in for 73 million weights -----------------------------------------------------------------


class Bright(nn.Module):
    """Calls the first structure where the image is brighter than half, the others nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor((0.5 - MEAN[0]) / STD[0]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = torch.full((len(x), 159, *x.shape[2:]), -20.0)
        logits[:, 0] = (x[:, 0] - self.middle) * 100
        return {"logits": logits}


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CXASModel:
    """Return a model read from a checkpoint in upstream's container, with the stand-in as its network."""
    monkeypatch.setattr(cxas_model, "CXAS", Bright)
    torch.save({"model": {"module.middle": Bright().middle.detach()}}, tmp_path / "weights.pth")
    return from_checkpoint(tmp_path / "weights.pth")


def test_a_checkpoint_opens_with_and_without_the_wrappers_prefix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cxas_model, "CXAS", Bright)
    path = tmp_path / "weights.pth"
    for prefix in ("", "module."):
        torch.save({"model": {f"{prefix}middle": torch.tensor(0.25)}}, path)
        model = from_checkpoint(path, channels=3)
        assert float(next(model.network.parameters()).detach()) == 0.25
        assert model.spec.channels == 3
        assert len(model.spec.weights_sha256) == 64
    torch.save({"model": {"middle": torch.zeros(2)}}, path)
    with pytest.raises(ModelError, match="WSI301"):
        from_checkpoint(path)
    with pytest.raises(ValueError, match="channels is 2"):
        from_checkpoint(path, channels=2)


def test_the_official_container_is_read_as_it_is(data: Path, empty: CXAS) -> None:
    folder = data / "golden" / "radiology" / "containers"
    file = read_tensors(folder / "cxas_model_module.pth")
    with np.load(folder / "expected.npz") as wanted:
        assert list(file.tensors) == list(wanted)
        assert all((file.tensors[k].numpy() == wanted[k]).all() for k in wanted)
    assert not is_ours(file)


def test_missing_weights_are_named_with_their_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WSITK_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"WSI312 UNet_ResNet50_default.pth is not in .*ChestXRay"):
        cxas()


# --- the image in, masks out ---------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(0, 2**32 - 1),
)
def test_nearest_picks_the_pixels_that_torch_picks(
    old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    image = np.random.default_rng(seed).random((2, *old), np.float32)
    wanted = F.interpolate(torch.from_numpy(image)[None], new)[0].numpy()
    assert (nearest(image, new) == wanted).all()


@pytest.mark.parametrize("side", [100, 511, 512, 513, 767, 1024, 2021, 2991])
def test_nearest_picks_the_pixels_that_torch_picks_at_real_sizes(side: int) -> None:
    for old, new in ((side, 512), (512, side)):
        image = np.arange(old, dtype=np.float32)[None, :, None]
        wanted = F.interpolate(torch.from_numpy(image)[None], (new, 1))[0].numpy()
        assert (nearest(image, (new, 1)) == wanted).all()


def test_pixels_are_scaled_over_the_whole_image_before_some_are_picked() -> None:
    image = np.full((600, 700, 1), 5.0, np.float32)
    rows = nearest(np.arange(600.0)[:, None], (512, 1))[:, 0].astype(int)
    skipped = next(k for k in range(600) if k not in rows)
    image[skipped, 0] = 9.0  # a pixel that the network never sees
    image[0, 0] = 1.0
    found = unit_pixels(image, "range")
    assert found.shape == (1, 512, 512)
    assert found[0, 0, 0] == 0.0
    assert found.max() == pytest.approx(0.5)
    grey = np.full((4, 4, 3), 51, np.uint8)
    assert (unit_pixels(grey, "byte") == np.float32(0.2)).all()
    assert (unit_pixels(np.full((4, 4, 1), 7, np.uint16), "range") == 0).all()


def test_an_image_comes_back_at_its_own_size(bright: CXASModel) -> None:
    pixels = np.zeros((300, 1000, 1), np.uint8)
    pixels[100:200, 250:750] = 255
    with ArraySource(pixels, axes=("y", "x", "c")) as source:
        found = analyse(bright, source)
    assert found.masks.shape == (159, 512, 512)
    assert found.areas()["spine"] == found.masks[0].sum()
    mask = found.mask("spine")
    assert mask.shape == (300, 1000)
    # one pixel of the coarser grid, either way
    assert mask[101:199, 252:748].all()
    assert not mask[:98].any()
    assert not mask[:, :247].any()
    assert not mask[:, 753:].any()
    assert not found.mask("heart").any()
    assert isnan(found.measurements()["cardiothoracic_ratio"])
    assert found.measurements()["structures"] == 1
    with pytest.raises(ModelError, match="WSI351"):
        found.mask("left lung of my uncle")


def test_the_engine_gets_masks_of_a_whole_image_and_of_nothing_else(bright: CXASModel) -> None:
    assert len(bright.spec.fields[0].channels) == 159
    whole = Region((0, 0), (512, 512))
    batch = torch.zeros(2, 1, 512, 512)
    batch[1, :, :256] = 1
    with torch.inference_mode():
        out = bright.predict(batch)["probability"]
    result = bright.postprocess({"probability": out[1].numpy()}, Tile(0, whole, whole))
    field = np.asarray(result.fields["anatomy"])
    assert field.dtype == np.float32
    assert (field[0, :256] == 1).all()
    assert (field[0, 256:] == 0).all()
    assert (field[1:] == 0).all()
    with pytest.raises(ModelError, match="WSI350"):
        bright.predict(torch.zeros(1, 1, 512, 256))


@pytest.mark.parametrize(("shape", "bits"), [((300, 1000), 8), ((700, 520), 16)])
def test_a_run_stretches_the_whole_image_and_measures_it(
    shape: tuple[int, int], bits: int, bright: CXASModel, tmp_path: Path
) -> None:
    pixels = np.zeros((*shape, 1), np.uint8 if bits == 8 else np.uint16)
    pixels[shape[0] // 3 : shape[0] // 2, 100:400] = 2**bits - 1
    with ArraySource(pixels, axes=("y", "x", "c"), name="chest") as source:
        wanted = analyse(bright, source)
        result = wsitk.run(bright, source, out=tmp_path, threads=1, workers=1)
    got = np.asarray(result.maps) > 0
    assert got.shape == wanted.masks.shape
    assert (got == wanted.masks).all()
    lines = (result.path / "measurements.csv").read_text().splitlines()
    assert lines[0] == "measurement,value"
    assert "structures,1.0" in lines
    assert "cardiothoracic_ratio," in lines, "what can't be measured is empty"
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["structures"], row["cardiothoracic_ratio"]) == ("1", "")


def test_real_radiographs_are_read_bright_for_bone(bright: CXASModel, data: Path) -> None:
    pytest.importorskip("pydicom")
    folder = data / "data" / "radiology" / "cxr"
    seen = 0
    for path in (folder / "00000001_000.png", folder / "Fake_MONOHR1.dcm"):
        with open_source(path) as source:
            found = analyse(bright, source)
            assert found.shape == source.shape
        share = found.masks[0].mean()
        # neither all black nor all white, as a wrong window or a lost inversion would make it
        assert 0.1 < share < 0.9
        seen += 1
    assert seen == 2


def test_volumes_are_refused(bright: CXASModel) -> None:
    with (
        ArraySource(np.zeros((3, 8, 8), np.uint8), axes=("z", "y", "x")) as source,
        pytest.raises(ModelError, match="WSI350"),
    ):
        analyse(bright, source)


# --- measurements --------------------------------------------------------------------------------------


def test_names_are_those_of_the_golden_labels() -> None:
    names = structure_names()
    assert len(names) == len(set(names)) == 159
    assert names[121] == "heart"
    assert names[134] == "lung"
    assert names[107] == "right hemidiaphragm"
    assert [k for k, n in enumerate(names) if n.startswith("vertebrae ")] == list(range(4, 28))


@pytest.mark.parametrize("case", FEATURES)
def test_measurements_are_those_of_upstream(case: dict[str, Any]) -> None:
    masks = drawn(case["boxes"])
    ratio = cardiothoracic_ratio(masks)
    assert ratio == pytest.approx(case["ctr"], rel=1e-12) if case["ctr"] >= 0 else isnan(ratio)
    assert spine_centre_distance(masks) == pytest.approx(case["scd"], rel=1e-12)


def test_the_golden_ratios_follow_from_the_radii_that_they_state(data: Path) -> None:
    golden = json.loads((data / "golden" / "radiology" / "cxas" / "features.json").read_text())
    for case in golden["cases"].values():
        heart, lung, middle = case["heart_rx"], case["lung_rx"], case["diaphragm_x"]
        boxes = {
            "121": [250, 330, case["heart_cx"] - heart + 1, case["heart_cx"] + heart],
            "134": [150, 400, 256 - lung + 1, 256 + lung],
            "107": [380, 390, 100, middle + 1],
        }
        assert cardiothoracic_ratio(drawn(boxes)) == pytest.approx(case["ctr"], rel=1e-12)


@settings(max_examples=25)
@given(arrays(np.bool_, (3, 9, 11)))
def test_the_ratio_is_that_of_a_search_row_by_row(masks: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    lung, heart, diaphragm = masks
    whole = np.zeros((159, 9, 11), np.bool_)
    whole[134], whole[121], whole[107] = lung, heart, diaphragm
    found = cardiothoracic_ratio(whole)
    if not (lung.any() and heart.any() and diaphragm.any()):
        assert isnan(found)
        return
    middle = max(x for y in range(9) for x in range(11) if diaphragm[y, x])
    right = left = width = 0
    for y in range(9):
        at = np.flatnonzero(heart[y])
        if at.size:
            right, left = max(right, middle - at[0]), max(left, at[-1] - middle)
        at = np.flatnonzero(lung[y])
        if at.size:
            width = max(width, at[-1] - at[0])
    assert isnan(found) if not width else found == (right + left) / width


def test_nothing_found_is_no_number_and_an_empty_cell(tmp_path: Path) -> None:
    empty = Anatomy(np.zeros((159, 64, 64), np.bool_), (10, 10))
    assert isnan(spine_centre_distance(empty.masks))
    one = drawn({"10": [20, 30, 20, 30], "11": [20, 30, 40, 50]}, 64)
    assert spine_centre_distance(one) == pytest.approx(10.0)  # in one row: about the column between them
    rows = [
        ("a.png", empty.measurements()),
        ("b, c.dcm", {**empty.measurements(), "cardiothoracic_ratio": 0.5}),
    ]
    write_measurements(tmp_path / "m.csv", rows)
    with (tmp_path / "m.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [list(COLUMNS), ["a.png", "", "", "0"], ["b, c.dcm", "0.5", "", "0"]]
