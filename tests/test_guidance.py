"""Maps of clicks against the published ones, and geodesic distances against Dijkstra's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wsitk.errors import UsageError
from wsitk.model import FieldSpec, ModelSpec
from wsitk.models.interactive.model import Interactive
from wsitk.volumes.guidance import Guidance, guidance_map
from wsitk.volumes.guidance.geodesic import FAR, geodesic_distance

DATA = os.environ.get("WSITK_TEST_DATA", "")
GOLDEN = Path(DATA) / "golden" / "radiology" / "geodesic_guidance"
needs_golden = pytest.mark.skipif(
    not (DATA and GOLDEN.is_dir()), reason="WSITK_TEST_DATA has no golden/radiology"
)

SPACINGS = {"s1": (1, 1, 1), "s3": (2, 2, 3)}
AUTOPET, SPLEEN = (2.03642, 2.03642, 3.0), (0.79, 0.79, 5.0)


@needs_golden
def test_distances_are_those_of_both_packages() -> None:
    count = 0
    for file, start, cost in (("golden", "fg", "fastgeodis"), ("geodistk", "raster", "geodistk")):
        golden = np.load(GOLDEN / f"{file}.npz")
        for name in golden.files:
            kind, *rest = name.split("_")
            if kind not in (f"{start}3d", f"{start}2d", "raster"):
                continue
            flat = kind.endswith("2d")
            image, seeds = (golden[n + "2d" * flat] for n in ("image", "seed"))
            found = geodesic_distance(
                image, seeds, (1, 1) if flat else SPACINGS[rest[1]], weight=float(rest[0][1:]),
                iterations=2 if flat else int(rest[2][1:]), cost=cost, mode="compatible",
            )  # fmt: skip
            np.testing.assert_allclose(found, golden[name], atol=1e-4)
            count += 1
    assert count == 18 + 3 + 12 + 3


def dijkstra(
    image: np.ndarray, seed: tuple[int, ...], spacing: tuple[float, ...], weight: float
) -> np.ndarray:
    """Return shortest paths among the 26 neighbours, by the book."""
    import heapq
    from itertools import product

    best = np.full(image.shape, np.inf)
    queue = [(0.0, seed)]
    while queue:
        distance, place = heapq.heappop(queue)
        if best[place] <= distance:
            continue
        best[place] = distance
        for step in product((-1, 0, 1), repeat=image.ndim):
            near = tuple(p + s for p, s in zip(place, step, strict=True))
            if any(step) and all(0 <= n < size for n, size in zip(near, image.shape, strict=True)):
                length = float(np.sqrt(sum((s * d) ** 2 for s, d in zip(step, spacing, strict=True))))
                change = abs(float(image[place]) - float(image[near]))
                heapq.heappush(queue, (distance + weight * change + (1 - weight) * length, near))
    return best


@pytest.mark.parametrize("shape", [(9, 11), (5, 7, 6)])
def test_many_sweeps_find_the_shortest_paths(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    image, seed = rng.random(shape, np.float32), tuple(n // 2 for n in shape)
    seeds = np.zeros(shape, bool)
    seeds[seed] = True
    spacing = (1.5, 1.0, 0.5)[: len(shape)]
    found = geodesic_distance(image, seeds, spacing, weight=0.7, iterations=30)
    np.testing.assert_allclose(found, dijkstra(image, seed, spacing, 0.7), atol=1e-5)


def test_textbook_scans_reach_across_in_one_pass() -> None:
    image, seeds = np.zeros((12, 12, 12), np.float32), np.zeros((12, 12, 12), bool)
    seeds[0, 11, 11] = True
    one, many = (
        geodesic_distance(image, seeds, (1, 1, 1), weight=0.0, iterations=n, cost="geodistk") for n in (1, 9)
    )
    np.testing.assert_allclose(one, many, rtol=1e-6)
    odd = geodesic_distance(
        image, seeds, (1, 1, 1), weight=0.0, iterations=1, cost="geodistk", mode="compatible"
    )
    assert odd[11, 0, 0] > one[11, 0, 0] + 1


def test_distances_refuse_what_makes_no_sense() -> None:
    image = np.zeros((4, 4), np.float32)
    assert (geodesic_distance(image, image, (1, 1)) == np.float32(FAR)).all()
    for change in ({"spacing": (1, 0)}, {"spacing": (1, 1, 1)}, {"weight": 2.0}, {"iterations": 0}):
        with pytest.raises(UsageError, match="WSI080"):
            geodesic_distance(image, image, **{"spacing": (1, 1), **change})
    with pytest.raises(UsageError, match="not finite"):
        geodesic_distance(image + np.nan, image, (1, 1))


@needs_golden
def test_maps_are_the_published_ones() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    image, clicks = golden["gtg_image"][0], golden["gtg_clicks"][:, 1:]

    def check(name: str, spacing: tuple[float, ...], guidance: Guidance) -> None:
        found = guidance_map(clicks, image, spacing, guidance).ravel()
        np.testing.assert_allclose(found[golden[f"{name}_idx"]], golden[f"{name}_val"], atol=1e-4)

    for sigma in (0, 1, 3, 5):
        check(f"heatmap_s{sigma}", AUTOPET, Guidance("gaussian", sigma))
        if sigma:
            disks = guidance_map(clicks, image, AUTOPET, Guidance("disk", sigma))
            np.testing.assert_array_equal(disks, golden[f"disks_s{sigma}"])
    for data, spacing in (("autopet", AUTOPET), ("msd", SPLEEN)):
        check(f"edt_s1_th10_{data}", spacing, Guidance("edt", 1))
        check(f"gdt_s5_th10_{data}", spacing, Guidance("geodesic", 5))
        check(f"expgeos_s5_{data}", spacing, Guidance("exponential", 5))
        # upstream gives background clicks a sigma of 1, whatever the distances
        check(f"adaptive_s5_th10_{data}_background", spacing, Guidance("adaptive", 5, steps=((-1.0, 1.0),)))


@needs_golden
def test_adaptive_heatmaps_add_up_as_published() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    name, image = "adaptive_s5_th10_autopet_spleen", golden["gtg_image"][0]
    total = np.zeros(image.shape, np.float32)
    for click, sigma in zip(golden["gtg_clicks"][:, 1:], (9, 13, 13), strict=True):
        total += guidance_map([click], image, AUTOPET, Guidance("gaussian", sigma))
    total = (total - total.min()) / (total.max() - total.min())
    np.testing.assert_allclose(total.ravel()[golden[f"{name}_idx"]], golden[f"{name}_val"], atol=1e-4)


def test_modes_differ_where_they_should() -> None:
    image = np.random.default_rng(2).random((20, 20, 20), np.float32)
    clicks = [[10, 10, 10]]
    inside = guidance_map(clicks, image, (1, 1, 1), Guidance("edt", 2, None))
    outside = guidance_map(clicks, image, (1, 1, 1), Guidance("edt", 2, None, mode="textbook"))
    disk = guidance_map(clicks, image, (1, 1, 1), Guidance("disk", 2))
    np.testing.assert_array_equal(inside > 0, disk > 0)
    np.testing.assert_array_equal(outside == 0, disk > 0)
    assert outside.max() == 1
    near_border = [[2, 10, 10]]
    wide = guidance_map(near_border, image, (1, 1, 1), Guidance("adaptive", 1, steps=((9.0, 4.0),)))
    assert (wide > 0).sum() > 1  # upstream's empty window: the largest sigma
    narrow = Guidance("adaptive", 1, steps=((9.0, 4.0),), mode="textbook")
    assert (guidance_map(near_border, image, (1, 1, 1), narrow) > 0).sum() == 1


def test_clicks_are_checked() -> None:
    image = np.zeros((5, 5, 5), np.float32)
    assert not guidance_map([], image, (1, 1, 1), Guidance("adaptive")).any()
    with pytest.raises(UsageError, match="WSI082"):
        guidance_map([[0, 5, 0]], image, (1, 1, 1), Guidance())
    with pytest.raises(UsageError, match="WSI081"):
        Guidance("disc")  # type: ignore[arg-type]  # what is tested


def test_interactive_fills_the_extra_channels() -> None:
    spec = ModelSpec("clicks", "1", None, (8, 8, 8), (0, 0, 0), (1, 1, 1), channels=1, dtype="",
                     fields=(FieldSpec("organs", ("background", "spleen"), reduction="argmax"),))  # fmt: skip
    model = Interactive(
        nn.Conv3d(3, 2, 1), spec, ("spleen", "background"), Guidance("gaussian", 1), lambda v: v / 2
    )
    image = np.random.default_rng(3).random((1, 8, 8, 8), np.float32)
    channels = model.channels(image, {"spleen": [[4, 4, 4]]}, (1, 1, 1))
    assert channels.shape == (model.spec.channels, 8, 8, 8)
    np.testing.assert_array_equal(channels[0], image[0] / 2)
    assert channels[1].argmax() == np.ravel_multi_index((4, 4, 4), (8, 8, 8))
    assert not channels[2].any()
    with torch.inference_mode():
        chances = model.predict(torch.from_numpy(channels[None]))["organs"]
    torch.testing.assert_close(chances.sum(1), torch.ones(1, 8, 8, 8))
    with pytest.raises(UsageError, match="WSI083"):
        model.channels(image, {"liver": []}, (1, 1, 1))
    with pytest.raises(UsageError, match="WSI083"):
        Interactive(nn.Conv3d(3, 2, 1), spec, ("spleen",), {"liver": Guidance()})
