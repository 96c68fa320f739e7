"""Tyche against vectors recorded from the original; its noise; what it says of its own uncertainty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cellvit_golden import one_thread
from hypothesis import given
from hypothesis import strategies as st
from incontext_data import GOLDEN, blobs, example_folder, keyed_file, keys, keys_of, signal
from radiology_fill import load_filled, uniform
from scipy import stats

import wsitk
from wsitk.errors import ModelError, UsageError
from wsitk.models.tyche import model as tyche_model
from wsitk.models.tyche.model import KINDS, from_checkpoint, tyche, uncertainty
from wsitk.models.tyche.network import Tyche
from wsitk.models.tyche.noise import normal_noise
from wsitk.torchfile import read_tensors


@pytest.fixture(scope="module")
def network() -> Tyche:
    network = Tyche()
    load_filled(network, 2**0.5)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keyed_file(tmp_path_factory.mktemp("weights") / "tyche.pt", Tyche(), "model")


# --- the network -------------------------------------------------------------------------------------


def test_state_dict_is_the_originals(network: Tyche) -> None:
    assert keys_of(network) == keys("tyche")
    assert sum(p.numel() for p in network.parameters()) == 1_774_785


def test_output_is_the_originals(network: Tyche) -> None:
    target = torch.from_numpy(signal("tyche.target", (1, 1, 128, 128)))
    support = torch.from_numpy(signal("tyche.support", (1, 4, 1, 128, 128)))
    noise = uniform("input:tyche.noise", 3 * 128**2).reshape(1, 3, 128, 128) * 3**0.5
    with np.load(GOLDEN / "tyche" / "golden.npz") as golden, torch.inference_mode(), one_thread():
        labels, wanted = torch.from_numpy(golden["labels"]), golden["logits"][:, :, 0]
        got = network(target, torch.from_numpy(noise.astype(np.float32)), support, labels)["logits"].numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_candidates_are_a_set(network: Tyche) -> None:
    target = torch.from_numpy(signal("a", (1, 1, 32, 40)))
    support = torch.from_numpy(signal("b", (1, 2, 1, 32, 40)))
    noise = torch.from_numpy(np.stack([normal_noise(0, k, (0, 0), (32, 40)) for k in range(3)]))[None]
    with torch.inference_mode(), one_thread():
        logits = network(target, noise, support, support > 0.5)["logits"]
        turned = network(target, noise.flip(1), support, support > 0.5)["logits"]
    torch.testing.assert_close(turned.flip(1), logits, rtol=1e-4, atol=1e-4)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 0.01


# --- noise -------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**70),
    st.integers(0, 9),
    st.tuples(st.integers(-50, 10**9), st.integers(-50, 50), st.integers(-50, 50)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
)
def test_noise_belongs_to_the_place_and_not_to_the_window(
    seed: int, candidate: int, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    window = normal_noise(seed, candidate, start, shape)
    around = normal_noise(seed, candidate, [s - 2 for s in start], [n + 3 for n in shape])
    assert np.array_equal(around[2:, 2:, 2:][: shape[0], : shape[1], : shape[2]], window)


def test_noise_is_normal_and_its_pixels_and_candidates_are_independent() -> None:
    one, two = (normal_noise(7, k, (-100, 5000), (400, 500)) for k in range(2))
    other = normal_noise(8, 0, (-100, 5000), (400, 500))
    assert stats.kstest(one.ravel(), "norm").pvalue > 0.01
    pairs = [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, two), (one, other), (one, one[::-1])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert one.dtype == np.float32
    assert np.isfinite(one).all()


def test_noise_is_the_same_everywhere_and_forever() -> None:
    # computed apart, with Python's whole numbers
    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = mixed(mixed(3) + 1)
    for place in (-4, 9):
        key = mixed(key + place % 2**64)
    high, low = divmod(key, 2**32)
    wanted = np.sqrt(-2 * np.log((high + 0.5) / 2**32)) * np.cos(2 * np.pi * low / 2**32)
    assert normal_noise(3, 1, (-5, 7), (2, 4))[1, 2] == np.float32(wanted)


# --- the model ---------------------------------------------------------------------------------------


def test_uncertainty_is_what_its_names_say() -> None:
    p = np.random.default_rng(0).random((2, 4, 3, 5))
    p[0, :, 0, 0], p[0, :, 0, 1], p[0, :, 0, 2] = 0, 1, [0, 0, 1, 1]

    def bits(q: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(-(q * np.log2(q))) + np.nan_to_num(-((1 - q) * np.log2(1 - q)))

    mean, spread = (v.numpy() for v in uncertainty(torch.from_numpy(p)))
    np.testing.assert_allclose(mean[:, 0], p.mean(1))
    np.testing.assert_allclose(spread[:, 0], p.var(1))
    np.testing.assert_allclose(spread[:, 1], bits(p.mean(1)), atol=1e-12)
    np.testing.assert_allclose(spread[:, 2], bits(p.mean(1)) - bits(p).mean(1), atol=1e-12)
    # nothing is uncertain where all agree; all of it is disagreement where half says yes and half no
    assert not spread[0, :, 0, :2].any()
    np.testing.assert_allclose(spread[0, :, 0, 2], [0.25, 1, 1])


def test_tiles_at_a_place_get_that_places_noise(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path, 2), size=32, candidates=3, seed=5)
    tile = torch.from_numpy(signal("tile", (1, 1, 32, 32)))
    with torch.inference_mode(), one_thread():
        here = model.predict_at(tile.expand(2, -1, -1, -1), [(64, 8), (0, 0)])
        there = model.predict_at(tile, [(64, 8)])
        corner = model.predict(tile)
    for name, channels in (("probability", 1), ("uncertainty", len(KINDS))):
        assert here[name].shape == (2, channels, 32, 32)
        assert torch.equal(here[name][:1], there[name])
        assert torch.equal(here[name][1:], corner[name])
        assert not torch.equal(here[name][:1], corner[name])


def test_slices_have_noise_of_their_own(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path, 1), size=32, slices=True, candidates=2)
    tile = torch.from_numpy(signal("tile", (1, 1, 1, 32, 32)))
    with torch.inference_mode(), one_thread():
        out = [model.predict_at(tile, [(z, 0, 0)])["uncertainty"] for z in (0, 1)]
    assert out[0].shape == (1, 3, 1, 32, 32)
    assert not torch.equal(*out)


def test_seed_and_candidates_are_recorded(weights: Path, tmp_path: Path) -> None:
    folder = example_folder(tmp_path, 2)
    model = from_checkpoint(weights, support=folder, candidates=4, seed=11)
    assert model.spec.version == "tyche.pt, 2 examples, 4 candidates, seed 11"
    assert {f.name: f.channels for f in model.spec.fields} == {
        "probability": ("Target",),
        "uncertainty": KINDS,
    }
    with pytest.raises(UsageError, match="WSI074"):
        from_checkpoint(weights, support=folder, candidates=1)


def test_runs_through_the_engine(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path / "s", 2), size=64, candidates=2)
    image = np.tile(blobs(4)[0], (2, 2))[..., None]
    with one_thread():
        result = wsitk.run(
            model, image, out=tmp_path / "o", spacing=1.0, tissue="none", preview=False, threads=1
        )
    maps = np.asarray(result.maps)
    assert maps.shape == (4, *image.shape[:2])
    assert maps.dtype == np.uint16
    assert (maps.reshape(4, -1).max(1) > maps.reshape(4, -1).min(1)).all()


def test_containers_and_families(
    weights: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = read_tensors(weights)
    assert file.key == "model"
    assert tyche_model.is_ours(file)
    folder = data / "golden" / "radiology" / "containers"
    with np.load(folder / "expected.npz") as wanted:
        small = read_tensors(folder / "tyche_model.pt").tensors
        assert all(np.array_equal(small[name], wanted[name]) for name in wanted.files)
    monkeypatch.setenv("WSITK_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"WSI312 tyche_v1_model_weights_CVPR.pt"):
        tyche(support=tmp_path)
