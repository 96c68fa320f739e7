"""Token classifiers: recorded logits, published files, and cell tokens against a plain loop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import detfill
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import ModelError
from wsitk.models.cellvit.classifier import LinearClassifier, cell_tokens, load_classifier

GOLDEN = Path(__file__).parent / "golden" / "cellvit"
OFFICIAL = json.loads((GOLDEN / "official_classifiers.json").read_text())
TOKENS = detfill.normal("classifier/tokens", (16, 1280))
SHAPES = {"fc1.weight": (128, 1280), "fc1.bias": (128,), "fc2.weight": (4, 128), "fc2.bias": (4,)}


def saved(path: Path, **change: object) -> Path:
    content = {
        "arch": "LinearClassifier",
        "epoch": 3,
        "model_state_dict": {name: torch.from_numpy(detfill.fill(name, s)) for name, s in SHAPES.items()},
        "config": {"data.dataset": "Some", "data.label_map.0": "Other", "data.label_map.2": "Epithelial"},
    }
    torch.save(content | change, path)
    return path


def recorded(name: str) -> np.ndarray:
    with np.load(GOLDEN / "classifiers.npz") as golden:
        return np.asarray(golden[name])


def check(network: LinearClassifier, logits: np.ndarray) -> None:
    with torch.inference_mode():
        np.testing.assert_allclose(network(torch.from_numpy(TOKENS)).numpy(), logits, atol=2e-5, rtol=0)
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        network.classify(TOKENS), shifted / shifted.sum(axis=1, keepdims=True), atol=1e-5
    )


def test_a_classifier_loads_and_gives_the_originals_logits(tmp_path: Path) -> None:
    network, info = load_classifier(saved(tmp_path / "c.pth"), embed_dim=1280)
    assert (info.embed_dim, info.hidden, info.named, info.dataset) == (1280, 128, True, "Some")
    assert [c.name for c in info.classes] == ["Other", "class 1", "Epithelial", "class 3"]
    assert len({c.color for c in info.classes}) == 4
    check(network, recorded("filled_1280_128_4"))


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_the_published_classifiers_load_as_they_are(name: str) -> None:
    folder = os.environ.get("WSITK_TEST_CLASSIFIERS")
    if not folder:
        pytest.skip("WSITK_TEST_CLASSIFIERS (CellViT++'s checkpoints/classifier/sam-h) is not set")
    facts = OFFICIAL[name]
    network, info = load_classifier(Path(folder) / f"{name}.pth", embed_dim=1280)
    assert info.sha256 == facts["sha256"]
    assert info.named == facts["has_label_map"]
    labels = [facts["config"].get(f"data.label_map.{i}", f"class {i}") for i in range(len(info.classes))]
    assert [c.name for c in info.classes] == labels
    check(network, recorded(f"official_{name}"))


@pytest.mark.parametrize(
    ("change", "embed_dim", "code"),
    [
        ({"arch": "CellViTSAM"}, None, "WSI304"),
        ({}, 384, "WSI308"),
        ({"model_state_dict": {}}, None, "WSI301"),
        (
            {"model_state_dict": {"fc1.weight": torch.zeros(3, 2), "fc2.weight": torch.zeros(2, 3)}},
            None,
            "WSI301",
        ),
        (
            {"model_state_dict": {"fc1.weight": torch.zeros(3), "fc2.weight": torch.zeros(2, 3)}},
            None,
            "WSI301",
        ),
        ({"config": {"data.label_map.4": "Beyond"}}, None, "WSI304"),
        ({"config": {"data.label_map.x": "None"}}, None, "WSI304"),
    ],
)
def test_what_is_no_classifier_is_refused(
    tmp_path: Path, change: dict[str, object], embed_dim: int, code: str
) -> None:
    with pytest.raises(ModelError, match=f"^{code} .*c.pth"):
        load_classifier(saved(tmp_path / "c.pth", **change), embed_dim)


def naive_tokens(tokens: np.ndarray, start: np.ndarray, stop: np.ndarray, patch: int) -> list[np.ndarray]:
    rows = []
    for (top, left), (bottom, right) in zip(start, stop, strict=True):
        box = tokens[:, top // patch : -(-bottom // patch), left // patch : -(-right // patch)]
        rows.append(box.reshape(len(tokens), -1).astype(np.float64).mean(axis=1))
    return rows


@settings(max_examples=60)
@given(st.data())
def test_cell_tokens_equal_a_plain_loop(data: st.DataObject) -> None:
    patch, h, w = (
        data.draw(st.sampled_from([1, 4, 16])),
        data.draw(st.integers(1, 7)),
        data.draw(st.integers(1, 7)),
    )
    edge = [
        [
            sorted((data.draw(st.integers(0, n * patch - 1)), data.draw(st.integers(0, n * patch - 1))))
            for n in (h, w)
        ]
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    box = np.array(edge)
    start, stop = box[:, :, 0], box[:, :, 1] + 1
    tokens = detfill.normal("cell tokens", (5, h, w))
    got = cell_tokens(tokens, start, stop - start, (h * patch, w * patch))
    np.testing.assert_allclose(got, naive_tokens(tokens, start, stop, patch), atol=1e-6)
    assert got.dtype == np.float32


def test_tokens_of_patches_that_do_not_divide_the_tile() -> None:
    tokens = np.arange(18 * 18, dtype=np.float32).reshape(1, 18, 18)  # Virchow: 256 px in 18 patches
    got = cell_tokens(
        tokens, np.array([[0, 0], [255, 255], [0, 0]]), np.array([[1, 1], [1, 1], [256, 256]]), (256, 256)
    )
    np.testing.assert_array_equal(got[:, 0], [0, 323, 161.5])
