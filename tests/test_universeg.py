"""UniverSeg against vectors recorded from the original, and the reading of examples."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cellvit_golden import one_thread
from hypothesis import given
from hypothesis import strategies as st
from incontext_data import GOLDEN, blobs, example_folder, keyed_file, keys, keys_of, read_all, signal
from PIL import Image
from radiology_fill import load_filled

import wsitk
from wsitk.errors import ModelError, SourceError, UsageError, WsitkError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.tyche.network import Tyche
from wsitk.models.universeg import model as universeg_model
from wsitk.models.universeg.incontext import Task, TaskOptions
from wsitk.models.universeg.model import UniverSegModel, from_checkpoint, universeg
from wsitk.models.universeg.network import UniverSeg
from wsitk.models.universeg.planes import open_planes
from wsitk.models.universeg.support import Example, Support, examples_at, read_support, unit_range
from wsitk.torchfile import read_tensors


@pytest.fixture(scope="module")
def network() -> UniverSeg:
    network = UniverSeg()
    load_filled(network, 2**0.5)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keyed_file(tmp_path_factory.mktemp("weights") / "universeg.pt", UniverSeg())


# --- the network -------------------------------------------------------------------------------------


def test_state_dict_is_the_originals(network: UniverSeg) -> None:
    assert keys_of(network) == keys("universeg")
    assert sum(p.numel() for p in network.parameters()) == 1_182_785


@pytest.mark.parametrize(("examples", "recorded"), [(4, "logits"), (1, "logits_s1")])
def test_output_is_the_originals(network: UniverSeg, examples: int, recorded: str) -> None:
    target = torch.from_numpy(signal("universeg.target", (1, 1, 128, 128)))
    support = torch.from_numpy(signal("universeg.support", (1, 4, 1, 128, 128)))
    with np.load(GOLDEN / "universeg" / "golden.npz") as golden, torch.inference_mode(), one_thread():
        labels = torch.from_numpy(golden["labels"])
        logits = network(target, support[:, :examples], labels[:, :examples])["logits"].numpy()
        np.testing.assert_allclose(
            logits, golden[recorded], rtol=1e-4, atol=1e-4 * abs(golden[recorded]).max()
        )


def test_features_of_the_first_block_are_the_originals(network: UniverSeg) -> None:
    target = torch.from_numpy(signal("universeg.target", (1, 1, 128, 128)))
    support = torch.from_numpy(signal("universeg.support", (1, 4, 1, 128, 128)))[0]
    with np.load(GOLDEN / "universeg" / "golden.npz") as golden, torch.inference_mode(), one_thread():
        examples = torch.cat([support, torch.from_numpy(golden["labels"])[0].float()], dim=1)
        for name, value in zip(("target", "support"), network.enc_blocks[0](target, examples), strict=True):
            wanted = golden[f"enc0_{name}_val"]
            got = value.numpy().ravel()[golden[f"enc0_{name}_idx"]]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_order_of_examples_does_not_matter_and_targets_do_not_see_each_other(network: UniverSeg) -> None:
    target = torch.from_numpy(signal("a", (2, 1, 32, 40)))
    support = torch.from_numpy(signal("b", (1, 3, 1, 32, 40))).expand(2, -1, -1, -1, -1)
    labels = (support > 0.5).float()
    with torch.inference_mode(), one_thread():
        both = network(target, support, labels)["logits"]
        turned = network(target, support.flip(1), labels.flip(1))["logits"]
        alone = network(target[1:], support[1:], labels[1:])["logits"]
    torch.testing.assert_close(turned, both, rtol=1e-4, atol=1e-4)
    assert torch.equal(alone, both[1:])


# --- the model ---------------------------------------------------------------------------------------


def test_official_container_gives_the_recorded_probabilities(weights: Path) -> None:
    images = signal("universeg.support", (1, 4, 1, 128, 128))[0, :, 0]
    with np.load(GOLDEN / "universeg" / "golden.npz") as golden:
        labels, logits = golden["labels"][0, :, 0], golden["logits"]
    pairs = zip(images, labels, strict=True)
    support = Support(tuple(Example(str(k), i, m > 0) for k, (i, m) in enumerate(pairs)), False, 4, "s")
    model = from_checkpoint(weights, support=support, intensity=(0, 1))
    tile = torch.from_numpy(signal("universeg.target", (1, 1, 128, 128)))
    with torch.inference_mode(), one_thread():
        out = {k: v[0].numpy() for k, v in model.predict(tile).items()}
    place = Tile(0, Region((0, 0), (128, 128)), Region((0, 0), (128, 128)))
    got = model.postprocess(out, place).fields["probability"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits[0])), atol=1e-4)


def test_fixture_of_the_official_format_is_read(data: Path) -> None:
    folder = data / "golden" / "radiology" / "containers"
    file = read_tensors(folder / "universeg_plain.pt")
    with np.load(folder / "expected.npz") as wanted:
        assert all(np.array_equal(file.tensors[name], wanted[name]) for name in wanted.files)


def test_spec_says_what_the_engine_needs(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path / "s"), target="Disk", spacing_um=4)
    spec = model.spec
    assert (spec.tile, spec.halo, spec.align, spec.channels) == ((128, 128), (32, 32), (8, 8), 1)
    assert spec.spacing == (4.0, 4.0)
    assert spec.fields[0].channels == ("Disk",)
    assert spec.weights_sha256.startswith(read_tensors(weights).sha256)
    others = [
        from_checkpoint(weights, support=example_folder(tmp_path / "t", 4), target="Disk"),
        from_checkpoint(weights, support=tmp_path / "s", intensity=(0, 255)),
        from_checkpoint(weights, support=tmp_path / "s"),
    ]
    # examples and range are part of what made a result; so they are part of its key
    assert len({m.spec.weights_sha256 for m in others}) == 3
    assert others[2].spec.weights_sha256 == spec.weights_sha256


def test_slices_of_a_volume_are_tiles_one_deep(weights: Path, tmp_path: Path) -> None:
    folder = example_folder(tmp_path / "s")
    model = from_checkpoint(weights, support=folder, slices=True, size=64)
    flat = from_checkpoint(weights, support=folder, size=64)
    assert (model.spec.tile, model.spec.halo, model.spec.align) == ((1, 64, 64), (0, 16, 16), (1, 8, 8))
    tile = torch.from_numpy(signal("slice", (1, 1, 1, 64, 64)) * 900)
    with torch.inference_mode(), one_thread():
        deep = model.predict(tile)["probability"]
        assert deep.shape == (1, 1, 1, 64, 64)
        assert torch.equal(deep[:, :, 0], flat.predict(tile[:, :, 0])["probability"])


def test_runs_through_the_engine_on_colours_and_a_blank_tile(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path / "s", 2, colour=True), size=64)
    assert model.spec.channels == 3
    image = np.full((100, 180, 3), 240, np.uint8)
    image[30:70, 20:60] = blobs(3)[0][:40, :40, None]
    with one_thread():
        result = wsitk.run(
            model, image, out=tmp_path / "o", spacing=1.0, tissue="none", preview=False, threads=1
        )
    maps = np.asarray(result.maps)
    assert maps.shape[-2:] == image.shape[:2]
    assert maps[0].max() > maps[0].min()


def test_a_tile_of_one_value_is_zero_and_finite(weights: Path, tmp_path: Path) -> None:
    model = from_checkpoint(weights, support=example_folder(tmp_path / "s", 1), size=32)
    with torch.inference_mode(), one_thread():
        values = [model.predict(torch.full((1, 1, 32, 32), v))["probability"] for v in (0, 1000)]
    assert torch.isfinite(values[0]).all()
    assert torch.equal(*values)


def test_pixels_become_the_range_of_their_own_image() -> None:
    task = Task(Support((), False, 0, ""), None)
    batch = torch.tensor([[[[10, 20], [30, 50]]], [[[-1000, 0], [1000, 3000]]]])
    wanted = torch.tensor([[[[0, 0.25], [0.5, 1]]], [[[0, 0.25], [0.5, 1]]]])
    assert torch.allclose(task.pixels(batch), wanted)
    fixed = Task(Support((), False, 0, ""), (0, 20)).pixels(batch)
    assert torch.allclose(fixed[0, 0], torch.tensor([[0.5, 1], [1, 1]]))
    red = torch.zeros(1, 3, 1, 2)
    red[0, 0, 0, 1] = 200
    assert torch.allclose(
        Task(Support((), True, 0, ""), (0, 100)).pixels(red), torch.tensor([[[[0, 0.598]]]])
    )


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"size": 100},
        {"size": 24},
        {"intensity": (5, 5)},
        {"spacing_um": (1, 1, 1)},
        {"slices": True, "spacing_um": (1, 1)},
    ],
)
def test_odd_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="WSI074"):
        TaskOptions(**options)  # type: ignore[arg-type]  # that is the test


def test_without_examples_or_weights_it_says_what_to_do(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"WSI070 .*--support"):
        from_checkpoint(weights)
    monkeypatch.setenv("WSITK_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"WSI312 universeg_v1_nf64_ss64_STA.pt .*download"):
        universeg(support=tmp_path)


def test_weights_by_name_come_from_the_weights_folder(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / universeg_model.WEIGHTS).write_bytes(weights.read_bytes())
    monkeypatch.setenv("WSITK_HOME", str(tmp_path))
    assert isinstance(universeg(support=example_folder(tmp_path / "s", 1)), UniverSegModel)


def test_files_tell_which_family_they_are(weights: Path, tmp_path: Path) -> None:
    tyche = read_tensors(keyed_file(tmp_path / "tyche.pt", Tyche(), "model"))
    assert universeg_model.is_ours(read_tensors(weights))
    assert not universeg_model.is_ours(tyche)
    with pytest.raises(ModelError, match="WSI301"):
        from_checkpoint(tyche.path, support=tmp_path)


# --- examples ----------------------------------------------------------------------------------------


def test_examples_are_read_with_all_their_values(tmp_path: Path) -> None:
    support = read_support(example_folder(tmp_path / "s"))
    assert [e.name for e in support.examples] == ["0", "1", "2"]
    assert (support.colour, support.found) == (False, 3)
    for k, example in enumerate(support.examples):
        image, mask = blobs(k)
        assert np.array_equal(example.image, image)
        assert np.array_equal(example.mask, mask > 0)
    same = read_support(example_folder(tmp_path / "t"))
    assert same.sha256 == support.sha256
    image, mask = blobs(2)
    mask[0, 0] ^= 255
    Image.fromarray(mask).save(tmp_path / "t" / "masks" / "2.png")
    assert read_support(tmp_path / "t").sha256 != support.sha256


def test_numpy_files_hold_pairs_or_stacks(tmp_path: Path) -> None:
    image, mask = blobs(1)
    np.savez(tmp_path / "a.npz", image=image, mask=mask)
    np.savez(tmp_path / "b.npz", image=np.stack([image] * 4), mask=np.stack([mask, 0 * mask, mask, 0 * mask]))
    support = read_support(tmp_path)
    # of a stack, only planes with something in them
    assert [e.name for e in support.examples] == ["a", "b slice 0", "b slice 2"]
    assert np.array_equal(support.examples[2].image, image)


def test_nifti_slices_are_examples(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    volume, labels = rng.normal(0, 500, (9, 12, 10)).astype(np.float32), np.zeros((9, 12, 10), np.uint8)
    labels[2:5, 3:6, 4] = 1
    labels[2:5, 3:6, 7] = 2
    for name, values in (("images", volume), ("labels", labels)):
        (tmp_path / name).mkdir()
        nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / name / "case.nii.gz")
    # NIfTI's array is (x, y, z); a plane is (y, x)
    both = read_support(tmp_path)
    assert [e.name for e in both.examples] == ["case slice 4", "case slice 7"]
    assert np.array_equal(both.examples[0].image, volume[:, :, 4].T)
    assert np.array_equal(both.examples[0].mask, labels[:, :, 4].T > 0)
    second = read_support(tmp_path, label=2)
    assert [e.name for e in second.examples] == ["case slice 7"]


def test_hippocampus_is_support_for_itself(data: Path) -> None:
    folder = data / "data" / "radiology" / "msd_hippocampus"
    support = read_support(folder, label=1, largest=16)
    assert len(support.examples) == 16 < support.found
    assert all(e.mask.any() and e.image.shape == e.mask.shape for e in support.examples)
    images, masks = examples_at(support, (128, 128), None)
    assert images.min() == 0
    assert images.max() == 1
    assert 0 < masks.mean() < 0.2


def test_too_many_examples_are_thinned_evenly(tmp_path: Path) -> None:
    folder = example_folder(tmp_path, 10)
    assert [e.name for e in read_support(folder, largest=5).examples] == ["1", "3", "5", "7", "9"]
    assert [e.name for e in read_support(folder, largest=1).examples] == ["5"]


def put(folder: Path, name: str, values: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


GREY = np.full((8, 8), 9, np.uint8)
RGB = np.full((8, 8, 3), 9, np.uint8)


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({}, "WSI070", "holds no examples"),
        ({"images/a.png": GREY}, "WSI070", "needs both"),
        ({"images/a.png": GREY, "masks/b.png": GREY}, "WSI071", "'a' has no partner"),
        ({"images/a.png": GREY, "images/a.tif": GREY, "masks/a.png": GREY}, "WSI071", "keep one"),
        ({"images/a.png": GREY, "masks/a.png": GREY[1:]}, "WSI072", "wanted the same"),
        ({"images/a.png": GREY, "masks/a.jpg": GREY}, "WSI072", "JPEG changes"),
        (
            {"images/a.png": GREY, "images/b.png": RGB, "masks/a.png": GREY, "masks/b.png": GREY},
            "WSI072",
            "colour",
        ),
        ({"images/a.png": GREY, "masks/a.png": 0 * GREY}, "WSI073", "isn't zero"),
        ({"images/a.npy": GREY[0], "masks/a.npy": GREY[0]}, "WSI072", "wanted numbers"),
        ({"images/a.npy": np.float32([[np.nan]]), "masks/a.npy": np.ones((1, 1))}, "WSI102", "not finite"),
        ({"images/a.npy": np.array([[{}]]), "masks/a.npy": GREY}, "WSI101", "never opened"),
    ],
)
def test_odd_folders_are_refused(tmp_path: Path, files: dict[str, np.ndarray], code: str, said: str) -> None:
    for name, values in files.items():
        put(tmp_path, name, values)
    with pytest.raises(WsitkError, match=f"{code} .*{said}"):
        read_support(tmp_path)


def test_missing_folder_label_in_colours_and_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI070 .*is no folder"):
        read_support(tmp_path / "none")
    put(tmp_path, "images/a.png", GREY)
    put(tmp_path, "masks/a.png", RGB)
    with pytest.raises(UsageError, match=r"WSI072 .*no label 1"):
        read_support(tmp_path, label=1)
    assert read_support(tmp_path).examples[0].mask.all()
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.npy", "w") as entry:
        for _ in range(600):
            entry.write(bytes(1 << 20))
    with pytest.raises(UsageError, match=r"WSI072 .*600 MiB is too large"):
        open_planes(bomb, "image")
    (tmp_path / "short.npy").write_bytes(
        b"\x93NUMPY\x01\0\x46\0"
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, 9999999), }"[:69].ljust(70)
    )
    with pytest.raises(SourceError, match="WSI101"):
        open_planes(tmp_path / "short.npy", "image")


def test_planes_of_each_kind_of_array(tmp_path: Path) -> None:
    put(tmp_path, "flat.npy", GREY)
    put(tmp_path, "rgb.npy", RGB)
    assert np.array_equal(read_all(open_planes(tmp_path / "flat.npy", "image")), GREY[None])
    assert np.array_equal(read_all(open_planes(tmp_path / "rgb.npy", "image")), RGB[None])
    with open_planes(tmp_path / "rgb.npy", "image") as planes:
        assert planes.colour


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_shrinking_by_whole_numbers_is_the_mean_of_areas(down: int, across: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 100, (8 * down, 8 * across)).astype(np.float32)
    mask = rng.random(image.shape) < 0.5
    images, masks = examples_at(Support((Example("a", image, mask),), False, 1, ""), (8, 8), (-300, 300))
    areas = image.astype(float).reshape(8, down, 8, across).mean((1, 3))
    share = mask.reshape(8, down, 8, across).mean((1, 3))
    np.testing.assert_allclose(images[0, 0], ((areas + 300) / 600).clip(0, 1), atol=1e-5)
    assert np.array_equal(masks[0, 0], share >= 0.5 - 1e-9)


def test_range_of_an_image() -> None:
    values = np.float32([[2, 4], [6, 10]])
    assert np.array_equal(unit_range(values, None), np.float32([[0, 0.25], [0.5, 1]]))
    assert np.array_equal(unit_range(values, (4, 6)), np.float32([[0, 0], [1, 1]]))
    assert not unit_range(np.full((2, 2), 7, np.float32), None).any()
