"""Mirror U-Net: upstream's names and numbers for every task, level and depth; CT and PET the right way round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from radiology_fill import load_filled

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.mirror_unet.model import INTENSITIES, MirrorUNetModel, from_checkpoint, is_ours
from wsitk.models.mirror_unet.network import MirrorConfig, MirrorUNet, config_of
from wsitk.torchfile import read_tensors

GOLDEN = Path(__file__).parent / "golden" / "radiology" / "mirror_unet"

VARIANTS = {
    "segmentation": MirrorConfig(),
    "segmentation_d2": MirrorConfig(depth=2),
    "segmentation_l1": MirrorConfig(level=1),
    "segmentation_l4": MirrorConfig(level=4),
    "segmentation_lth": MirrorConfig(ct_share=None),
    "transference": MirrorConfig("transference"),
    "transference_d3": MirrorConfig("transference", depth=3),
    "fission": MirrorConfig("fission"),
    "fission_classification": MirrorConfig("fission_classification"),
}


def empty(config: MirrorConfig) -> MirrorUNet:
    with torch.device("meta"):
        return MirrorUNet(config)


def filled(config: MirrorConfig) -> MirrorUNet:
    network = empty(config).to_empty(device="cpu")
    load_filled(network)
    return network


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(data / "golden" / "radiology" / "mirror_unet" / "golden.npz", allow_pickle=False) as file:
        return dict(file)


# --- the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_the_state_has_upstreams_names_and_shapes_in_its_order(name: str) -> None:
    wanted = [line.split() for line in (GOLDEN / f"keys_{name}.txt").read_text().splitlines()]
    found = [
        [key, str(t.dtype).removeprefix("torch."), "x".join(map(str, t.shape)) or "scalar"]
        for key, t in empty(VARIANTS[name]).state_dict().items()
    ]
    assert found == wanted


def check(name: str, golden: dict[str, Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = filled(VARIANTS[name])(x)
    output = found["output"]
    assert list(output.shape) == golden[f"{name}_shape"].tolist()
    wanted = golden[f"{name}_val"]
    got = output.numpy().ravel()[golden[f"{name}_idx"]]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    return dict(found)


def test_depth_three_gives_the_golden_vectors(golden: dict[str, Any]) -> None:
    found = check("transference_d3", golden, torch.from_numpy(golden["x"]))
    assert torch.equal(found["output"], torch.cat([found["ct"], found["segmentation"]], dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in VARIANTS if n not in ("transference_d3", "fission_classification")]
)
def test_every_variant_gives_the_golden_vectors(name: str, golden: dict[str, Any]) -> None:
    check(name, golden, torch.from_numpy(golden["x"]))


@pytest.mark.parametrize(
    ("task", "depth", "level"),
    [
        *(("segmentation", 1, k) for k in range(7)),
        ("transference", 2, 3),
        ("fission", 3, 3),
        ("fission_classification", 1, 6),
    ],
)
def test_a_checkpoint_tells_its_variant(task: Any, depth: int, level: int) -> None:
    config = MirrorConfig(task, depth, level)
    state = empty(config).state_dict()
    assert config_of(state) == config
    assert config_of(dict(list(state.items())[:-1])) is None


@pytest.mark.parametrize("level", [0, 3, 6])
def test_what_is_shared_is_what_the_level_names(level: int) -> None:
    config = MirrorConfig(level=level)
    network = empty(config)
    stages = [
        network.down_1,
        network.down_2,
        network.up_1,
        network.up_2,
        network.common_downs,
        network.common_ups,
    ]
    bottoms = 1 if config.shared_bottom else 2
    # one of the eighteen stages of two U-Nets serves both
    assert sum(len(s) for s in stages) + bottoms == 2 * (4 + 4 + 1) - 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "guessing"}, "task 'guessing'"),
        ({"depth": 4}, "depth 4"),
        ({"level": 7}, "level 7"),
        ({"ct_share": 1.5}, r"ct_share 1\.5"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"WSI352 .*{said}"):
        MirrorConfig(**options)


# --- from a checkpoint to labels -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a checkpoint as upstream's trainer writes it, of the task with all outputs."""
    path = tmp_path_factory.mktemp("mirror") / "net_key_metric.pt"
    torch.manual_seed(3)
    network = MirrorUNet(MirrorConfig("fission_classification"))
    torch.save({"net": network.state_dict(), "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def model(saved: Path) -> MirrorUNetModel:
    return from_checkpoint(saved)


def test_upstreams_checkpoints_open_as_they_are(saved: Path, model: MirrorUNetModel) -> None:
    assert is_ours(read_tensors(saved))
    network = model.network
    assert isinstance(network, MirrorUNet)
    assert network.config == MirrorConfig("fission_classification")
    assert model.spec.align == (96, 96, 96)
    assert model.spec.step == 0.75
    assert model.spec.labels[0].channels == ("background", "lesion")


def test_other_weights_are_refused(data: Path) -> None:
    path = data / "golden" / "radiology" / "containers" / "mirror_net.pt"
    assert not is_ours(read_tensors(path))
    with pytest.raises(ModelError, match="WSI353"):
        from_checkpoint(path)


def test_intensities_are_upstreams() -> None:
    ct, pet = (rule.numbers() for rule in INTENSITIES)
    np.testing.assert_allclose(
        ct(np.array([-1000.0, -100, 75, 250, 3000])), [-18 / 7, 0, 0.5, 1, 62 / 7], rtol=1e-6
    )
    np.testing.assert_allclose(pet(np.array([0.0, 7.5, 15, 60])), [0, 0.5, 1, 4], rtol=1e-6)


def test_axes_are_turned_for_the_network_and_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = tmp_path / "net.pt"
    torch.save(MirrorUNet(MirrorConfig("transference", depth=3)).state_dict(), path)
    model = from_checkpoint(path)
    path.unlink()
    assert model.spec.align == (16, 16, 16)
    x = torch.rand(1, 2, 16, 32, 48)
    with torch.inference_mode():
        found = model.predict(x)
        wanted = model.network(x.transpose(2, 4))
    for name in ("ct", "segmentation"):
        assert torch.equal(found[name], wanted[name].transpose(2, 4))
    assert "output" not in found
    region = Region((0, 0, 0), (16, 32, 48))
    field = model.postprocess({k: v[0].numpy() for k, v in found.items()}, Tile(0, region, region)).fields[
        "lesions"
    ]
    assert np.asarray(field).shape == (2, 16, 32, 48)
    with pytest.raises(ModelError, match="WSI354"):
        model.predict(torch.zeros(1, 2, 16, 16, 40))


def test_the_lesion_classifier_reads_a_whole_cube(golden: dict[str, Any]) -> None:
    network = filled(MirrorConfig("fission_classification"))
    with torch.inference_mode():
        deep = torch.zeros(1, 256, 6, 6, 6)
        found = network.fc(network.flatten_channels(deep))
    assert found.shape == (1, 1)
    assert 0 < float(found) < 1
