"""pet-ct-annotate: the published weights give the published maps, whole and in tiles."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from wsitk.models.pet_ct_annotate.model import PetCtAnnotate, from_official, pet_ct_annotate, proposals
from wsitk.models.pet_ct_annotate.network import REACH
from wsitk.models.pet_ct_annotate.scribbles import NOWHERE, scale, scribble_distances

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


def tiled(model: PetCtAnnotate, channels: np.ndarray, owned: tuple[int, ...]) -> np.ndarray:
    """Return the logits of a volume, tile by tile, each read with the halo as far as the volume goes."""
    shape, halo = channels.shape[1:], model.spec.halo
    result = np.zeros(shape, np.float32)
    for start in product(*(range(0, n, o) for n, o in zip(shape, owned, strict=True))):
        stop = [min(a + o, n) for a, o, n in zip(start, owned, shape, strict=True)]
        first = [max(0, a - h) for a, h in zip(start, halo, strict=True)]
        last = [min(b + h, n) for b, h, n in zip(stop, halo, shape, strict=True)]
        read = (slice(None), *(slice(a, b) for a, b in zip(first, last, strict=True)))
        inner = tuple(slice(a - f, b - f) for a, b, f in zip(start, stop, first, strict=True))
        batch = torch.from_numpy(np.ascontiguousarray(channels[read].transpose(0, 3, 2, 1)))[None]
        with torch.inference_mode():
            map_ = model.network(batch)["proposal"].permute(0, 1, 4, 3, 2)
        result[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = map_[0, 0].numpy()[inner]
    return result


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tiles_equal_the_whole_volume(axis: int) -> None:
    model = proposals()
    assert model.spec.halo == REACH == (32, 91, 91)
    shape = [3, 6, 6]
    shape[axis] = 2 * REACH[axis] + 20
    rng = np.random.default_rng(axis)
    channels = scale(rng.normal(0, 300, shape), rng.gamma(1.0, 4000, shape))
    owned = tuple(10 if a == axis else n for a, n in enumerate(shape))
    whole = tiled(model, channels, tuple(shape))
    assert whole.std() > 0.01
    np.testing.assert_allclose(tiled(model, channels, owned), whole, atol=1e-5 * np.abs(whole).max())


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


def test_the_pair_reads_four_channels_and_looks_twice_as_far() -> None:
    model = pet_ct_annotate()
    assert model.spec.channels == 4
    assert model.spec.halo == (64, 182, 182)
    batch = torch.zeros(1, 4, 4, 5, 6)
    with torch.inference_mode():
        assert model.predict(batch)["probability"].shape == (1, 1, 4, 5, 6)
