"""Instance metrics beside slow references: a mask per object, and all pairs in one matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from wsitk.errors import UsageError
from wsitk.metrics import assignment
from wsitk.metrics.assignment import best_pairs
from wsitk.metrics.contingency import Contingency, as_labels
from wsitk.metrics.counts import Convention, Counts
from wsitk.metrics.pannuke import binarize, image_counts, summarise
from wsitk.metrics.panoptic import (
    aji,
    aji_plus,
    class_counts,
    count_matches,
    ensemble_dice,
    foreground_dice,
    matches,
    panoptic_counts,
)

Array = NDArray[Any]

SEEDS = st.integers(0, 2**32 - 1)
"""Arrays come from numpy, as hypothesis would take most of the time to draw them pixel by pixel."""

SHAPES = st.sampled_from([(7, 9), (12, 5), (4, 5, 6), (0, 3), (30,)])
LABELS = np.array([0, 0, 0, 1, 2, 5, 900], np.int32)


def random_maps(shape: tuple[int, ...], seed: int) -> tuple[Array, Array]:
    """Two maps of few labels with gaps between them, the second somewhat like the first."""
    random = np.random.default_rng(seed)
    labels = LABELS[random.permutation(LABELS.size)[: random.integers(1, LABELS.size + 1)]]
    truth, other = random.choice(labels, (2, *shape))
    return truth, np.where(random.random(shape) < random.random(), other, truth)


def label_maps() -> st.SearchStrategy[tuple[Array, Array]]:
    return st.builds(random_maps, SHAPES, SEEDS)


def overlap_matrices(truth: Array, predicted: Array) -> tuple[Array, Array]:
    """Shared pixels and unions of all pairs, from one mask per object."""
    t_masks = [truth == k for k in np.unique(truth[truth > 0])]
    p_masks = [predicted == k for k in np.unique(predicted[predicted > 0])]
    shared = np.array([[(t & p).sum() for p in p_masks] for t in t_masks]).reshape(len(t_masks), len(p_masks))
    union = np.array([[(t | p).sum() for p in p_masks] for t in t_masks]).reshape(shared.shape)
    return shared, union


def divided(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


@given(label_maps())
def test_the_table_holds_what_masks_say(maps: tuple[Array, Array]) -> None:
    table = Contingency.of(*maps)
    shared, union = overlap_matrices(*maps)
    dense = np.zeros_like(shared)
    dense[table.truth, table.predicted] = table.shared
    assert np.array_equal(dense, shared)
    assert (table.shared > 0).all()
    assert np.array_equal(table.union, union[table.truth, table.predicted])
    for ids, area, labels in (
        (table.truth_ids, table.truth_area, maps[0]),
        (table.predicted_ids, table.predicted_area, maps[1]),
    ):
        assert ids.tolist() == np.unique(labels[labels > 0]).tolist()
        assert area.tolist() == [(labels == k).sum() for k in ids]


@given(label_maps(), st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.75]))
def test_panoptic_counts_as_of_a_full_matrix(maps: tuple[Array, Array], threshold: float) -> None:
    shared, union = overlap_matrices(*maps)
    iou = shared / np.maximum(union, 1)
    counts = panoptic_counts(*maps, threshold)
    if threshold >= 0.5:
        kept = iou[iou > threshold]
        assert counts == Counts(
            kept.size, shared.shape[1] - kept.size, shared.shape[0] - kept.size, pytest.approx(kept.sum())
        )
        return
    # Below a half the optimum may not be unique, its total is.
    table = Contingency.of(*maps)
    every = matches(table, 0.0)
    assert table.iou()[every].sum() == pytest.approx(iou[linear_sum_assignment(-iou)].sum())
    assert len(set(table.truth[every])) == len(set(table.predicted[every])) == every.size
    assert counts.tp == (table.iou()[every] > threshold).sum()


@given(label_maps())
def test_aggregated_jaccard_as_of_a_full_matrix(maps: tuple[Array, Array]) -> None:
    shared, union = overlap_matrices(*maps)
    table = Contingency.of(*maps)
    iou = shared / np.maximum(union, 1)
    t_area, p_area = table.truth_area, table.predicted_area
    best = iou.argmax(axis=1) if iou.size else np.zeros(len(iou), int)
    pairs = [(t, p) for t, p in enumerate(best) if iou.size and iou[t, p] > 0]
    used_t, used_p = {t for t, _ in pairs}, {p for _, p in pairs}
    left = sum(a for t, a in enumerate(t_area) if t not in used_t)
    left += sum(a for p, a in enumerate(p_area) if p not in used_p)
    wanted = divided(sum(shared[k] for k in pairs), sum(union[k] for k in pairs) + left)
    assert aji(table) == pytest.approx(wanted, nan_ok=True)
    assert not aji_plus(table) > 1
    assert ensemble_dice(table) == pytest.approx(
        divided(2 * shared.sum(), ((shared + union) * (shared > 0)).sum()), nan_ok=True
    )
    truth, predicted = maps[0] > 0, maps[1] > 0
    total = truth.sum() + predicted.sum()
    assert foreground_dice(table) == pytest.approx(divided(2 * (truth & predicted).sum(), total), nan_ok=True)


@given(label_maps())
def test_perfect_is_one_and_order_and_numbers_say_nothing(maps: tuple[Array, Array]) -> None:
    truth, predicted = maps
    own = Contingency.of(truth, truth)
    if own.truth_ids.size:
        assert count_matches(own).pq == aji(own) == aji_plus(own) == foreground_dice(own) == 1
    renamed = np.array([0, 40, 3, 7, 2, 11])[np.searchsorted([0, 1, 2, 5, 900], truth)]
    first, second = panoptic_counts(truth, predicted), panoptic_counts(renamed, predicted[...])
    assert (first.tp, first.fp, first.fn) == (second.tp, second.fp, second.fn)
    assert first.iou_sum == pytest.approx(second.iou_sum)
    swapped = panoptic_counts(predicted, truth)
    assert (first.tp, first.fp, first.fn) == (swapped.tp, swapped.fn, swapped.fp)


@given(label_maps(), SEEDS)
def test_class_counts_as_if_the_rest_were_erased(maps: tuple[Array, Array], seed: int) -> None:
    table, random = Contingency.of(*maps), np.random.default_rng(seed)
    t_classes = random.integers(1, 3, table.truth_ids.size)
    p_classes = random.integers(1, 3, table.predicted_ids.size)
    each = class_counts(table, t_classes, p_classes, (1, 2), 0.3)
    for c, counts in zip((1, 2), each, strict=True):
        erased = [
            np.where(np.isin(labels, ids[classes == c]), labels, 0)
            for labels, ids, classes in (
                (maps[0], table.truth_ids, t_classes),
                (maps[1], table.predicted_ids, p_classes),
            )
        ]
        assert counts == panoptic_counts(*erased, 0.3)


@given(label_maps())
def test_every_type_of_array_gives_the_same(maps: tuple[Array, Array]) -> None:
    wanted = panoptic_counts(*maps)
    for dtype in (np.uint16, np.int64, np.uint64, np.float32, np.float64):
        assert panoptic_counts(*(m.astype(dtype) for m in maps)) == wanted
    assert panoptic_counts(*(np.asfortranarray(m) for m in maps)) == wanted


@given(SEEDS, st.sampled_from([4.0, 60.0]))
def test_best_pairs_cost_as_little_as_a_full_matrix(seed: int, alone: float) -> None:
    random = np.random.default_rng(seed)
    cost = random.choice([0.0, 1.0, 2.0, 2.5, 3.0, 3.5, 7.0], (6, 5))
    possible = random.random((6, 5)) < random.random()
    possible &= cost < alone
    rows, columns = np.nonzero(possible)
    full = np.where(possible, cost, alone)
    wanted = full[linear_sum_assignment(full)].sum()
    chosen = best_pairs(rows, columns, cost[rows, columns], alone)
    assert len(set(rows[chosen])) == len(set(columns[chosen])) == chosen.size
    total = cost[rows[chosen], columns[chosen]].sum() + alone * (5 - chosen.size)
    assert total == pytest.approx(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "DENSE_CELLS", 0)
        sparse = best_pairs(rows, columns, cost[rows, columns], alone)
    assert len(set(rows[sparse])) == len(set(columns[sparse])) == sparse.size
    assert cost[rows[sparse], columns[sparse]].sum() + alone * (5 - sparse.size) == pytest.approx(wanted)


def test_conventions_differ_by_their_constants_alone() -> None:
    counts = Counts(3, 1, 2, 2.4)
    exact, hovernet, cellvit = (counts.quality(c) for c in Convention)
    assert (exact.dq, exact.sq) == (3 / 4.5, pytest.approx(0.8))
    assert exact.pq == pytest.approx(exact.dq * exact.sq)
    assert (hovernet.dq, hovernet.sq) == (3 / 4.5, 2.4 / 3.000001)
    assert (cellvit.dq, cellvit.sq) == (3 / 4.500001, 2.4 / 3.000001)
    assert counts + Counts(1, 1, 1, 0.6) == Counts(4, 2, 3, pytest.approx(3.0))
    lost = Counts(0, 0, 4)
    assert lost.pq == lost.f1 == 0
    assert np.isnan([lost.sq, lost.precision]).all()


def random_channels(seed: int) -> Array:
    """Channels of whole floats, as PanNuke stores them."""
    return np.random.default_rng(seed).choice([0.0, 0.0, 1.0, 4.0], (6, 7, 3))


LAYERS = st.builds(random_channels, SEEDS)


@given(LAYERS)
def test_binarize_paints_one_object_after_the_other(channels: Array) -> None:
    painted, count = np.zeros(channels.shape[:2], int), 0
    for k in range(channels.shape[2]):
        for label in np.unique(channels[..., k]):
            if label > 0:
                count += 1
                painted[channels[..., k] == label] = count
    assert np.array_equal(binarize(channels), painted)


@given(LAYERS, LAYERS)
def test_image_counts_are_those_of_each_channel(truth: Array, predicted: Array) -> None:
    counts = image_counts(truth, predicted, classes=2)
    assert counts.classes == tuple(panoptic_counts(truth[..., k], predicted[..., k]) for k in range(2))
    assert counts.binary == panoptic_counts(binarize(truth[..., :2]), binarize(predicted[..., :2]))


def test_false_positives_that_no_mean_sees_are_counted() -> None:
    empty, full = np.zeros((8, 8, 2), np.int32), np.zeros((8, 8, 2), np.int32)
    full[:3, :3, 0] = 1
    summary = summarise([image_counts(full, full, 2), image_counts(empty, full, 2)], ["Colon", "Skin"])
    assert summary.mpq_tissues == summary.bpq_images == pytest.approx(1, abs=1e-5)
    assert (summary.images, summary.skipped, summary.free_fp, summary.free_fp_binary) == (2, 1, (1, 0), 1)
    assert summary.pooled_binary.pq == pytest.approx(2 / 3)
    assert np.isnan(summary.tissue_mpq["Skin"])
    assert np.isnan(summarise([]).mpq_images)


BLANK = np.zeros((4, 4), np.int32)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("WSI800", lambda: Contingency.of(BLANK, BLANK[:2])),
        ("WSI801", lambda: as_labels(BLANK - 1)),
        ("WSI801", lambda: as_labels(BLANK + 0.5)),
        ("WSI801", lambda: as_labels(BLANK + np.nan)),
        ("WSI801", lambda: as_labels(BLANK + 1e30)),
        ("WSI801", lambda: as_labels(BLANK.astype(str))),
        ("WSI801", lambda: as_labels(BLANK.astype(np.uint64) + np.uint64(2**63))),
        ("WSI802", lambda: panoptic_counts(BLANK, BLANK, 1.0)),
        ("WSI802", lambda: panoptic_counts(BLANK, BLANK, float("nan"))),
        (
            "WSI803",
            lambda: class_counts(Contingency.of(BLANK, BLANK), np.array([1]), np.array([], int), (1,)),
        ),
        ("WSI810", lambda: binarize(BLANK)),
        ("WSI810", lambda: image_counts(np.zeros((4, 4, 3)), np.zeros((4, 4, 3)))),
        ("WSI811", lambda: summarise([], ["Colon"])),
    ],
)
def test_refusals(code: str, call: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        call()
    assert refusal.value.code == code
    assert "\n" not in refusal.value.message
