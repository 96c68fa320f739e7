"""Sampling by cells and tissue: the published formula, exact shares, and draws that need no state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.sampling import (
    PANNUKE_IMAGES_WITH,
    Sampler,
    cell_tissue_weights,
    cell_weights,
    tissue_weights,
)

Array = NDArray[Any]

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.integers(0, 3))
GAMMA = st.floats(0, 1)


def slow_cell_weights(cells: Array, gamma: float) -> list[float]:
    """The formula of the paper, image by image and class by class."""
    count = [sum(int(row[c] > 0) for row in cells) for c in range(cells.shape[1])]
    k = sum(count)
    weights = []
    for row in cells:
        present = [c for c in range(cells.shape[1]) if row[c] > 0]
        rare = sum(k / (gamma * count[c] + (1 - gamma) * k) for c in present)
        weights.append((1 - gamma) * (1.0 if present else 0.0) + gamma * rare)
    if not any(weights):
        return [1.0] * len(weights)
    return [w or min(v for v in weights if v) for w in weights]


@given(COUNTS, GAMMA)
def test_cell_weights_are_the_papers(cells: Array, gamma: float) -> None:
    assert cell_weights(cells, gamma) == pytest.approx(slow_cell_weights(cells, gamma))


def test_pannukes_fixed_counts_give_the_numbers_of_upstreams_formula() -> None:
    """By hand for an image with neoplastic and dead cells: 0.15 + 0.85 (k / (.85 n + .15 k)), k = 16223."""
    cells = np.array([[5, 0, 0, 1, 0], [0, 0, 2, 0, 0], [0, 0, 0, 0, 0]])
    k = 4191 + 4132 + 6140 + 232 + 1528
    first = 0.15 + 0.85 * (k / (0.85 * 4191 + 0.15 * k) + k / (0.85 * 232 + 0.15 * k))
    second = 0.15 + 0.85 * k / (0.85 * 6140 + 0.15 * k)
    assert cell_weights(cells, 0.85, PANNUKE_IMAGES_WITH) == pytest.approx([first, second, second])


def test_tissues_are_as_rare_as_gamma_says() -> None:
    tissues = ("Breast", "Breast", "Breast", "Lung")
    assert tissue_weights(tissues, 0.0).tolist() == [1, 1, 1, 1]
    assert tissue_weights(tissues, 1.0) == pytest.approx([4 / 3] * 3 + [4])
    expected = [4 / (0.85 * 3 + 0.15 * 4)] * 3 + [4 / (0.85 + 0.15 * 4)]
    assert tissue_weights(tissues, 0.85) == pytest.approx(expected)


def test_both_are_scaled_by_their_largest_and_added() -> None:
    cells, tissues = np.array([[1, 0], [0, 1], [1, 1]]), ("a", "a", "b")
    tissue, cell = tissue_weights(tissues, 0.85), cell_weights(cells, 0.85)
    both = cell_tissue_weights(cells, tissues)
    assert both == pytest.approx(tissue / tissue.max() + cell / cell.max())
    assert both.argmax() == 2


def test_untyped_images_are_drawn_alike() -> None:
    assert cell_weights(np.zeros((3, 0), np.int64), 0.85).tolist() == [1, 1, 1]


@given(arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 9)).filter(lambda w: bool(w.any())))
def test_each_image_owns_exactly_its_share_of_the_chances(weights: Array) -> None:
    """The middles of `total` equal intervals: whole-number weights must come out as they went in."""
    sampler = Sampler(weights.astype(float), batch=1, seed=0)
    total = int(weights.sum())
    drawn = sampler.pick((np.arange(total) + 0.5) / total)
    assert np.bincount(drawn, minlength=len(weights)).tolist() == weights.tolist()


def test_the_last_chance_never_draws_an_image_of_no_weight() -> None:
    sampler = Sampler(np.array([0.1] * 3 + [0.0]), batch=1, seed=0)
    assert sampler.pick(np.array([0.0, np.nextafter(1.0, 0)])).tolist() == [0, 2]


def test_a_draw_depends_on_seed_and_step_only() -> None:
    weights = np.arange(1.0, 50.0)
    one = Sampler(weights, batch=16, seed=7)
    late = one.draw(1000)
    again = Sampler(weights, batch=16, seed=7)
    again.draw(3)
    assert (again.draw(1000) == late).all()
    assert (one.draw(1001) != late).any()
    assert (Sampler(weights, batch=16, seed=8).draw(1000) != late).any()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_the_draw_of_one(world: int) -> None:
    sampler = Sampler(np.arange(1.0, 50.0), batch=12, seed=3)
    whole = sampler.draw(5)
    shared = np.zeros_like(whole)
    for rank in range(world):
        shared[rank::world] = sampler.draw(5, rank, world)
    assert (shared == whole).all()


def test_each_sample_has_its_own_source_of_chance() -> None:
    sampler = Sampler(np.ones(4), batch=4, seed=3)
    first = {tuple(sampler.generator(step, slot).random(2)) for step in range(20) for slot in range(20)}
    assert len(first) == 400
    assert sampler.generator(9, 2).random() == sampler.generator(9, 2).random()
    assert not {sampler.generator(s, k).random() for s in range(9) for k in range(4)} & {
        float(v)
        for s in range(9)
        for v in np.random.Generator(np.random.Philox(key=3, counter=[0, 0, 0, s])).random(4)
    }


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0, 3.0], [np.nan, 1.0], [np.inf]])
def test_weights_that_no_draw_can_follow_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="WSI904"):
        Sampler(np.array(weights), batch=1, seed=0)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="WSI902"):
        tissue_weights(("a",), 1.5)
    with pytest.raises(UsageError, match="WSI903"):
        cell_weights(np.ones((2, 3), np.int64), 0.5, (1, 2))
