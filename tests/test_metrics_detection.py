"""Pairing by centroids beside brute force: every way of pairing a few points, and one matrix of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from wsitk.errors import UsageError
from wsitk.metrics import detection
from wsitk.metrics.counts import Counts
from wsitk.metrics.detection import centroids, detection_counts, detection_f1, pair_points, typed_counts

Array = NDArray[Any]

SEEDS = st.integers(0, 2**32 - 1)


def random_points(seed: int, most: int, axes: int = 2) -> Array:
    """Up to `most` points on a small lattice, so that ties and equal points are many."""
    random = np.random.default_rng(seed)
    return random.integers(0, 12, (random.integers(0, most + 1), axes)).astype(float)


def points(most: int, axes: int = 2) -> st.SearchStrategy[Array]:
    return st.builds(random_points, SEEDS, st.just(most), st.just(axes))


def most_and_nearest(distance: Array, radius: float) -> tuple[int, float]:
    """The greatest number of pairs within the radius and the least sum of their distances, trying them all."""
    best = (0, 0.0)
    if distance.shape[0] == 0:
        return best
    rest = distance[1:]
    options = [most_and_nearest(rest, radius)]
    for column in np.flatnonzero(distance[0] <= radius):
        count, total = most_and_nearest(np.delete(rest, column, axis=1), radius)
        options.append((count + 1, total + float(distance[0, column])))
    return max(options, key=lambda option: (option[0], -option[1]))


@given(points(5), points(5), st.sampled_from([1.0, 3.0, 6.5]))
def test_gated_makes_the_most_pairs_and_of_those_the_nearest(
    truth: Array, predicted: Array, radius: float
) -> None:
    pairs = pair_points(truth, predicted, radius)
    count, total = most_and_nearest(cdist(truth, predicted), radius)
    assert pairs.truth.size == count
    assert pairs.distance.sum() == pytest.approx(total)
    assert (pairs.distance <= radius).all()


@given(points(7, 3), points(7, 3), st.sampled_from(["gated", "hovernet"]))
def test_pairs_are_one_to_one_and_nobody_is_lost(truth: Array, predicted: Array, protocol: Any) -> None:
    pairs = pair_points(truth, predicted, 4.0, protocol)
    assert sorted([*pairs.truth, *pairs.unpaired_truth]) == list(range(len(truth)))
    assert sorted([*pairs.predicted, *pairs.unpaired_predicted]) == list(range(len(predicted)))
    assert (np.diff(pairs.truth) > 0).all()
    np.testing.assert_allclose(
        pairs.distance, np.linalg.norm(truth[pairs.truth] - predicted[pairs.predicted], axis=1)
    )
    assert pairs.counts == detection_counts(truth, predicted, 4.0, protocol)
    assert (
        detection_counts(truth, predicted, 4.0).tp >= detection_counts(truth, predicted, 4.0, "hovernet").tp
    )


def test_a_field_of_many_points_as_of_one_matrix() -> None:
    random = np.random.default_rng(3)
    truth = random.uniform(0, 300, (900, 2))
    predicted = np.concatenate(
        [truth[:700] + random.normal(0, 4, (700, 2)), random.uniform(0, 300, (200, 2))]
    )
    distance = cdist(truth, predicted)
    cost = np.where(distance <= 12, distance, 1e5)
    chosen = linear_sum_assignment(cost)
    near = cost[chosen] < 1e5
    pairs = pair_points(truth, predicted, 12.0)
    assert pairs.truth.size == near.sum()
    assert pairs.distance.sum() == pytest.approx(cost[chosen][near].sum())
    shuffled = random.permutation(len(predicted))
    again = pair_points(truth, predicted[shuffled], 12.0)
    assert np.array_equal(shuffled[again.predicted], pairs.predicted)


def test_a_slide_needs_no_matrix() -> None:
    """A matrix of all against all would take 80 GB."""
    side = np.arange(320) * 30.0
    truth = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)[:100_000]
    counts = detection_counts(truth, truth[1000:] + 2.0, 12.0)
    assert counts == Counts(99_000, 0, 1000)


@given(points(12), points(12), SEEDS)
def test_typed_counts_as_by_hand(truth: Array, predicted: Array, seed: int) -> None:
    random = np.random.default_rng(seed)
    t, p = random.integers(1, 5, len(truth)), random.integers(1, 5, len(predicted))
    pairs = pair_points(truth, predicted, 3.0)
    counts = typed_counts(pairs, t, p, (1, 2, 3))
    assert counts.detection == pairs.counts
    t_paired, p_paired = t[pairs.truth], p[pairs.predicted]
    for c in (1, 2, 3):
        hit = int(((t_paired == c) & (p_paired == c)).sum())
        given_wrongly = int(((t_paired != c) & (p_paired == c)).sum())
        withheld = int(((t_paired == c) & (p_paired != c)).sum())
        spurious, missed = (
            int((p[pairs.unpaired_predicted] == c).sum()),
            int((t[pairs.unpaired_truth] == c).sum()),
        )
        whole = 2 * hit + 2 * given_wrongly + 2 * withheld + spurious + missed
        wanted = 2 * hit / whole if whole else float("nan")
        assert counts.score(c).f1 == pytest.approx(wanted, nan_ok=True)
    agree = ((t_paired == p_paired) & (t_paired < 4)).sum()
    wanted = agree / t_paired.size if t_paired.size else float("nan")
    assert counts.accuracy == pytest.approx(wanted, nan_ok=True)
    both = counts + counts
    assert both.score(2).f1 == pytest.approx(counts.score(2).f1, nan_ok=True)
    assert both.detection == counts.detection + counts.detection


def test_centroids_are_centres_of_mass() -> None:
    labels = np.zeros((5, 6), np.uint16)
    labels[1:3, 1:4] = 9
    labels[4, 5] = 2
    assert centroids(labels).tolist() == [[4.0, 5.0], [1.5, 2.0]]
    assert centroids(np.zeros((3, 3, 3), int)).shape == (0, 3)


def test_nothing_against_nothing() -> None:
    nothing, one = np.zeros((0, 2)), np.array([[1.0, 2.0]])
    assert np.isnan(detection_f1(nothing, nothing, 3.0))
    assert detection_counts(one, nothing, 3.0, "hovernet") == Counts(0, 0, 1)
    assert detection_counts(np.array([]), one, 3.0) == Counts(0, 1, 0)
    assert detection_counts(one, one + np.array([0.0, 3.0]), 3.0).tp == 1  # the radius itself is within
    assert detection_counts(one, one, 3.0).tp == 1


ONE = np.array([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("WSI803", lambda: pair_points(ONE, np.zeros((2, 3)), 3.0)),
        ("WSI803", lambda: pair_points(ONE[0], ONE, 3.0)),
        ("WSI803", lambda: pair_points(ONE * np.nan, ONE, 3.0)),
        ("WSI803", lambda: typed_counts(pair_points(ONE, ONE, 3.0), np.array([1, 2]), np.array([1]), (1,))),
        (
            "WSI803",
            lambda: typed_counts(pair_points(ONE, ONE, 3.0), np.array([1]), np.array([1]), (1,)).score(2),
        ),
        ("WSI804", lambda: pair_points(ONE, ONE, 0.0)),
        ("WSI804", lambda: pair_points(ONE, ONE, float("inf"))),
        ("WSI805", lambda: pair_points(ONE, ONE, 3.0, "nearest")),  # type: ignore[arg-type]
    ],
)
def test_refusals(code: str, call: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        call()
    assert refusal.value.code == code


def test_too_much_at_once_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    many = np.zeros((6000, 2))
    with pytest.raises(UsageError, match=r"WSI806.*gated"):
        pair_points(many, many, 3.0, "hovernet")
    with pytest.raises(UsageError, match=r"WSI806.*unit"):
        pair_points(many, many, 3.0)
    monkeypatch.setattr(detection, "REACH_PAIRS", 0)
    with pytest.raises(UsageError, match="WSI806"):
        pair_points(ONE, ONE, 3.0)
