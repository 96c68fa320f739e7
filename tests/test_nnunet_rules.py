"""nnU-Net's conventions against vectors recorded from nnU-Net 1.7.1, and against what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnunet_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from radiology_fill import load_filled

from wsitk.models.stunet.network import STUNet, STUNetConfig
from wsitk.volumes.nnunet_rules import (
    IntensityRule,
    Moments,
    Resampling,
    foreground,
    gaussian,
    gaussian_axis,
    nonzero_box,
    region_labels,
    resampled_shape,
    resampling,
    separate_axis,
    tile_starts,
)

GOLDEN = Path(__file__).parent / "golden" / "radiology" / "nnunet_v1" / "rules.npz"
PATCH = (32, 32, 64)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def network() -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the network with which the predictions were recorded: STU-Net S with five classes."""
    whole = STUNet(STUNetConfig(16, classes=5))
    load_filled(whole)
    return lambda x: whole(x)["logits"]


# --- tiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(6))
def test_tiles_start_where_upstream_starts_them(golden: dict[str, Any], case: int) -> None:
    *sizes, step = golden[f"steps{case}_case"].tolist()
    patch, size = [int(n) for n in sizes[:3]], [int(n) for n in sizes[3:]]
    recorded = golden[f"steps{case}"].tolist()
    starts = tile_starts(size, patch, step)
    assert [len(s) for s in starts] == recorded[:3]
    assert [a for s in starts for a in s] == recorded[3:]


@given(st.integers(1, 700), st.integers(1, 200), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
def test_tiles_cover_the_axis_and_are_never_too_far_apart(size: int, patch: int, step: float) -> None:
    (starts,) = tile_starts([size], [patch], step)
    if size <= patch:
        assert starts == (-((patch - size) // 2),)
        return
    assert starts[0] == 0
    assert starts[-1] + patch == size
    gaps = np.diff(starts)
    assert (gaps >= 0).all()
    assert gaps.max() <= patch * step + 1


def test_the_window_is_upstreams(golden: dict[str, Any]) -> None:
    window = gaussian((128, 128, 128))
    assert window.dtype == np.float32
    assert window.max() == 1
    assert np.array_equal(window[64, 64], golden["gaussian_128_line"])
    assert np.array_equal(np.einsum("iii->i", window), golden["gaussian_128_diag"])
    assert window.min() == golden["gaussian_128_min"]


@pytest.mark.parametrize("patch", [1, 2, 3, 7, 20, 33, 64, 97, 128, 191])
def test_a_filtered_one_gives_the_same_window_and_reaches_every_pixel(patch: int) -> None:
    from scipy.ndimage import gaussian_filter1d

    one = np.zeros(patch)
    one[patch // 2] = 1
    filtered = gaussian_filter1d(one, patch / 8, mode="constant")
    assert filtered.min() > 0  # so that upstream's rule for zeros never applies
    assert np.allclose(gaussian_axis(patch), filtered / filtered.max(), rtol=1e-12, atol=0)


# --- crop and resampling -------------------------------------------------------------------------------


def test_the_crop_is_upstreams(golden: dict[str, Any]) -> None:
    mask = foreground(golden["raw"])
    box = nonzero_box(mask)
    assert box is not None
    assert list(zip(box.start, box.stop, strict=True)) == [tuple(b) for b in golden["crop_bbox"].tolist()]
    assert np.array_equal(np.where(mask, 0, -1)[box.slices()], golden["crop_seg"][0])


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=6))
def test_the_box_is_that_of_its_points_whether_holes_are_filled_or_not(points: list[tuple[int, ...]]) -> None:
    volume = np.zeros((1, 6, 6, 6))
    for point in points:
        volume[(0, *point)] = -1
    box = nonzero_box(volume[0])
    assert box == nonzero_box(foreground(volume))
    if not points:
        assert box is None
    else:
        assert box is not None
        assert box.start == tuple(map(min, zip(*points, strict=True)))
        assert box.stop == tuple(max(p) + 1 for p in zip(*points, strict=True))


@pytest.mark.parametrize(("name", "spacing"), [("iso", (2.0, 0.9, 0.9)), ("aniso", (5.0, 0.8, 0.8))])
def test_resampling_and_normalising_are_upstreams(data: Path, name: str, spacing: tuple[float, ...]) -> None:
    golden = np.load(data / "golden" / "radiology" / "nnunet_v1" / "golden.npz", allow_pickle=False)
    box = nonzero_box(golden["raw"][0])
    assert box is not None
    crop = golden["raw"][(slice(None), *box.slices())]
    rule = resampling(crop.shape[1:], spacing, (1.5, 1.5, 1.5))
    assert (1, *rule.shape) == tuple(golden[f"norm_{name}_shape"])
    assert rule.axis == (0 if name == "aniso" else None)
    volume = reference.resample(crop, rule)
    done = IntensityRule("zscore", added=True).numbers(Moments.of(volume))(volume)
    assert np.abs(done[:, ::2, ::2, ::2] - golden[f"norm_{name}"]).max() < 1e-5
    assert np.allclose(
        [done.std(dtype=np.float64), done.min(), done.max()], golden[f"norm_{name}_stats"][1:4], atol=1e-5
    )


@pytest.mark.parametrize(
    ("spacing", "target", "axis"),
    [
        ((5, 0.8, 0.8), (1.5, 1.5, 1.5), 0),
        ((0.8, 0.8, 5), (1.5, 1.5, 1.5), 2),
        ((3, 1, 1), (1, 1, 1), None),  # exactly three times is not yet anisotropic
        ((1, 1, 1), (1, 4, 1), 1),
        ((5, 5, 1), (1, 1, 1), None),  # two coarse axes
        ((5, 5, 1), (1, 4, 1), None),  # the first that is anisotropic decides
        ((1, 1, 1), (1, 1, 1), None),
    ],
)
def test_the_axis_that_is_resampled_by_itself(spacing: Any, target: Any, axis: int | None) -> None:
    assert separate_axis(spacing, target) == axis
    assert resampling((9, 9, 9), spacing, target, separate=False).axis is None


def test_halves_are_rounded_to_even_as_numpy_does() -> None:
    assert resampled_shape((5, 7, 9), (1.5, 1.5, 1.5), (3.0, 3.0, 3.0)) == (2, 4, 4)
    assert resampling((10, 10, 10), (2, 1, 1), (1, 1, 1), order=1) == Resampling((20, 10, 10), 1)


# --- intensities and labels ----------------------------------------------------------------------------


@given(st.lists(st.floats(-2000, 3000, width=32), min_size=1, max_size=60), st.integers(1, 7))
def test_moments_of_parts_add_up(values: list[float], size: int) -> None:
    whole = np.array(values, np.float32)
    total = sum((Moments.of(whole[k : k + size]) for k in range(0, len(values), size)), Moments())
    exact = whole.astype(np.float64)
    assert total.count == len(values)
    assert total.mean == pytest.approx(exact.mean(), abs=1e-9, rel=1e-12)
    assert total.std == pytest.approx(exact.std(), abs=1e-6, rel=1e-9)
    assert (total.low, total.high) == (exact.min(), exact.max())


def test_each_scheme_does_what_it_says() -> None:
    values = np.array([-1500, -100, 0, 50, 4000], np.float32)
    moments = Moments.of(values)
    ct = IntensityRule("ct", shift=10.0, scale=20.0, low=-900.0, high=300.0)
    assert ct.numbers()(values).tolist() == [-45.5, -5.5, -0.5, 2.0, 14.5]
    assert IntensityRule("none").numbers()(values).tolist() == values.tolist()
    assert IntensityRule("unit").numbers(moments)(values)[[0, -1]].tolist() == [0, 1]
    assert IntensityRule("byte").numbers()(np.array([0, 255], np.uint8)).tolist() == [0, 1]
    assert IntensityRule("zscore").numbers(moments)(values).std() == pytest.approx(1, abs=1e-6)
    flat = Moments.of(np.full(4, 7.0))
    assert IntensityRule("zscore").numbers(flat)(np.full(4, 7.0)).tolist() == [0.0] * 4
    assert [IntensityRule(s).needs_moments for s in ("zscore", "ct", "unit", "byte", "none")] == [
        True, False, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="moments"):
        IntensityRule("zscore").numbers()


def test_later_regions_write_over_earlier_ones() -> None:
    scores = np.array([[1.0, 1.0, 1.0, -1.0, 0.0], [-1.0, 1.0, 2.0, -1.0, 0.0], [-1.0, -1.0, 0.1, 5.0, 0.0]])
    assert region_labels(scores, (2, 1, 3)).tolist() == [2, 1, 3, 3, 0]


# --- prediction ----------------------------------------------------------------------------------------


def test_a_volume_smaller_than_the_patch(golden: dict[str, Any], network: Any) -> None:
    labels, scores = reference.predict(network, golden["small"], PATCH)
    assert scores.shape == (5, 20, 30, 40)
    assert np.array_equal(labels, golden["seg_small"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("tta", {"mirror": (0, 1, 2)}), ("notta", {}), ("nogauss", {"weighted": False})]
)
def test_the_reference_predicts_as_upstream(
    data: Path, network: Any, name: str, options: dict[str, Any]
) -> None:
    golden = np.load(data / "golden" / "radiology" / "nnunet_v1" / "golden.npz", allow_pickle=False)
    labels, scores = reference.predict(network, golden["vol"], PATCH, **options)
    recorded = golden[f"prob_{name}_val"]
    assert np.abs(scores.reshape(-1)[golden[f"prob_{name}_idx"]] - recorded).max() < 1e-5
    assert np.array_equal(labels, golden[f"seg_{name}"])


def test_the_reference_weighs_tiles_by_the_window() -> None:
    rng = np.random.default_rng(3)
    volume = rng.normal(size=(1, 20, 9, 4)).astype(np.float32)
    starts = iter(range(100))
    got = reference.sliding_mean(lambda tile: np.full_like(tile, next(starts)), volume, (8, 9, 8))
    window, total, weight = gaussian((8, 9, 8))[:, :, 2:6], np.zeros((20, 9, 4)), np.zeros((20, 9, 4))
    for k, a in enumerate((0, 4, 8, 12)):
        total[a : a + 8] += k * window
        weight[a : a + 8] += window
    assert np.allclose(got[0], total / weight, atol=1e-6)
