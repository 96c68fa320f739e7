"""The liver-stage model: its network, how objects are cut, and what the weights that ship do on real fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

import wsitk
from wsitk.card import read_card, write_card
from wsitk.errors import ModelError, UsageError
from wsitk.metrics.counts import Counts
from wsitk.metrics.panoptic import panoptic_counts
from wsitk.models.liverstage import model as liverstage
from wsitk.models.liverstage.data import normalised, targets
from wsitk.models.liverstage.evaluate import made_scores, summary
from wsitk.models.liverstage.model import LiverStageModel, spec_of
from wsitk.models.liverstage.network import RADIUS, LiverStageUNet, UNetConfig
from wsitk.models.liverstage.objects import CutSettings, parasites, segment
from wsitk.uncertainty import MEASURES, OBJECT_COLUMNS, MonteCarlo
from wsitk.volumes.nnunet_rules import IntensityRule, Moments
from wsitk.volumes.quantiles import Histogram

FOLDER = Path(liverstage.__file__).parent

TINY = UNetConfig(channels=2, base=2, levels=3, dropout=(0.1, 0.3, 0.5))


def network(config: UNetConfig = TINY, seed: int = 0) -> LiverStageUNet:
    """Return a network with random weights and random statistics of its norms."""
    torch.manual_seed(seed)
    made = LiverStageUNet(config)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return made.eval()


# --- the network ---------------------------------------------------------------------------------------


def test_the_two_parts_are_the_whole() -> None:
    made, x = network(), torch.randn(2, 2, 24, 16)
    with torch.inference_mode():
        assert torch.equal(made(x)["logits"], made.suffix(made.prefix(x)))
        assert made(x)["logits"].shape == (2, 2, 24, 16)


def test_dropout_takes_whole_maps_after_each_double_convolution() -> None:
    made = network(replace(TINY, base=8))
    seen: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in made.named_modules() if isinstance(m, torch.nn.Dropout2d)}
    for name, layer in layers.items():
        layer.train()
        layer.register_forward_hook(lambda m, given, out, name=name: seen.update({name: (given[0], out)}))
    torch.manual_seed(3)
    made(torch.randn(4, 2, 16, 16))
    assert sorted(layers) == ["drop_down.0", "drop_down.1", "drop_down.2", "drop_up.0", "drop_up.1"]
    for name, (before, out) in seen.items():
        rate = layers[name].p
        gone = (out == 0).all(dim=(2, 3)) & (before != 0).any(dim=(2, 3))
        kept = torch.isclose(out, before / (1 - rate)).all(dim=(2, 3))
        assert bool((gone | kept).all()), name
    assert any(bool((out == 0).all(dim=(2, 3)).any()) for _, out in seen.values())
    assert layers["drop_up.1"].p == layers["drop_down.1"].p == 0.3


def test_other_kinds_of_dropout_start_from_the_same_weights() -> None:
    kinds = [
        network(replace(TINY, kind=kind), seed=4).state_dict() for kind in ("spatial", "element", "none")
    ]
    assert all(torch.equal(v, other[k]) for other in kinds[1:] for k, v in kinds[0].items())


def test_a_pixel_hangs_on_its_neighbourhood_alone() -> None:
    """Weights are all positive, so that nothing cancels and what can be reached is reached."""
    made = network(UNetConfig(channels=1, base=2, kind="none")).double()
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.weight.data.abs_().add_(0.01)
    image = torch.rand(1, 1, 160, 160, dtype=torch.float64)
    reach = []
    with torch.inference_mode():
        before = made(image)["logits"]
        for place in range(76, 84):  # each phase of the coarsest level
            other = image.clone()
            other[0, 0, place, place] += 50
            rows = (made(other)["logits"] != before).any(1)[0].any(1).nonzero().ravel()
            reach += [place - int(rows.min()), int(rows.max()) - place]
    assert max(reach) == RADIUS


@pytest.mark.parametrize(
    "odd", [{"base": 0}, {"levels": 1}, {"dropout": (0.1,)}, {"dropout": (0.1, 0.2, 1.0)}, {"kind": "blur"}]
)
def test_networks_that_cannot_be_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        replace(TINY, **odd)


# --- brightness ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_of_whole_numbers_are_exact(values: list[int], share: float) -> None:
    array = np.array(values, np.uint16)
    counted = Histogram(float(array.min()), float(array.max()), array.dtype)
    for part in np.array_split(array, 3):
        counted.add(part)
    assert counted.quantile(share) == np.quantile(array, share, method="inverted_cdf")


def test_quantiles_of_other_numbers_are_exact_to_a_65536th() -> None:
    values = np.random.default_rng(0).lognormal(size=5000).astype(np.float32)
    counted = Histogram(float(values.min()), float(values.max()), values.dtype)
    counted.add(values)
    for share in (0.0, 0.01, 0.5, 0.998, 1.0):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert counted.quantile(share) == pytest.approx(exact, abs=float(np.ptp(values)) / 65535)


def test_the_background_is_the_unit() -> None:
    rule = IntensityRule("background")
    known = Moments(9, 0, 0, 90.0, 60090.0, (100.0, 120.0, 900.0))
    assert rule.numbers(known)(np.array([100, 120, 300])).tolist() == pytest.approx([0, 20 / 60, 200 / 60])
    usual = replace(known, high=900.0)
    assert rule.numbers(usual)(np.array([100, 120, 300])).tolist() == [0, 1, 10]
    black = Moments(9, 0, 0, 0.0, 255.0, (0.0, 0.0, 200.0))  # cut at black: no spread at all
    assert rule.numbers(black)(np.array([200])).tolist() == [50]
    empty = Moments(9, 0, 0, 7.0, 7.0, (7.0, 7.0, 7.0))
    assert rule.numbers(empty)(np.array([7])).tolist() == [0]
    with pytest.raises(ValueError, match="quantiles"):
        rule.numbers(Moments.of(np.arange(3)))


# --- objects -------------------------------------------------------------------------------------------


def disc(shape: tuple[int, int], middle: tuple[float, float], radius: float) -> NDArray[np.bool_]:
    y, x = np.ogrid[: shape[0], : shape[1]]
    found: NDArray[np.bool_] = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < radius**2
    return found


def touching() -> NDArray[np.int32]:
    labels = np.zeros((60, 80), np.int32)
    labels[disc(labels.shape, (30, 25), 14)] = 1
    labels[disc(labels.shape, (30, 50), 12.5)] = 2
    labels[disc(labels.shape, (10, 70), 4)] = 3
    return labels


def test_touching_objects_are_parted_where_they_touch() -> None:
    truth = touching()
    found = segment(*targets(truth))
    assert panoptic_counts(truth, found) == Counts(3, 0, 0, pytest.approx(3, abs=0.15))
    assert found.max() == 3
    one = segment(truth > 0, truth > 0)  # cores that touch are one
    assert one.max() == 2
    assert segment(truth > 0, (truth > 0) * 0.4).max() == 0  # no core, no object


def test_specks_are_left_out_and_holes_filled() -> None:
    foreground = np.zeros((40, 40))
    foreground[5:8, 5:8] = 1  # 9 pixels
    foreground[15:30, 15:30] = 1
    foreground[20:23, 20:23] = 0
    foreground[35:37, 2:38] = 1  # a line
    foreground[2:12, 20:38] = 1
    foreground[2:8, 24:34] = 0  # torn: a U
    labels = segment(foreground, foreground)
    assert np.unique(labels).tolist() == [0, 1]
    assert segment(foreground, foreground, CutSettings(least_width_px=0, least_solidity=0)).max() == 3
    assert (labels[15:30, 15:30] == 1).all()


def test_an_object_hangs_on_its_own_piece_alone() -> None:
    """The same in a crop that shows the piece whole, wherever it lies in it."""
    rng = np.random.default_rng(2)
    noise = ndimage.gaussian_filter(rng.normal(size=(160, 160)), 4)
    noise /= noise.std()
    foreground, core = (noise > 0.6) * 0.9, (noise > 1) * 0.8
    pieces, count = ndimage.label(foreground > 0.5)
    whole = segment(foreground, core)
    compared = 0
    for piece, box in enumerate(ndimage.find_objects(pieces), 1):
        start = [max(s.start - 3, 0) for s in box]
        crop = (slice(start[0], box[0].stop), slice(start[1], box[1].stop))
        inside = pieces[crop] == piece
        parts = [np.where(inside, labels[crop], 0) for labels in (whole,)]
        own = segment(foreground[crop] * inside, core[crop])
        names = [np.unique(p[p > 0]) for p in (*parts, own)]
        assert len(names[0]) == len(names[1])
        for a, b in zip(*names, strict=True):
            assert np.array_equal(parts[0] == a, own == b)
        compared += len(names[0])
    assert compared == whole.max() >= 10
    assert count > 1


def test_columns_are_means_of_channels() -> None:
    truth = touching()
    image = np.stack([truth * 10.0, np.random.default_rng(0).normal(size=truth.shape)])
    shape, core = targets(truth)
    table = parasites(shape * 0.8, core, image, ("intensity_a", "intensity_b"), (100, 200), tile=7)
    assert len(table) == 3
    assert table.probability == pytest.approx([0.8] * 3)
    assert sorted(table.columns["intensity_a"].round().tolist()) == [10, 20, 30]
    assert set(table.tile.tolist()) == {7}
    row = int(np.argmax(table.columns["intensity_a"]))
    assert table.anchor[row] == pytest.approx([110.5, 270.5])
    labels = segment(shape, core)
    assert table.columns["intensity_b"] == pytest.approx(ndimage.mean(image[1], labels, [1, 2, 3]), abs=1e-6)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI620"):
        CutSettings(threshold=1.0)


# --- the model in the engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> LiverStageModel:
    return liverstage.default_model()


def field(seed: int = 5, side: int = 320) -> NDArray[np.generic]:
    """Return a made field (H, W, 2) with parasites in it."""
    from wsitk.models.liverstage.fields import make_field

    made = make_field((side, side), np.random.default_rng(seed))
    return np.moveaxis(made.image, 0, -1)


def naive(model: LiverStageModel, image: NDArray[np.generic], margin: int) -> tuple[Any, Any]:
    """Return foreground and core of a whole image at once, mirrored beyond its borders as the engine does."""
    whole = normalised(np.moveaxis(image, -1, 0))
    more = [-n % 32 for n in whole.shape[1:]]
    wide = np.pad(whole, [(0, 0), *((margin, margin + m) for m in more)], mode="reflect")
    with torch.inference_mode():
        out = model.predict(torch.from_numpy(wide)[None])
    inside = tuple(slice(margin, margin + n) for n in whole.shape[1:])
    return tuple(out[name][0, 0].numpy()[inside] for name in ("foreground", "core"))


def test_tiles_say_what_the_whole_image_says(tmp_path: Path, shipped: LiverStageModel) -> None:
    """Fields to a step of what is stored, objects to the pixel, whatever the tiles."""
    image = field()
    foreground, core = naive(shipped, image, 64)
    labels = segment(foreground, core)
    assert labels.max() >= 2
    for number, (tile, halo) in enumerate(((256, 64), (320, 64))):
        result = wsitk.run(
            shipped, image, out=tmp_path / str(number), device="cpu", workers=1, tile=tile, halo=halo
        )
        stored = np.asarray(result.maps)[0] / 255
        assert np.abs(stored - foreground).max() < 0.5 / 255 + 1e-4
        seen = result.objects
        assert sorted(seen.area_um2) == sorted(np.bincount(labels.ravel())[1:])  # no spacing: pixels
        assert (seen["class"] == "Parasite").all()
        assert {"equivalent_diameter_um", "intensity_DAPI", "intensity_HSP70"} <= set(seen.columns)


def test_samples_are_asked_of_what_comes_after_the_first_dropout(shipped: LiverStageModel) -> None:
    batch = torch.from_numpy(normalised(np.moveaxis(field(side=192), -1, 0)))[None]
    asked = MonteCarlo(shipped, 8)
    with torch.inference_mode():
        alone, drawn = shipped.predict(batch), asked.predict(batch)
    mutual = drawn["uncertainty"][:, MEASURES.index("mutual_information")]
    assert float(mutual.max()) > 0.01
    assert float((drawn["foreground"] - alone["foreground"]).abs().mean()) < 0.1
    assert torch.equal(drawn["image"], batch)
    still = MonteCarlo(shipped, 3, rate=0.0)
    with torch.inference_mode():
        nothing = still.predict(batch)
    assert not nothing["uncertainty"][:, MEASURES.index("mutual_information")].any()
    assert torch.equal(nothing["foreground"], alone["foreground"])


def test_objects_carry_their_doubt(tmp_path: Path, shipped: LiverStageModel) -> None:
    result = wsitk.run(
        MonteCarlo(shipped, 5), field(side=192), out=tmp_path, device="cpu", workers=1, tile=256, halo=64
    )
    seen = result.objects
    assert len(seen)
    assert set(OBJECT_COLUMNS) <= set(seen.columns)
    assert (seen.area_low_um2 <= seen.area_high_um2).all()
    assert seen.existence.between(0, 1).all()


def test_8_and_16_bits_exposure_and_offset_come_to_the_same(shipped: LiverStageModel) -> None:
    image = np.moveaxis(field(side=128), -1, 0).astype(np.uint8)
    other = image.astype(np.uint16) * np.array([37, 200], np.uint16)[:, None, None] + 400
    assert normalised(other) == pytest.approx(normalised(image), abs=1e-5)


def test_without_the_stain_of_dna(shipped: LiverStageModel) -> None:
    """One channel goes where it belongs, and the other is empty."""
    alone = liverstage.hsp70_only()
    assert alone.spec.channels == 1
    assert alone.spec.object_columns == ("intensity_HSP70",)
    batch = torch.from_numpy(normalised(np.moveaxis(field(side=64), -1, 0)))[None]
    blind = batch.clone()
    blind[:, 0] = 0
    with torch.inference_mode():
        one, both = alone.predict(batch[:, 1:]), shipped.predict(blind)
    assert torch.equal(one["foreground"], both["foreground"])
    assert torch.equal(one["image"], batch[:, 1:])
    turned = liverstage.from_folder(FOLDER, channels="HSP70, DAPI")
    with torch.inference_mode():
        assert torch.equal(turned.predict(batch.flip(1))["core"], shipped.predict(batch)["core"])
    for wanted in ("GFP", "DAPI,DAPI"):
        with pytest.raises(UsageError, match=r"WSI622 .*DAPI, HSP70"):
            liverstage.from_folder(FOLDER, channels=wanted)


def test_images_are_brought_to_a_pixel_size_if_asked(tmp_path: Path) -> None:
    image = np.kron(field(side=160), np.ones((2, 2, 1), np.uint8))
    model = liverstage.default_model(mpp=0.65)
    source = wsitk.open_source(image, mpp=0.325)
    result = wsitk.run(model, source, out=tmp_path, device="cpu", workers=1, tile=256, halo=64)
    assert np.asarray(result.maps).shape[1:] == (160, 160)


# --- the weights that ship -----------------------------------------------------------------------------


def test_the_weights_are_those_of_the_card_and_small(shipped: LiverStageModel) -> None:
    card = read_card(FOLDER / "card.toml")
    assert card.verified()
    assert card.weights.stat().st_size == card.content["size_bytes"] < 8_000_000
    assert sum(p.numel() for p in shipped.network.parameters()) == card.content["parameters"]
    assert shipped.spec.channels == 2
    assert shipped.spec.spacing is None
    assert not shipped.network.training
    assert {p.dtype for p in shipped.network.parameters()} == {torch.float32}
    data = " ".join(d["name"] for d in card.content["training_data"])
    assert "parasites" not in data.lower()


def test_other_weights_or_another_network_are_refused(tmp_path: Path) -> None:
    card = read_card(FOLDER / "card.toml")
    (tmp_path / "weights").mkdir()
    for case in card.content["failure_cases"]:
        (tmp_path / case["picture"]).parent.mkdir(exist_ok=True)
        (tmp_path / case["picture"]).write_bytes((FOLDER / case["picture"]).read_bytes())
    weights = tmp_path / card.content["weights"]
    with pytest.raises(ModelError, match=r"WSI317 .* are not there"):
        liverstage.from_folder(_copy(tmp_path, card.content))
    weights.write_bytes(card.weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=r"WSI317 .* don't have sha256"):
        liverstage.from_folder(tmp_path)
    own = card.content["network"]
    for described, said in (
        ({**own, "arch": "compact"}, "WSI318 .*wanted 'liverstage-unet'"),
        ({**own, "width": 3}, "WSI318 .*width"),
        ({**own, "dropout": [0.5]}, "WSI318 .*dropout"),
        ({**own, "base": own["base"] + 1}, "WSI301"),
    ):
        weights.write_bytes(card.weights.read_bytes())
        with pytest.raises(ModelError, match=said):
            liverstage.from_folder(_copy(tmp_path, {**card.content, "network": described}))


def _copy(folder: Path, content: Mapping[str, Any]) -> Path:
    write_card(folder / "card.toml", content, overwrite=True)
    return folder


@pytest.mark.slow
def test_the_cards_figures_are_those_of_the_weights(shipped: LiverStageModel) -> None:
    card = read_card(FOLDER / "card.toml").content["measured"]
    for name, blind in (("made_fields", False), ("made_fields_without_dna", True)):
        found = summary(made_scores(shipped.network, card[name]["images"], blind=blind))
        assert found["f1"] == pytest.approx(card[name]["f1"], abs=0.01), name
        assert found["dice"] == pytest.approx(card[name]["dice"], abs=0.01), name


def test_clear_made_fields_are_read(shipped: LiverStageModel) -> None:
    scores = made_scores(shipped.network, 10, contrast=(15.0, 40.0), median=(8.0, 16.0), empty=0.0)
    assert summary(scores)["f1"] > 0.6
    assert summary(scores)["dice"] > 0.7


# --- real fields ---------------------------------------------------------------------------------------


def real(data: Path, name: str) -> dict[str, NDArray[Any]]:
    with np.load(data / "data" / "parasites" / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def painted(result: wsitk.Result, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Return the outlines of a run as labels, by the geometry that QuPath would see."""
    from skimage.draw import polygon

    labels = np.zeros(shape, np.int32)
    for number, outline in enumerate(result.objects.geometry, 1):
        for part in getattr(outline, "geoms", [outline]):  # the image's border may cut one in two
            x, y = np.array(part.exterior.coords).T
            labels[polygon(y - 0.5, x - 0.5, shape)] = number
    return labels


def test_parasites_of_a_real_field_are_found(data: Path, tmp_path: Path, shipped: LiverStageModel) -> None:
    """The labelled half field, which took no part in training; no threshold is set for it."""
    stored = real(data, "field1_left_labelled")
    image = np.stack([stored["dapi"], stored["hsp70"]], -1)
    result = wsitk.run(shipped, image, out=tmp_path / "both", device="cpu", workers=1)
    truth = stored["parasite_inst"].astype(np.int32)
    found = panoptic_counts(truth, painted(result, truth.shape))
    print(f"\nDAPI and HSP70: TP {found.tp}, FP {found.fp}, FN {found.fn}; F1 {found.f1:.3f}")
    assert found.f1 >= 0.7
    path = tmp_path / "hsp70.tif"
    tifffile.imwrite(path, stored["hsp70"])
    alone = wsitk.run(liverstage.hsp70_only(), path, out=tmp_path / "one", device="cpu", workers=1)
    found = panoptic_counts(truth, painted(alone, truth.shape))
    print(f"HSP70 alone: TP {found.tp}, FP {found.fp}, FN {found.fn}; F1 {found.f1:.3f}")
    assert found.f1 >= 0.5


def test_spec_of_other_channels() -> None:
    spec = spec_of(("red", "green", "blue"))
    assert spec.channels == 3
    assert spec.object_columns == ("intensity_red", "intensity_green", "intensity_blue")
    assert spec.halo[0] > RADIUS
