"""CellViT's post-processing: upstream's arrays to the last bit, and what the default promises instead."""

from __future__ import annotations

import heapq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.models.cellvit import watershed
from wsitk.models.cellvit.postprocess import (
    HoverSettings,
    Variant,
    classify_objects,
    mean_by_label,
    objects_from_maps,
    segment,
    segment_upstream,
)

Array = NDArray[Any]

GOLDEN = Path(__file__).parent / "golden" / "cellvit"
PREFIX = {"v1_40": "v1_40_", "v1_20": "v1_20_", "v1_gt": "v1_gt_", "inference": "inf_"}
CASES = ("nuclei_256", "empty_64", "empty_hvnoise_64", "full_64", "borders_64")
EVERYWHERE = np.ones((3, 3), int)


def golden(case: str) -> dict[str, Array]:
    with np.load(GOLDEN / f"post_{case}.npz") as stored:
        return dict(stored)


def noisy_nuclei() -> tuple[Array, Array]:
    """Return foreground probability and HV maps of the 143 golden nuclei, noise included."""
    stored = golden("nuclei_256")
    prob = cv2.GaussianBlur(stored["in_binary"].astype(np.float32), (0, 0), 0.8)
    return prob, np.ascontiguousarray(stored["in_hv"].transpose(2, 0, 1).astype(np.float32))


def hv_of(labels: Array) -> Array:
    """Return the HV maps of a label image as HoVer-Net defines them."""
    maps = np.zeros((2, *labels.shape), np.float32)
    for index, box in enumerate(ndimage.find_objects(labels)):
        if box is None:
            continue
        mask = labels[box] == index + 1
        for channel, position in enumerate(np.nonzero(mask)[::-1]):
            offset = (position - np.rint(position.mean())).astype(np.float32)
            offset[offset < 0] /= max(1.0, -offset.min())
            offset[offset > 0] /= max(1.0, offset.max())
            maps[channel][box][mask] = offset
    return maps


def panoptic_parts(truth: Array, found: Array) -> tuple[float, int]:
    """Return numerator and denominator of PQ, matches above an IoU of 1/2 (Kirillov et al. 2019, eq. 1)."""
    joint = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(joint, (truth.ravel(), found.ravel()), 1)
    union = joint.sum(1)[1:, None] + joint.sum(0)[None, 1:] - joint[1:, 1:]
    iou = joint[1:, 1:] / np.maximum(union, 1)
    total = (joint.sum(1)[1:] > 0).sum() + (joint.sum(0)[1:] > 0).sum()
    return 2 * float(iou[iou > 0.5].sum()), int(total)


def as_masks(labels: Array, shift: tuple[int, int] = (0, 0)) -> set[tuple[int, int, int, int, bytes]]:
    """Return every object as (top, left, bottom, right, mask), so that two label images can be compared."""
    out = set()
    for index, box in enumerate(ndimage.find_objects(labels)):
        if box is not None:
            top, left = box[0].start + shift[0], box[1].start + shift[1]
            bottom, right = box[0].stop + shift[0], box[1].stop + shift[1]
            out.add((top, left, bottom, right, (labels[box] == index + 1).tobytes()))
    return out


# --- upstream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize("case", CASES)
def test_upstream_equals_the_golden_arrays(case: str, variant: Variant) -> None:
    stored, prefix = golden(case), PREFIX[variant]
    labels, found = segment_upstream(
        stored["in_binary"], stored["in_type"], stored["in_hv"].transpose(2, 0, 1), variant
    )
    assert np.array_equal(labels, stored[f"{prefix}inst"])
    assert np.array_equal(found.ids, stored[f"{prefix}ids"])
    assert np.array_equal(found.bbox, stored[f"{prefix}bbox"])
    assert np.array_equal(found.centroid_xy, stored[f"{prefix}centroid"])
    assert np.array_equal(found.type_id, stored[f"{prefix}type"])
    assert np.array_equal(found.type_prob, stored[f"{prefix}type_prob"])
    assert np.array_equal(found.contour_xy, stored[f"{prefix}contour"])
    assert np.array_equal(found.offset, stored[f"{prefix}contour_offsets"])


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UsageError, match="WSI061"):
        segment_upstream(np.zeros((8, 8)), np.zeros((8, 8)), np.zeros((2, 8, 8)), "v3")  # type: ignore[arg-type]


def test_upstream_mode_gives_upstream_objects() -> None:
    stored = golden("nuclei_256")
    prob, types = stored["in_binary"].astype(np.float32), np.eye(6, dtype=np.float32)[stored["in_type"]]
    window = Region((512, -64), (256, 256))
    table = objects_from_maps(
        prob,
        stored["in_hv"].transpose(2, 0, 1),
        types.transpose(2, 0, 1),
        Tile(3, window, window),
        0.25,
        HoverSettings(mode="upstream"),
    )
    keep = stored["inf_type"] > 0
    assert np.array_equal(table.start, stored["inf_bbox"][keep][:, 0] + window.start)
    assert np.array_equal(table.class_id, stored["inf_type"][keep] - 1)
    assert np.array_equal(table.probability, stored["inf_type_prob"][keep].astype(np.float32))
    assert np.allclose(table.anchor[:, ::-1] - (-64 + 0.5, 512 + 0.5), stored["inf_centroid"][keep])


# --- kernels against slow references ---------------------------------------------------------------------


def slow_flood(labels: Array, height: Array) -> Array:
    """Flood with a heap ordered by (height, time of arrival)."""
    out, queue, clock = labels.copy(), [], 0
    for y, x in np.argwhere(labels > 0).tolist():
        heapq.heappush(queue, (int(height[y, x]), clock, y, x))
        clock += 1
    while queue:
        _, _, y, x = heapq.heappop(queue)
        for v, u in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if out[v, u] == 0:
                out[v, u] = out[y, x]
                heapq.heappush(queue, (int(height[v, u]), clock, v, u))
                clock += 1
    return out


@given(
    arrays(np.int32, (9, 11), elements=st.sampled_from([-1, 0, 0, 0, 0, 0, 1, 2, 3])),
    arrays(np.uint8, (9, 11), elements=st.integers(0, 255) | st.integers(0, 3)),
)
def test_flooding_equals_a_heap_with_the_same_order(labels: Array, height: Array) -> None:
    framed, heights = np.pad(labels, 1, constant_values=-1), np.pad(height, 1)
    expected = slow_flood(framed, heights)
    watershed.flood(framed, heights)
    assert np.array_equal(framed, expected)


@given(arrays(np.int32, (10, 10), elements=st.sampled_from([0, 0, 1, 1, 1, 2])))
def test_a_hole_is_filled_if_one_label_alone_surrounds_it(labels: Array) -> None:
    framed = np.pad(labels, 1)
    gaps, count = ndimage.label(framed == 0, EVERYWHERE)
    expected = framed.copy()
    for gap in range(1, count + 1):
        ring = ndimage.binary_dilation(gaps == gap) & (gaps != gap)
        around = np.unique(framed[ring])
        if len(around) == 1 and gap != gaps[0, 0]:
            expected[gaps == gap] = around[0]
    watershed.fill_holes(framed, gaps.astype(np.int32))
    assert np.array_equal(framed, expected)


@given(arrays(np.int32, (8, 9), elements=st.integers(-1, 5)), st.integers(1, 6))
def test_labels_are_numbered_by_their_first_pixel(labels: Array, size_min: int) -> None:
    framed = np.pad(labels, 1, constant_values=-1)
    values, first, sizes = np.unique(framed, return_index=True, return_counts=True)
    kept = [v for _, v, n in sorted(zip(first, values, sizes, strict=True)) if v > 0 and n >= size_min]
    expected = np.zeros_like(framed)
    for index, value in enumerate(kept):
        expected[framed == value] = index + 1
    assert watershed.number(framed, size_min) == len(kept)
    assert np.array_equal(framed, expected)


def test_slopes_are_derivatives_of_the_maps() -> None:
    """A ramp's slope is exact whatever the width of the filter; quantising costs less than one step."""
    from wsitk.models.cellvit.hover import _slopes

    y, x = np.mgrid[:40, :40].astype(np.float32)
    hv = np.stack([x / 32 - 0.6, 0.5 - y / 64])
    for sigma in (0.35, 0.7, 1.4, 4.0):
        (dx, dy), unit = _slopes(hv, sigma)
        inner = (slice(14, 26), slice(14, 26))
        assert np.allclose(dx[inner] * unit, 1 / 32, rtol=1e-5)
        assert np.allclose(dy[inner] * unit, -1 / 64, rtol=1e-5)
        assert np.all(dx == np.rint(dx))


def test_not_a_number_is_cut_like_any_other_value() -> None:
    values = np.array([np.nan, -np.inf, -3, -0.5, 0, 0.25, 2.5, np.inf], np.float32)
    assert watershed.quantise(values, 256).tolist() == [-512, -512, -512, -128, 0, 64, 512, 512]


# --- what the default promises ---------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_um", [0.25, 0.5])
def test_a_nucleus_is_one_piece_without_holes(spacing_um: float) -> None:
    labels = segment(*noisy_nuclei(), spacing_um)
    assert labels.dtype == np.int32
    assert labels.max() > 40
    _, first = np.unique(labels[labels > 0], return_index=True)
    assert np.all(np.diff(first) > 0), "numbers follow the first pixel in raster order"
    for index in range(1, int(labels.max()) + 1):
        mask = np.pad(labels == index, 1)
        assert ndimage.label(mask)[1] == 1
        gaps, count = ndimage.label(~mask, EVERYWHERE)
        holes = [g for g in range(1, count + 1) if g != gaps[0, 0]]
        assert all((np.pad(labels, 1)[gaps == g] > 0).any() for g in holes), (
            "only another nucleus may lie inside"
        )


@given(
    arrays(np.float32, (14, 17), elements=st.floats(0, 1, width=32)),
    arrays(np.float32, (2, 14, 17), elements=st.floats(-1.5, 1.5, width=32)),
    st.integers(0, 23),
    st.integers(0, 23),
)
def test_shifting_the_maps_shifts_the_nuclei(prob: Array, hv: Array, dy: int, dx: int) -> None:
    settings = HoverSettings(min_object_um2=0.2, min_marker_um2=0.1)

    def on_canvas(y: int, x: int) -> Array:
        canvas, maps = np.zeros((70, 70), np.float32), np.zeros((2, 70, 70), np.float32)
        canvas[y : y + 14, x : x + 17], maps[:, y : y + 14, x : x + 17] = prob, hv
        return segment(canvas, maps, 0.25, settings)

    assert np.array_equal(np.roll(on_canvas(12, 12), (dy, dx), (0, 1)), on_canvas(12 + dy, 12 + dx))


@pytest.mark.parametrize("corner", [(0, 0), (31, 17), (64, 64), (95, 3)])
def test_a_crop_shows_the_same_nuclei_as_the_whole(corner: tuple[int, int]) -> None:
    """This is what makes tiling invisible: what lies a margin inside the crop does not notice the cut."""
    prob, hv = noisy_nuclei()
    size, margin = 160, 28
    y, x = corner
    crop = segment(prob[y : y + size, x : x + size], hv[:, y : y + size, x : x + size], 0.25)
    whole = segment(prob, hv, 0.25)

    def inside(objects: set[tuple[int, int, int, int, bytes]]) -> set[tuple[int, int, int, int, bytes]]:
        inner = Region((y, x), (size, size)).grow((-margin, -margin))
        return {o for o in objects if inner.contains(Region.between(o[:2], o[2:4]))}

    expected = inside(as_masks(whole))
    assert len(expected) > 10
    assert inside(as_masks(crop, corner)) == expected


def test_nuclei_do_not_change_with_what_lies_elsewhere_but_upstreams_do() -> None:
    prob, hv = noisy_nuclei()
    disturbed = hv.copy()
    disturbed[:, 200:, 200:] *= 4
    disturbed[:, 200:, 200::2] *= -1
    away = (slice(0, 150), slice(0, 150))

    def upstream(maps: Array) -> Array:
        return segment(prob, maps, 0.25, HoverSettings(mode="upstream"))

    assert np.array_equal(segment(prob, hv, 0.25)[away], segment(prob, disturbed, 0.25)[away])
    assert not np.array_equal(upstream(hv)[away], upstream(disturbed)[away])


def test_threads_do_not_change_the_result() -> None:
    prob, hv = noisy_nuclei()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: segment(np.roll(prob, k, 0), np.roll(hv, k, 1), 0.25), range(8)))
    for k, labels in enumerate(found):
        assert np.array_equal(labels, segment(np.roll(prob, k, 0), np.roll(hv, k, 1), 0.25))


def test_touching_discs_are_cut_where_they_touch() -> None:
    y, x = np.mgrid[:60, :90]
    truth = np.zeros((60, 90), np.int32)
    for index, centre in enumerate((20, 41, 62)):
        truth[(truth == 0) & ((y - 30) ** 2 + (x - centre) ** 2 <= 11.5**2)] = index + 1
    for spacing_um in (0.25, 0.4):
        labels = segment((truth > 0).astype(np.float32), hv_of(truth), spacing_um)
        quality, total = panoptic_parts(truth, labels)
        assert quality / total > 0.97


def test_a_nucleus_without_a_marker_is_kept() -> None:
    prob, hv = np.zeros((40, 40), np.float32), np.zeros((2, 40, 40), np.float32)
    prob[10:20, 10:20] = 0.9
    hv[0] = np.where(np.arange(40) % 2, 1.0, -1.0)[None] - np.arange(40)[None] / 20
    assert np.array_equal(segment(prob, hv, 0.25) > 0, prob > 0.5)
    assert not segment(prob, hv, 0.1).any(), "a square micrometre is too small for a nucleus"


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (64, 64)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_maps_pass(shape: tuple[int, int], value: float) -> None:
    labels = segment(np.full(shape, value, np.float32), np.zeros((2, *shape), np.float32), 0.5)
    assert labels.shape == shape
    assert labels.max() == (value > 0 and labels.size >= 12)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI063"):
        segment(np.zeros((8, 8), np.float32), np.zeros((8, 8, 2), np.float32), 0.5)
    with pytest.raises(UsageError, match="WSI062"):
        HoverSettings(threshold=0.0)
    window = Region((0, 0), (8, 8))
    maps = np.zeros((8, 8), np.float32), np.zeros((2, 8, 8), np.float32)
    with pytest.raises(UsageError, match="WSI064"):
        objects_from_maps(*maps, None, Tile(0, window, window), 0.5, columns=("A",))


# --- classes and tables ----------------------------------------------------------------------------------


def test_classes_are_means_over_the_object() -> None:
    rng = np.random.default_rng(5)
    labels = segment(*noisy_nuclei(), 0.25)
    types = rng.dirichlet(np.ones(6), labels.shape).astype(np.float32).transpose(2, 0, 1)
    class_id, probability, each = classify_objects(labels, types)
    index = np.arange(1, labels.max() + 1)
    expected = np.stack([ndimage.mean(types[k].astype(float), labels, index) for k in range(1, 6)], axis=1)
    assert np.allclose(each, expected, atol=1e-6)
    assert np.array_equal(class_id, each.argmax(axis=1))
    assert np.array_equal(probability, each.max(axis=1))


def test_equal_classes_give_the_first_and_no_object_gives_none() -> None:
    labels = np.ones((4, 4), np.int32)
    class_id, probability, _ = classify_objects(labels, np.full((4, 4, 4), 0.25, np.float32))
    assert class_id.tolist() == [0]
    assert probability.tolist() == [0.25]
    assert mean_by_label(np.zeros((4, 4), np.int32), np.ones((3, 4, 4))).shape == (0, 3)


def test_a_table_lies_on_the_working_grid() -> None:
    prob, hv = noisy_nuclei()
    types = np.stack([1 - prob, prob * 0.25, prob * 0.75])
    window = Region((-64, 4000), prob.shape)
    tile = Tile(11, window.grow((-32, -32)), window)
    table = objects_from_maps(prob, hv, types, tile, 0.25, columns=("one", "two"))
    labels = segment(prob, hv, 0.25)
    canvas = np.zeros_like(labels)
    for row in range(len(table)):
        box = table.region(row).slices(window.start)
        canvas[box][table.mask(row)] = row + 1
    assert np.array_equal(canvas, labels)
    assert set(table.class_id.tolist()) == {1}
    assert set(table.tile.tolist()) == {11}
    assert np.array_equal(table.probability, table.columns["two"])
    foreground = objects_from_maps(prob, hv, None, tile, 0.25)
    assert np.allclose(foreground.probability * 0.75, table.probability, atol=1e-6)
    assert not foreground.columns


# --- quality ---------------------------------------------------------------------------------------------


def predicted(truth: Array, spacing_um: float, strength: float, seed: int) -> tuple[Array, Array]:
    """Return maps as a network gives them: blurred, too flat, with coarse and fine noise."""
    rng = np.random.default_rng(seed)

    def noise(sigma_um: float) -> Array:
        field = cv2.GaussianBlur(
            rng.standard_normal(truth.shape).astype(np.float32), (0, 0), sigma_um / spacing_um
        )
        return np.asarray(field / field.std())

    foreground, hv = (truth > 0).astype(np.float32), hv_of(truth)
    if strength == 0:
        return foreground, hv
    blur = (0.2 + 0.1 * strength) / spacing_um
    logit = (cv2.GaussianBlur(foreground, (0, 0), blur) - 0.5) * 8
    logit += strength * 0.25 * (2 * noise(1.0) + noise(0.25))
    hv = np.stack([cv2.GaussianBlur(m, (0, 0), 1.3 * blur) * (1 - 0.1 * strength) for m in hv])
    hv += np.stack([strength * 0.08 * (noise(1.0) + 0.7 * noise(0.25)) for _ in range(2)])
    return (1 / (1 + np.exp(-logit))).astype(np.float32), hv.astype(np.float32)


@pytest.mark.parametrize("strength", [0, 1, 2])
@pytest.mark.parametrize("spacing_um", [0.25, 0.5])
def test_the_default_is_no_worse_than_upstream_on_real_nuclei(
    data: Path, spacing_um: float, strength: int
) -> None:
    files = sorted((data / "data" / "nuclei" / "consep256" / "train").glob("*.npz"))[::43]
    default, upstream = np.zeros(2), np.zeros(2)
    for seed, file in enumerate(files):
        truth = np.load(file)["inst"].astype(np.int32)
        truth = truth if spacing_um == 0.25 else np.ascontiguousarray(truth[::2, ::2])
        prob, hv = predicted(truth, spacing_um, strength, seed)
        default += panoptic_parts(truth, segment(prob, hv, spacing_um))
        upstream += panoptic_parts(truth, segment(prob, hv, spacing_um, HoverSettings(mode="upstream")))
    assert default[0] / default[1] > upstream[0] / upstream[1]
    assert default[0] / default[1] > (0.93, 0.88, 0.70)[strength]
