"""Token classifiers: their training, their file, and the tokens they learn from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cellvit_golden import TINY_VIT, filled_state, one_thread
from hypothesis import given
from hypothesis import strategies as st

from wsitk.errors import ModelError, OutputError, UsageError
from wsitk.models.cellvit.classifier import LinearClassifier, cell_tokens, load_classifier
from wsitk.models.cellvit.compact import compact_cellvit
from wsitk.models.cellvit.network import CellViT
from wsitk.models.cellvit.training import tokens as tokens_module
from wsitk.models.cellvit.training.head_scores import score_head
from wsitk.models.cellvit.training.heads import HeadConfig, save_head, split_groups, train_head
from wsitk.models.cellvit.training.tokens import (
    LabelledCells,
    TokenSet,
    cells_of_labels,
    encoder_tokens,
    extract_tokens,
    open_tokens,
)

QUICK = HeadConfig(hidden=16, batch=32, epochs=12, patience=4, learning_rate=3e-3)
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@cache
def blobs(cells: int = 600, spread: float = 1.0, scale: float = 1.0, seed: int = 0) -> TokenSet:
    """Return three classes as Gaussian blobs in 12 channels, spread over six patients."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, cells, p=(0.6, 0.3, 0.1)).astype(np.int16)
    centres = rng.normal(0, 2, (3, 12))
    values = (centres[labels] + rng.normal(0, spread, (cells, 12))) * scale + 3 * scale
    groups = rng.integers(0, 6, cells).astype(np.int32)
    names = tuple(f"patient {i}" for i in range(6))
    return TokenSet(values.astype(np.float32), labels, groups, ("a", "b", "c"), names)


@pytest.mark.parametrize("monitor", ["auroc", "f1"])
@pytest.mark.parametrize("weights", ["none", "inverse", "root"])
def test_separable_classes_are_learned(monitor: str, weights: str) -> None:
    config = replace(QUICK, monitor=monitor, class_weights=weights, dropout=0.1, label_smoothing=0.05)
    head = train_head(blobs(), config)  # type: ignore[arg-type]  # parameters are plain strings
    assert head.scores.macro_auroc > 0.99
    assert head.scores.macro_f1 > 0.95
    assert not head.network.training


def test_labels_without_meaning_are_not_learned() -> None:
    data = blobs()
    noise = np.random.default_rng(1).permutation(data.labels)
    assert abs(train_head(replace(data, labels=noise), QUICK).scores.macro_auroc - 0.5) < 0.2


def test_data_and_seed_decide_every_bit_and_nothing_else_does() -> None:
    config = replace(QUICK, dropout=0.2, fam="auto")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_head(blobs(), config).network.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = train_head(blobs(), config).network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_head(blobs(), replace(config, seed=20)).network.state_dict()
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_tokens_does_not_matter(scale: float) -> None:
    """Standardised training, folded into the first layer, sees the same numbers up to rounding."""
    plain, scaled = train_head(blobs(), QUICK), train_head(blobs(scale=scale), QUICK)
    assert scaled.scores.macro_auroc == pytest.approx(plain.scores.macro_auroc, abs=0.02)
    raw = train_head(blobs(scale=1e-4), replace(QUICK, standardise=False, epochs=2))
    assert raw.scores.macro_auroc < plain.scores.macro_auroc


def test_a_channel_that_never_changes_does_no_harm() -> None:
    data = blobs()
    tokens = np.column_stack(
        [data.tokens, np.full(len(data), 7e3, np.float32), np.zeros(len(data), np.float32)]
    )
    head = train_head(replace(data, tokens=tokens.astype(np.float32)), QUICK)
    assert head.scores.macro_auroc > 0.99


def test_the_scores_returned_are_those_of_the_classifier_returned() -> None:
    data = blobs(spread=3.0)
    head = train_head(data, QUICK)
    out = np.flatnonzero(np.isin(data.groups, [data.group_names.index(n) for n in head.held_out]))
    assert score_head(head.network, data, out) == head.scores
    best = max(head.history, key=lambda row: row["macro_auroc"])
    assert head.scores.macro_auroc == best["macro_auroc"]
    assert head.epoch == best["epoch"]


def test_training_stops_when_nothing_gets_better() -> None:
    rows: list[dict[str, float]] = []
    config = replace(QUICK, epochs=200, patience=3)
    head = train_head(blobs(spread=0.01), config, log=rows.append)
    assert rows == list(head.history)
    assert len(rows) == head.epoch + 1 + config.patience < 200


def test_held_out_groups_take_no_part_in_training() -> None:
    data = blobs()
    out = np.isin(data.groups, (1, 4))
    changed = np.array(data.tokens)
    changed[out] += 1000
    names = ("patient 1", "patient 4")
    config = replace(QUICK, epochs=3)
    same, other = (train_head(replace(data, tokens=t), config, names) for t in (data.tokens, changed))
    assert [r["training_loss"] for r in same.history] == [r["training_loss"] for r in other.history]
    assert same.held_out == names
    assert sum(same.scores.count) == out.sum()


def test_flatness_makes_the_last_layer_flatter() -> None:
    plain = train_head(blobs(spread=2.0), replace(QUICK, fam=0.0))
    flat = train_head(blobs(spread=2.0), replace(QUICK, fam=0.3))
    assert flat.history[-1]["kappa"] < 0.7 * plain.history[-1]["kappa"]
    without = train_head(blobs(spread=2.0), QUICK)
    assert "kappa" not in without.history[0]
    assert torch.equal(without.network.fc1.weight, plain.network.fc1.weight)


def test_scores_on_a_case_worked_out_by_hand() -> None:
    network = LinearClassifier(2, 2, 2)
    with torch.no_grad():
        for layer in (network.fc1, network.fc2):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    tokens = np.array([[3, 0], [2, 0], [0, 1], [1, 0], [0, 4], [0, 0]], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1], np.int16)
    data = TokenSet(tokens, labels, np.zeros(6, np.int32), ("a", "b"), ("g",))
    scores = score_head(network, data, np.arange(6))
    # Predicted: 0 0 1 0 1 0 (a tie goes to the first).
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.f1 == pytest.approx((2 * 2 / (3 + 4), 2 * 1 / (3 + 2)))
    # How much more b than a: -3, -2, 1 for those of a; -1, 4, 0 for those of b, above them in 2 + 3 + 2 pairs.
    assert scores.auroc == pytest.approx((7 / 9, 7 / 9))
    logits = np.maximum(tokens, 0).astype(np.float64)
    entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels]
    assert scores.loss == pytest.approx(entropy.mean())
    one = score_head(network, data, np.arange(3))
    assert one.count == (3, 0)
    assert np.isnan(one.f1[1])
    assert np.isnan(one.macro_auroc)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(0, 50), st.floats(0.05, 0.95))
def test_a_split_holds_out_some_groups_and_never_all(sizes: list[int], seed: int, share: float) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    names = tuple(f"g{i}" for i in range(len(sizes)))
    data = TokenSet(np.zeros((len(groups), 1), np.float32), groups.astype(np.int16), groups, names, names)
    out = split_groups(data, share, seed)
    assert 0 < len(out) < len(sizes)
    assert out == split_groups(data, share, seed)
    held = sum(sizes[names.index(n)] for n in out) / sum(sizes)
    assert abs(held - share) <= max(sizes) / sum(sizes) + abs(1 - share) * (len(out) == len(sizes) - 1)


def test_the_file_is_what_the_engine_loads_and_its_bytes_are_the_heads(tmp_path: Path) -> None:
    head = train_head(blobs(), replace(QUICK, epochs=2, fam="auto"))
    save_head(head, tmp_path / "head.pth", dataset="Blobs")
    save_head(head, tmp_path / "again.pth", dataset="Blobs")
    digests = {hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in ("head.pth", "again.pth")}
    assert len(digests) == 1
    network, info = load_classifier(tmp_path / "head.pth", embed_dim=12)
    assert (info.hidden, info.named, info.dataset) == (16, True, "Blobs")
    assert tuple(c.name for c in info.classes) == ("a", "b", "c")
    np.testing.assert_array_equal(network.classify(blobs().tokens), head.network.classify(blobs().tokens))
    with pytest.raises(ModelError, match="WSI308"):
        load_classifier(tmp_path / "head.pth", embed_dim=13)
    with pytest.raises(OutputError, match="WSI510"):
        save_head(head, tmp_path / "head.pth")


@pytest.mark.parametrize(
    ("change", "held_out"),
    [
        ({}, ("nobody",)),
        ({}, ()),
        ({}, tuple(f"patient {i}" for i in range(6))),
        ({"groups": np.zeros(600, np.int32), "group_names": ("one",)}, None),
        ({"classes": ("a", "b", "c", "d")}, None),
    ],
    ids=["unknown group", "nothing held out", "all held out", "one group", "class without a cell"],
)
def test_a_split_that_cannot_be_trained_on_is_refused(
    change: dict[str, object], held_out: tuple[str, ...] | None
) -> None:
    with pytest.raises(UsageError, match="WSI895"):
        train_head(replace(blobs(), **change), QUICK, held_out)  # type: ignore[arg-type]  # of mixed types


@pytest.mark.parametrize(
    "change", [{"hidden": 0}, {"dropout": 1.0}, {"validation_share": 1.0}, {"label_smoothing": -0.1}]
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        HeadConfig(**change)  # type: ignore[arg-type]  # of mixed types


# Tokens


@cache
def tiny() -> CellViT:
    network = CellViT(TINY_VIT)
    network.load_state_dict(filled_state("tiny_vit"))
    return network.eval()


def images(count: int = 3, size: tuple[int, int] = (64, 96)) -> Iterator[LabelledCells]:
    rng = np.random.default_rng(7)
    for index in range(count):
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        start = rng.integers(0, (size[0] - 20, size[1] - 20), (5, 2))
        label = rng.integers(-1, 2, 5)
        yield LabelledCells(image, start, rng.integers(4, 20, (5, 2)), label, f"slide {index % 2}")


def test_tokens_are_those_that_the_network_gives_when_it_runs(tmp_path: Path) -> None:
    network = tiny()
    data = extract_tokens(
        network, images(), tmp_path / "t", ("x", "y"), mean=MEAN, std=STD, facts={"from": "here"}
    )
    expected, labels, groups = [], [], []
    for index, cells in enumerate(images()):
        pixels = torch.from_numpy(cells.image).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
        with torch.inference_mode():
            grid = network(pixels)["tokens"][0].numpy()
        keep = cells.label >= 0
        expected.append(cell_tokens(grid, cells.start[keep], cells.shape[keep], (64, 96)))
        labels.append(cells.label[keep])
        groups.append(np.full(keep.sum(), index % 2))
    np.testing.assert_array_equal(data.tokens, np.concatenate(expected))
    np.testing.assert_array_equal(data.labels, np.concatenate(labels))
    np.testing.assert_array_equal(data.groups, np.concatenate(groups))
    assert data.group_names == ("slide 0", "slide 1")
    assert (data.classes, data.facts) == (("x", "y"), {"from": "here"})
    assert isinstance(data.tokens, np.memmap)
    assert not (tmp_path / ".t.partial").exists()


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        extract_tokens(tiny(), images(), tmp_path / name, ("x", "y"), mean=MEAN, std=STD)
    for file in ("tokens.npy", "labels.npy", "groups.npy", "tokens.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_image_of_any_size_is_mirrored_to_what_the_encoder_takes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 61, 3), np.uint8)
    cells = LabelledCells(image, np.array([[40, 50]]), np.array([[10, 11]]), np.array([0]), "g")
    data = extract_tokens(tiny(), [cells], tmp_path / "t", ("x",), mean=MEAN, std=STD)
    assert data.tokens.shape == (1, 96)
    mirrored = np.pad(image, ((0, 14), (0, 3), (0, 0)), mode="symmetric")
    whole = replace(cells, image=mirrored)
    again = extract_tokens(tiny(), [whole], tmp_path / "u", ("x",), mean=MEAN, std=STD)
    np.testing.assert_array_equal(data.tokens, again.tokens)


def test_large_images_pass_in_windows_and_each_cell_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that answers with the pixels' mean says for each cell where it was taken from."""
    monkeypatch.setattr(tokens_module, "TILE", 128)
    monkeypatch.setattr(tokens_module, "HALO", 32)
    seen = []

    def pixels(network: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(batch.shape[2:]))
        return torch.nn.functional.avg_pool2d(batch, 4)

    monkeypatch.setattr(tokens_module, "encoder_tokens", pixels)
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (300, 217, 3), np.uint8)
    start = rng.integers(0, (70, 50), (80, 2)) * 4
    shape = np.full((80, 2), 8)
    cells = LabelledCells(image, start, shape, np.arange(80) % 3, "g")
    data = extract_tokens(tiny(), [cells], tmp_path / "t", "xyz", mean=(0, 0, 0), std=(1, 1, 1))
    assert max(max(s) for s in seen) <= 128
    boxes = [image[y : y + 8, x : x + 8].reshape(-1, 3).mean(0) / 255 for y, x in start]
    table = np.column_stack([np.arange(80) % 3, np.array(boxes)])
    found = np.column_stack([data.labels, data.tokens])
    np.testing.assert_allclose(found[np.lexsort(found.T)], table[np.lexsort(table.T)], atol=1e-5)


def test_the_compact_network_has_tokens_too() -> None:
    network = compact_cellvit().eval()
    with torch.inference_mode():
        assert encoder_tokens(network, torch.zeros(1, 3, 256, 512)).shape == (1, 320, 8, 16)
    with pytest.raises(UsageError, match="WSI895"):
        encoder_tokens(torch.nn.Identity(), torch.zeros(1, 3, 16, 16))


def test_boxes_of_a_label_map_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    labels = np.kron(rng.integers(0, 9, (6, 7)), np.ones((3, 2), np.int64)) * 5
    ids, start, shape = cells_of_labels(labels)
    assert ids.tolist() == sorted(set(labels.ravel().tolist()) - {0})
    for number, low, size in zip(ids, start, shape, strict=True):
        rows, columns = np.nonzero(labels == number)
        assert low.tolist() == [rows.min(), columns.min()]
        assert (low + size).tolist() == [rows.max() + 1, columns.max() + 1]
    assert all(len(part) == 0 for part in cells_of_labels(np.zeros((4, 4), np.int32)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"label": np.full(5, 2)}, "WSI896"),
        ({"label": np.full(5, -2)}, "WSI896"),
        ({"start": np.full((5, 2), 60)}, "WSI896"),
        ({"start": np.full((5, 2), -1)}, "WSI896"),
        ({"shape": np.zeros((5, 2), np.int64)}, "WSI896"),
        ({"label": np.full(5, -1)}, "WSI895"),
    ],
)
def test_cells_that_cannot_be_are_refused(change: dict[str, np.ndarray], code: str, tmp_path: Path) -> None:
    cells = replace(next(images()), **change)  # type: ignore[arg-type]  # arrays, as the fields are
    with pytest.raises(UsageError, match=code):
        extract_tokens(tiny(), [cells], tmp_path / "t", ("x", "y"), mean=MEAN, std=STD)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("damage", ["none", "short", "json", "labels", "pickle"])
def test_a_damaged_folder_of_tokens_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    if damage != "none":
        extract_tokens(tiny(), images(), folder, ("x", "y"), mean=MEAN, std=STD)
    if damage == "short":
        os.truncate(folder / "tokens.npy", 300)
    elif damage == "json":
        (folder / "tokens.json").write_text("{}", encoding="utf-8")
    elif damage == "labels":
        np.save(folder / "labels.npy", np.full(len(np.load(folder / "labels.npy")), 9, np.int16))
    elif damage == "pickle":
        np.save(folder / "labels.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match="WSI897"):
        open_tokens(folder)
