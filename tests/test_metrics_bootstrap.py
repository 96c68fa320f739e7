"""Intervals beside a loop that draws slides and pools them by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.metrics import bootstrap as module
from wsitk.metrics.bootstrap import (
    bootstrap,
    bootstrap_mean,
    count_columns,
    group_means,
    pooled_f1,
    pooled_pq,
    pooled_precision,
    pooled_recall,
    pooled_sq,
)
from wsitk.metrics.counts import Counts

Array = NDArray[Any]

RANDOM = np.random.default_rng(11)
SLIDES = [f"slide {k}" for k in RANDOM.integers(0, 9, 60)]
NAMES = sorted(set(SLIDES))
COUNTS = [Counts(*RANDOM.integers(0, 30, 3).tolist(), float(RANDOM.random() * 20)) for _ in SLIDES]
STATISTICS = {
    pooled_f1: "f1",
    pooled_precision: "precision",
    pooled_recall: "recall",
    pooled_sq: "sq",
    pooled_pq: "pq",
}


def draws_by_hand(draws: int, seed: int) -> list[list[int]]:
    """The items of each draw, from the same random numbers."""
    random = np.random.Generator(np.random.PCG64(seed))
    chosen = random.integers(0, len(NAMES), (draws, len(NAMES)))
    items = [[k for k, slide in enumerate(SLIDES) if slide == name] for name in NAMES]
    return [[item for group in row for item in items[group]] for row in chosen]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_pooled_figures_as_by_hand(statistic: Any) -> None:
    interval = bootstrap(count_columns(COUNTS), SLIDES, statistic, draws=300, level=0.9, seed=5)
    drawn = [
        getattr(sum((COUNTS[k] for k in items), Counts()), STATISTICS[statistic])
        for items in draws_by_hand(300, 5)
    ]
    assert interval.value == pytest.approx(getattr(sum(COUNTS, Counts()), STATISTICS[statistic]))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.05, 0.95]))
    assert interval.low < interval.value < interval.high
    assert (interval.groups, interval.draws, interval.undefined) == (len(NAMES), 300, 0)


def test_means_as_by_hand_with_and_without_strata() -> None:
    values = RANDOM.random(len(SLIDES))
    values[::7] = np.nan
    tissues = np.array(["Colon", "Skin", "Lung"])[RANDOM.integers(0, 3, len(SLIDES))]
    plain = bootstrap_mean(values, SLIDES, draws=200)
    layered = bootstrap_mean(values, SLIDES, tissues, draws=200)
    means, layered_means = [], []
    for items in draws_by_hand(200, 0):
        chosen, names = values[items], tissues[items]
        means.append(np.nanmean(chosen))
        layered_means.append(np.mean([np.nanmean(chosen[names == name]) for name in set(names)]))
    assert plain.value == pytest.approx(np.nanmean(values))
    assert layered.value == pytest.approx(np.mean([np.nanmean(values[tissues == t]) for t in set(tissues)]))
    for interval, drawn in ((plain, means), (layered, layered_means)):
        assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_order_of_items_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = count_columns(COUNTS)
    wanted = bootstrap(columns, SLIDES, pooled_pq)
    order = RANDOM.permutation(len(SLIDES))
    assert bootstrap(columns[order], np.array(SLIDES)[order], pooled_pq) == wanted
    assert bootstrap(columns, SLIDES, pooled_pq, seed=1) != wanted
    monkeypatch.setattr(module, "DRAW_CELLS", 100)  # in many small blocks
    assert bootstrap(columns, SLIDES, pooled_pq) == wanted


def test_the_interval_is_as_wide_as_theory_says() -> None:
    means = np.random.default_rng(0).normal(0.7, 0.1, 400)
    slides = np.repeat(np.arange(400), 5)
    interval = bootstrap_mean(np.repeat(means, 5), slides)
    error = means.std() / np.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    # Tiles of a slide are alike here: to draw tiles would claim an interval less than half as wide.
    tiles = bootstrap_mean(np.repeat(means, 5), np.arange(2000))
    assert tiles.high - tiles.low < 0.6 * (interval.high - interval.low)


def test_one_slide_has_no_interval_and_nothing_is_undefined() -> None:
    one = bootstrap_mean([0.5, 0.7], ["a", "a"])
    assert one.value == pytest.approx(0.6)
    assert np.isnan([one.low, one.high]).all()
    rare = bootstrap(count_columns([Counts(3, 1, 1), Counts(), Counts()]), "abc", pooled_f1)
    assert rare.value == pytest.approx(0.75)
    assert 0 < rare.undefined < rare.draws
    assert rare.low == rare.high == pytest.approx(0.75)
    endless = bootstrap_mean([1.0, np.inf, 2.0], "abc")
    assert (endless.value, endless.groups) == (np.inf, 3)
    nothing = bootstrap_mean([np.nan, np.nan], "ab")
    assert np.isnan([nothing.value, nothing.low]).all()
    assert nothing.undefined == nothing.draws


def test_group_means() -> None:
    names, means = group_means([1.0, 3.0, np.nan, 5.0, np.nan], ["b", "b", "b", "a", "c"])
    assert names == ["a", "b", "c"]
    assert means.tolist() == pytest.approx([5.0, 2.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap(np.ones((3, 4)), "ab", pooled_f1),
        lambda: bootstrap(np.ones((0, 4)), [], pooled_f1),
        lambda: bootstrap(np.full((2, 4), np.nan), "ab", pooled_f1),
        lambda: bootstrap(np.ones((2, 4)), "ab", pooled_f1, draws=10),
        lambda: bootstrap(np.ones((2, 4)), "ab", pooled_f1, level=95),
        lambda: bootstrap_mean([1.0, 2.0], "ab", "abc"),
        lambda: bootstrap_mean([1.0, np.inf], "abc"),
        lambda: group_means([1.0], "ab"),
    ],
)
def test_refusals(call: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        call()
    assert refusal.value.code == "WSI809"
