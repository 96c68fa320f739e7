"""Regions restored through windows: what a result may depend on, and what it may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from wsitk.card import write_card
from wsitk.errors import ModelError, UsageError
from wsitk.geometry import Region
from wsitk.models.artifusion.diffusion import Diffusion
from wsitk.models.artifusion.fill import membrane
from wsitk.models.artifusion.model import (
    AFFORDABLE,
    ArtiFusion,
    default_model,
    from_checkpoint,
    from_folder,
)
from wsitk.models.artifusion.network import Denoiser, DenoiserConfig
from wsitk.models.artifusion.repaint import Known, repaint
from wsitk.models.artifusion.restore import Chain, Damaged, Restorer, Sampling
from wsitk.models.artifusion.schedule import jump_times, spaced_times
from wsitk.models.artifusion.windows import Lattice
from wsitk.noise import normal_noise
from wsitk.writers.base import sha256_file

CONFIG = DenoiserConfig(size=32, width=16, depths=(1, 2), heads=(2, 2), drop_path=0.0)

QUICK = Sampling("ddim", steps=4, jump_length=2, jump_n_sample=2, eta=0.5)

SAMPLINGS = [QUICK, Sampling("repaint", 4, 2, 2), Sampling("dpm++", 6, 2, 2, start=0.5, average=2)]

Bits = NDArray[np.bool_]
Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> Denoiser:
    """A network of random weights: whatever it predicts, it predicts from all that it sees."""
    torch.manual_seed(0)
    network = Denoiser(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def restorer(network: Denoiser, sampling: Sampling = QUICK, batch: int = 2, seed: int = 7) -> Restorer:
    return Restorer(network, sampling, seed, 32, chain=Chain("cosine", 100), compute_batch=batch)


def picture(height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def blob(shape: tuple[int, int], y: int, x: int, height: int, width: int) -> Bits:
    mask = np.zeros(shape, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def regions(count: int) -> list[Damaged]:
    """Regions of various sizes, places and masks, of one window and of several."""
    found = []
    for k in range(count):
        shape = (34 + 4 * k, 62 - 4 * k)
        mask = blob(shape, 2 * k, 5, 9 + k, 8 + k) | blob(shape, 28, 30, 4, 3)
        found.append(Damaged(picture(*shape, k), mask, (100 * k - 150, 17 * k)))
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_of_seven_is_seven_batches_of_one(network: Denoiser, sampling: Sampling) -> None:
    model, every = restorer(network, sampling), regions(7)
    together = model.restore_many(every)
    for region, found in zip(every, together, strict=True):
        alone = model.restore(region.image, region.mask, region.start_yx)
        assert found.tobytes() == alone.tobytes()


def test_no_order_matters(network: Denoiser) -> None:
    model, every = restorer(network), regions(5)
    forward = model.restore_many(every)
    back = model.restore_many(every[::-1])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(forward, back[::-1], strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_mask_is_restored_alike_in_any_region_with_its_margin(
    network: Denoiser, sampling: Sampling
) -> None:
    model = restorer(network, sampling)
    image = picture(260, 240)
    mask = blob((260, 240), 100, 90, 45, 30)
    whole = model.restore(image, mask | blob((260, 240), 5, 5, 9, 9), (-30, 1000))
    inner = np.s_[100 - model.margin : 145 + model.margin, 90 - model.margin : 120 + model.margin]
    cut = model.restore(image[inner], mask[inner], (-30 + 100 - model.margin, 1000 + 90 - model.margin))
    assert whole[inner][mask[inner]].tobytes() == cut[mask[inner]].tobytes()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_is_known_stays_and_what_is_masked_does_not_matter(
    network: Denoiser, sampling: Sampling
) -> None:
    model, image = restorer(network, sampling), picture(70, 64)
    mask = blob((70, 64), 0, 10, 20, 15)
    found = model.restore(image, mask, (3, 4))
    assert found.dtype == np.float32
    assert (found[~mask] == image[~mask]).all()
    assert found.min() >= 0
    assert found.max() <= 255
    other = image.copy()
    other[mask] = picture(70, 64, 9)[mask]
    assert model.restore(other, mask, (3, 4)).tobytes() == found.tobytes()
    assert (found[mask] != image[mask]).any()


def test_samples_seeds_and_places_differ(network: Denoiser) -> None:
    image, mask = picture(40, 40), blob((40, 40), 12, 12, 10, 10)
    found = [
        restorer(network).restore(image, mask, (0, 0)),
        restorer(network).restore(image, mask, (0, 0), sample=1),
        restorer(network).restore(image, mask, (0, 0), sample=2),
        restorer(network, seed=8).restore(image, mask, (0, 0)),
        restorer(network).restore(image, mask, (0, 1)),
    ]
    assert len({f.tobytes() for f in found}) == len(found)
    again = restorer(network).restore(image, mask, (0, 0))
    assert again.tobytes() == found[0].tobytes()


def test_the_mean_of_samples(network: Denoiser) -> None:
    model, image, mask = restorer(network), picture(40, 40), blob((40, 40), 12, 12, 10, 10)
    each = np.stack([model.restore(image, mask, (0, 0), k) for k in range(3)]).astype(np.float64)
    found = model.restore_mean(image, mask, (0, 0), 3)
    np.testing.assert_allclose(found.image, each.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.deviation, each.std(axis=0), atol=1e-2)
    assert (found.deviation[~mask] == 0).all()
    assert (found.image[~mask] == image[~mask]).all()


def test_a_result_may_be_the_mean_of_a_pair(network: Denoiser) -> None:
    image, mask = picture(40, 40), blob((40, 40), 12, 12, 10, 10)
    pair = restorer(network, replace(QUICK, average=2)).restore(image, mask, (0, 0), sample=1)
    each = [restorer(network).restore(image, mask, (0, 0), k) for k in (2, 3)]
    np.testing.assert_allclose(pair, (each[0] + each[1]) / 2, atol=1e-3)
    assert replace(QUICK, average=2).evaluations == 2 * QUICK.evaluations


def test_nothing_masked_changes_nothing_and_all_masked_is_refused(network: Denoiser) -> None:
    model, image = restorer(network), picture(40, 50)
    assert (model.restore(image, np.zeros((40, 50), bool), (0, 0)) == image).all()
    with pytest.raises(UsageError, match=r"WSI640 the mask covers all of the 40 x 50 px"):
        model.restore(image, np.ones((40, 50), bool), (0, 0))
    with pytest.raises(UsageError, match="WSI645"):
        model.restore(image[:31], np.zeros((31, 50), bool), (0, 0))
    with pytest.raises(UsageError, match="WSI645"):
        model.restore(image, np.zeros((40, 49), bool), (0, 0))


def test_one_window_is_the_sampler_itself(network: Denoiser) -> None:
    """Without overlap and on the lattice, a restoration is RePaint with the keyed noise, no more."""
    model = Restorer(network, Sampling("repaint", 6, 2, 2), 5, 32, 0, chain=Chain("linear", 50))
    image, mask = picture(32, 32), blob((32, 32), 8, 10, 12, 9)
    found = model.restore(image, mask, (64, -32), sample=3)
    known = Known(
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1,
        torch.from_numpy(~mask)[None, None],
    )

    def noise(k: int) -> torch.Tensor:
        # the odd sample of the second pair
        return -torch.from_numpy(normal_noise((5, 1, k), (0, 64, -32), (3, 32, 32)))[None]

    chain = Diffusion.of("linear", 50, spaced_times(50, [6]))
    with torch.inference_mode():
        *_, last = repaint(network, chain, jump_times(6, 2, 2).tolist(), known, noise)
    wanted = (last.image[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    np.testing.assert_allclose(found[mask], wanted.numpy()[mask], atol=2e-2)


def test_overlapping_windows_agree_at_every_step(network: Denoiser) -> None:
    """Against a slow DDIM whose windows are looped over and averaged pixel by pixel, in double precision."""
    model = restorer(network, Sampling("ddim", 5, 5, 1))
    image, mask = picture(72, 61), blob((72, 61), 20, 22, 30, 21)
    found = model.restore(image, mask, (11, 23))
    lattice, chain = Lattice(32, 12), Diffusion.of("cosine", 100, spaced_times(100, [5]))
    pads = 32
    grown = np.pad(image, ((pads, pads), (pads, pads), (0, 0)), mode="reflect").astype(np.float64) / 127.5 - 1
    keep = ~np.pad(mask, pads, mode="reflect")
    x = normal_noise((7, 0, 0), (0, 11 - pads, 23 - pads), (3, *keep.shape)).astype(np.float64)
    starts = [(y, x) for y in range(-21, 72) for x in range(-31, 61) if (y + 11) % 20 == 0 == (x + 23) % 20]
    places = [
        (y, x)
        for y, x in starts
        if mask[max(0, y + 1) : max(0, y + 31), max(0, x + 1) : max(0, x + 31)].any()
    ]
    for t in range(4, -1, -1):
        total, weight = np.zeros((6, *keep.shape)), np.zeros(keep.shape)
        for place in places:
            at = tuple(slice(p + pads, p + pads + 32) for p in place)
            with torch.inference_mode():
                told = torch.tensor([float(chain.times[t])])
                seen = network(torch.from_numpy(x[:, *at])[None].float(), told)[0].numpy()
            total[:, *at] += seen * lattice.weights
            weight[at] += lattice.weights
        noise = total[:3] / np.where(weight > 0, weight, 1)
        signal, after = chain.signal[t], chain.signal[t - 1] if t else 1.0
        clean = ((x - np.sqrt(1 - signal) * noise) / np.sqrt(signal)).clip(-1, 1)
        clean = np.where(keep, grown.transpose(2, 0, 1), clean)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * (x - np.sqrt(signal) * clean) / np.sqrt(1 - signal)
    wanted = ((x[:, pads:-pads, pads:-pads].transpose(1, 2, 0) + 1) * 127.5).clip(0, 255)
    np.testing.assert_allclose(found[mask], wanted[mask], atol=0.1)


@given(
    size=st.integers(4, 40),
    share=st.floats(0, 0.5),
    start=st.tuples(st.integers(-100, 100), st.integers(-100, 100)),
    seed=st.integers(0, 99),
)
def test_every_masked_pixel_has_a_window_that_answers_for_it(
    size: int, share: float, start: tuple[int, int], seed: int
) -> None:
    lattice = Lattice(size, int(share * size))
    mask = np.random.default_rng(seed).random((50, 37)) < 0.01
    windows, answered = lattice.windows(mask, start), np.zeros((50, 37), bool)
    assert windows == sorted(windows)
    for y, x in windows:
        assert (y + start[0]) % lattice.stride == 0 == (x + start[1]) % lattice.stride
        middle = [slice(max(0, p + lattice.rim), max(0, p + size - lattice.rim)) for p in (y, x)]
        assert mask[*middle].any()
        answered[*middle] = True
    assert answered[mask].all()
    groups = lattice.groups(windows)
    assert sorted(w for group in groups for w in group) == windows
    for one in groups:
        for other in groups:
            near = any(abs(a - c) < size and abs(b - d) < size for a, b in one for c, d in other)
            assert near == (one is other)


def test_weights_of_neighbours_sum_to_one() -> None:
    lattice = Lattice(64, 24)
    axis = lattice.weights.max(axis=0)
    inner = (
        axis[lattice.stride + lattice.rim :][: 24 - 2 * lattice.rim] + axis[lattice.rim : 24 - lattice.rim]
    )
    np.testing.assert_allclose(inner, 1, atol=1e-6)
    assert (lattice.weights > 0).all()
    with pytest.raises(ValueError, match="overlap 33 of windows of 64"):
        Lattice(64, 33)


def test_a_membrane_keeps_what_is_known_and_is_flat_between() -> None:
    y, x = np.mgrid[:50, :70]
    ramp = np.stack([2 * y + x, 3 * x, np.full_like(x, 9)], axis=-1).astype(np.float32)
    keep = ~blob((50, 70), 10, 20, 25, 31)
    found = membrane(np.where(keep[..., None], ramp, 255), keep)
    assert (found[keep] == ramp[keep]).all()
    np.testing.assert_allclose(found, ramp, atol=3)
    np.testing.assert_allclose(found[..., 2], 9, atol=1e-5)
    assert membrane(ramp, np.ones((50, 70), bool)) is ramp


def test_noise_belongs_to_its_place() -> None:
    whole = normal_noise((1, -2, 3), (0, -40, 7), (3, 300, 200))
    assert abs(float(whole.mean())) < 0.01
    assert abs(float(whole.std()) - 1) < 0.01
    part = normal_noise((1, -2, 3), (1, 10, 20), (2, 30, 40))
    assert part.tobytes() == np.ascontiguousarray(whole[1:, 50:80, 13:53]).tobytes()
    for key in ((1, -2, 4), (2, -2, 3), (1, -2)):
        other = normal_noise(key, (0, -40, 7), (3, 300, 200))
        assert abs(float((whole * other).mean())) < 0.01


# --- the model as the engine sees it --------------------------------------------------------------------


def card(folder: Path) -> dict[str, object]:
    weights = folder / "weights.safetensors"
    return {
        "name": "artifusion-test",
        "version": "1",
        "summary": "Random weights.",
        "paper": "none",
        "spacing_um": 0.5,
        "classes": [{"name": "Tissue", "color": [200, 120, 160]}],
        "weights": weights.name,
        "sha256": sha256_file(weights),
        "size_bytes": weights.stat().st_size,
        "parameters": 1,
        "licence": "CC0-1.0",
        "data_licence": "none",
        "use": "Tests.",
        "network": {
            "arch": "artifusion", "size": 32, "width": 16, "depths": [1, 2], "heads": [2, 2], "drop_path": 0.0,
            "schedule": "cosine", "times": 100,
        },
        "training_data": [{"name": "none", "labels": "none", "licence": "none"}],
        "known_failures": {"all": "random"},
    }  # fmt: skip


@pytest.fixture
def folder(network: Denoiser, tmp_path: Path) -> Path:
    learned = {name: value.detach().half() for name, value in network.named_parameters()}
    save_file(learned, tmp_path / "weights.safetensors")
    write_card(tmp_path / "card.toml", card(tmp_path))
    return tmp_path


def test_a_folder_is_a_model_that_paints_regions(folder: Path) -> None:
    model = from_folder(folder, QUICK)
    assert model.spec.restores
    assert model.spec.spacing == (0.5, 0.5)
    assert model.spec.halo == (30, 30)
    assert "ddim 4/2x2 eta 0.5" in model.spec.version
    assert from_folder(folder).sampling == AFFORDABLE
    image, mask = picture(60, 50), blob((60, 50), 20, 20, 9, 9)
    found = model.process_region(image, mask, Region((5, 6), (60, 50)), seed=3, sample=1)
    wanted = Restorer(model.network, QUICK, 3, 32, chain=Chain("cosine", 100)).restore(image, mask, (5, 6), 1)
    assert found.tobytes() == wanted.tobytes()


def test_other_weights_or_networks_are_refused(folder: Path) -> None:
    content = card(folder)
    described = {**content["network"], "arch": "unet"}  # type: ignore[dict-item]  # a table
    write_card(folder / "card.toml", content | {"network": described}, overwrite=True)
    with pytest.raises(ModelError, match="WSI318"):
        from_folder(folder)
    described = {**content["network"], "heads": [3, 3]}  # type: ignore[dict-item]  # a table
    write_card(folder / "card.toml", content | {"network": described}, overwrite=True)
    with pytest.raises(ModelError, match="WSI318"):
        from_folder(folder)
    write_card(folder / "card.toml", content | {"sha256": "0" * 64}, overwrite=True)
    with pytest.raises(ModelError, match="WSI317"):
        from_folder(folder)


def test_a_published_state_dict_is_a_model(tmp_path: Path) -> None:
    config = replace(CONFIG, size=64, depths=(2, 2))
    network = Denoiser(config)
    torch.save(network.state_dict(), tmp_path / "ema_0.9999_1.pt")
    model = from_checkpoint(tmp_path / "ema_0.9999_1.pt", spacing_um=0.25)
    assert isinstance(model, ArtiFusion)
    assert replace(model.network.config, drop_path=0.0) == config
    assert model.chain == Chain("linear", 4000)
    assert model.spec.spacing == (0.25, 0.25)
    for name, value in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)
    state = network.state_dict()
    state["input_blocks.0.0.blocks.1.attn_mask"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"WSI646 .*attn_mask is not what"):
        from_checkpoint(tmp_path / "other.pt")
    del state["input_blocks.0.0.blocks.1.attn_mask"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ModelError, match="WSI646"):
        from_checkpoint(tmp_path / "less.pt")


def test_the_model_that_ships() -> None:
    """It fits the card, and paints tissue nearer to what surrounds the hole than to noise or grey."""
    model = default_model(Sampling("dpm++", 8, 1, 1, start=0.5, average=2))
    assert model.spec.name == "artifusion"
    assert model.spec.spacing == (0.5, 0.5)
    assert sum(p.numel() for p in model.network.parameters()) * 2 < 12e6
    side = model.network.config.size
    ground = np.full((side, side, 3), (215, 150, 190), np.float64)
    image = np.clip(ground + np.random.default_rng(0).normal(0, 8, ground.shape), 0, 255).astype(np.uint8)
    mask = blob((side, side), 24, 24, 14, 14)
    found = model.process_region(image, mask, Region((0, 0), (side, side)))
    assert np.abs(found[mask].mean(axis=0) - ground[0, 0]).max() < 15
    assert np.sqrt(np.square(found[mask] - ground[0, 0]).mean()) < 25
