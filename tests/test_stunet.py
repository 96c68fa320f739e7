"""STU-Net against vectors recorded from the original code; its files, its plans, its views and its head in pieces."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nnunet_reference as reference
import numpy as np
import pytest
import torch
from radiology_fill import load_filled

from wsitk.errors import ModelError
from wsitk.model import ModelSpec
from wsitk.models.nnunet.labels import color_of
from wsitk.models.nnunet.volume import VolumeModel, flips, label_field
from wsitk.models.stunet import model as stunet
from wsitk.models.stunet.network import POOLS, SIZES, STUNet, STUNetConfig, config_of
from wsitk.models.stunet.plans import read_plan

GOLDEN = Path(__file__).parent / "golden" / "radiology" / "stunet"
PARAMETERS = {"small": 14_596_941, "base": 58_262_669, "large": 440_302_605, "huge": 1_457_326_221}
TINY = STUNetConfig(4, classes=5)
TILE = (16, 32, 32)


def tiny(seed_scale: float = 1.0, config: STUNetConfig = TINY) -> STUNet:
    network = STUNet(config)
    load_filled(network, seed_scale)
    return network


def spec_of(tile: tuple[int, ...] = TILE, **options: Any) -> ModelSpec:
    channels = ("background", "a", "b", "c", "d")
    field = label_field(channels, **{"softmax": True, **options})
    return ModelSpec("m", "1", (1000.0,) * 3, tile, (0,) * 3, (1,) * 3, 1, "", fields=(field,), step=0.5)


def joined(model: VolumeModel, batch: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
    """Return what the engine makes of predict and head: (K, *tile)."""
    with torch.inference_mode():
        features = model.predict(batch)
        edges = [0, *np.cumsum(pieces).tolist()]
        parts = [model.head(features, "labels", a, b) for a, b in itertools.pairwise(edges)]
        logits = torch.cat(parts, dim=1)
    assert len(logits) == model.views
    field = model.spec.fields[0]
    return (logits.softmax(1) if field.activation == "softmax" else logits).mean(0)


# --- the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_upstreams_parameters_and_is_known_by_its_tensors(size: str) -> None:
    with torch.device("meta"):
        network = STUNet(SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[size]
    assert config_of(network.state_dict()) == SIZES[size]
    assert SIZES[size].divisor == (16, 16, 32)


def _said(network: STUNet) -> list[str]:
    state = network.state_dict().items()
    return [f"{k} {str(v.dtype)[6:]} {'x'.join(map(str, v.shape)) or 'scalar'}" for k, v in state]


def test_every_entry_has_upstreams_name_shape_and_place() -> None:
    with torch.device("meta"):
        network = STUNet(SIZES["small"])
    assert _said(network) == (GOLDEN / "keys_small.txt").read_text().splitlines()


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_larger_sizes_too(data: Path, size: str) -> None:
    with torch.device("meta"):
        network = STUNet(SIZES[size])
    keys = data / "golden" / "radiology" / "stunet" / f"keys_{size}.txt"
    assert _said(network) == keys.read_text().splitlines()


def test_the_network_gives_what_the_original_gives(data: Path) -> None:
    golden = np.load(data / "golden" / "radiology" / "stunet" / "golden.npz", allow_pickle=False)
    network = STUNet(SIZES["small"])
    load_filled(network)
    with torch.inference_mode():
        every = [y.numpy() for y in network.supervised(torch.from_numpy(golden["x"]))]
    for name, got in zip(("logits", "ds1", "ds2", "ds3", "ds4"), every, strict=True):
        assert got.shape == tuple(golden[f"{name}_shape"])
        recorded = golden[f"{name}_val"]
        assert np.abs(got.reshape(-1)[golden[f"{name}_idx"]] - recorded).max() < 1e-5 * np.abs(recorded).max()
    assert np.array_equal(every[0].argmax(1), golden["argmax"])
    assert np.abs(every[0][:, 0] - golden["ch0"]).max() < 1e-4
    assert np.abs(every[0][:, 104] - golden["ch104"]).max() < 1e-4


def test_features_and_head_are_the_network() -> None:
    network, x = tiny(), torch.randn(1, 1, *TILE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(network.head(network.features(x)), network(x)["logits"])


# --- views, folds and the head in pieces ---------------------------------------------------------------


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("mirror", [(), (0, 1, 2)])
def test_views_are_averaged_as_upstream_averages_them(softmax: bool, mirror: tuple[int, ...]) -> None:
    network = tiny()
    x = torch.randn(1, 1, *TILE, generator=torch.Generator().manual_seed(2))
    model = VolumeModel([network], spec_of(softmax=softmax), mirror=mirror)
    _, wanted = reference.predict(
        lambda t: network(t)["logits"], x[0].numpy(), TILE, mirror=mirror, softmax=softmax
    )
    assert np.allclose(joined(model, x, (1, 3, 1)).numpy(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("softmax", [True, False])
def test_folds_are_averaged(softmax: bool) -> None:
    first, second = tiny(), tiny(0.8)
    x = torch.randn(1, 1, *TILE, generator=torch.Generator().manual_seed(3))
    model = VolumeModel([first, second], spec_of(softmax=softmax), mirror=(2,))
    each = [VolumeModel([n], spec_of(softmax=softmax), mirror=(2,)) for n in (first, second)]
    wanted = torch.stack([joined(m, x, (5,)) for m in each]).mean(0)
    assert torch.allclose(joined(model, x, (2, 3)), wanted, atol=2e-6, rtol=1e-5)
    with torch.inference_mode():
        mean = (first(x)["logits"] + second(x)["logits"]) / 2
        assert torch.allclose(model.network(x)["logits"], mean, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
def test_a_network_with_other_axes_sees_them_in_its_order(axes: tuple[int, int, int]) -> None:
    network, inside = tiny(), (16, 32, 64)
    tile = tuple(inside[axes.index(a)] for a in range(3))
    x = torch.randn(1, 1, *tile, generator=torch.Generator().manual_seed(4))
    model = VolumeModel([network], spec_of(tile), mirror=(0,), axes=axes)
    turned = np.transpose(x[0].numpy(), (0, *(1 + a for a in axes)))
    _, wanted = reference.predict(lambda t: network(t)["logits"], turned, inside, mirror=(0,))
    back = np.transpose(wanted, (0, *(1 + axes.index(a) for a in range(3))))
    assert np.allclose(joined(model, x, (2, 3)).numpy(), back, atol=2e-6, rtol=1e-5)


def test_all_flips_none_first() -> None:
    assert flips((2, 0)) == ((), (0,), (2,), (0, 2))
    assert len(flips((0, 1, 2))) == 8


# --- files ---------------------------------------------------------------------------------------------


def _saved(folder: Path, network: STUNet, plans: bytes, prefix: str = "") -> Path:
    """Write a checkpoint as nnU-Net 1 does, with the NumPy scalars that it puts beside the weights."""
    state = {prefix + k: v for k, v in network.state_dict().items()}
    beside = {"plot_stuff": ([1.0], [np.float64(0.5)]), "best_stuff": (np.float32(0.1), 1.0, 0)}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]}
    path = folder / "small_ep4k.model"
    torch.save({"epoch": 4000, "state_dict": state, "optimizer_state_dict": optimizer, **beside}, path)
    (folder / "small_ep4k.model.pkl").write_bytes(plans)
    return path


def _plans(**changes: Any) -> bytes:
    """Return plans such as nnU-Net 1 pickles, of a network with four labels."""
    stage = {
        "patch_size": np.array(TILE),
        "current_spacing": np.array([3.0, 1.0, 2.0]),
        "pool_op_kernel_sizes": [list(p) for p in POOLS],
        "conv_kernel_sizes": [[3, 3, 3]] * 6,
    }
    plans = {
        "num_modalities": 1,
        "normalization_schemes": {0: "CT"},
        "use_mask_for_norm": {0: False},
        "all_classes": [1, 2, 3, 4],
        "transpose_forward": [np.int64(0), 1, 2],
        "plans_per_stage": {0: stage | changes.pop("stage", {})},
        "dataset_properties": {
            "intensityproperties": {
                0: {"mean": np.float64(3), "sd": 5.0, "percentile_00_5": -7.0, "percentile_99_5": 9.0}
            }
        },
        **changes,
    }
    return pickle.dumps({"init": (), "name": "STUNetTrainer_small", "plans": plans})


def test_the_published_plans_are_read_without_unpickling() -> None:
    plan = read_plan(GOLDEN / "small_ep4k.model.pkl")
    assert (plan.spacing_um, plan.patch, plan.axes) == ((1500.0,) * 3, (128,) * 3, (0, 1, 2))
    assert plan.trainer == "STUNetTrainer_small"
    assert plan.pools == POOLS
    assert plan.labels == tuple(range(1, 105))
    (rule,) = plan.intensities
    assert (rule.scheme, rule.masked, rule.added) == ("zscore", False, True)
    with pytest.raises(ModelError, match="WSI340"):
        read_plan(GOLDEN / "plans.pkl")  # the task's plans, without the stages


def test_a_published_checkpoint_becomes_a_model(tmp_path: Path) -> None:
    network = STUNet(SIZES["small"])
    load_filled(network)
    path = _saved(tmp_path, network, (GOLDEN / "small_ep4k.model.pkl").read_bytes(), "module.")
    model = stunet.from_checkpoint(path)
    spec = model.spec
    assert (spec.name, spec.tile, spec.spacing, spec.step) == ("stunet-small", (128,) * 3, (1500.0,) * 3, 0.5)
    assert (spec.crop, spec.interpolation, spec.border, spec.fill) == (True, "cubic", "constant", 0.0)
    assert not spec.normalise_first
    assert model.views == 1
    (field,) = spec.fields
    assert field.channels[:2] == ("background", "adrenal_gland_left")
    assert len(field.channels) == 105
    assert (field.dtype, field.activation, field.window, field.restore) == (
        "uint8", "softmax", "gaussian", "linear",
    )  # fmt: skip
    assert [c.name for c in spec.classes] == list(field.channels[1:])
    loaded = model.network.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in network.state_dict().items())
    assert not model.network.training


def test_a_fine_tuned_checkpoint_and_its_options(tmp_path: Path) -> None:
    model = stunet.from_checkpoint(_saved(tmp_path, tiny(), _plans()), mirror=True, restore="nearest")
    assert model.views == 8
    assert model.spec.fields[0].restore == "nearest"
    assert model.spec.spacing == (3000.0, 1000.0, 2000.0)
    assert model.spec.name == "stunet-custom"
    assert [c.name for c in model.spec.classes] == ["label 1", "label 2", "label 3", "label 4"]
    (rule,) = model.spec.normalise
    assert (rule.scheme, rule.shift, rule.scale, rule.low, rule.high) == ("ct", 3.0, 5.0, -7.0, 9.0)


def _refused(code: str, path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        stunet.from_checkpoint(path)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    network = tiny()
    _refused("WSI301", _saved(tmp_path, network, _plans(all_classes=[1, 2])))
    _refused("WSI341", _saved(tmp_path, network, _plans(normalization_schemes={0: "odd"})))
    _refused("WSI341", _saved(tmp_path, network, _plans(stage={"conv_kernel_sizes": [[1, 3, 3]] * 6})))
    _refused("WSI340", _saved(tmp_path, network, _plans(stage={"patch_size": [20, 32, 32]})))
    _refused("WSI340", _saved(tmp_path, network, pickle.dumps({"plans": {}})))
    _refused("WSI340", _saved(tmp_path, network, pickle.dumps([1, 2])))
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "small_ep4k.model")
    (tmp_path / "small_ep4k.model.pkl").write_bytes(_plans())
    assert "STU-Net" in _refused("WSI301", tmp_path / "small_ep4k.model")
    (tmp_path / "small_ep4k.model.pkl").unlink()
    _refused("WSI303", _saved(tmp_path, network, b""))


def test_a_pickle_that_calls_something_is_refused_by_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    assert "asks to call" in _refused("WSI302", _saved(tmp_path, tiny(), pickle.dumps({"plans": Evil()})))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_here_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stunet, "home", lambda: tmp_path)
    with pytest.raises(ModelError, match=r"WSI312 base_ep4k\.model is not in"):
        stunet.stunet_base()


# --- labels --------------------------------------------------------------------------------------------


def test_labels_are_upstreams_in_upstreams_order(data: Path) -> None:
    import json

    text = (data / "golden" / "radiology" / "stunet" / "label_orders.json").read_text("utf-8")
    names = stunet.structures()
    assert {str(k): n for k, n in enumerate(("background", *names))} == json.loads(text)
    assert list(names) == sorted(names)
    assert len(names) == 104


def test_colors_differ_and_stay() -> None:
    colors = [color_of(k) for k in range(1, 105)]
    assert len(set(colors)) == 104
    assert color_of(1) == (242, 36, 36)
    assert all(max(c) >= 190 for c in colors)
