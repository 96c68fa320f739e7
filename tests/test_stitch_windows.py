"""Windows: positive where a tile answers, and summing to one between neighbours where they should."""

from __future__ import annotations

import numpy as np
import pytest

from wsitk.stitch.windows import WINDOWS, outer, window


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("halo", [0, 1, 5, 20])
def test_positive_and_symmetric_on_the_cell(name: str, halo: int) -> None:
    (weights,) = window(name, (48,), (halo,))
    assert weights.dtype == np.float32
    assert weights.shape == (48,)
    assert (weights[halo : 48 - halo] > 0).all()
    assert weights.min() >= 0
    assert weights.max() <= 1
    # nnU-Net's bell has its middle on a pixel, not between two
    middle = weights[1:] if name == "gaussian" else weights
    assert np.array_equal(middle, middle[::-1])


@pytest.mark.parametrize("name", ["ramp", "crop"])
@pytest.mark.parametrize("halo", [0, 1, 5, 12])
def test_neighbours_sum_to_one(name: str, halo: int) -> None:
    tile, cell = 48, 48 - 2 * halo
    (weights,) = window(name, (tile,), (halo,))
    total = np.zeros(3 * cell + 2 * halo, np.float64)
    for k in range(3):
        total[k * cell : k * cell + tile] += weights
    inside = slice(2 * halo, 3 * cell)
    assert total[inside] == pytest.approx(1.0, abs=1e-6)


def test_ramp_written_out() -> None:
    (weights,) = window("ramp", (10,), (2,))
    assert weights.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 0.875, 0.625, 0.375, 0.125]


def test_crop_written_out() -> None:
    assert window("crop", (6,), (2,))[0].tolist() == [0, 0, 1, 1, 0, 0]


def test_the_outer_product_is_separable() -> None:
    axes = window("hann", (6, 8, 5), (1, 2, 0))
    whole = outer(axes)
    assert whole.shape == (6, 8, 5)
    assert whole[2, 3, 4] == axes[0][2] * axes[1][3] * axes[2][4]
