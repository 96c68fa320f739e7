"""MONAI bundles: those that can be mapped run as MONAI would, all else is refused by name, and nothing runs."""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.monai_bundle.config import Config, read_file
from wsitk.models.monai_bundle.model import BundleModel, from_bundle, is_bundle
from wsitk.models.monai_bundle.transforms import preparation

METADATA = {
    "name": "Spleen, small",
    "version": "0.5.3",
    "license": "Apache-2.0",
    "network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background", "1": "spleen"}}}},
}

UNET = {
    "_target_": "monai.networks.nets.UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "num_res_units": 1,
    "norm": "batch",
}

INFERENCE: dict[str, Any] = {
    "patch": [32, 24, 16],
    "network_def": UNET,
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.0, 2.0], "mode": "bilinear"},
            {
                "_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -57, "a_max": 164, "b_min": 0.0,
                "b_max": 1.0, "clip": True,
            },
            {"_target_": "EnsureTyped", "keys": "image"},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@patch", "sw_batch_size": 4, "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "eval"},
        ],
    },
}  # fmt: skip


def changed(**entries: Any) -> dict[str, Any]:
    return copy.deepcopy(INFERENCE) | entries


def with_step(*steps: dict[str, Any], at: int = 3) -> dict[str, Any]:
    """Return the configuration with further transforms before its spacing."""
    content = changed()
    content["preprocessing"]["transforms"][at:at] = list(steps)
    return content


def write(
    folder: Path, content: dict[str, Any], metadata: Any = METADATA, name: str = "inference.json"
) -> Path:
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / name).write_text(json.dumps(content))
    return folder


def read(folder: Path, content: dict[str, Any]) -> Config:
    return Config.read(write(folder, content), "refuse")


@pytest.fixture(scope="session")
def nets() -> Any:
    """Return MONAI's networks; its own warnings on import are not ours."""
    pytest.importorskip("monai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks import nets

        return nets


@pytest.fixture
def bundle(tmp_path: Path, nets: Any) -> Iterator[Path]:
    """Return a bundle with weights."""
    torch.manual_seed(1)
    network = nets.UNet(**{k: v for k, v in UNET.items() if k != "_target_"})
    folder = write(tmp_path / "bundle", INFERENCE)
    (folder / "models").mkdir()
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    yield folder
    (folder / "models" / "model.pt").unlink(missing_ok=True)


# --- what runs -----------------------------------------------------------------------------------------


def test_a_bundle_becomes_a_spec(bundle: Path) -> None:
    assert is_bundle(bundle)
    assert not is_bundle(bundle / "models")
    model = from_bundle(bundle)
    spec = model.spec
    assert (spec.name, spec.version, spec.licences.weights) == ("Spleen, small", "0.5.3", "Apache-2.0")
    assert model.spec.orientation == "RAS"
    assert spec.spacing == (2000.0, 1000.0, 1500.0)
    assert spec.tile == (16, 24, 32)
    assert spec.step == 0.5
    assert spec.normalise_first is False
    assert spec.labels[0].channels == ("background", "spleen")
    assert spec.labels[0].window == "flat"
    assert [c.name for c in spec.classes] == ["spleen"]
    rule = spec.normalise[0].numbers()
    np.testing.assert_allclose(rule(np.array([-900.0, -57, 53.5, 164, 900])), [0, 0, 0.5, 1, 1], atol=1e-6)


def test_the_network_sees_axes_in_monais_order(bundle: Path, nets: Any) -> None:
    model = from_bundle(bundle)
    reference = nets.UNet(**{k: v for k, v in UNET.items() if k != "_target_"})
    reference.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    x = torch.rand(1, 1, 16, 24, 32)
    with torch.inference_mode():
        found = model.predict(x)["logits"]
        wanted = reference.eval()(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    assert torch.equal(found, wanted)
    region = Region((0, 0, 0), (16, 24, 32))
    field = model.postprocess({"logits": found[0].numpy()}, Tile(0, region, region)).fields["labels"]
    assert np.asarray(field).shape == (2, 16, 24, 32)


def test_yaml_and_one_output_with_a_threshold(bundle: Path, nets: Any) -> None:
    yaml = pytest.importorskip("yaml")
    one = changed(network_def={**UNET, "out_channels": 1})
    one["postprocessing"]["transforms"][0] = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
    one["postprocessing"]["transforms"][2] = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
    (bundle / "configs" / "inference.json").unlink()
    (bundle / "configs" / "inference.yaml").write_text(yaml.safe_dump(one))
    network = nets.UNet(**{k: v for k, v in one["network_def"].items() if k != "_target_"})
    torch.save({"model": network.state_dict()}, bundle / "models" / "model.pt")
    field = from_bundle(bundle).spec.labels[0]
    assert (field.channels, field.regions, field.threshold) == (("spleen",), (1,), 0.0)


def test_each_intensity_rule_is_monais(nets: Any, tmp_path: Path) -> None:
    from monai import transforms

    from wsitk.volumes.nnunet_rules import Moments

    image = torch.from_numpy(np.random.default_rng(2).normal(30, 60, (1, 5, 6, 7)).astype(np.float32))
    range_ = {"a_min": -20, "a_max": 90, "b_min": -1.0, "b_max": 1.0}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ScaleIntensityRange", {**range_, "clip": True}),
        ("ScaleIntensityRange", {**range_, "clip": False}),
        ("ScaleIntensity", {}),
        ("NormalizeIntensity", {}),
        ("NormalizeIntensity", {"channel_wise": True}),
        ("NormalizeIntensity", {"subtrahend": 12.5, "divisor": 4.0}),
    ]
    for k, (name, options) in enumerate(cases):
        steps = [{"_target_": f"{name}d", "keys": ["image"], **options}]
        rule = preparation(read(tmp_path / str(k), changed(preprocessing=steps)), 1).rule
        assert rule is not None
        found = rule.numbers(Moments.of(image.numpy()))(image.numpy())
        wanted = np.asarray(getattr(transforms, name)(**options)(image))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_intensity_before_the_spacing_stays_before_it(tmp_path: Path) -> None:
    content = changed()
    steps = content["preprocessing"]["transforms"]
    steps[3], steps[4] = steps[4], steps[3]
    found = preparation(read(tmp_path, content), 1)
    assert found.rule_first
    assert found.spacing_um == (2000.0, 1000.0, 1500.0)


# --- expressions ---------------------------------------------------------------------------------------


def marking(path: Path) -> str:
    return f"$open({str(path)!r}, 'w').close()"


def places(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("imports#0", changed(imports=[text])),
        ("device", changed(device=text)),
        ("network_def", changed(network_def=text)),
        ("network_def#channels", changed(network_def={**UNET, "channels": text})),
        ("inferer#roi_size#1", changed(inferer={**INFERENCE["inferer"], "roi_size": [32, text, 16]})),
        ("preprocessing#transforms#3", with_step(text)),  # type: ignore[arg-type]  # a text in a step's place
        (
            "preprocessing#transforms#3#func",
            with_step({"_target_": "Lambdad", "keys": "image", "func": text}),
        ),
        ("run#0", changed(run=[text], initialize=[text])),
        (text, changed(**{text: 1})),
    ]


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("name", ["inference.json", "inference.yaml"])
def test_an_expression_anywhere_is_refused_by_its_place_and_nothing_ran(
    tmp_path: Path, place: int, name: str
) -> None:
    pytest.importorskip("yaml")  # JSON is YAML
    marker = tmp_path / "ran"
    where, content = places(marking(marker))[place]
    folder = write(tmp_path / "evil", content, name=name)
    with pytest.raises(ModelError, match="WSI361") as refusal:
        from_bundle(folder)
    assert where[:20] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ModelError):  # without its weights, in any case
        from_bundle(folder, skip_expressions=True)
    assert not marker.exists()


def test_expressions_that_are_not_needed_can_be_left_alone(bundle: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = marking(marker)
    content = changed(device=text, network="$@network_def.to(@device)", imports=["$import os"])
    content["preprocessing"]["transforms"][-1]["device"] = "@device"
    content["postprocessing"]["transforms"][3]["output_dir"] = "$@bundle_root + '/eval'"
    write(bundle, content)
    with pytest.raises(ModelError, match="WSI361"):
        from_bundle(bundle)
    assert isinstance(from_bundle(bundle, skip_expressions=True), BundleModel)
    content["inferer"]["overlap"] = text
    write(bundle, content)
    with pytest.raises(ModelError, match=r"WSI361 .*inferer#overlap"):
        from_bundle(bundle, skip_expressions=True)
    assert not marker.exists()


def test_trust_runs_what_is_needed(bundle: Path) -> None:
    content = changed(side="$2 * 8")
    content["inferer"]["roi_size"] = ["$4 * @side // 2", 24, 16]
    write(bundle, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert from_bundle(bundle, trust=True).spec.tile == (16, 24, 32)


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["os.system", "scripts.net.Mine", "builtins.eval", "monai.networks.nets.os", "FlexibleUNet", "unet"],
)
def test_networks_that_are_not_on_the_list_are_never_imported(tmp_path: Path, target: str) -> None:
    folder = write(tmp_path, changed(network_def={**UNET, "_target_": target}))
    (folder / "scripts").mkdir()
    (folder / "scripts" / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    before = set(sys.modules)
    with pytest.raises(ModelError, match=f"WSI362 .*{re.escape(target)}"):
        from_bundle(folder)
    assert not (tmp_path / "ran").exists()
    assert not {m for m in set(sys.modules) - before if m.startswith("scripts")}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"act": {"_target_": "os.getcwd"}}, "WSI362"),
        ({"pretrained": True}, "WSI362"),
        ({"spatial_dims": 2}, "WSI362"),
        ({"chanels": 3}, "WSI366"),
        ({"strides": [2, 2, 2], "channels": [4]}, "WSI366"),
    ],
)
def test_arguments_of_a_network_are_plain_and_right(
    bundle: Path, nets: Any, arguments: dict[str, Any], code: str
) -> None:
    write(bundle, changed(network_def={**UNET, **arguments}))
    with pytest.raises(ModelError, match=code):
        from_bundle(bundle)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"_target_": "Resized", "spatial_size": [96, 96, 96]}, "Resized"),
        ({"_target_": "mine.Orientationd", "axcodes": "RAS"}, "mine.Orientationd"),
        ({"_target_": "Orientationd", "axcodes": "RRS"}, "axcodes"),
        ({"_target_": "Spacingd", "pixdim": [1, 1]}, "pixdim"),
        ({"_target_": "Spacingd", "pixdim": [1, 1, 1], "mode": "nearest"}, "mode"),
        ({"_target_": "Spacingd", "pixdim": [1, 1, 1], "max_pixdim": 2.0}, "max_pixdim"),
        ({"_target_": "NormalizeIntensityd", "nonzero": True}, "nonzero"),
        ({"_target_": "ScaleIntensityd", "minv": -1.0}, "minv"),
        ({"_target_": "ScaleIntensityRanged", "a_min": 5, "a_max": 1}, "ascending"),
        ({"_target_": "ScaleIntensityd"}, "another intensity"),
        ({"_target_": "CropForegroundd", "source_key": "image"}, "CropForegroundd"),
        ({"_target_": "LoadImaged", "keys": ["image", "label"]}, "keys"),
    ],
)
def test_transforms_without_an_equal_are_refused_by_name(
    tmp_path: Path, step: dict[str, Any], said: str
) -> None:
    config = read(tmp_path, with_step({"keys": "image", **step}))
    with pytest.raises(ModelError, match=f"WSI363 .*{said}"):
        preparation(config, 1)


@pytest.mark.parametrize(
    "inferer",
    [
        {"_target_": "SimpleInferer"},
        None,
        {
            "_target_": "SlidingWindowInferer",
            "roi_size": [32, 32, 32],
            "mode": "gaussian",
            "sigma_scale": 0.25,
        },
        {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "overlap": 1.5},
        {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "padding_mode": "reflect"},
        {"_target_": "SlidingWindowInferer", "roi_size": -1},
    ],
)
def test_inferers_without_an_equal_are_refused(bundle: Path, inferer: Any) -> None:
    write(bundle, changed(inferer=inferer))
    with pytest.raises(ModelError, match="WSI363"):
        from_bundle(bundle)


def test_results_that_are_no_labels_are_refused(bundle: Path) -> None:
    content = changed()
    content["postprocessing"]["transforms"].insert(
        2, {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}
    )
    write(bundle, content)
    with pytest.raises(ModelError, match=r"WSI363 .*KeepLargest"):
        from_bundle(bundle)
    content["postprocessing"]["transforms"] = [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]
    write(bundle, content)
    with pytest.raises(ModelError, match=r"WSI363 .*postprocessing"):
        from_bundle(bundle)


@pytest.mark.parametrize(
    "content",
    [
        {"a": "@a"},
        {"a": "@b", "b": "@a"},
        {"a": "@nothing"},
        {"a": "@#b"},
        {"a": "%other.json::x"},
        {"a": {"b": "@a"}},
    ],
)
def test_references_lead_somewhere(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="WSI364"):
        read(tmp_path, content).value("a")


def test_references_are_followed(tmp_path: Path) -> None:
    config = read(tmp_path, {"a": ["@b#c", 1], "b": {"c": "@d::1"}, "d": [0, {"x": "@e"}], "e": 5})
    assert config.value("a") == [{"x": 5}, 1]
    assert config.value("b#c#x") is None


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": NaN', "a: !!python/object/apply:os.getcwd []", "&a [*a]"]
)
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, text: str) -> None:
    pytest.importorskip("yaml")
    for name in ("x.json", "x.yaml"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelError, match="WSI360"):
            read_file(tmp_path / name)


def test_a_page_of_aliases_is_not_unfolded(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(ModelError, match=r"WSI360 .*too many"):
        read_file(tmp_path / "x.yaml")


def test_missing_parts_are_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="WSI360"):
        from_bundle(tmp_path / "nowhere")
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(ModelError, match=r"WSI360 .*model\.pt is missing"):
        from_bundle(bundle)
    torch.save({"x": torch.zeros(1)}, bundle / "models" / "model.pt")
    with pytest.raises(ModelError, match="WSI301"):
        from_bundle(bundle)
