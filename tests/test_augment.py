"""Augmentation: pure functions that keep labels valid, and image and labels together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.models.cellvit.training import optics, stain, warp
from wsitk.models.cellvit.training.augment import PAPER, PLAIN, RECIPES, STAIN, Recipe, augment, make_crop
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Example
from wsitk.testing.synthetic import SyntheticSlide, decode_labels

Array = NDArray[Any]

SEEDS = st.integers(0, 2**32)
LABELS = arrays(np.int32, (16, 12), elements=st.integers(-1, 3))


def synthetic(side: int = 128, count: int = 60, seed: int = 0) -> Example:
    """Nuclei whose number can be read back from their colour, so that image and labels judge each other."""
    slide = SyntheticSlide.make((side, side), count=count, radius=(4, 9), seed=seed)
    types = np.where(slide.labels > 0, 1 + slide.labels % 3, 0).astype(np.uint8)
    return Example(slide.pixels, slide.labels, types, 0.25, "Breast", "slide")


def check_valid(example: Example, smallest: int = warp.SPECK_PX) -> None:
    """Each instance is one piece of one type; the numbers have no gap; nothing is said of unlabelled pixels."""
    inst, types = example.inst, example.types
    numbers = np.unique(inst[inst > 0])
    assert numbers.tolist() == list(range(1, len(numbers) + 1))
    assert inst.min() >= UNLABELLED
    assert types is not None
    for number in numbers:
        mask = inst == number
        assert mask.sum() >= smallest
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
        assert len(np.unique(types[mask])) == 1
    assert (types[inst == UNLABELLED] == IGNORE).all()
    assert (types[inst == 0] == 0).all()


@settings(max_examples=50)
@given(LABELS, st.integers(1, 6))
def test_tidy_splits_drops_and_numbers(inst: Array, smallest: int) -> None:
    out, _ = warp.tidy(inst, None, smallest)
    pieces = []
    for number in np.unique(inst[inst > 0]):
        found, count = ndimage.label(inst == number, np.ones((3, 3)))
        pieces += [found == k for k in range(1, count + 1)]
    kept = [p for p in pieces if p.sum() >= smallest]
    assert out.max(initial=0) == len(kept)
    assert all(len(np.unique(out[p])) == 1 and out[p][0] > 0 for p in kept)
    assert all((out[p] == UNLABELLED).all() for p in pieces if p.sum() < smallest)
    assert ((out == 0) == (inst == 0)).all()
    assert (out[inst == UNLABELLED] == UNLABELLED).all()


@given(st.integers(0, 3), st.booleans(), st.booleans())
def test_symmetries_move_image_and_labels_alike(turns: int, mirror_x: bool, mirror_y: bool) -> None:
    example = synthetic(64, 20)
    moved = warp.symmetry(example, turns, mirror_x, mirror_y)
    assert (decode_labels(moved.image) == moved.inst).all()
    assert sorted(np.bincount(moved.inst.ravel())) == sorted(np.bincount(example.inst.ravel()))
    back = warp.symmetry(warp.symmetry(moved, 0, mirror_x, mirror_y), -turns)
    assert (back.image == example.image).all()
    assert (back.inst == example.inst).all()


@settings(max_examples=50)
@given(st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 90), st.integers(1, 90))
def test_a_window_says_nothing_of_what_lies_beyond(y: int, x: int, height: int, width: int) -> None:
    example = synthetic(48, 12)
    cut = warp.window(example, y, x, height, width)
    assert cut.image.shape == (height, width, 3)
    rows, columns = np.arange(y, y + height), np.arange(x, x + width)
    inside = np.outer((rows >= 0) & (rows < 48), (columns >= 0) & (columns < 48))
    assert (cut.inst[~inside] == UNLABELLED).all()
    assert cut.types is not None
    assert (cut.types[~inside] == IGNORE).all()
    expected = example.inst[np.ix_(rows.clip(0, 47), columns.clip(0, 47))]
    assert (cut.inst[inside] == expected[inside]).all()


@settings(max_examples=25)
@given(SEEDS)
def test_fit_of_true_size_is_a_window(seed: int) -> None:
    example = synthetic()
    crop = warp.fit(example, 64, 0.25, np.random.default_rng(seed))
    check_valid(crop)
    assert crop.image.shape == (64, 64, 3)
    inside = crop.inst > 0
    # labels still sit on the pixels that they sat on: the colours say which nucleus it was
    original = decode_labels(crop.image)
    assert (original[inside] > 0).all()
    for number in np.unique(crop.inst[inside]):
        assert len(np.unique(original[crop.inst == number])) == 1


@pytest.mark.parametrize(
    ("spacing_um", "zoom", "side"), [(0.25, 1, 64), (0.5, 1, 128), (0.5, 2, 64), (0.25, 0.5, 128)]
)
def test_fit_reads_as_much_tissue_as_the_crop_shows(spacing_um: float, zoom: float, side: int) -> None:
    """A grey ramp from left to right: its span in the crop tells how wide the window was."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, axis=0).repeat(3, axis=2)
    example = Example(ramp, np.zeros((200, 200), np.int32), None, 0.25)
    crop = warp.fit(example, 64, spacing_um, None, zoom)
    assert crop.spacing_um == spacing_um
    assert int(crop.image.max()) - int(crop.image.min()) == pytest.approx(side, abs=side / 64 + 1)


def test_fit_pads_a_small_image_and_says_so() -> None:
    example = synthetic(40, 10)
    crop = warp.fit(example, 64, 0.25, np.random.default_rng(0))
    assert (crop.inst == UNLABELLED).sum() >= 64 * 64 - 40 * 40
    assert crop.inst.max() > 0
    check_valid(crop)


def test_images_far_too_coarse_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI919"):
        warp.fit(Example(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.int32), None, 2.0), 64, 0.25)


@settings(max_examples=15)
@given(SEEDS)
def test_geometry_keeps_nuclei_on_their_labels(seed: int) -> None:
    """Where the moved image is the colour of a nucleus's middle, the moved label must be that nucleus."""
    example = synthetic()
    for moved in (
        warp.sized_crop(example, np.random.default_rng(seed)),
        warp.elastic(example, np.random.default_rng(seed)),
    ):
        check_valid(moved)
        assert moved.inst.shape == example.inst.shape
        eroded = ndimage.binary_erosion(moved.inst > 0, iterations=3) & (
            ndimage.minimum_filter(moved.inst, 5) > 0
        )
        dark = moved.image[..., 0] < 130  # nuclei are; tissue is brighter
        if eroded.sum() > 50:
            assert dark[eroded].mean() > 0.98
        far = ndimage.binary_erosion(moved.inst == 0, iterations=3)
        if far.sum() > 50:
            assert dark[far].mean() < 0.02


@settings(max_examples=15)
@given(SEEDS)
def test_elastic_keeps_about_as_many_nuclei_as_stay_in_view(seed: int) -> None:
    example = synthetic()
    moved = warp.elastic(example, np.random.default_rng(seed))
    assert 0.4 * example.inst.max() <= moved.inst.max() <= 1.05 * example.inst.max()


def test_a_mosaic_keeps_its_parts_apart() -> None:
    parts = [synthetic(32, 8, seed) for seed in range(4)]
    whole = warp.mosaic(parts)
    assert whole.inst.max() == sum(int(p.inst.max()) for p in parts)
    assert len(np.unique(whole.inst[whole.inst > 0])) == sum(len(np.unique(p.inst)) - 1 for p in parts)
    assert (whole.image[32:, :32] == parts[2].image).all()
    assert (decode_labels(whole.image[32:, 32:]) == parts[3].inst).all()
    with pytest.raises(UsageError, match="WSI919"):
        warp.mosaic(parts[:3])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_augmentation_is_pure_and_valid(recipe: Recipe) -> None:
    example = synthetic()
    before = example.image.copy(), example.inst.copy()
    changed = 0
    for seed in range(12):
        one, two = (make_crop(example, 96, 0.25, np.random.default_rng(seed), recipe) for _ in range(2))
        assert (one.image == two.image).all()
        assert (one.inst == two.inst).all()
        assert one.image.shape == (96, 96, 3)
        assert one.image.dtype == np.uint8
        assert one.spacing_um == 0.25
        check_valid(one)
        changed += not np.array_equal(
            one.image, make_crop(example, 96, 0.25, np.random.default_rng(seed), PLAIN).image
        )
    assert (example.image == before[0]).all()
    assert (example.inst == before[1]).all()
    assert changed == 0 if recipe == PLAIN else changed >= 10


def test_no_change_is_no_change() -> None:
    example = synthetic()
    same = augment(example, np.random.default_rng(0), PLAIN)
    assert (same.image == example.image).all()
    assert (same.inst == example.inst).all()


def test_the_paper_recipe_is_the_papers() -> None:
    """Probabilities of the published configuration, in its order."""
    listed = (
        "turn",
        "mirror_x",
        "mirror_y",
        "downscale",
        "blur",
        "noise",
        "jitter",
        "superpixels",
        "zoom_blur",
    )
    published = (0.5, 0.5, 0.5, 0.15, 0.2, 0.25, 0.2, 0.1, 0.1)
    assert tuple(getattr(PAPER, name) for name in listed) == published
    assert (PAPER.sized_crop, PAPER.elastic, PAPER.restain) == (0.1, 0.2, 0.0)


def test_one_change_more_leaves_the_others_as_they_were() -> None:
    """Each change has its own chances: turning one off must not reshuffle the rest."""
    example = synthetic()
    with_blur = augment(example, np.random.default_rng(5), Recipe(blur=1.0, elastic=1.0))
    without = augment(example, np.random.default_rng(5), Recipe(blur=0.0, elastic=1.0))
    assert (with_blur.inst == without.inst).all()
    assert (with_blur.image != without.image).any()


@pytest.mark.parametrize("wrong", [{"blur": 1.5}, {"zoom": 0.5}, {"stain_hue": -1.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="WSI902"):
        Recipe(**wrong)


@given(arrays(np.uint8, (6, 5, 3), elements=st.integers(1, 255)))
def test_unmixing_and_remixing_is_the_identity(image: Array) -> None:
    pixels = image.astype(np.float32)
    assert np.abs(stain.remix(stain.unmix(pixels)) - pixels).max() < 0.05


def test_restaining_without_spread_changes_nothing() -> None:
    pixels = synthetic().image.astype(np.float32)
    same = stain.restain(pixels, np.random.default_rng(0), amount=0, shift=0, hue=0)
    assert np.abs(same - np.maximum(pixels, 1)).max() < 0.1


def test_glass_stays_glass_and_pure_stains_come_apart() -> None:
    assert np.abs(stain.unmix(np.full((1, 3), 255.0, np.float32))).max() < 1e-5
    amounts = np.eye(3, dtype=np.float32) * 0.8
    assert stain.unmix(stain.remix(amounts)) == pytest.approx(amounts, abs=1e-4)


def test_estimated_stains_are_the_ones_that_were_mixed() -> None:
    rng = np.random.default_rng(0)
    true = np.array([[0.60, 0.75, 0.28], [0.15, 0.96, 0.24]], np.float32)
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    amounts = rng.exponential(0.5, (20_000, 2)).astype(np.float32)
    # every tissue has pixels of one stain only; the method needs them
    amounts[:2000, 0], amounts[2000:4000, 1] = 0, 0
    image = np.rint(255 * np.exp(-amounts @ true)).clip(1, 255).astype(np.uint8).reshape(100, 200, 3)
    found = stain.estimate_stains(image)
    assert (found[:2] * true).sum(1).min() > 0.995
    blank = np.full((50, 50, 3), 240, np.uint8)
    assert (stain.estimate_stains(blank) == stain.STAINS).all()


def test_stain_augmentation_moves_colour_not_structure(data: Path) -> None:
    """On real tissue: hue moves far, and light and dark stay where they are."""
    from wsitk.models.cellvit.training.patches import read_picture

    image = read_picture(data / "data" / "nuclei" / "consep256" / "train" / "train_1_000.jpg")
    pixels = image.astype(np.float32)
    moved = [stain.restain(pixels, np.random.default_rng(seed)) for seed in range(8)]
    shift = [np.abs(m.mean((0, 1)) - pixels.mean((0, 1))).max() for m in moved]
    assert np.median(shift) > 8
    grey = pixels.mean(2).ravel()
    assert min(np.corrcoef(grey, m.mean(2).ravel())[0, 1] for m in moved) > 0.8


@pytest.mark.parametrize(
    "change",
    [
        optics.downscale,
        optics.blur,
        optics.noise,
        optics.jitter,
        optics.superpixels,
        optics.zoom_blur,
        stain.degrade,
    ],
)
def test_optics_keep_the_mean_about(change: Any) -> None:
    image = synthetic().image
    means = []
    for seed in range(6):
        out = change(image, np.random.default_rng(seed))
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        means.append(out.mean())
    assert abs(np.mean(means) - image.mean()) < (40 if change is optics.jitter else 8)


def test_noise_and_blur_do_what_they_say() -> None:
    flat = np.full((128, 128, 3), 128, np.uint8)
    spreads = [optics.noise(flat, np.random.default_rng(s)).std() for s in range(20)]
    assert 0 <= min(spreads) <= max(spreads) <= np.sqrt(50) * 1.05 + 0.3
    noisy = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert optics.blur(noisy, np.random.default_rng(0)).std() < 0.5 * noisy.std()
    halves = optics.downscale(noisy, np.random.default_rng(0))
    assert (halves[::2, ::2] == halves[1::2, 1::2]).all()


def test_the_stain_recipe_varies_more_than_one_laboratory_does() -> None:
    assert STAIN.restain > 0.5
    example = synthetic()
    hues = [augment(example, np.random.default_rng(s), STAIN).image.mean((0, 1)) for s in range(30)]
    paper = [augment(example, np.random.default_rng(s), PAPER).image.mean((0, 1)) for s in range(30)]
    assert np.std(hues, axis=0).min() > np.std(paper, axis=0).max()
