"""pet-ct-annotate: the published weights give the published maps, whole and in tiles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from radiology_fill import load_filled
from scipy.ndimage import gaussian_filter

import wsitk
from wsitk.models.pet_ct_annotate.model import (
    INTENSITIES,
    PetCtAnnotate,
    from_official,
    pet_ct_annotate,
    proposals,
    refinement,
)
from wsitk.models.pet_ct_annotate.network import REACH, Pair
from wsitk.models.pet_ct_annotate.scribbles import NOWHERE, scale, scribble_distances
from wsitk.sources import open_source

DATA = os.environ.get("WSITK_TEST_DATA", "")
GOLDEN = Path(DATA) / "golden" / "radiology" / "pet_ct_annotate"
needs_golden = pytest.mark.skipif(
    not (DATA and GOLDEN.is_dir()), reason="WSITK_TEST_DATA has no golden/radiology"
)


def logits(model: PetCtAnnotate, channels: np.ndarray) -> dict[str, np.ndarray]:
    """Return both networks' logits for channels (C, x, y, z)."""
    with torch.inference_mode():
        return {k: v[0, 0].numpy() for k, v in model.network(torch.from_numpy(channels)[None]).items()}


@needs_golden
def test_the_golden_volume_with_official_weights() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    channels = np.concatenate([golden[n][0] for n in ("ct", "pet", "fg", "bg")])
    for model in (pet_ct_annotate(), from_official(GOLDEN / "weights")):
        found = logits(model, channels)
        for name, wanted in (("proposal", "official_pnet_logits"), ("refined", "official_rnet_logits")):
            top = np.abs(golden[wanted]).max()
            np.testing.assert_allclose(found[name], golden[wanted][0, 0], rtol=1e-4, atol=1e-4 * top)
        np.testing.assert_array_equal(found["refined"] > 0, golden["official_mask"][0, 0] > 0)


@needs_golden
def test_the_golden_volume_with_keyed_weights() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    channels = np.concatenate([golden[n][0] for n in ("ct", "pet", "fg", "bg")])
    found = logits(PetCtAnnotate(filled(), "both", ""), channels)
    for name, wanted in (("proposal", "filled_pnet_logits"), ("refined", "filled_rnet_logits")):
        top = np.abs(golden[wanted]).max()
        np.testing.assert_allclose(found[name], golden[wanted][0, 0], rtol=1e-4, atol=1e-4 * top)
    clear = np.abs(golden["filled_rnet_logits"][0, 0]) > 1e-3
    np.testing.assert_array_equal(found["refined"][clear] > 0, golden["filled_mask"][0, 0][clear] > 0)


@needs_golden
@pytest.mark.parametrize("name", ["PNet", "RNet"])
def test_the_state_has_upstreams_names_and_shapes_in_its_order(name: str) -> None:
    wanted = [line.split() for line in (GOLDEN / f"keys_{name}.txt").read_text().splitlines()]
    state = getattr(Pair(), name.lower()).state_dict()
    assert [
        [key, str(t.dtype).removeprefix("torch."), "x".join(map(str, t.shape))] for key, t in state.items()
    ] == wanted


@needs_golden
def test_the_real_crop_gives_the_published_mask() -> None:
    golden = np.load(GOLDEN / "golden_realct.npz")
    background = np.full(golden["hu"].shape, golden["bg_const"], np.float32)
    channels = np.stack((*scale(golden["hu"], golden["pet_raw"]), golden["fg"], background))
    found = logits(pet_ct_annotate(), channels)
    for name, short in (("proposal", "p"), ("refined", "r")):
        mask = np.unpackbits(golden[f"{short}net_mask"])[: found[name].size].reshape(found[name].shape)
        np.testing.assert_array_equal(found[name] > 0, mask > 0)
    assert (found["refined"] > 0).sum() == 1893
    whole = found["refined"].ravel()[golden["rnet_idx"]]
    np.testing.assert_allclose(whole, golden["rnet_val"], rtol=1e-4, atol=1e-4 * np.abs(whole).max())


# --- in tiles --------------------------------------------------------------------------------------------


def some(shape: Sequence[int], seed: int) -> np.ndarray:
    """Return CT, PET, two distances and a proposal, raw: (z, y, x, c)."""
    rng = np.random.default_rng(seed)
    hidden = gaussian_filter(rng.normal(size=shape), 2, mode="wrap")
    hidden /= hidden.std()
    ct = 200 * hidden + rng.normal(0, 100, shape)
    far = [np.abs(gaussian_filter(rng.normal(size=shape), 3)) * 10 for _ in range(2)]
    pet = 6000 * np.clip(hidden - 0.5, 0, None) + rng.gamma(1.0, 300, shape)
    return np.stack((ct, pet, *far, rng.random(shape)), -1).astype(np.float32)


def mapped(
    model: PetCtAnnotate, volume: np.ndarray, out: Path, **changes: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return probability and labels of a run over (z, y, x, c)."""
    model.spec = replace(model.spec, **changes)
    source = open_source(volume[..., : model.spec.channels], axes="zyxc", mpp=2000.0)
    result = wsitk.run(model, source, out=out, threads=1, workers=1, device="cpu")
    return result.maps.compute()[0], result.labels.compute()


def filled(scale: float = 2**0.5) -> Pair:
    """Return both networks with the weights of the vectors; somewhat larger ones give livelier answers."""
    pair = Pair()
    for network in (pair.pnet, pair.rnet):
        load_filled(network, scale=scale)
    return pair.eval()


def whole(model: PetCtAnnotate, volume: np.ndarray) -> np.ndarray:
    """Return the probability of (z, y, x, c), all at once and without the engine."""
    scaled = np.stack([rule.numbers()(volume[..., k]) for k, rule in enumerate(model.spec.normalise)])
    with torch.inference_mode():
        return model.predict(torch.from_numpy(scaled)[None])["probability"][0, 0].numpy()


SLOW = {("proposals", 2), ("refinement", 0), ("refinement", 1), ("both", 0), ("both", 2)}


@pytest.mark.parametrize(
    ("part", "axis"),
    [
        pytest.param(part, axis, marks=[pytest.mark.slow] if (part, axis) in SLOW else [])
        for part in ("proposals", "refinement", "both")
        for axis in range(3)
    ],
)
def test_tiles_equal_the_whole_volume(part: Any, axis: int, tmp_path: Path) -> None:
    """A network looks 32, 91 and 91 voxels far; both in one look twice as far, and half of that is too little."""
    model, both = PetCtAnnotate(filled(2.0), part, ""), part == "both"
    assert model.spec.halo == tuple((1 + both) * n for n in REACH)
    assert REACH == (32, 91, 91)
    shape = [3, 6, 6]
    shape[axis] = 2 * model.spec.halo[axis] + 20
    volume = some(shape, axis)
    wanted = whole(model, volume)
    assert wanted.std() > 0.01
    halo = np.array(model.spec.halo)
    owned = np.where(np.arange(3) == axis, 10, 200)
    tile = tuple((owned + 2 * halo).tolist())
    found, labels = mapped(model, volume, tmp_path / "a", tile=tile)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(labels, found > 0.5)
    if both:
        near = tuple(int(n if a == axis else h) for a, (n, h) in enumerate(zip(REACH, halo, strict=True)))
        tile = tuple((owned + 2 * np.array(near)).tolist())
        found, _ = mapped(model, volume, tmp_path / "b", tile=tile, halo=near)
        assert np.abs(found - wanted).max() > 1e-5


@needs_golden
def test_the_engine_gives_the_published_mask_of_the_real_crop(tmp_path: Path) -> None:
    """The crop is smaller than the margins; in one pass, and in two, of which the second reads the first."""
    golden = np.load(GOLDEN / "golden_realct.npz")
    background = np.full(golden["hu"].shape, golden["bg_const"], np.float32)
    volume = np.stack((golden["hu"], golden["pet_raw"], golden["fg"], background), -1).transpose(2, 1, 0, 3)
    proposal, first = mapped(proposals(), volume, tmp_path / "p")
    assert (first == unpacked(golden, "pnet")).all()
    one, labels = mapped(pet_ct_annotate(), volume, tmp_path / "1")
    two, again = mapped(refinement(), np.concatenate((volume, proposal[..., None]), -1), tmp_path / "2")
    for map_, mask in ((one, labels), (two, again)):
        assert (mask == unpacked(golden, "rnet")).all()
        assert mask.sum() == 1893
        wanted = 1 / (1 + np.exp(-golden["rnet_val"]))
        np.testing.assert_allclose(map_.T.ravel()[golden["rnet_idx"]], wanted, atol=1e-5)


def unpacked(golden: Any, name: str) -> np.ndarray:
    shape = golden["hu"].shape
    return np.unpackbits(golden[f"{name}_mask"])[: np.prod(shape)].reshape(shape).T


@pytest.mark.slow
def test_a_volume_larger_than_its_margins_in_two_passes(tmp_path: Path) -> None:
    """256 x 256 x 128 voxels in eight tiles: each network's margin is its own reach."""
    volume = some((128, 256, 256), 9)[..., :4]
    first = proposals()
    found, _ = mapped(first, volume, tmp_path / "p")
    wanted = whole(first, volume[..., :2])
    assert np.abs(found - wanted).max() < 1e-5
    second = refinement()
    refined, labels = mapped(second, np.concatenate((volume, found[..., None]), -1), tmp_path / "r")
    wanted = whole(second, np.concatenate((volume, wanted[..., None]), -1))
    print(f"largest difference {np.abs(refined - wanted).max():.1e}, lesions {labels.mean():.1%}")
    assert wanted.std() > 0.01
    assert np.abs(refined - wanted).max() < 1e-5
    clear = np.abs(wanted - 0.5) > 1e-5
    np.testing.assert_array_equal(labels[clear], wanted[clear] > 0.5)


# --- scribbles -------------------------------------------------------------------------------------------


def test_scribbles_become_distances_in_their_box() -> None:
    rng = np.random.default_rng(5)
    ct = rng.random((20, 30, 40), np.float32)
    scribbles = np.zeros(ct.shape, np.uint8)
    scribbles[8:12, 10:16, 20:28] = 3
    foreground, background = scribble_distances(ct, scribbles, (3.0, 2.0, 2.0))
    assert (background == NOWHERE).all()
    assert (foreground[scribbles == 3] == 0).all()
    box = np.zeros(ct.shape, bool)
    box[6:14, 7:19, 16:32] = True
    assert (foreground[~box] == foreground[box].max()).all()
    assert (foreground[box & (scribbles == 0)] > 0).all()


def test_the_engine_scales_as_the_scribbles_do() -> None:
    ct, pet = np.array([-1024.0, 0, 3071]), np.array([0.0, 800, 65535])
    np.testing.assert_allclose(
        [rule.numbers()(v) for rule, v in zip(INTENSITIES[:2], (ct, pet), strict=True)],
        scale(ct, pet),
        rtol=1e-6,
    )
