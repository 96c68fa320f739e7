"""Uncertainty: what is known by construction, and that nothing but (seed, sample, layer, place) decides a mask."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampled_models import Canned, Small, net
from torch import Tensor, nn

from wsitk.errors import ModelError, UsageError
from wsitk.settings import Settings
from wsitk.uncertainty import MEASURES, Ensemble, MonteCarlo, Views
from wsitk.uncertainty.choose import sampled
from wsitk.uncertainty.dropout import DropoutSampler
from wsitk.uncertainty.masks import element_mask, layer_key, map_mask
from wsitk.uncertainty.measures import Running, entropy
from wsitk.uncertainty.views import turns

ORIGIN = [(0, 0)]


def pixels(n: int = 1, side: int = 64, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), np.uint8))


def asked(model: Any, batch: Tensor, starts: Any = None) -> dict[str, Tensor]:
    with torch.inference_mode():
        out: dict[str, Tensor] = model.predict_at(batch, starts or ORIGIN * len(batch))
    return out


# --- measures ----------------------------------------------------------------------------------------


def test_two_points_give_the_known_numbers() -> None:
    points = [torch.tensor([1 - p, p]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4) for p in (0.1, 0.9)]
    found = asked(MonteCarlo(Canned(points), 2), torch.zeros(1, 3, 4, 4))
    assert torch.allclose(found["p"], torch.tensor(0.5))
    # H2(0.1) = 0.4689956 bits; the mean, one half, has one bit
    wanted = dict(zip(MEASURES, (0.16, 1.0, 0.4689956, 0.5310044), strict=True))
    for name, value in zip(MEASURES, found["uncertainty"][0], strict=True):
        assert torch.allclose(value, torch.tensor(wanted[name]), atol=1e-6), name


def test_two_certain_samples_that_contradict_each_other_are_all_mutual_information() -> None:
    sure = [torch.eye(3)[k].reshape(1, 3, 1, 1) for k in (0, 2)]
    found = asked(MonteCarlo(Canned(sure), 2), torch.zeros(1, 3, 1, 1))["uncertainty"][0, :, 0, 0]
    # one bit of log2(3); two of three classes vary between 0 and 1
    one = np.log(2) / np.log(3)
    assert np.allclose(found.numpy(), [0.25 * 2 / 3, one, 0.0, one], atol=1e-6)
    assert found[2] == 0


@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 9), st.sampled_from([0.02, 1.0, 30.0]))
def test_mutual_information_lies_between_nothing_and_all(
    seed: int, classes: int, count: int, sharp: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    each = [(sharp * torch.randn(1, classes, 3, 5, generator=generator)).softmax(1) for _ in range(count)]
    running = Running()
    for p in each:
        running.add({"p": p}, p)
    variance, total, shared, mutual = running.measures()[0]
    assert (mutual >= 0).all()
    assert (mutual <= total).all()
    assert (total <= 1).all()
    assert (shared >= 0).all()
    every = torch.stack(each).double()
    mean = every.mean(0)
    naive = (entropy(mean) - torch.stack([entropy(p) for p in every]).mean(0))[0]
    assert torch.allclose(mutual.double(), naive.clamp(min=0), atol=1e-5)
    assert torch.allclose(variance.double(), every.var(0, correction=0).mean(1)[0], atol=1e-6)
    assert torch.allclose(running.outputs["p"].double(), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["spatial", "element", "dropout"])
@pytest.mark.parametrize("count", [2, 7])
def test_a_rate_of_zero_says_nothing_is_uncertain_exactly(kind: Any, count: int) -> None:
    model, batch = Small(net()), pixels(2)
    found = asked(MonteCarlo(model, count, kind=kind, rate=0.0), batch)
    with torch.inference_mode():
        plain = model.predict(batch)["probability"]
    assert torch.equal(found["probability"], plain)
    variance, total, shared, mutual = found["uncertainty"].unbind(1)
    assert (variance == 0).all()
    assert (mutual == 0).all()
    assert torch.equal(total, shared)
    assert (total > 0).any()


def test_only_one_sample_is_held_at_a_time() -> None:
    living: set[int] = set()
    most = 0

    class Watched(Small):
        def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
            nonlocal most
            out = super().suffix(features)
            value = out["probability"]
            living.add(id(value))
            weakref.finalize(value, living.discard, id(value))
            most = max(most, len(living))
            return out

    asked(MonteCarlo(Watched(net()), 12), pixels())
    assert most <= 2  # the one before goes when the next has come


# --- masks -------------------------------------------------------------------------------------------


class Ones(nn.Module):
    """A dropout layer between ones and whoever looks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def drawn(
    layer: nn.Module, kind: Any, starts: Any, shape: tuple[int, ...] = (16, 8, 8), sample: int = 0
) -> Tensor:
    network = Ones(layer).eval()
    sampler = DropoutSampler(network, seed=5, kind=kind, rate=None)
    with sampler.sampling(sample, starts, (16, 16)):
        out: Tensor = network.layer(torch.ones(len(starts), *shape))
    assert torch.equal(network.layer(torch.ones(2, *shape)), torch.ones(2, *shape))  # the hooks are gone
    return out


def test_spatial_dropout_zeroes_whole_maps_the_same_in_every_tile() -> None:
    out = drawn(nn.Dropout2d(0.25), "dropout", [(0, 0), (48, 16), (-16, 96)], (400, 8, 8))
    flat = out.flatten(2)
    assert torch.equal(flat.amin(2), flat.amax(2))  # a map is one value
    assert set(flat.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])
    assert abs(float((flat[0, :, 0] == 0).float().mean()) - 0.25) < 0.07
    assert torch.equal(out, drawn(nn.Dropout(0.25), "spatial", [(0, 0)] * 3, (400, 8, 8)))


def test_dropped_elements_belong_to_the_image_and_not_to_the_tile() -> None:
    # tiles of 16 pixels at stride 2: the second begins 3 elements further down and 2 to the left
    out = drawn(nn.Dropout(0.4), "dropout", [(-4, 8), (2, 4)])
    assert torch.equal(out[0, :, 3:, :6], out[1, :, :5, 2:])
    assert not torch.equal(out[0], out[1])
    assert abs(float((out == 0).float().mean()) - 0.4) < 0.03
    assert len(out[0].flatten(1).mean(1).unique()) > 1  # maps are not dropped whole
    assert torch.equal(out, drawn(nn.Dropout2d(0.4), "element", [(-4, 8), (2, 4)]))
    assert torch.equal(out[1:], drawn(nn.Dropout(0.4), "dropout", [(2, 4)]))


def test_samples_layers_seeds_and_channels_draw_differently() -> None:
    def whole(seed: int, sample: int, layer: str) -> NDArray[np.bool_]:
        return map_mask(layer_key(seed, sample, layer), 64, 0.5)

    masks = [whole(0, 0, "a"), whole(1, 0, "a"), whole(0, 1, "a"), whole(0, 0, "b")]
    assert len({m.tobytes() for m in masks}) == 4
    many = np.stack([whole(0, k, "a") for k in range(500)])
    assert abs(many.mean() - 0.5) < 0.01
    # no two channels drop together more often than chance has it
    between = np.corrcoef(many.T) - np.eye(64)
    assert np.abs(between).max() < 0.2
    each = element_mask(layer_key(0, 0, "a"), 3, (-5, 2), (40, 50), 0.5)
    assert abs(np.corrcoef(each[:, 1:].ravel(), each[:, :-1].ravel())[0, 1]) < 0.05


def test_masks_are_the_same_for_ever() -> None:
    assert np.packbits(map_mask(layer_key(0, 0, "deep.3"), 16, 0.5)).tolist() == MAPS
    assert np.packbits(element_mask(layer_key(7, 3, "x"), 1, (-2, 5), (2, 8), 0.3)).tolist() == ELEMENTS


@pytest.mark.parametrize("kind", ["spatial", "element"])
def test_samples_batches_and_order_of_tiles_do_not_change_a_mask(kind: Any) -> None:
    model, batch = Small(net()), pixels(3)
    starts = [(0, 0), (40, -12), (80, 28)]

    def answers(samples: int, places: list[int]) -> list[Tensor]:
        with torch.inference_mode():
            chosen = [starts[k] for k in places]
            return [
                out["probability"]
                for out in MonteCarlo(model, samples, kind=kind, seed=3).answers(batch[places], chosen)
            ]

    whole = answers(6, [0, 1, 2])
    assert not torch.allclose(whole[0], whole[1])
    for sample, few in enumerate(answers(3, [2, 0])):  # fewer samples, another batch, another order
        assert torch.allclose(few[0], whole[sample][2], atol=1e-6)
        assert torch.allclose(few[1], whole[sample][0], atol=1e-6)


def test_the_prefix_runs_once_and_nothing_trains() -> None:
    network = net()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    asked(MonteCarlo(Small(network), 9), pixels())
    assert network.runs == 1
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


class Late(Small):
    """A model that was cut in the wrong place."""

    def prefix(self, batch: Tensor) -> dict[str, Tensor]:
        return {"all": super().suffix(super().prefix(batch))["probability"]}

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"probability": features["all"]}


def test_dropout_in_the_prefix_is_refused() -> None:
    with pytest.raises(ModelError, match=r"WSI603 .*'deep.3'.*prefix"):
        asked(MonteCarlo(Late(net()), 2), pixels())


def test_layers_that_lie_otherwise_in_every_tile_are_refused() -> None:
    with pytest.raises(ModelError, match=r"WSI605 .*multiple of the network's stride"):
        asked(MonteCarlo(Small(net()), 2, kind="element"), pixels(), [(1, 0)])
    with pytest.raises(ModelError, match="WSI604"):
        drawn(nn.Dropout(0.5), "dropout", [(0, 0)], (16, 8))
    assert drawn(nn.Dropout(0.5), "element", [(0, 0), (8, 8)], (64,)).unique().tolist() == [0.0, 2.0]


# --- settings ----------------------------------------------------------------------------------------


def test_one_sample_is_the_model_itself() -> None:
    model = Small(net())
    assert sampled(model, Settings()) is model


@pytest.mark.parametrize(
    ("wishes", "code"),
    [
        ({"samples": 0}, "WSI609"),
        ({"samples": 2, "members": ("x",)}, "WSI609"),
        ({"uncertainty": "ensemble"}, "WSI609"),
        ({"uncertainty": "ensemble", "members": ("x",), "samples": 3}, "WSI609"),
        ({"uncertainty": "tta"}, "WSI609"),
        ({"uncertainty": "element"}, "WSI609"),
        ({"dropout": 0.1}, "WSI609"),
        ({"dropout": 0.1, "samples": 4, "uncertainty": "tta"}, "WSI609"),
        ({"dropout": 1.5, "samples": 4}, "WSI602"),
        ({"uncertainty": "tta", "samples": 9}, "WSI606"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(wishes: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError, match=code):
        sampled(Small(net()), Settings(**wishes))


def test_a_network_without_dropout_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"WSI602 canned has no dropout layers.*tta"):
        sampled(Canned([torch.ones(1, 2, 4, 4)], dropout=False), Settings(samples=4))
    with pytest.raises(UsageError, match=r"WSI602 small was trained without dropout.*--dropout 0.1"):
        sampled(Small(net(0.0)), Settings(samples=4))
    found = asked(sampled(Small(net(0.0)), Settings(samples=4, dropout=0.2)), pixels())
    assert (found["uncertainty"][:, 3] > 0).any()
    with pytest.raises(UsageError, match="WSI600"):
        MonteCarlo(Small(net()), 1)


def test_what_a_run_is_called_tells_samples_apart() -> None:
    model = Small(net(), objects=True, dtype="uint8")
    names = {
        sampled(model, Settings(samples=n, uncertainty=kind, seed=seed, dropout=rate)).spec.version  # type: ignore[arg-type]
        for n, kind, seed, rate in [
            (2, "dropout", 0, None),
            (3, "dropout", 0, None),
            (2, "spatial", 0, None),
            (2, "element", 0, None),
            (2, "dropout", 1, None),
            (2, "dropout", 0, 0.5),
            (2, "tta", 0, None),
        ]
    }
    assert len(names) == 7
    spec = MonteCarlo(model, 2).spec
    assert [f.dtype for f in spec.fields] == ["uint16", "uint16"]
    assert spec.fields[1].channels == MEASURES


# --- turned views ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (3, 4, 5)])
def test_what_is_turned_comes_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *shape)
    every = turns(shape)
    assert len(every) == (4 if shape == (4, 6) else 8)
    assert torch.equal(every[0].image(x), x)
    images = [turn.image(x) for turn in every]
    assert all(torch.equal(turn.back(image), x) for turn, image in zip(every, images, strict=True))
    assert len({i.numpy().tobytes() for i in images}) == len(every)


class Slope(Canned):
    """Answers with the slope of its image, x before y as CellViT does: it turns as the image turns."""

    def __init__(self, vectors: Mapping[str, tuple[int, ...]] | None) -> None:
        super().__init__([torch.ones(1, 2, 16, 16)])
        self.vectors = vectors

    def suffix(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = features["x"]
        down, right = (torch.roll(x, -1, k) - torch.roll(x, 1, k) for k in (2, 3))
        return {"hv": torch.cat([right, down], 1), "p": torch.cat([1 - x, x], 1)}

    def prefix(self, batch: Tensor) -> dict[str, Tensor]:
        return {"x": batch[:, :1].float() / 255}


def test_arrows_turn_with_the_image() -> None:
    batch = pixels(side=16)
    told, untold = (asked(Views(Slope(v), 8), batch)["hv"] for v in ({"hv": (1, 0)}, {}))
    once = Slope({}).predict(batch)["hv"]
    assert torch.allclose(told, once, atol=1e-6)
    assert untold.abs().max() < 1e-6 < once.abs().max()  # turned as plain maps they cancel out
    assert asked(Views(Slope({"hv": (1, 0)}), 8), batch)["uncertainty"][:, 3].max() < 1e-6


def test_a_model_that_does_not_know_how_it_turns_is_refused() -> None:
    with pytest.raises(UsageError, match="WSI607 canned doesn't say how its outputs turn"):
        Views(Slope(None), 4)


def test_views_of_a_network_that_is_not_symmetric_differ() -> None:
    found = asked(Views(Small(net()), 8), pixels())
    assert (found["uncertainty"][:, 3] > 0).any()


# --- ensembles ---------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    models = [Small(net(seed=k)) for k in range(3)]
    ensemble, batch = Ensemble(models), pixels()
    with torch.inference_mode():
        each = torch.stack([m.predict(batch)["probability"] for m in models])
    found = asked(ensemble, batch)
    assert torch.allclose(found["probability"], each.mean(0), atol=1e-6)
    assert torch.allclose(found["uncertainty"][:, 0], each.var(0, correction=0)[:, 0], atol=1e-6)
    assert len(list(ensemble.network.parameters())) == 3 * len(list(models[0].network.parameters()))


def test_models_that_see_other_things_are_no_ensemble() -> None:
    with pytest.raises(UsageError, match=r"WSI608 model 2 .* differs from the first in halo"):
        Ensemble([Small(net()), Small(net(), halo=8)])
    with pytest.raises(UsageError, match=r"WSI608 model 2 .* architecture"):
        Ensemble([Small(net()), Canned([torch.ones(1, 2, 64, 64)])])
    with pytest.raises(UsageError, match="WSI600"):
        Ensemble([Small(net())])


MAPS = [92, 2]
ELEMENTS = [221, 215]
