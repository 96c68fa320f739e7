"""Learning to denoise: the hybrid loss against its definition, crops that show no artifact, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from wsitk.errors import UsageError
from wsitk.models.artifusion.data import Crops, Place, clean_crops, is_clean, read_crops, write_crops
from wsitk.models.artifusion.demonstration import APART, CROP, part_of
from wsitk.models.artifusion.diffusion import Diffusion, hybrid_loss
from wsitk.models.artifusion.network import Denoiser, DenoiserConfig
from wsitk.models.artifusion.training import (
    DEMONSTRATION,
    DEMONSTRATION_FIT,
    FIT,
    ArtiFusionTask,
    LearnConfig,
    train,
)
from wsitk.training.settings import FitConfig

CONFIG = LearnConfig(
    DenoiserConfig(size=16, patch=2, width=16, depths=(1, 1), heads=(2, 2), drop_path=0.1),
    schedule="cosine",
    times=50,
    batch=4,
    weighting="min-snr",
    epoch_steps=3,
)

SETTINGS = FitConfig(
    seed=3,
    steps=6,
    learning_rate=2e-3,
    average=0.9,
    threads=1,
    schedule="constant",
    save_every=3,
    log_every=1,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def crops(count: int, side: int = 20) -> Crops:
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return Crops(pixels, tuple(Place("a.svs", 0, side * k) for k in range(count)))


def guess(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a network that says the same of everything."""
    said = torch.randn((1, 6, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x, t: said.expand(len(x), -1, -1, -1).tanh()


def test_the_hybrid_loss_is_its_definition() -> None:
    """Against torch's Gaussians: their divergence, and at time 0 the mass of a byte between its borders."""
    chain = Diffusion.of("linear", 200)
    rng = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (3, 3, 8, 8), generator=rng).double() / 127.5 - 1
    clean[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    noise = torch.randn(clean.shape, generator=rng, dtype=torch.float64)
    t, weights = torch.tensor([0, 1, 150]), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    simple, bound = hybrid_loss(chain, lambda x, told: guess(1)(x, told), clean, t, noise, weights)
    predicted, share = guess(1)(clean, t).chunk(2, dim=1)
    errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    assert float(simple) == pytest.approx(float((errors * weights).mean()), rel=1e-6)

    terms = []
    for k, time in enumerate(t.tolist()):
        signal, before, beta = chain.signal[time], chain.before[time], chain.betas[time]
        x = np.sqrt(signal) * clean[k] + np.sqrt(1 - signal) * noise[k]

        def mean(
            image: Tensor, x: Tensor = x, s: float = signal, b: float = before, v: float = beta
        ) -> Tensor:
            # the posterior by precisions: a prior around the clean image, and one step of noise
            prior, step = Normal(np.sqrt(b) * image, np.sqrt(1 - b) if b < 1 else 1e-9), np.sqrt(1 - v)
            weight = step**2 / v + 1 / prior.scale**2
            return torch.as_tensor((step * x / v + prior.loc / prior.scale**2) / weight)

        ours = mean((x - np.sqrt(1 - signal) * predicted[k]) / np.sqrt(signal))
        least = chain.variance[time] if time else chain.variance[1]
        between = (share[k] + 1) / 2
        scale = (0.5 * (between * np.log(beta) + (1 - between) * np.log(least))).exp()
        if time:
            term = kl_divergence(Normal(mean(clean[k]), np.sqrt(least)), Normal(ours, scale))
        else:
            said = Normal(ours, scale)
            above = torch.where(clean[k] > 0.999, torch.ones(()).double(), said.cdf(clean[k] + 1 / 255))
            below = torch.where(clean[k] < -0.999, torch.zeros(()).double(), said.cdf(clean[k] - 1 / 255))
            term = -(above - below).clamp(min=1e-12).log()
        terms.append(float(term.mean()) / np.log(2))
    assert float(bound) == pytest.approx(np.mean(terms) * 200 / 1000, rel=1e-4)


def test_the_bound_teaches_the_variance_alone() -> None:
    chain, clean = Diffusion.of("cosine", 50), torch.zeros(2, 3, 8, 8)
    said = torch.zeros(2, 6, 8, 8, requires_grad=True)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    _, bound = hybrid_loss(chain, lambda x, told: said, clean, torch.tensor([3, 0]), noise)
    bound.backward()  # type: ignore[no-untyped-call]
    assert said.grad is not None
    assert (said.grad[:, :3] == 0).all()
    assert (said.grad[:, 3:] != 0).any()


def test_the_default_is_the_papers_recipe() -> None:
    assert LearnConfig() == LearnConfig(DenoiserConfig(), "linear", 4000, 1, "none", 1000)
    assert (FIT.learning_rate, FIT.weight_decay, FIT.average) == (1e-4, 0.0, 0.9999)
    assert (FIT.schedule, FIT.precision, FIT.clip) == ("constant", "float32", None)
    assert sum(p.numel() for p in Denoiser(DEMONSTRATION.network).parameters()) * 2 < 12e6
    assert DEMONSTRATION_FIT.threads == 1


def test_a_batch_is_a_function_of_its_number() -> None:
    task, again = (ArtiFusionTask(CONFIG, crops(10), crops(2), 3) for _ in range(2))
    torch.rand(7)  # a global state that nothing may depend on
    for index in (5, 0, 12):
        one, two = task.batch(index, 0, 1), again.batch(index, 0, 1)
        assert all(torch.equal(one[name], two[name]) for name in one)
        halves = [task.batch(index, rank, 2) for rank in range(2)]
        for rank, half in enumerate(halves):
            assert all(torch.equal(half[name], one[name][rank::2]) for name in one)
        assert ((one["place"] * 4).long() == torch.arange(4)).all()
        assert one["image"].shape == (4, 3, 16, 16)
        assert one["image"].abs().max() <= 1


def test_every_crop_comes_once_in_every_pose() -> None:
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    gradient = Crops(pixels, tuple(Place("a", 0, k) for k in range(5)))
    task = ArtiFusionTask(CONFIG, gradient, crops(1), 3)
    seen = [float(task._crop(number)[0, 0, 0] + 1) * 127.5 for number in range(10)]
    assert sorted(round(s) for s in seen[:5]) == sorted(round(s) for s in seen[5:]) == list(range(5))
    corner = np.zeros((1, 16, 16, 3), np.uint8)
    corner[0, 0, 1] = 255
    task = ArtiFusionTask(CONFIG, Crops(corner, (Place("a", 0, 0),)), crops(1), 3)
    assert len({task._crop(number).numpy().tobytes() for number in range(80)}) == 8


def test_errors_of_the_clean_image_count_no_more_than_five_times() -> None:
    task = ArtiFusionTask(CONFIG, crops(4), crops(1), 3)
    t = torch.arange(50)
    weights = task._weights(t, torch.zeros((), dtype=torch.float64))
    assert weights is not None
    ratio = task.diffusion.signal / (1 - task.diffusion.signal)
    np.testing.assert_allclose(weights.numpy() * ratio, np.minimum(ratio, 5), rtol=1e-12)
    assert ArtiFusionTask(replace(CONFIG, weighting="none"), crops(4), crops(1), 3)._weights(t, t) is None


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = train(crops(10), crops(9), tmp_path / "whole", CONFIG, SETTINGS)
    assert whole.status == "done"
    assert set(whole.scores) == {"simple", "clean"}
    train(crops(10), crops(9), tmp_path / "parts", CONFIG, replace(SETTINGS, steps=3))
    train(crops(10), crops(9), tmp_path / "parts", CONFIG, SETTINGS)
    names = ("artifusion.safetensors", "checkpoint.safetensors")
    one, two = (load_file(tmp_path / folder / names[0]) for folder in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    learned = dict(Denoiser(CONFIG.network).named_parameters())
    assert set(one) == set(learned)
    assert all(value.dtype == torch.float16 for value in one.values())


def test_a_network_learns_what_all_crops_share(tmp_path: Path) -> None:
    pixels = np.full((8, 16, 16, 3), (200, 120, 160), np.uint8)
    flat = Crops(pixels, tuple(Place("a", 0, k) for k in range(8)))
    quick = replace(SETTINGS, steps=90, learning_rate=5e-3, average=None, save_every=90, validate_every=90)
    result = train(flat, flat, tmp_path, CONFIG, quick)
    untrained = ArtiFusionTask(CONFIG, flat, flat, 3)
    with torch.inference_mode():
        before = untrained.validate(untrained.network.eval())
    assert result.scores["simple"] < 0.5 * before["simple"]


def test_crops_smaller_than_the_network_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI643 crops of 15 px for a network of 16"):
        ArtiFusionTask(CONFIG, crops(2, 15), crops(2), 3)


# --- clean tissue ---------------------------------------------------------------------------------------


def tissue(side: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """Pink ground with grain and dark nuclei."""
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), (215, 150, 190), np.float32) + rng.normal(0, 12, (side, side, 1))
    for y, x in rng.integers(0, side, (side * side // 300, 2)):
        cv2.circle(pixels, (int(x), int(y)), 4, (80.0, 50.0, 120.0), -1)
    return np.asarray(pixels.clip(0, 255), np.uint8)


def test_what_is_no_clean_tissue_is_left_out() -> None:
    clean = tissue()
    assert is_clean(clean)
    assert not is_clean(np.asarray(cv2.GaussianBlur(clean, (0, 0), 4)))
    for colour, share in (
        ((20, 20, 25), 0.5),
        ((40, 160, 60), 0.2),
        ((30, 40, 190), 0.2),
        ((245, 245, 246), 0.6),
    ):
        spoiled = clean.copy()
        spoiled[: int(64 * share)] = colour
        assert not is_clean(spoiled), colour


def test_crops_go_to_the_disk_and_come_back(tmp_path: Path) -> None:
    picture = np.concatenate([tissue(128), np.full((128, 128, 3), 244, np.uint8)], axis=1)
    Image.fromarray(picture).save(tmp_path / "slide.png")
    found = list(clean_crops(tmp_path / "slide.png", 32, 0.5, own_um=0.25))
    assert {place.x for place, _ in found} <= {0, 32}
    assert {(place.image, place.y) for place, _ in found} <= {("slide.png", y) for y in (0, 32)}
    assert len(found) == 4
    assert write_crops(iter(found), tmp_path / "crops") == len(found)
    read = read_crops(tmp_path / "crops")
    assert read.places == tuple(place for place, _ in found)
    assert all((a == b).all() for a, (_, b) in zip(read.pixels, found, strict=True))
    left = read.where(lambda place: place.x == 0)
    assert len(left) == 2
    assert {place.x for place in left.places} == {0}


def test_crops_that_are_not_there_or_damaged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI641"):
        write_crops(iter([]), tmp_path)
    with pytest.raises(UsageError, match="WSI642"):
        read_crops(tmp_path / "none")
    write_crops(iter([(Place("a", 0, 0), tissue())]), tmp_path)
    (tmp_path / "crops.json").write_text(json.dumps([["a", 0, 0], ["b", 1, 1]]))
    with pytest.raises(UsageError, match="WSI642"):
        read_crops(tmp_path)


def test_no_held_out_crop_shares_a_pixel_with_training() -> None:
    for name, (axis, line) in APART.items():
        for first in range(line - 2 * CROP, line + CROP, 7):
            place = Place(name, first, 5) if axis == "y" else Place(name, 5, first)
            ends = first + CROP <= line
            wanted = "held_out" if first >= line else "training" if ends else "neither"
            assert part_of(place) == wanted
    assert part_of(Place("train_5_003.jpg", 0, 0)) == "held_out"
    assert part_of(Place("train_6_003.jpg", 0, 0)) == "training"
