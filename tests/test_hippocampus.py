"""The hippocampus model: its data, its training, and what the weights that ship do on cases they never saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import wsitk
from wsitk.card import read_card, write_card
from wsitk.errors import ModelError, UsageError
from wsitk.models.hippocampus import model as hippocampus
from wsitk.models.hippocampus.augment import Recipe, random_crop
from wsitk.models.hippocampus.cases import Case, find_cases, read_case
from wsitk.models.hippocampus.evaluate import case_scores, summary
from wsitk.models.hippocampus.network import CLASSES, narrow_stunet
from wsitk.models.hippocampus.training import (
    FIT,
    HippocampusTask,
    VolumeConfig,
    _dices,
    segmentation_loss,
    train,
)
from wsitk.models.nnunet.volume import VolumeModel
from wsitk.training.folds import split
from wsitk.volumes.nnunet_rules import gaussian, tile_starts
from wsitk.writers.base import sha256_file

FOLDER = Path(hippocampus.__file__).parent

STILL = Recipe(turn=0, scale=1, shift=0, bend=0, mirror=0, gain=1, offset=0, gamma=1, noise=0, blur=0)
"""Changes nothing."""


@pytest.fixture
def case() -> Case:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (20, 18, 14), np.uint8)
    return Case("a", rng.normal(size=labels.shape).astype(np.float32), labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six small volumes with a bright and a dark ball, as NIfTI: x first, as files have it."""
    rng = np.random.default_rng(5)
    for name in ("images", "labels"):
        (tmp_path / "cases" / name).mkdir(parents=True)
    for number in range(6):
        shape = (18, 24, 20 + number)
        at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        labels = np.zeros(shape, np.uint8)
        for k, middle in ((1, (9, 16, 12)), (2, (9, 8, 8))):
            labels[((at - middle - rng.uniform(-1, 1, 3)) ** 2).sum(-1) < 20] = k
        image = np.array([100, 180, 30])[labels] + rng.normal(0, 10, shape)
        for name, voxels in (("images", image.astype(np.float32)), ("labels", labels)):
            volume = nibabel.Nifti1Image(voxels, np.eye(4))
            volume.header.set_xyzt_units("mm")
            nibabel.save(volume, tmp_path / "cases" / name / f"case_{number:03}.nii.gz")
    return tmp_path / "cases"


# --- cases ---------------------------------------------------------------------------------------------


def test_no_case_is_on_both_sides_and_every_case_is_held_out_once() -> None:
    names = [f"case_{k}" for k in range(23)]
    parts = [split(names, 5, part) for part in range(5)]
    assert sorted(i for _, held_out in parts for i in held_out) == list(range(23))
    for learn, held_out in parts:
        assert sorted({*learn, *held_out}) == list(range(23))
        assert not {*learn} & {*held_out}
    turned = names[::-1]
    assert {turned[i] for i in split(turned, 5, 2)[1]} == {names[i] for i in parts[2][1]}
    assert split(names, 5, 0, seed=1) != split(names, 5, 0)


def test_a_case_is_read_in_the_axes_of_the_engine_and_normalised(folder: Path) -> None:
    image, labels = find_cases(folder)[3]
    case = read_case(image, labels)
    stored = np.asarray(nibabel.load(image).dataobj, np.float64).T
    assert case.name == "case_003"
    assert case.image.shape == (23, 24, 18)
    assert np.allclose(case.image, (stored - stored.mean()) / stored.std(), atol=1e-5)
    assert np.array_equal(case.labels, np.asarray(nibabel.load(labels).dataobj).T)


def test_data_that_are_no_cases_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI885 no NIfTI files in"):
        find_cases(tmp_path)
    with pytest.raises(UsageError, match=r"WSI885 .*wanted 0, 1, 2"):
        read_case(*[find_cases(folder)[0][0]] * 2)
    with pytest.raises(UsageError, match="WSI885"):
        read_case(find_cases(folder)[0][0], find_cases(folder)[1][1])
    (folder / "labels" / "case_001.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"WSI885 .*case_001\.nii\.gz is not there"):
        find_cases(folder)


# --- augmentation --------------------------------------------------------------------------------------


def test_a_crop_that_changes_nothing_is_the_case_padded_with_zeros(case: Case) -> None:
    image, labels = random_crop(case, (20, 22, 14), np.random.default_rng(1), STILL)
    assert np.allclose(image[:, 2:20], case.image, atol=1e-5)
    assert np.array_equal(labels[:, 2:20], case.labels)
    for outside in (slice(0, 2), slice(20, 22)):
        assert not labels[:, outside].any()
        assert np.abs(image[:, outside]).max() < 1e-4


def test_left_and_right_change_places_and_nothing_else(case: Case) -> None:
    mirrored = replace(STILL, mirror=1.0)
    image, labels = random_crop(case, case.image.shape, np.random.default_rng(1), mirrored)
    assert np.allclose(image[:, :, ::-1], case.image, atol=1e-4)
    assert np.array_equal(labels[:, :, ::-1], case.labels)


def test_labels_move_with_the_image() -> None:
    """A smooth image whose value tells the label: well inside it, after any change of place it still does."""
    at = np.stack(np.meshgrid(*(np.arange(30) - 14.5,) * 3, indexing="ij"), -1)
    smooth = (at @ np.array([0.1, 0.2, 0.3])).astype(np.float32)
    case = Case("a", smooth, (smooth > 0).astype(np.uint8))
    for seed in range(5):
        place = replace(Recipe(), shift=-9, gain=1, offset=0, gamma=1, noise=0, blur=0)
        image, labels = random_crop(case, (8, 8, 8), np.random.default_rng(seed), place)
        sure = np.abs(image) > 0.35  # a voxel's half diagonal away from the boundary
        assert np.array_equal(labels[sure], image[sure] > 0)
        assert sure.sum() > 200


def test_a_crop_depends_on_its_chance_alone(case: Case) -> None:
    crops = [random_crop(case, (16, 16, 8), np.random.default_rng(s), Recipe()) for s in (3, 3, 4)]
    assert np.array_equal(crops[0][0], crops[1][0])
    assert not np.array_equal(crops[0][0], crops[2][0])
    assert crops[0][0].dtype == np.float32
    assert np.isfinite(crops[0][0]).all()


# --- training ------------------------------------------------------------------------------------------

SMALL = VolumeConfig(base=4, levels=2, shape=(16, 24, 16), batch=2, parts=3, augment=STILL)


def test_a_batch_is_a_pure_function_of_its_number(case: Case) -> None:
    cases = [replace(case, name=str(k), image=case.image + k) for k in range(3)]
    one, other = (HippocampusTask(SMALL, cases, [], seed=4) for _ in range(2))
    later = other.batch(5, 0, 1)
    assert all(torch.equal(v, one.batch(5, 0, 1)[k]) for k, v in later.items())
    assert later["image"].shape == (2, 1, 16, 24, 16)
    halves = [one.batch(5, rank, 2)["image"] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), later["image"])
    seen = [one.batch(k, 0, 1)["image"][:, 0, 8, 12, 8] for k in range(3)]  # two laps of three cases
    assert len(set(torch.cat(seen)[:3].tolist())) == 3


def test_the_loss_is_that_of_a_slow_reading_of_its_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 3, 4, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 3, 4, 5), generator=draw)
    overlap, entropy = segmentation_loss(logits, labels)
    share = np.exp(logits.numpy())
    share /= share.sum(1, keepdims=True)
    truth = labels.numpy()
    slow = []
    for k in (1, 2):
        both, sizes = (share[:, k] * (truth == k)).sum(), share[:, k].sum() + (truth == k).sum()
        slow.append((2 * both + 1) / (sizes + 1))
    assert float(overlap) == pytest.approx(1 - np.mean(slow))
    picked = [share[n, truth[n, z, y, x], z, y, x] for n, z, y, x in np.ndindex(truth.shape)]
    assert float(entropy) == pytest.approx(-np.log(picked).mean())


def test_a_short_training_learns_resumes_and_leaves_weights(folder: Path, tmp_path: Path) -> None:
    settings = replace(
        FIT, steps=60, learning_rate=1e-2, average=0.9, precision="float32", validate_every=60, save_every=30
    )
    outcome = train(folder, tmp_path / "out", SMALL, settings)
    assert outcome.status == "done"
    assert outcome.scores["dice"] > 0.6  # a ball of 4 voxels; what has learned nothing finds a tenth
    assert set(outcome.scores) == {"dice", "dice_anterior", "dice_posterior"}
    again = train(folder, tmp_path / "out", SMALL, settings)
    assert again.scores == outcome.scores
    loaded = hippocampus.from_folder(_described(tmp_path / "out", base=4, levels=2))
    cases = [read_case(*pair) for pair in find_cases(folder)]
    held_out = [cases[i] for i in split([c.name for c in cases], 3, 0)[1]]
    found = np.mean([_dices(loaded.network, case) for case in held_out])
    assert found == pytest.approx(outcome.scores["dice"], abs=0.01)  # kept in half precision


def _described(folder: Path, **network: Any) -> Path:
    """Write the shipped card into a training's folder, with what is its own."""
    weights = folder / "hippocampus.safetensors"
    own = {
        "weights": weights.name,
        "sha256": sha256_file(weights),
        "network": {"arch": hippocampus.ARCH, **network},
    }
    write_card(folder / "card.toml", {**read_card(FOLDER / "card.toml").content, **own})
    return folder


# --- figures -------------------------------------------------------------------------------------------


def test_figures_of_one_case() -> None:
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:6, 2:6, 2:6], truth[7:11, 7:11, 7:11] = 1, 2
    assert set(case_scores(truth, truth, (1.0, 1.0, 1.0)).values()) == {1.0}
    moved = np.roll(np.where(truth == 1, truth, 0), 1, axis=0) + np.where(truth == 2, truth, 0)
    scores = case_scores(truth, moved, (1.0, 1.0, 1.0))
    assert scores["dice_anterior"] == pytest.approx(0.75)
    assert scores["nsd_anterior"] == 1.0  # a voxel is 1 mm, and that is the tolerance
    assert scores["dice"] == pytest.approx(0.875)
    assert case_scores(truth, moved, (2.0, 1.0, 1.0))["nsd_anterior"] < 0.75
    table = summary([("a", scores), ("b", case_scores(truth, truth, (1.0, 1.0, 1.0)))])
    assert table["dice"] == pytest.approx(0.9375)
    assert table["dice_ci95"] == [0.875, 1.0]


# --- the weights that ship -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> VolumeModel:
    return hippocampus.default_model()


def test_the_weights_are_those_of_the_card_and_small(shipped: VolumeModel) -> None:
    card = read_card(FOLDER / "card.toml")
    assert card.verified()
    assert card.weights.stat().st_size == card.content["size_bytes"] < 8_000_000
    assert sum(p.numel() for p in shipped.network.parameters()) == card.content["parameters"]
    assert [c.name for c in shipped.spec.classes] == list(CLASSES[1:])
    assert shipped.spec.spacing == (1000.0, 1000.0, 1000.0)
    assert {p.dtype for p in shipped.network.parameters()} == {torch.float32}
    assert not shipped.network.training
    assert card.content["licence"] == "CC-BY-SA-4.0"
    held_out = card.content["measured"]["held_out"]
    assert held_out["dice"] >= 0.85


def test_other_weights_or_another_network_are_refused(tmp_path: Path) -> None:
    card = read_card(FOLDER / "card.toml")
    (tmp_path / "weights").mkdir()
    with pytest.raises(ModelError, match=r"WSI317 .* are not there"):
        hippocampus.from_folder(_copy(tmp_path, card.content))
    weights = tmp_path / card.content["weights"]
    weights.write_bytes(card.weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=r"WSI317 .* don't have sha256"):
        hippocampus.from_folder(tmp_path)
    for network, said in (
        ({"arch": "compact"}, "WSI318 .*wanted 'stunet-narrow'"),
        ({"arch": hippocampus.ARCH, "width": 3}, "WSI318 .*width"),
        ({"arch": hippocampus.ARCH, "base": 0}, "WSI318 .*base 0"),
        ({"arch": hippocampus.ARCH, "base": 8}, "WSI301"),
    ):
        weights.write_bytes(card.weights.read_bytes())
        with pytest.raises(ModelError, match=said):
            hippocampus.from_folder(_copy(tmp_path, {**card.content, "network": network}))


def _copy(folder: Path, content: Mapping[str, Any]) -> Path:
    write_card(folder / "card.toml", content, overwrite=True)
    return folder


def test_stages_are_as_many_as_asked_for() -> None:
    network = narrow_stunet(base=3, levels=2).eval()
    assert network.config.dims == (3, 6, 12)
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 4, 8, 12))["logits"].shape == (1, 3, 4, 8, 12)


def naive(model: VolumeModel, image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return labels (z, y, x) of a normalised volume: nnU-Net's sliding window over all of it at once."""
    tile = model.spec.tile
    window = gaussian(tile)
    total = np.zeros((len(CLASSES), *image.shape), np.float64)
    inside = np.zeros(tile, np.float32)
    for start in product(*tile_starts(image.shape, tile, model.spec.step)):
        reach = [
            (max(s, 0), min(s + t, n)) for s, t, n in zip(start, tile, image.shape, strict=True)
        ]  # fmt: skip
        there = tuple(slice(*r) for r in reach)
        here = tuple(slice(a - s, b - s) for (a, b), s in zip(reach, start, strict=True))
        inside[:] = 0
        inside[here] = image[there]
        with torch.inference_mode():
            features = model.predict(torch.from_numpy(inside.copy())[None, None])
            views = model.head(features, "labels", 0, len(CLASSES)).softmax(1)
        total[(slice(None), *there)] += (views.mean(0).numpy() * window)[(slice(None), *here)]
    return total.argmax(0).astype(np.uint8)


def held_out(data: Path) -> list[Case]:
    pairs = find_cases(data / "data" / "radiology" / "msd_hippocampus")
    names = [image.name.partition(".")[0] for image, _ in pairs]
    return [read_case(*pairs[i]) for i in split(names, 5, 0)[1]]


def test_the_engine_gives_what_a_sliding_window_over_everything_gives(
    data: Path, tmp_path: Path, shipped: VolumeModel
) -> None:
    """On the held-out case that needs the most tiles; and the labels lie on the input's own grid."""
    case = max(held_out(data), key=lambda c: c.image.size)
    path = data / "data" / "radiology" / "msd_hippocampus" / "images" / f"{case.name}.nii.gz"
    result = wsitk.run(shipped, path, out=tmp_path, device="cpu", workers=1)
    volume = nibabel.load(result.path / "labels.nii.gz")
    assert np.array_equal(volume.affine, nibabel.load(path).affine)
    labels, wanted = np.asarray(volume.dataobj).T, naive(shipped, case.image)
    # the engine adds in float32: a voxel between two parts may fall to either side
    assert np.count_nonzero(labels != wanted) <= 2
    assert any(n > t for n, t in zip(case.image.shape, shipped.spec.tile, strict=True))


def test_held_out_cases_are_segmented(data: Path, shipped: VolumeModel) -> None:
    cases = held_out(data)[::4]
    scores = [case_scores(c.labels, naive(shipped, c.image), (1.0, 1.0, 1.0)) for c in cases]
    assert np.mean([s["dice"] for s in scores]) > 0.85
    assert np.mean([s["nsd"] for s in scores]) > 0.9


def test_the_other_side_of_a_brain_is_its_mirror_image(data: Path, shipped: VolumeModel) -> None:
    """With `mirror`, mirrored input gives mirrored labels."""
    both = hippocampus.default_model(mirror=True)
    case = held_out(data)[0]
    found = naive(both, case.image)
    turned = naive(both, np.ascontiguousarray(case.image[:, :, ::-1]))
    assert (found != turned[:, :, ::-1]).mean() < 1e-3  # tiles of odd excess lie a voxel apart
    assert case_scores(case.labels, found, (1.0, 1.0, 1.0))["dice"] > 0.8


@pytest.mark.slow
def test_the_cards_figures_are_those_of_the_weights(data: Path, shipped: VolumeModel) -> None:
    card = read_card(FOLDER / "card.toml").content["measured"]["held_out"]
    cases = held_out(data)
    assert len(cases) == card["images"]
    found = summary([(c.name, case_scores(c.labels, naive(shipped, c.image), (1.0,) * 3)) for c in cases])
    wanted = {
        f"{figure}{suffix}": table[figure]
        for suffix, table in (("", card), *((f"_{n.lower()}", t) for n, t in card["per_class"].items()))
        for figure in ("dice", "nsd")
    }
    assert len(wanted) == 6
    assert {figure: found[figure] for figure in wanted} == pytest.approx(wanted, abs=0.002)
    assert found["dice_ci95"] == pytest.approx(card["dice_ci95"], abs=0.005)
