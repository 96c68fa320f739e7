"""A folder of a card and weights is a model: the same as the one it was made from, or refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cellvit_golden import TINY_VIT, filled, one_thread
from safetensors.torch import save_file

from wsitk.card import write_card
from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.models.cellvit.folder import from_folder
from wsitk.models.cellvit.model import default_model
from wsitk.testing import SyntheticSlide

TINY = {
    "arch": "CellViT",
    "family": "dino",
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "extract_layers": [1, 2, 3, 4],
}
KINDS = [{"name": f"kind {i}", "color": [i, i, i]} for i in range(5)]


FEW = {"w": torch.zeros(2)}
"""Weights where the refusal comes before they matter."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Give a place for a model, and delete its weights afterwards: pytest keeps its folders."""
    yield tmp_path / "m"
    (tmp_path / "m" / "model.safetensors").unlink(missing_ok=True)


def write_folder(folder: Path, state: dict[str, torch.Tensor], **fields: Any) -> Path:
    """Write a model folder; `fields` replace those of a small card, None takes one out."""
    folder.mkdir(exist_ok=True)
    weights = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    content: dict[str, Any] = {
        "name": "mine",
        "version": "3",
        "summary": "A model of a test.",
        "paper": "none",
        "spacing_um": 0.25,
        "classes": KINDS,
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "size_bytes": weights.stat().st_size,
        "parameters": 1,
        "licence": "MIT",
        "data_licence": "CC0",
        "use": "Tests only.",
        "network": TINY,
        "normalisation": {"mean": [0.5, 0.6, 0.7], "std": [0.5, 0.4, 0.3]},
        "postprocessing": {"threshold": 0.45, "min_object_um2": 3.5},
        "training_data": [{"name": "none", "labels": "none", "licence": "none"}],
        "known_failures": {"all": "nobody has looked"},
    }
    content = {k: v for k, v in (content | fields).items() if v is not None}
    write_card(folder / "card.toml", content, overwrite=True)
    return folder


def test_the_shipped_network_in_a_folder_predicts_as_the_shipped_model(folder: Path) -> None:
    ours = default_model()
    norm = {"scale": 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    settings = ours._settings
    write_folder(
        folder,
        ours.network.state_dict(),
        spacing_um=0.25,
        classes=[{"name": "Nucleus", "color": [1, 2, 3]}],
        network={"arch": "compact"},
        normalisation=norm,
        postprocessing={n: getattr(settings, n) for n in settings.__dataclass_fields__},
    )
    model = from_folder(folder)
    spec, wanted = model.spec, ours.spec
    assert (spec.name, spec.version, spec.classes[0].color) == ("mine", "3", (1, 2, 3))
    for name in ("spacing", "tile", "halo", "align", "border", "fields", "object_columns", "objects"):
        assert getattr(spec, name) == getattr(wanted, name)
    assert (spec.licences.weights, spec.licences.data) == ("MIT", "CC0")
    image = SyntheticSlide.make((256, 256), count=20, radius=(8.0, 12.0), seed=3).pixels
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    with torch.inference_mode(), one_thread():
        a, b = model.predict(batch), ours.predict(batch)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    tile = TileGrid.fit(Region((0, 0), (256, 256)), (256, 256), (0, 0), align=(1, 1))[0]
    maps = {k: v[0].numpy() for k, v in a.items()}
    found, there = (m.postprocess(maps, tile).objects for m in (model, ours))
    assert found is not None
    assert there is not None
    assert len(found) > 5
    assert np.array_equal(found.anchor, there.anchor)


def test_a_cellvit_network_of_ones_own_comes_back_with_its_classes(folder: Path) -> None:
    network = filled("tiny_vit")
    model = from_folder(write_folder(folder, network.state_dict()))
    assert model.network.config == TINY_VIT  # type: ignore[comparison-overlap]  # a CellViT's
    assert all(torch.equal(v, model.network.state_dict()[k]) for k, v in network.state_dict().items())
    assert not model.network.training
    assert [c.name for c in model.spec.classes] == [k["name"] for k in KINDS]
    assert model.spec.fields[0].channels == ("Nuclei", *(str(k["name"]) for k in KINDS))
    assert (model.spec.tile, model.spec.align, model.spec.border) == ((1024, 1024), (16, 16), "constant")
    assert model._settings.threshold == 0.45
    assert model._mean.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        from_folder(folder)
    assert "\n" not in str(caught.value)
    return f"{caught.value.code} {caught.value.message}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"network": None}, "WSI318 .*network.arch is None, wanted one of compact, CellViT, CellViT-256"),
        ({"network": {"arch": "ResNet"}}, "WSI318 .*network.arch is 'ResNet'"),
        ({"network": {"arch": "compact", "depth": 3}}, "WSI318 .*'compact': .*depth"),
        ({"network": TINY | {"widht": 3}}, "WSI318 .*'CellViT': .*widht"),
        ({"network": TINY | {"depth": 10**9}}, "WSI318 .*depth is 1000000000"),
        ({"network": TINY | {"depth": "4"}}, "WSI318 .*'CellViT': "),
        ({"network": TINY | {"family": "cnn"}}, "WSI318 .*family is 'cnn'"),
        ({"network": TINY | {"extract_layers": [1, 2, 3]}}, "WSI318 .*extract_layers"),
        ({"classes": KINDS[:3]}, "WSI318 .*3 classes for a type map of 5"),
        ({"normalisation": None}, r"WSI318 .*no \[normalisation\]"),
        (
            {"normalisation": {"scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}},
            r"WSI318 .*no \[normalisation\] of pixels divided by 255",
        ),
        ({"postprocessing": {"threshhold": 0.5}}, r"WSI318 .*\[postprocessing\]: .*threshhold"),
        ({"network": TINY | {"depth": 5}}, "WSI301 .*'encoder.cls_token'"),
        ({"network": {"arch": "CellViT-256"}}, "WSI301 .* of 439 entries are missing"),
        ({"sha256": "0" * 64}, "WSI317 .*don't have sha256 000000000000"),
    ],
)
def test_what_the_card_says_wrongly_is_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    assert re.match(said, refusal(write_folder(folder, FEW, **fields)))


def test_a_folder_that_is_no_model_or_a_damaged_one_is_refused(folder: Path) -> None:
    assert refusal(folder).startswith("WSI314")
    write_folder(folder, FEW)
    weights, card = folder / "model.safetensors", folder / "card.toml"
    whole = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.unlink()
    assert refusal(folder).startswith("WSI317")
    weights.write_bytes(b"\xff" * 64)
    card.write_text(card.read_text("utf-8").replace(whole, hashlib.sha256(b"\xff" * 64).hexdigest()), "utf-8")
    assert refusal(folder).startswith("WSI303")
    state = filled("tiny_vit").state_dict() | {"encoder.norm.bias": torch.full((96,), float("nan"))}
    assert refusal(write_folder(folder, state)).startswith("WSI307")
