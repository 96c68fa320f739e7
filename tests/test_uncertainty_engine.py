"""Uncertainty through the whole engine: joined maps, columns of objects, settings, processes, the shipped model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from cellvit_golden import he_input, one_thread, quick
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampled_models import Canned, Small, Thick, net, scene
from torch import nn
from typer.testing import CliRunner

import wsitk
from wsitk.cli.main import app
from wsitk.errors import OutputError, UsageError
from wsitk.grid import Tile
from wsitk.objects import ObjectTable
from wsitk.testing import IdentityModel, SyntheticSlide
from wsitk.uncertainty import MEASURES, OBJECT_COLUMNS, MonteCarlo
from wsitk.uncertainty.dropout import DropoutSampler
from wsitk.uncertainty.grow import grow
from wsitk.uncertainty.objects import object_columns
from wsitk.worker import _start

PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "preview": False}

IMAGE = scene((130, 151)).numpy()


def whole(model: MonteCarlo, pad: int) -> dict[str, NDArray[np.float32]]:
    """Return the outputs over all of `IMAGE` at once, computed with `pad` pixels more on each side."""
    h, w = (-(-n // 2) * 2 for n in IMAGE.shape[:2])
    far = ((pad, pad + h - IMAGE.shape[0]), (pad, pad + w - IMAGE.shape[1]), (0, 0))
    batch = torch.from_numpy(np.pad(IMAGE, far, "reflect")).permute(2, 0, 1)[None]
    with torch.inference_mode():
        found = model.predict_at(batch, [(-pad, -pad)])
    inside = (slice(pad, pad + IMAGE.shape[0]), slice(pad, pad + IMAGE.shape[1]))
    return {name: value[(0, slice(None), *inside)].numpy() for name, value in found.items()}


@pytest.mark.parametrize(
    ("kind", "layer", "batch"), [("spatial", nn.Dropout2d, 3), ("element", nn.Dropout, 1)]
)
def test_joined_tiles_equal_the_whole_image(kind: Any, layer: Any, batch: int, tmp_path: Path) -> None:
    model = Small(net(layer=layer), window="crop", batch=batch)
    wishes = {**PLAIN, "samples": 5, "uncertainty": kind, "seed": 11, "block": 2}
    result = wsitk.run(model, IMAGE, out=tmp_path, spacing=0.5, **wishes)
    assert result.map_channels == ("Thing", *MEASURES)
    found, wanted = result.maps.compute(), whole(MonteCarlo(model, 5, kind=kind, seed=11), 32)
    assert np.abs(found[:1] - wanted["probability"]).max() < 1e-5
    assert np.abs(found[1:] - wanted["uncertainty"]).max() < 1e-5
    assert found[1 + MEASURES.index("mutual_information")].max() > 0.02


def test_another_grid_is_the_same_answer(tmp_path: Path) -> None:
    model = Small(net(layer=nn.Dropout), window="crop")
    maps = [
        wsitk.run(model, IMAGE, out=tmp_path / name, spacing=0.5, samples=3, **PLAIN, **more).maps.compute()
        for name, more in (("a", {"block": 1}), ("b", {"tile": 96, "halo": 20}))
    ]
    assert np.abs(maps[0] - maps[1]).max() < 1e-5


def test_a_volume_is_sampled_the_same_way(tmp_path: Path) -> None:
    model = Thick()
    pixels = np.random.default_rng(1).integers(0, 256, (20, 33, 41, 1), np.uint8)
    source = wsitk.open_source(pixels, axes="zyxc", mpp=1000.0)
    wishes = {**PLAIN, "samples": 4, "uncertainty": "element", "seed": 2}
    found = wsitk.run(model, source, out=tmp_path, **wishes).maps.compute()
    pad = np.pad(pixels, ((4, 4),) * 3 + ((0, 0),), "reflect")
    with torch.inference_mode():
        batch = torch.from_numpy(pad).permute(3, 0, 1, 2)[None]
        wanted = MonteCarlo(model, 4, kind="element", seed=2).predict_at(batch, [(-4, -4, -4)])["uncertainty"]
    assert np.abs(found[1:] - wanted[0, :, 4:-4, 4:-4, 4:-4].numpy()).max() < 1e-5
    assert found[4].max() > 0.01


def test_one_sample_changes_no_byte_and_several_are_another_run(tmp_path: Path) -> None:
    model = Small(net(), objects=True, dtype="uint8")
    for name, more in (("a", {}), ("b", {"samples": 1, "seed": 5})):
        wsitk.run(model, IMAGE, out=tmp_path / name, spacing=0.5, **PLAIN, **more)
    (a,), (b,) = ((tmp_path / n).rglob("provenance.json") for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(OutputError, match="samples of dropout"):
        wsitk.run(model, IMAGE, out=tmp_path / "a", spacing=0.5, samples=2, **PLAIN)


def test_objects_carry_their_doubt_into_every_file(tmp_path: Path) -> None:
    model = Small(net(), objects=True, dtype="uint8")
    result = wsitk.run(model, IMAGE, out=tmp_path, spacing=0.5, samples=8, **PLAIN)
    table = result.objects
    assert len(table) > 3
    assert set(OBJECT_COLUMNS) <= set(table.columns)
    assert (table["area_low_um2"] <= table["area_high_um2"]).all()
    assert table["existence"].between(0, 1).all()
    assert table["class_entropy"].between(0, 1).all()
    assert (table["mutual_information"] > 0).any()
    # areas are written in micrometres: pixels are a quarter of a square one
    ratio = (table["area_low_um2"] + table["area_high_um2"]) / 2 / table["area_um2"]
    assert 0.5 < ratio.median() < 2
    with gzip.open(result.path / "objects.geojson.gz") as file:
        features = json.load(file)["features"]
    names = {"Mutual information", "Class entropy", "Existence", "Area low µm^2", "Area high µm^2"}
    assert len(features) == len(table)
    assert names <= set(features[0]["properties"]["measurements"])
    assert result.maps.dtype == np.uint16


# --- objects -----------------------------------------------------------------------------------------


def naive_grow(labels: NDArray[np.int32], reach: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return for each background pixel the label nearest in steps, if that reaches so far; lowest label first."""
    out = labels.copy()
    for wave in range(1, int(reach.max(initial=0)) + 1):
        before = out.copy()
        for place in np.argwhere(before == 0):
            near = []
            for axis in range(labels.ndim):
                for step in (-1, 1):
                    other = place.copy()
                    other[axis] += step
                    if 0 <= other[axis] < labels.shape[axis] and before[tuple(other)]:
                        near.append(before[tuple(other)])
            claims = [n for n in near if reach[n - 1] >= wave]
            if claims:
                out[tuple(place)] = min(claims)
    return out


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(9, 11), (4, 5, 6)]))
def test_labels_grow_as_the_naive_ones_do(seed: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(shape) < 0.1, rng.integers(1, 5, shape), 0).astype(np.int32)
    reach = rng.integers(0, 4, 4).astype(np.int32)
    assert np.array_equal(grow(labels, reach), naive_grow(labels, reach))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([2, 5, 8, 20]))
def test_columns_are_what_counting_gives(seed: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    shape, origin = (24, 26), (-3, 40)
    labels = np.zeros(shape, np.int32)
    labels[2:8, 3:9], labels[10:13, 2:5], labels[9:20, 9:20] = 1, 2, 3
    table = ObjectTable.from_labels(labels, origin=origin)
    mutual = rng.random(shape).astype(np.float32)
    each = rng.dirichlet((1, 1, 1), shape).astype(np.float32).transpose(2, 0, 1)
    seen = rng.random((samples, *shape)) < 0.6
    votes = np.packbits(seen, axis=0)
    box = wsitk.Region(origin, shape)
    found = object_columns(table, Tile(0, box, box), mutual, each, votes, samples)
    reach = np.ceil(np.sqrt(table.size / np.pi) / 2).astype(np.int32)
    around = naive_grow(labels, reach)
    for k in range(3):
        own = labels == k + 1
        p = each[:, own].astype(float).mean(1)
        areas = [(s & (around == k + 1)).sum() for s in seen]
        low, high = np.quantile(areas, (0.05, 0.95))
        wanted = {
            "mutual_information": mutual[own].mean(),
            "class_entropy": -(p * np.log(p)).sum() / np.log(3),
            "existence": np.mean([(s & own).sum() > own.sum() / 2 for s in seen]),
            "area_low_um2": low,
            "area_high_um2": high,
        }
        for name in OBJECT_COLUMNS:
            assert np.isclose(found[name][k], wanted[name], rtol=1e-5), name


def test_objects_without_doubt_are_sure(tmp_path: Path) -> None:
    wishes = {**PLAIN, "samples": 4, "dropout": 0.0}
    model = Small(net(), objects=True, dtype="uint8")
    table = wsitk.run(model, IMAGE, out=tmp_path, spacing=0.5, **wishes).objects
    assert (table["mutual_information"] == 0).all()
    assert (table["existence"] == 1).all()
    assert (table["area_low_um2"] == table["area_high_um2"]).all()
    assert (table["area_low_um2"] >= table["area_um2"]).all()  # the band around may hold a neighbour's crumbs


def test_a_tile_without_objects_has_columns_without_rows() -> None:
    box = wsitk.Region((0, 0), (8, 8))
    nothing = np.zeros((8, 8), np.float32)
    found = object_columns(
        ObjectTable.empty(2),
        Tile(0, box, box),
        nothing,
        np.stack([1 - nothing, nothing]),
        np.zeros((1, 8, 8), "u1"),
        4,
    )
    assert {name: len(v) for name, v in found.items()} == dict.fromkeys(OBJECT_COLUMNS, 0)


# --- refusals, and other processes -------------------------------------------------------------------


def test_models_that_cannot_be_sampled_are_refused_before_any_slide_is_opened(tmp_path: Path) -> None:
    for model, code in (
        (IdentityModel(), "WSI601"),
        (Canned([torch.ones(1, 2, 4, 4)], dropout=False), "WSI602"),
    ):
        with pytest.raises(UsageError, match=code):
            wsitk.run(model, IMAGE, out=tmp_path / "out", spacing=0.5, samples=3, **PLAIN)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "slide.tiff"
    options: dict[str, Any] = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, IMAGE, tile=(64, 64), photometric="rgb", **options)
    return path


def test_the_command_line_samples_in_a_process_of_its_own(slide: Path, tmp_path: Path) -> None:
    words = [
        "run",
        "sampled_models:small_model",
        str(slide),
        "-o",
        str(tmp_path / "apart"),
        "--tissue",
        "none",
    ]
    words += ["--threads", "1", "--workers", "1", "--no-preview", "--samples", "4", "--seed", "9"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    model = Small(net(), objects=True, dtype="uint8")
    here = wsitk.run(model, str(slide), out=tmp_path / "here", samples=4, seed=9, workers=1, **PLAIN)
    apart = wsitk.Result(tmp_path / "apart" / "slide.tiff")
    assert apart.provenance["key"] == here.provenance["key"]
    assert apart.provenance["outputs"] == here.provenance["outputs"]


def test_the_command_line_refuses_in_one_line(slide: Path, tmp_path: Path) -> None:
    words = [
        "run",
        "sampled_models:small_model",
        str(slide),
        "-o",
        str(tmp_path / "out"),
        "--uncertainty",
        "tta",
    ]
    done = CliRunner().invoke(app, [*words, "--samples", "9", "--no-supervise"])
    assert isinstance(done.exception, UsageError)
    assert done.exception.code == "WSI606"


def test_an_ensemble_is_named_on_the_command_line(slide: Path, tmp_path: Path) -> None:
    words = ["run", "sampled_models:small_model", str(slide), "-o", str(tmp_path / "out"), "--tissue", "none"]
    words += ["--threads", "1", "--no-preview", "--no-supervise", "--uncertainty", "ensemble"]
    done = CliRunner().invoke(app, [*words, "--member", "sampled_models:small_model"])
    assert done.exit_code == 0, done.output
    result = wsitk.Result(tmp_path / "out" / "slide.tiff")
    assert "2 models" in result.provenance["model"]["version"]
    assert result.maps[1 + MEASURES.index("mutual_information")].max().compute() == 0  # twice the same model


# --- the shipped model -------------------------------------------------------------------------------


def test_cellvit_looks_once_whatever_the_samples(tmp_path: Path) -> None:
    slide = SyntheticSlide.make((256, 256), count=30, seed=5)
    model = wsitk.load_model("cellvit")
    network: Any = model.network
    seen = {"encoder": 0, "decoder": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            seen[name] += 1

        return hook

    network.encoder.register_forward_hook(count("encoder"))
    network.hv_map_decoder.register_forward_hook(count("decoder"))
    wishes = {**PLAIN, "tile": 512, "halo": 128, "samples": 3}
    result = wsitk.run(model, slide.pixels, out=tmp_path, spacing=0.25, **wishes)
    tiles = result.provenance["tiles"]["ok"]
    assert seen == {"encoder": tiles, "decoder": 3 * tiles}
    assert result.map_channels == ("Nuclei", *MEASURES, "Density")
    assert result.maps[1].max().compute() > 0


def test_cellvit_knows_how_its_outputs_turn() -> None:
    from wsitk.uncertainty import Views

    slide = SyntheticSlide.make((256, 256), count=30, seed=5)
    model: Any = wsitk.load_model("cellvit")
    batch = torch.from_numpy(slide.pixels).permute(2, 0, 1)[None]
    with torch.inference_mode():
        once, turned = model.predict(batch)["hv"], Views(model, 8).predict(batch)["hv"]
    # the network is not symmetric, but nearly; with a sign or an axis wrong the maps would not correlate
    for k in (0, 1):
        both = np.corrcoef(once[0, k].numpy().ravel(), turned[0, k].numpy().ravel())
        assert both[0, 1] > 0.9


def test_a_sampled_model_is_not_sampled_again(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI609 small .* is sampled already"):
        wsitk.run(MonteCarlo(Small(net()), 2), IMAGE, out=tmp_path, spacing=0.5, samples=2, **PLAIN)


def test_places_on_an_axis_that_was_turned_count_from_its_other_end() -> None:
    image = wsitk.Region((0, 0), (40, 50))
    task = SimpleNamespace(image=image, view=SimpleNamespace(turned=(1,)))
    for start in ((-4, -4), (8, 10)):
        read = wsitk.Region(start, (16, 20))
        request: Any = SimpleNamespace(tile=Tile(0, read, read), home=SimpleNamespace(task=task))
        place = _start(request, np.zeros((16, 20, 1)))
        # the network's last column is the image's first one, whichever tile shows it
        assert place == (start[0], -(start[1] + 20))
        cut = read.intersect(image)
        assert _start(request, np.zeros((*cut.shape, 1))) == (cut.start[0], -cut.stop[1])


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_sam"])
def test_official_networks_are_sampled_in_their_decoders(name: str) -> None:
    network, x = quick(name), he_input(64, 64)
    calls: list[int] = []
    handle = network.encoder.register_forward_hook(lambda *_: calls.append(1))
    sampler = DropoutSampler(network, seed=0, kind="dropout", rate=0.1)
    with torch.inference_mode(), one_thread():
        features = network.prefix(x)
        plain = network.suffix(features)
        drawn = []
        for sample in (0, 1, 0):
            with sampler.sampling(sample, [(0, 0)], (64, 64)):
                drawn.append(network.suffix(features))
        assert torch.equal(plain["hv_map"], network.suffix(features)["hv_map"])
    handle.remove()
    assert calls == [1]
    for output in ("hv_map", "nuclei_binary_map", "nuclei_type_map"):
        assert torch.equal(drawn[0][output], drawn[2][output])
        assert not torch.equal(drawn[0][output], drawn[1][output])
        assert not torch.equal(drawn[0][output], plain[output])
