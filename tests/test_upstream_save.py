"""Checkpoints that we write in upstream's container: as good as upstream's own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cellvit_golden import CONFIGS, TINY_SAM, TINY_VIT, check_against_golden, filled, manifest

from wsitk.errors import ModelError, OutputError
from wsitk.model import ObjectClass
from wsitk.models.cellvit import checkpoint
from wsitk.models.cellvit.checkpoint import PANNUKE, load_checkpoint, save_upstream_checkpoint
from wsitk.models.cellvit.compact import compact_cellvit
from wsitk.models.cellvit.config import VARIANTS
from wsitk.models.cellvit.network import CellViT, empty_network

VARIANT_OF = {
    "cellvit256": ("CellViT256", None),
    "sam_b": ("CellViTSAM", "SAM-B"),
    "sam_l": ("CellViTSAM", "SAM-L"),
    "sam_h": ("CellViTSAM", "SAM-H"),
    "uni": ("CellViTUNI", None),
    "virchow": ("CellViTVirchow", None),
    "virchow2": ("CellViTVirchow2", None),
}


@pytest.fixture
def path(tmp_path: Path) -> Any:
    """Give a place for a large file, and take it away afterwards: pytest keeps its folders."""
    file = tmp_path / "saved.pth"
    yield file
    file.unlink(missing_ok=True)


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(
        v.dtype == two[k].dtype and torch.equal(v.view(torch.uint8), two[k].view(torch.uint8))
        if v.dim()
        else torch.equal(v, two[k])
        for k, v in one.items()
    )


def test_a_published_variant_comes_back_bit_by_bit(path: Path) -> None:
    network = filled("cellvit256")
    save_upstream_checkpoint(path, network, mixed_precision=True)
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert (content["arch"], content["config"]["data.magnification"]) == ("CellViT256", 40)
    assert [(k, tuple(v.shape)) for k, v in content["model_state_dict"].items()] == [
        (name, shape) for name, shape, _ in manifest("cellvit256")
    ]
    loaded, info = load_checkpoint(path)
    assert same_bits(network, loaded)
    assert (info.variant, info.config, info.classes) == ("CellViT-256", VARIANTS["CellViT-256"], PANNUKE)
    assert (info.spacing_um, info.mixed_precision, info.mean) == (0.25, True, (0.5,) * 3)
    check_against_golden(loaded, "cellvit256", 224, 224)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_vit_reg"])
def test_a_generic_network_with_classes_of_its_own_comes_back(path: Path, name: str) -> None:
    network = filled(name)
    classes = [ObjectClass(f"kind {i}", (i, i, i)) for i in range(5)]
    wishes = {"magnification": 20, "mean": (0.7, 0.6, 0.5), "std": (0.1, 0.2, 0.3)}
    save_upstream_checkpoint(path, network, classes=classes, config={"run.note": "ours"}, **wishes)
    loaded, info = load_checkpoint(path)
    assert same_bits(network, loaded)
    assert info.config == CONFIGS[name]
    assert [c.name for c in info.classes] == [c.name for c in classes]
    assert (info.spacing_um, info.mean, info.std) == (0.5, (0.7, 0.6, 0.5), (0.1, 0.2, 0.3))
    config = torch.load(path, weights_only=True)["config"]
    assert config["run.note"] == "ours"
    assert all(isinstance(v, str | int | float | list) for v in config.values())


@pytest.mark.parametrize("name", VARIANT_OF)
def test_every_published_variant_is_recognised_whatever_its_classes(name: str) -> None:
    config = replace(CONFIGS[name], nuclei_classes=3, tissue_classes=2, regression=True, dropout=0.1)
    arch, settings = checkpoint._upstream_architecture(empty_network(config))
    assert (arch, settings.get("model.backbone")) == VARIANT_OF[name]


def test_the_same_network_gives_the_same_bytes_and_views_do_not_swell_the_file(path: Path) -> None:
    network = CellViT(TINY_VIT)
    save_upstream_checkpoint(path, network)
    first = hashlib.sha256(path.read_bytes()).hexdigest()
    bias = network.encoder.norm.bias
    bias.data = torch.cat([bias.data, torch.zeros(3_000_000)])[: len(bias)]
    with pytest.raises(OutputError, match="WSI510"):
        save_upstream_checkpoint(path, network)
    save_upstream_checkpoint(path, network, overwrite=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first


def refusal(network: torch.nn.Module, **wishes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        save_upstream_checkpoint("never-written.pth", network, **wishes)
    assert "\n" not in str(caught.value)
    return f"{caught.value.code} {caught.value.message}"


def test_what_upstream_cannot_hold_is_refused() -> None:
    with torch.device("meta"):
        compact = compact_cellvit()
    assert refusal(compact).startswith("WSI315 a CompactCellViT has no architecture")
    assert refusal(empty_network(TINY_SAM)).startswith("WSI315 upstream has no architecture for")
    network = CellViT(TINY_VIT)
    assert refusal(network, classes=PANNUKE[:3]).startswith("WSI316 3 different classes for a type map of 5")
    assert refusal(network, classes=[*PANNUKE[:4], PANNUKE[0]]).startswith("WSI316 4 different")
    dotted = [*PANNUKE[:4], ObjectClass("a.b", (0, 0, 0))]
    assert refusal(network, classes=dotted).startswith("WSI316 class 'a.b'")
    assert refusal(network, magnification=10).startswith("WSI316 magnification is 10")
    network.encoder.adapter = torch.nn.Linear(2, 2)
    assert refusal(network).startswith("WSI315 2 entries are not those of a plain CellViT ('encoder.adapter")
    del network.encoder.adapter
    network.encoder.norm.bias.data[3] = float("nan")
    assert refusal(network).startswith("WSI307 'encoder.norm.bias'")
    assert not Path("never-written.pth").exists()
