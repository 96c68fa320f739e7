"""Made fields: exact masks, light that behaves like light, and a training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.models.liverstage.camera import Camera, photograph
from wsitk.models.liverstage.data import (
    CORE,
    Crops,
    Photograph,
    depths,
    normalised,
    read_photographs,
    sample,
    targets,
)
from wsitk.models.liverstage.fields import DNA, PARASITE, FieldRecipe, make_field
from wsitk.models.liverstage.network import UNetConfig
from wsitk.models.liverstage.shapes import blob, box_at, smooth_noise, spots
from wsitk.models.liverstage.training import FIT, FieldsConfig, LiverStageTask, loss_parts, train

CLEAR = Camera(
    defocus_um=(0.0, 1e-6), resized_px=(0.0, 1e-6), vignette=(0, 0), haze=(0.1, 0.11), electrons=(1000, 1001),
    read_noise=(1, 1.01), stretched=0.0, lines=0.0,
)  # fmt: skip
"""A camera that hides little."""


# --- shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "stretch", "wobble"), [(4, 1, 0), (12, 2, 0), (25, 1.3, 0.1), (9, 6, 0.05)]
)
def test_a_blob_has_the_area_that_was_asked_for(radius: float, stretch: float, wobble: float) -> None:
    for seed in range(5):
        made = blob(np.random.default_rng(seed), radius, stretch=stretch, wobble=wobble)
        area = np.count_nonzero(made.inside)
        assert area == pytest.approx(np.pi * radius**2, rel=0.15)
        assert ndimage.label(made.inside)[1] == 1
        light = made.thickness(0.5)
        assert light.max() <= 1.01
        assert not light[made.rho > 1 + 1 / radius].any()


def test_squares_meet_images_as_slow_loops_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        side, shape, centre = 2 * int(rng.integers(1, 9)) + 1, (15, 11), rng.uniform(-12, 25, 2)
        slow = np.zeros(shape)
        for y in range(side):
            for x in range(side):
                at = np.round(centre).astype(int) - side // 2 + (y, x)
                if (at >= 0).all() and (at < shape).all():
                    slow[tuple(at)] = y * side + x + 1
        fast, box = np.zeros(shape), box_at(centre, side, shape)
        if box is not None:
            fast[box[0]] = (np.arange(side**2).reshape(side, side) + 1)[box[1]]
        assert np.array_equal(fast, slow)


def test_noise_and_spots() -> None:
    rng = np.random.default_rng(1)
    noise = smooth_noise(rng, (120, 90), 6)
    assert noise.shape == (120, 90)
    assert abs(noise.mean()) < 0.6
    assert np.abs(np.diff(noise, axis=0)).max() < 0.6  # smooth
    where = np.zeros((40, 40), np.bool_)
    where[20, 20] = True
    drawn = spots(rng, where, 1, 2.0, 0.0)
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (20, 20)
    assert drawn.max() == pytest.approx(1, abs=0.05)
    assert not spots(rng, ~where & where, 5, 1.0).any()


# --- the camera ----------------------------------------------------------------------------------------


def test_light_comes_in_whole_photons() -> None:
    """Photon transfer: gain times electrons is the mean, gain squared times electrons the variance."""
    scene = np.ones((1, 300, 300), np.float32)
    scene[:, :, 150:] = 4
    grey = photograph(scene, 0.65, np.random.default_rng(2), CLEAR)[0].astype(np.float64)
    assert grey.max() not in (4095, 65535)  # nothing is saturated
    halves = grey[:, 10:140], grey[:, 160:290]
    one, other = ((h.mean(), (h - ndimage.gaussian_filter(h, 10)).var()) for h in halves)
    electrons = (other[0] - one[0]) ** 2 / (other[1] - one[1])
    assert electrons == pytest.approx(3 * 1000, rel=0.1)


def test_images_have_8_or_16_bits_and_saturate() -> None:
    kinds = set()
    for seed in range(12):
        made = make_field((96, 96), np.random.default_rng(seed))
        kinds.add(made.image.dtype.name)
        assert made.image.shape == (2, 96, 96)
        assert made.image.std() > 0
    assert kinds == {"uint8", "uint16"}


# --- fields --------------------------------------------------------------------------------------------


def fields(count: int = 8, **recipe: object) -> list:
    chosen = replace(FieldRecipe(), empty=0.0, camera=CLEAR, look_alikes=(0, 1e-9), **recipe)  # type: ignore[arg-type]  # numbers
    return [make_field((224, 224), np.random.default_rng(k), chosen) for k in range(count)]


def test_a_field_is_a_function_of_its_seed() -> None:
    one, same, other = (make_field((128, 96), np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.parasites, same.parasites)
    assert one.um_per_px == same.um_per_px != other.um_per_px
    assert one.image.shape == (2, 128, 96)


def test_parasites_are_where_the_masks_say() -> None:
    """The light inside the masks stands out from that around them, in the parasite's channel."""
    clear = 0
    for made in fields(contrast=(15, 25)):
        if not made.parasites.max():
            continue
        channel = made.image[PARASITE].astype(np.float64)
        inside = made.parasites > 0
        around = ndimage.binary_dilation(inside, iterations=12) & ~ndimage.binary_dilation(
            inside, iterations=6
        )
        assert channel[inside].mean() > 2 * np.median(channel[around])
        clear += 1
    assert clear >= 6


def test_masks_end_at_half_of_the_light() -> None:
    """For a flat, sharp, lonely parasite the pixels above half its brightness are its mask."""
    recipe = replace(
        FieldRecipe(), empty=0.0, parasites=(1, 1.01), median=(18, 20), spread=0.01, contrast=(60, 61), touching=0.0,
        camera=CLEAR, look_alikes=(0, 1e-9), um_per_px=(0.5, 0.51),
    )  # fmt: skip
    agreed = []
    for seed in range(12):
        made = make_field((256, 256), np.random.default_rng(seed), recipe)
        channel = ndimage.gaussian_filter(made.image[PARASITE].astype(np.float64), 0.7)
        for label, box in enumerate(ndimage.find_objects(made.parasites), 1):
            mask = made.parasites[box] == label
            if mask.sum() < 600:
                continue
            ground = np.median(channel)
            half = (channel[box] - ground) > (np.median(channel[box][mask]) - ground) / 2
            agreed.append((half & mask).sum() / (half | mask).sum())
    assert len(agreed) >= 8
    assert np.median(agreed) > 0.8


def test_sizes_stay_within_their_bounds() -> None:
    sizes = []
    for made in fields(12, median=(5, 30), touching=0.0, parasites=(6, 8)):
        for label, box in enumerate(ndimage.find_objects(made.parasites), 1):
            whole = all(s.start > 0 and s.stop < 224 for s in box)
            pixels = np.count_nonzero(made.parasites[box] == label)
            if whole:
                sizes.append(np.sqrt(pixels * 4 / np.pi) * made.um_per_px)
    assert len(sizes) > 15
    assert min(sizes) > 2.4  # 3.5 µm, of which another parasite may have taken a third
    assert max(sizes) < 62
    assert max(sizes) / min(sizes) > 3


def test_real_nuclei_take_the_place_of_made_ones() -> None:
    nuclei = np.zeros((128, 128))
    nuclei[40:60, 40:60] = 1
    recipe = replace(FieldRecipe(), camera=CLEAR, look_alikes=(0, 1e-9), empty=1.0)
    made = make_field((128, 128), np.random.default_rng(0), recipe, nuclei)
    assert not made.nuclei.any()
    channel = made.image[DNA].astype(float)
    assert channel[45:55, 45:55].mean() > 2 * channel[80:, 80:].mean()


def test_a_share_of_fields_is_empty() -> None:
    recipe = replace(FieldRecipe(), empty=1.0)
    made = make_field((128, 128), np.random.default_rng(0), recipe)
    assert not made.parasites.any()
    assert made.nuclei.any()


# --- what is learned from ------------------------------------------------------------------------------


def test_depth_is_that_of_a_slow_reading() -> None:
    labels = np.zeros((20, 24), np.int32)
    labels[2:9, 3:12] = 1
    labels[9:16, 5:20] = 2  # touches the first
    found = depths(labels)
    for label in (1, 2):
        inside, outside = np.argwhere(labels == label), np.argwhere(labels != label)
        far = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1) - 0.5
        assert found[labels == label] == pytest.approx(far / far.max(), abs=1e-6)
    assert not found[labels == 0].any()
    assert found.max() == 1
    both = targets(labels)
    assert np.array_equal(both[0], labels > 0)
    assert np.array_equal(both[1], found >= CORE)
    assert ndimage.label(both[1])[1] == 2  # cores part what touches


def test_samples_are_functions_of_their_seed_and_hold_what_they_say() -> None:
    crops = Crops(side=128, crop=64, each=2, blind=0.5)
    blind = 0
    for seed in range(6):
        made, found = sample(np.random.default_rng(seed), crops)
        _, again = sample(np.random.default_rng(seed), crops)
        for one, other in zip(found, again, strict=True):
            assert np.array_equal(one.image, other.image)
            assert one.image.dtype == np.float32
            assert one.image.shape == one.target.shape == (2, 64, 64)
            assert np.array_equal(one.target[0], one.labels > 0)
            blind += not one.image[DNA].any()
        if made.parasites.any():
            assert found[0].labels.any()  # every other crop shows one
    assert 0 < blind < 12


def test_photographs_are_read_with_their_masks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI621 no pictures"):
        read_photographs(tmp_path)
    image = np.zeros((40, 50), np.uint8)
    image[10:20, 10:20] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "without.png")
    np.savez(tmp_path / "a.npz", inst=(image > 0).astype(np.uint16))
    (read,) = read_photographs(tmp_path)
    assert read.name == "a"
    assert read.image.max() == pytest.approx(1)
    assert read.diameter == pytest.approx(np.sqrt(400 / np.pi))
    np.savez(tmp_path / "a.npz", inst=np.zeros((3, 3), np.uint16))
    with pytest.raises(UsageError, match=r"WSI621 a\.png"):
        read_photographs(tmp_path)


def test_fields_with_photographs_show_them() -> None:
    nuclei = np.zeros((70, 70), np.int32)
    nuclei[20:34, 20:34] = 1
    shown = Photograph("a", (nuclei > 0).astype(np.float32), nuclei)
    made, _ = sample(np.random.default_rng(1), Crops(side=128, crop=64, photographed=1.0), [shown])
    assert not made.nuclei.any()


# --- training ------------------------------------------------------------------------------------------

SMALL = FieldsConfig(
    UNetConfig(base=4, levels=3, dropout=(0.0, 0.1, 0.1)),
    Crops(side=80, crop=64, each=2, photographed=0, blind=0, recipe=FieldRecipe(empty=0, contrast=(20, 40))),
    fields=2,
    held_out=2,
)


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    one, other = (LiverStageTask(SMALL, [], seed=4) for _ in range(2))
    later = other.batch(5, 0, 1)
    assert all(torch.equal(v, one.batch(5, 0, 1)[k]) for k, v in later.items())
    assert later["image"].shape == (4, 2, 64, 64)
    halves = [one.batch(5, rank, 2)["image"] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), later["image"])
    assert not torch.equal(one.batch(6, 0, 1)["image"], later["image"])
    judged = [f.image for f in one.judged()]
    assert len(judged) == 2
    assert all(np.array_equal(a, f.image) for a, f in zip(judged, other.judged(), strict=True))


def test_the_loss_is_that_of_a_slow_reading_of_its_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64)
    target = torch.rand(2, 2, 5, 4, generator=draw, dtype=torch.float64)
    parts = loss_parts(logits, target)
    share, truth = 1 / (1 + np.exp(-logits.numpy())), target.numpy()
    both, sizes = (share * truth).sum((0, 2, 3)), (share + truth).sum((0, 2, 3))
    assert float(parts["dice"]) == pytest.approx(1 - ((2 * both + 1) / (sizes + 1)).mean())
    slow = -(truth * np.log(share) + (1 - truth) * np.log(1 - share))
    assert float(parts["foreground_entropy"]) == pytest.approx(slow[:, 0].mean())
    assert float(parts["core_entropy"]) == pytest.approx(slow[:, 1].mean())


def loss_of(folder: Path) -> NDArray[np.float64]:
    """Return the losses in a training's log."""
    rows = (folder / "log.csv").read_text().splitlines()
    place = rows[0].split(",").index("loss")
    return np.array([float(row.split(",")[place]) for row in rows[1:]])


def test_a_short_training_learns_resumes_and_leaves_weights(tmp_path: Path) -> None:
    settings = replace(
        FIT, steps=30, learning_rate=1e-2, average=0.9, precision="float32", validate_every=30, save_every=15,
        log_every=10,
    )  # fmt: skip
    outcome = train(None, tmp_path / "out", SMALL, settings)
    assert outcome.status == "done"
    assert set(outcome.scores) == {"dice", "f1", "precision", "recall"}
    losses = loss_of(tmp_path / "out")
    assert losses[-1] < 0.95 * losses[0]
    assert (tmp_path / "out" / "liverstage.safetensors").is_file()
    again = train(None, tmp_path / "out", SMALL, settings)
    assert again.scores == pytest.approx(outcome.scores, nan_ok=True)


def test_whole_fields_are_normalised_as_the_engine_does(tmp_path: Path) -> None:
    from wsitk.models.liverstage.model import spec_of
    from wsitk.sources import open_source
    from wsitk.sources.view import ViewRules
    from wsitk.sources.volume_grid import VolumeGrid, view_of

    made = make_field((90, 70), np.random.default_rng(3))
    source = open_source(np.moveaxis(made.image, 0, -1))
    spec = spec_of(("a", "b"))
    view = view_of(source, ViewRules(None, rules=spec.normalise, first=spec.normalise_first))
    grid = VolumeGrid(source, view)
    from wsitk.geometry import Region

    seen = grid.read(Region((0, 0), (90, 70))).pixels
    assert np.array_equal(np.moveaxis(seen, -1, 0), normalised(made.image))
