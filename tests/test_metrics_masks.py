"""Metrics of masks beside slow references: whole-image distance transforms, and solids with known surfaces."""

from __future__ import annotations

from itertools import product
from math import inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.metrics.empties import Empty
from wsitk.metrics.overlap import Confusion, centreline_dice, class_confusions, confusion, dice, iou
from wsitk.metrics.surface import boundary_iou, nsd, surface_distances
from wsitk.metrics.surfels import surfel_sizes

Array = NDArray[Any]


def blobs(seed: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two masks with holes and islands that partly agree; one of them is empty now and then."""
    random = np.random.default_rng(seed)
    common = random.random(shape)
    both = (ndimage.gaussian_filter(common + 0.7 * random.random(shape), 1.2) for _ in range(2))
    truth, predicted = (field > random.uniform(0.78, 0.92) for field in both)
    return truth, predicted


MASKS = st.builds(
    blobs, st.integers(0, 2**32 - 1), st.sampled_from([(15, 22), (23, 9), (6, 9, 8), (40,), (3, 5, 4, 6)])
)
STEPS = st.sampled_from([0.25, 1.0, 3.0])


def distances_by_transform(truth: Array, predicted: Array, steps: tuple[float, ...]) -> tuple[Array, Array]:
    """The definition: border by erosion, and a distance transform of the whole image."""
    t, p = (m & ~ndimage.binary_erosion(m, border_value=0) for m in (truth, predicted))
    return (
        ndimage.distance_transform_edt(~p, sampling=steps)[t],
        ndimage.distance_transform_edt(~t, sampling=steps)[p],
    )


@given(MASKS, st.lists(STEPS, min_size=4, max_size=4))
def test_border_distances_are_those_of_the_whole_image(
    masks: tuple[Array, Array], steps: list[float]
) -> None:
    truth, predicted = masks
    spacing = tuple(steps[: truth.ndim])
    found = surface_distances(truth, predicted, spacing)
    if not (truth.any() and predicted.any()):
        assert found.from_truth.size == 0 or found.from_predicted.size == 0
        return
    one, other = distances_by_transform(truth, predicted, spacing)
    np.testing.assert_allclose(found.from_truth, one, rtol=1e-14)
    np.testing.assert_allclose(found.from_predicted, other, rtol=1e-14)
    near = (one <= 1).sum() + (other <= 1).sum()
    assert found.nsd(1.0) == pytest.approx(near / (one.size + other.size))
    assert found.hausdorff() == pytest.approx(max(one.max(), other.max()))
    assert found.hausdorff(95) == pytest.approx(max(np.percentile(one, 95), np.percentile(other, 95)))
    assert found.assd() == pytest.approx(np.concatenate([one, other]).mean())
    assert found.masd() == pytest.approx((one.mean() + other.mean()) / 2)


@given(MASKS, st.sampled_from(["border", "surfel"]))
def test_frame_unit_and_order_say_nothing(masks: tuple[Array, Array], surface: Any) -> None:
    truth, predicted = masks
    if surface == "surfel" and truth.ndim not in (2, 3):
        return
    plain = surface_distances(truth, predicted, 0.5, surface)
    framed = surface_distances(np.pad(truth, 3), np.pad(predicted, 3), 0.5, surface)
    scaled = surface_distances(truth, predicted, 500.0, surface)
    swapped = surface_distances(predicted, truth, 0.5, surface)
    for tolerance in (0.5, 1.0):
        wanted = plain.nsd(tolerance)
        assert framed.nsd(tolerance) == pytest.approx(wanted, nan_ok=True)
        assert scaled.nsd(1000 * tolerance) == pytest.approx(wanted, nan_ok=True)
        assert swapped.nsd(tolerance) == pytest.approx(wanted, nan_ok=True)
    assert scaled.hausdorff(95) == pytest.approx(1000 * framed.hausdorff(95), nan_ok=True)
    assert swapped.assd() == pytest.approx(plain.assd(), nan_ok=True)
    own = surface_distances(truth, truth, 0.5, surface)
    if truth.any():
        assert (own.nsd(0), own.hausdorff(), own.masd()) == (1, 0, 0)


@given(MASKS, st.sampled_from([1.0, 1.5, 3.0]))
def test_boundary_iou_by_transform(masks: tuple[Array, Array], width: float) -> None:
    rims = []
    for mask in masks:
        border = mask & ~ndimage.binary_erosion(mask, border_value=0)
        rims.append(mask & (ndimage.distance_transform_edt(~border) < width) & border.any())
    whole = (rims[0] | rims[1]).sum()
    wanted = (rims[0] & rims[1]).sum() / whole if whole else nan
    assert boundary_iou(*masks, width, 1.0) == pytest.approx(wanted, nan_ok=True)


def test_a_tolerance_of_whole_pixels_is_not_lost_to_rounding() -> None:
    truth, predicted = np.zeros((2, 20, 20), bool)
    truth[5:9, 5:9] = True
    predicted[8:12, 5:9] = True  # three rows of 0.1 apart, which is 0.30000000000000004
    assert surface_distances(truth, predicted, 0.1).from_truth.max() > 0.3
    assert nsd(truth, predicted, 0.3, 0.1) == 1


def test_spacing_has_one_number_per_axis() -> None:
    truth, predicted = np.zeros((2, 10, 10), bool)
    truth[2, 4], predicted[5, 4] = True, True
    assert surface_distances(truth, predicted, (2.0, 0.5)).hausdorff() == 6.0
    assert surface_distances(truth.T, predicted.T, (2.0, 0.5)).hausdorff() == 1.5


def test_length_and_area_of_boxes() -> None:
    corners, lengths = surfel_sizes(np.ones((4, 7), bool), np.array([2.0, 0.5]))
    assert len(corners) == 2 * (4 + 7)
    assert lengths.sum() == pytest.approx(2 * 3 * 2.0 + 2 * 6 * 0.5 + 4 * sqrt(2.0**2 + 0.5**2) / 2)
    n = np.array([3, 4, 6]) - 1
    _, areas = surfel_sizes(np.ones(n + 1, bool), np.ones(3))
    faces = 2 * (n[0] * n[1] + n[1] * n[2] + n[0] * n[2])
    assert areas.sum() == pytest.approx(faces + 4 * n.sum() * sqrt(0.5) + 8 * sqrt(3) / 8)


def test_a_hole_has_the_surface_of_what_was_taken_out() -> None:
    random = np.random.default_rng(5)
    for shape in ((9, 9), (7, 7, 7)):
        solid = np.pad(random.random(shape) < 0.5, 2)
        steps = random.uniform(0.3, 2, solid.ndim)
        around = np.zeros(solid.shape, bool)
        around[...] = True
        whole, hull = surfel_sizes(~solid, steps)[1].sum(), surfel_sizes(around, steps)[1].sum()
        assert whole - hull == pytest.approx(surfel_sizes(solid, steps)[1].sum())


@given(MASKS)
def test_pixel_counts(masks: tuple[Array, Array]) -> None:
    truth, predicted = masks
    counts = confusion(truth.astype(np.uint8) * 255, predicted.astype(float))
    cells = [(truth == t) & (predicted == p) for t, p in product((True, False), repeat=2)]
    assert [counts.tp, counts.fn, counts.fp, counts.tn] == [int(cell.sum()) for cell in cells]
    total = truth.sum() + predicted.sum()
    assert dice(truth, predicted) == pytest.approx(2 * cells[0].sum() / total if total else nan, nan_ok=True)
    overlap = iou(truth, predicted)
    assert dice(truth, predicted) == pytest.approx(2 * overlap / (1 + overlap), nan_ok=True)
    if total and not (truth.all() or predicted.all()) and truth.any() and predicted.any():
        wanted = np.corrcoef(truth.ravel(), predicted.ravel())[0, 1]
        assert counts.mcc == pytest.approx(wanted, abs=1e-12)
    assert counts + Confusion(1, 2, 3, 4) == Confusion(
        counts.tp + 1, counts.fp + 2, counts.fn + 3, counts.tn + 4
    )


@given(st.integers(0, 2**32 - 1))
def test_classes_in_one_pass_as_one_by_one(seed: int) -> None:
    truth, predicted = np.random.default_rng(seed).choice([0, 1, 1, 3, 7], (2, 9, 11))
    for c, counts in class_confusions(truth, predicted, (1, 3, 5, 7)).items():
        assert counts == confusion(truth == c, predicted == c)


SOME, NONE = np.ones((4, 4), bool), np.zeros((4, 4), bool)
NOTHING = {
    # policy: (dice, iou, nsd, boundary IoU, clDice, hausdorff, HD95, assd), both empty; only the truth;
    # only the prediction
    Empty.SKIP: ((nan,) * 8, (0, 0, 0, 0, 0, inf, inf, inf), (0, 0, 0, 0, 0, inf, inf, inf)),
    Empty.PERFECT: ((1, 1, 1, 1, 1, 0, 0, 0), (0, 0, 0, 0, 0, inf, inf, inf), (0, 0, 0, 0, 0, inf, inf, inf)),
    Empty.METRICS_RELOADED: (
        (1, nan, 1, 1, nan, 0, 0, 0),
        (0, 0, 0, 0, nan, nan, nan, nan),
        (0, 0, 0, 0, nan, nan, nan, nan),
    ),
    Empty.MONAI: ((nan,) * 8, (nan, nan, 0, 0, 0, inf, nan, inf), (0, 0, 0, 0, 0, inf, nan, inf)),
}


@pytest.mark.parametrize("policy", Empty)
def test_every_policy_says_what_its_table_says(policy: Empty) -> None:
    for (truth, predicted), wanted in zip(
        ((NONE, NONE), (NONE, SOME), (SOME, NONE)), NOTHING[policy], strict=True
    ):
        surfaces = surface_distances(truth, predicted, 1.0)
        ours = (
            dice(truth, predicted, policy),
            iou(truth, predicted, policy),
            surfaces.nsd(1, policy),
            boundary_iou(truth, predicted, 1, 1.0, policy),
            centreline_dice(truth, predicted, policy),
            surfaces.hausdorff(empty=policy),
            surfaces.hausdorff(95, policy),
            surfaces.assd(policy),
        )
        assert ours == pytest.approx(wanted, nan_ok=True)


def test_precision_of_nothing() -> None:
    assert confusion(SOME, NONE).precision == 0
    assert isnan(confusion(NONE, NONE).precision)


def test_centreline_dice_of_lines() -> None:
    truth, predicted = np.zeros((2, 21, 40), bool)
    truth[9:12, 3:37] = True
    predicted[9:12, 3:20] = True
    whole = centreline_dice(truth, predicted)
    assert 0.6 < whole < 0.75  # all of the predicted line, half of the true one
    assert centreline_dice(truth, truth) == 1


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("WSI800", lambda: dice(SOME, SOME[:2])),
        ("WSI800", lambda: surface_distances(SOME, SOME[:2], 1.0)),
        ("WSI801", lambda: class_confusions(SOME, SOME, (0, 1))),
        ("WSI804", lambda: surface_distances(SOME, SOME, 1.0).nsd(-1)),
        ("WSI804", lambda: surface_distances(SOME, SOME, 1.0).nsd(nan)),
        ("WSI804", lambda: surface_distances(SOME, SOME, 1.0).hausdorff(0)),
        ("WSI804", lambda: boundary_iou(SOME, SOME, 0, 1.0)),
        ("WSI805", lambda: surface_distances(SOME, SOME, 1.0, "edges")),  # type: ignore[arg-type]
        ("WSI807", lambda: surface_distances(SOME, SOME, (1.0, 1.0, 1.0))),
        ("WSI807", lambda: surface_distances(SOME, SOME, (1.0, 0.0))),
        ("WSI808", lambda: surface_distances(SOME[0], SOME[0], 1.0, "surfel")),
        ("WSI808", lambda: centreline_dice(SOME[0], SOME[0])),
    ],
)
def test_refusals(code: str, call: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        call()
    assert refusal.value.code == code
