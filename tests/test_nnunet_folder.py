"""Model folders of nnU-Net 2: networks, plans, folds, labels; and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnunet_reference as reference
import numpy as np
import pytest
import torch
from radiology_fill import load_filled
from torch import nn

from wsitk.errors import ModelError
from wsitk.models.nnunet.folder import from_folder
from wsitk.models.nnunet.network import architecture, build_unet
from wsitk.models.stunet.network import STUNet, STUNetConfig

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")

PATCH = [8, 16, 16]
UNET = "dynamic_network_architectures.architectures.unet."
RESAMPLED = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {
        "is_seg": False,
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    },
}
CT = {"mean": 40.0, "std": 30.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0, "min": -1024.0}
KWARGS = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
BLOCKS = {
    "PlainConvUNet": {"n_conv_per_stage": [1, 2, 1]},
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 2, 1]},
}
REAL = {
    "conv_op": nn.Conv3d,
    "norm_op": nn.InstanceNorm3d,
    "nonlin": nn.LeakyReLU,
    "dropout_op": None,
}


def plans_of(kind: str = "PlainConvUNet") -> dict[str, Any]:
    """Return plans as nnU-Net 2.5 writes them, as far as prediction reads them."""
    full = {
        "patch_size": PATCH,
        "spacing": [3.0, 0.8, 0.7],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
        "architecture": {
            "network_class_name": UNET + kind,
            "arch_kwargs": KWARGS | BLOCKS[kind],
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **RESAMPLED,
    }
    return {
        "dataset_name": "Dataset500_Toy",
        "transpose_forward": [0, 1, 2],
        "configurations": {
            "3d_fullres": full,
            "3d_bigger": {"inherits_from": "3d_fullres", "spacing": [6.0, 1.6, 1.4]},
            "2d": full | {"patch_size": [16, 16], "spacing": [0.8, 0.7]},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "foreground_intensity_properties_per_channel": {"0": CT},
    }


DATASET = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "tumour": 2, "organ": 1, "ignore": 3},
    "file_ending": ".nii.gz",
}


def network_of(kind: str, scale: float, outputs: int = 3) -> nn.Module:
    """Return upstream's own network, built the way upstream builds it."""
    network: nn.Module = getattr(unet, kind)(
        input_channels=2, num_classes=outputs, deep_supervision=False, **(KWARGS | REAL | BLOCKS[kind])
    )
    load_filled(network, scale)
    return network


def write(
    folder: Path,
    networks: dict[str, nn.Module],
    plans: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    *,
    configuration: str = "3d_fullres",
    trainer: str = "nnUNetTrainer",
    axes: tuple[int, ...] | None = (0, 1, 2),
) -> Path:
    """Write a model folder as nnU-Net 2 leaves it, with what its checkpoints hold beside the weights."""
    path = folder / "Dataset500_Toy" / f"{trainer}__nnUNetPlans__{configuration}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "plans.json").write_text(json.dumps(plans or plans_of()))
    (path / "dataset.json").write_text(json.dumps(dataset or DATASET))
    for fold, network in networks.items():
        (path / f"fold_{fold}").mkdir(exist_ok=True)
        arguments = {"configuration": configuration, "fold": fold, "device": torch.device("cpu")}
        content = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(4)}}, "param_groups": []},
            "logging": {"mean_fg_dice": [np.float64(0.5)], "lrs": [0.01]},
            "_best_ema": np.float64(0.7),
            "current_epoch": 1000,
            "init_args": arguments,
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": axes,
        }
        torch.save(content, path / f"fold_{fold}" / "checkpoint_final.pth")
    return path


def answer(model: Any, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the logits of a tile, its classes computed in two pieces."""
    with torch.inference_mode():
        features = model.predict(x)
        count = len(model.spec.fields[0].channels)
        return torch.cat([model.head(features, "labels", a, b) for a, b in ((0, 1), (1, count))], 1)[
            0
        ].numpy()


def wanted(networks: list[nn.Module], x: torch.Tensor, mirror: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return what upstream computes: mean logits of flips, then of folds."""
    each = [reference.predict(n, x[0].numpy(), PATCH, mirror=mirror, softmax=False)[1] for n in networks]
    mean: np.ndarray[Any, Any] = np.mean(each, axis=0)
    return mean


X = torch.randn(1, 2, *PATCH, generator=torch.Generator().manual_seed(5))


# --- networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
def test_folds_are_loaded_mirrored_and_averaged(tmp_path: Path, kind: str) -> None:
    networks = {"0": network_of(kind, 1.0), "3": network_of(kind, 0.7), "all": network_of(kind, 0.5)}
    path = write(tmp_path, networks, plans_of(kind))
    both = [networks["0"], networks["3"]]
    assert np.allclose(answer(from_folder(path), X), wanted(both, X, (0, 1, 2)), atol=1e-5)
    one = from_folder(path, folds=[3], mirror=False)
    assert np.allclose(answer(one, X), wanted([networks["3"]], X, ()), atol=1e-6)
    assert list(one.network.state_dict()) == list(networks["3"].state_dict())
    every = from_folder(path, folds=["all"], mirror=False)
    assert np.allclose(answer(every, X), wanted([networks["all"]], X, ()), atol=1e-6)
    assert len({m.spec.weights_sha256 for m in (one, every, from_folder(path))}) == 3


def test_a_network_trained_without_mirroring_is_not_mirrored(tmp_path: Path) -> None:
    network = network_of("PlainConvUNet", 1.0)
    for axes, mirror in ((None, ()), ((2,), (2,))):
        model = from_folder(write(tmp_path, {"0": network}, axes=axes))
        assert np.allclose(answer(model, X), wanted([network], X, mirror), atol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS)
def test_older_plans_describe_the_same_network(kind: str) -> None:
    blocks = next(iter(BLOCKS[kind].values()))
    old = {
        "UNet_class_name": kind,
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": blocks,
        "n_conv_per_stage_decoder": KWARGS["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": KWARGS["kernel_sizes"],
        "pool_op_kernel_sizes": KWARGS["strides"],
    }
    name, arguments = architecture(old)
    state, other = build_unet(name, arguments, 2, 3).state_dict(), network_of(kind, 1.0).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.items()}


def test_stunet_trained_by_version_2(tmp_path: Path) -> None:
    pools = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1))
    network = STUNet(STUNetConfig(4, channels=2, classes=3, pools=pools))
    load_filled(network)
    plans = plans_of()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["strides"] = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    path = write(tmp_path, {"0": network}, plans, trainer="STUNetTrainer_small_ft")
    plain: Callable[[torch.Tensor], torch.Tensor] = lambda x: network(x)["logits"]  # noqa: E731
    _, logits = reference.predict(plain, X[0].numpy(), PATCH, softmax=False)
    assert np.allclose(answer(from_folder(path, mirror=False), X), logits, atol=1e-6)


# --- what the plans say --------------------------------------------------------------------------------


def test_the_spec_says_what_the_plans_say(tmp_path: Path) -> None:
    spec = from_folder(write(tmp_path, {"0": network_of("PlainConvUNet", 1.0)})).spec
    assert (spec.name, spec.tile, spec.spacing) == ("Dataset500_Toy", (8, 16, 16), (3000.0, 800.0, 700.0))
    assert (spec.step, spec.channels, spec.crop, spec.normalise_first) == (0.5, 2, True, True)
    ct, pet = spec.normalise
    assert (ct.scheme, ct.shift, ct.scale, ct.low, ct.high) == ("ct", 40.0, 30.0, -100.0, 300.0)
    assert (pet.scheme, pet.masked, pet.added) == ("zscore", True, False)
    (field,) = spec.fields
    assert field.channels == ("background", "organ", "tumour")
    assert (field.reduction, field.activation, field.regions) == ("argmax", "", ())
    assert [c.name for c in spec.classes] == ["organ", "tumour"]


def test_a_configuration_inherits(tmp_path: Path) -> None:
    model = from_folder(write(tmp_path, {"0": network_of("PlainConvUNet", 1.0)}, configuration="3d_bigger"))
    assert (model.spec.spacing, model.spec.tile) == ((6000.0, 1600.0, 1400.0), (8, 16, 16))


def test_transposed_plans_come_back_to_the_sources_axes(tmp_path: Path) -> None:
    plans = plans_of() | {"transpose_forward": [2, 0, 1]}
    network = network_of("PlainConvUNet", 1.0)
    model = from_folder(write(tmp_path, {"0": network}, plans, axes=(0, 2)))
    # the network's z (3 mm, 8 voxels) is the source's x
    assert (model.spec.spacing, model.spec.tile) == ((800.0, 700.0, 3000.0), (16, 16, 8))
    source = X.permute(0, 1, 3, 4, 2)
    got = np.transpose(answer(model, source), (0, 3, 1, 2))
    assert np.allclose(got, wanted([network], X, (0, 2)), atol=1e-5)


def test_regions_may_overlap_and_write_their_labels(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    dataset = DATASET | {"labels": labels, "regions_class_order": [1, 2, 3]}
    spec = from_folder(write(tmp_path, {"0": network_of("PlainConvUNet", 1.0)}, None, dataset)).spec
    (field,) = spec.fields
    assert (field.channels, field.regions, field.threshold) == (
        ("whole", "core", "enhancing"),
        (1, 2, 3),
        0.0,
    )
    assert [c.name for c in spec.classes] == ["whole", "core", "enhancing"]


# --- refusals ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return network_of("PlainConvUNet", 1.0)


def _refused(code: str, said: str, path: Path, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        from_folder(path, **options)
    assert caught.value.code == code, caught.value
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _changed(where: str, value: Any) -> dict[str, Any]:
    """Return the plans with one value of the configuration, or below it, replaced (or removed: None)."""
    plans = copy.deepcopy(plans_of())
    here = plans["configurations"]["3d_fullres"]
    *parents, last = where.split(".")
    for key in parents:
        here = here[key]
    here[last] = value
    return plans


@pytest.mark.parametrize(
    ("where", "value", "code", "said"),
    [
        ("architecture.network_class_name", "os.system", "WSI341", "os.system"),
        ("architecture.network_class_name", f"{UNET}ResidualUNet", "WSI341", "ResidualUNet"),
        ("architecture.arch_kwargs.conv_op", "os.Conv3d", "WSI341", "os.Conv3d"),
        ("architecture.arch_kwargs.nonlin", "torch.load", "WSI341", "torch.load"),
        ("architecture.arch_kwargs.extra", 1, "WSI341", "extra"),
        ("architecture.arch_kwargs.n_stages", 9, "WSI341", "don't fit"),
        ("architecture.arch_kwargs.features_per_stage", [4, 8, 9], "WSI301", "shape"),
        ("architecture", {}, "WSI340", "network_class_name"),
        ("normalization_schemes", ["MyNormalization", "ZScoreNormalization"], "WSI341", "MyNormalization"),
        ("resampling_fn_data", "resample_torch_fornnunet", "WSI341", "resample_torch_fornnunet"),
        ("resampling_fn_data_kwargs", {"order": 1}, "WSI341", "order"),
        ("patch_size", [8, 16], "WSI341", "2d"),
        ("patch_size", [8, 16, 10**9], "WSI340", "patch_size"),
        ("spacing", [1.0, 0.0, 1.0], "WSI340", "spacing"),
        ("spacing", "odd", "WSI340", "TypeError"),
        ("inherits_from", "3d_fullres", "WSI340", "circle"),
        ("previous_stage", "3d_lowres", "WSI341", "3d_lowres"),
    ],
)
def test_plans_that_are_not_nnunets_own_are_refused(
    tmp_path: Path, network: nn.Module, where: str, value: Any, code: str, said: str
) -> None:
    _refused(code, said, write(tmp_path, {"0": network}, _changed(where, value)))


@pytest.mark.parametrize(
    "labels", [None, {"background": 0}, {"background": 0, "a": 2}, {"background": 0, "a": "x"}, {"a": [1, 2]}]
)
def test_labels_that_make_no_sense_are_refused(tmp_path: Path, network: nn.Module, labels: Any) -> None:
    _refused("WSI340", "dataset.json", write(tmp_path, {"0": network}, None, DATASET | {"labels": labels}))


def test_folders_that_are_none_are_refused(tmp_path: Path, network: nn.Module) -> None:
    _refused("WSI340", "plans.json", tmp_path)
    path = write(tmp_path, {"0": network})
    _refused("WSI340", "folds ['0']", path, folds=[1])
    _refused("WSI340", "folds []", path, checkpoint="checkpoint_best.pth")
    (path / "plans.json").write_text("[1]")
    _refused("WSI340", "holds a list", path)
    (path / "plans.json").write_text("{")
    _refused("WSI340", "plans.json", path)


def test_a_checkpoint_that_calls_something_is_refused_by_name(tmp_path: Path, network: nn.Module) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = write(tmp_path, {"0": network})
    torch.save({"network_weights": {"a": Evil()}}, path / "fold_0" / "checkpoint_final.pth")
    _refused("WSI302", "asks to call", path)
    assert not (tmp_path / "ran").exists()
