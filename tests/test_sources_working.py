"""The working grid: each pixel equals a slow, direct area mean, and does not depend on the window read."""

from __future__ import annotations

import itertools
import math
from typing import Any, final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsitk.errors import SpacingError, UsageError
from wsitk.geometry import Region, Spacing
from wsitk.sources import open_source
from wsitk.sources.base import Level, Reading, Source
from wsitk.sources.resample import apply_taps, halve, make_taps
from wsitk.sources.working import WorkingImage


@final
class Pyramid(Source):
    """A pyramid given level by level, with holes."""

    def __init__(
        self, levels: list[NDArray[Any]], um: float, holes: list[NDArray[np.bool_]] | None = None
    ) -> None:
        full = levels[0].shape[:-1]
        self.name, self.axes = "pyramid", ("z", "y", "x", "c")[-levels[0].ndim :]
        steps = [tuple(float(round(n / m)) for n, m in zip(full, a.shape, strict=False)) for a in levels]
        chunk = (16,) * len(full)
        self.levels = tuple(Level(a.shape[:-1], d, chunk) for a, d in zip(levels, steps, strict=True))
        self.dtype = levels[0].dtype
        self.channel_names = tuple("rgb"[: levels[0].shape[-1]])
        self.spacing, self.spacing_error = Spacing((um,) * len(full), "test"), ""
        self.bounds, self.ref = Region((0,) * len(full), full), None
        self._data, self._holes = levels, holes
        self.reads: list[tuple[int, Region]] = []

    def identity(self) -> dict[str, Any]:
        return {}

    def read_inside(self, region: Region, level: int) -> Reading:
        self.reads.append((level, region))
        hole = self._holes[level][region.slices()] if self._holes else None
        return Reading(self._data[level][region.slices()], hole if hole is not None and hole.any() else None)

    def close(self) -> None:
        pass


def noise(*shape: int, dtype: str = "u1", seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if dtype == "f4":
        return rng.random(shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def slow_mean(image: NDArray[Any], factor: tuple[float, ...]) -> NDArray[np.float64]:
    """Return exact area means, one output pixel at a time, in double precision."""
    spatial = image.shape[:-1]
    shape = [max(1, math.floor(n / f + 0.5)) for n, f in zip(spatial, factor, strict=True)]
    out = np.zeros((*shape, image.shape[-1]))
    for place in np.ndindex(*shape):
        total = 0.0
        spans = []
        for k, f, n in zip(place, factor, spatial, strict=True):
            low, high = k * f, min((k + 1) * f, n)
            cells = range(math.floor(low), math.ceil(high))
            spans.append([(i, min(i + 1, high) - max(i, low)) for i in cells])
        for combination in itertools.product(*spans):
            weight = math.prod(w for _, w in combination)
            out[place] += weight * image[tuple(i for i, _ in combination)].astype(float)
            total += weight
        out[place] /= total
    return out


@pytest.mark.parametrize("factor", [2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(41, 30, 3), (28, 56, 1), (13, 17, 5)])
def test_whole_factor_is_the_block_mean_rounded_half_up(factor: int, shape: tuple[int, int, int]) -> None:
    image = noise(*shape, seed=factor)
    working = WorkingImage(open_source(image, mpp=0.25, axes="yxc"), (0.25 * factor,) * 2)
    assert working.factor == (factor, factor)
    got = working.read(Region((0, 0), working.shape)).pixels
    for y, x in np.ndindex(*working.shape):
        block = image[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].astype(int)
        count = block.shape[0] * block.shape[1]
        np.testing.assert_array_equal(got[y, x], (2 * block.sum((0, 1)) + count) // (2 * count))


def test_simd_halving_equals_the_block_mean() -> None:
    for seed, channels in itertools.product(range(40), (1, 3, 4)):
        rng = np.random.default_rng(seed)
        h, w = (int(n) for n in rng.integers(1, 70, 2))
        image = noise(2 * h, 2 * w, channels, seed=seed)
        want = (image.reshape(h, 2, w, 2, channels).sum((1, 3), dtype=int) + 2) // 4
        np.testing.assert_array_equal(halve(image), want)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("factor", [(1.37, 2.6), (1.0, 3.3), (5.5, 1.2)])
def test_any_factor_is_the_exact_area_mean(factor: tuple[float, float], dtype: str) -> None:
    image = noise(23, 31, 2, dtype=dtype)
    spacing = (0.5 * factor[0], 0.5 * factor[1])
    working = WorkingImage(open_source(image, mpp=0.5, axes="yxc"), spacing, tolerance=0)
    got = working.read(Region((0, 0), working.shape)).pixels
    assert got.dtype == image.dtype
    slack = 1e-5 if dtype == "f4" else 0.5001
    np.testing.assert_allclose(got, slow_mean(image, working.factor), atol=slack)


def test_volumes_are_resampled_along_each_axis() -> None:
    image = noise(9, 14, 12, 1)
    working = WorkingImage(
        open_source(image, mpp=(3.0, 1.0, 1.0), axes="zyxc"), (3.0, 2.0, 2.6), tolerance=0.05
    )
    assert working.factor == (1.0, 2.0, 2.6)
    got = working.read(Region((0, 0, 0), working.shape)).pixels
    np.testing.assert_allclose(got, slow_mean(image, working.factor), atol=0.5001)


@given(st.data())
def test_a_pixel_depends_on_its_place_only(data: st.DataObject) -> None:
    ndim = data.draw(st.sampled_from([2, 3]))
    size = st.integers(1, 40 if ndim == 2 else 12)
    image = noise(
        *(data.draw(size) for _ in range(ndim)), 3 if ndim == 2 else 1, seed=data.draw(st.integers(0, 9))
    )
    factors = st.sampled_from([0.41, 0.7, 1.0, 1.3, 2.0, 2.004, 3.0, 3.7])
    spacing = tuple(10 * data.draw(factors) for _ in range(ndim))
    border = data.draw(st.sampled_from(["reflect", "constant"]))
    source = open_source(image, mpp=10.0, axes="zyxc"[-ndim - 1 :])
    working = WorkingImage(source, spacing, tolerance=0.0, border=border)
    everything = Region((0,) * ndim, working.shape).grow((7,) * ndim)
    whole = working.read(everything).pixels
    start = tuple(
        data.draw(st.integers(a, b - 1)) for a, b in zip(everything.start, everything.stop, strict=True)
    )
    stop = tuple(data.draw(st.integers(a + 1, b)) for a, b in zip(start, everything.stop, strict=True))
    part = Region.between(start, stop)
    np.testing.assert_array_equal(working.read(part).pixels, whole[part.slices(everything.start)])


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.45, 1.0, 1.9, 2.0, 5.0]))
def test_every_working_pixel_is_at_least_half_real(height: int, width: int, factor: float) -> None:
    source = open_source(np.zeros((height, width, 3), np.uint8), mpp=1.0)
    working = WorkingImage(source, (factor, factor), tolerance=0)
    for n, m, f in zip(source.shape, working.shape, working.factor, strict=True):
        assert m == 1 or n - (m - 1) * f >= 0.5 * f
        assert n - m * f < 0.5 * f  # and none that could be there is left out


def test_tolerance_takes_the_nearest_whole_factor() -> None:
    def factor(have: float, want: float) -> tuple[float, ...]:
        return WorkingImage(open_source(np.zeros((99, 99, 3), np.uint8), mpp=have), (want, want)).factor

    assert factor(0.2457, 0.5) == (2.0, 2.0)
    assert factor(0.499, 0.5) == (1.0, 1.0)
    assert factor(0.5, 0.499) == (1.0, 1.0)
    assert factor(0.25, 0.25) == (1.0, 1.0)
    assert factor(0.25, 0.4) == pytest.approx((1.6, 1.6))


def test_the_nearest_finer_level_is_read() -> None:
    levels = [noise(64, 64, 3), noise(32, 32, 3, seed=1), noise(8, 8, 3, seed=2)]
    source = Pyramid(levels, 0.25)
    for want, level, factor in [
        (0.25, 0, 1),
        (0.4, 0, 1.6),
        (0.5, 1, 1),
        (1.0, 1, 2),
        (2.0, 2, 1),
        (1.94, 2, 1),
        (4.0, 2, 2),
    ]:
        working = WorkingImage(source, (want, want))
        assert (working.level, working.factor) == (level, pytest.approx((factor, factor)))
        assert working.scale == pytest.approx((factor * source.levels[level].downsample[0],) * 2)
        assert working.spacing == pytest.approx(tuple(0.25 * s for s in working.scale))
    source.reads.clear()
    WorkingImage(source, (0.5, 0.5)).read(Region((3, 5), (4, 6)))
    assert source.reads == [(1, Region((3, 5), (4, 6)))]


def test_enlarging_warns_and_has_a_limit() -> None:
    source = open_source(
        np.tile(np.arange(20, dtype=np.float32)[:, None, None], (1, 20, 1)), mpp=1.0, axes="yxc"
    )
    working = WorkingImage(source, (0.5, 0.5))
    assert working.shape == (40, 40)
    assert "WSI204" in working.warnings[0]
    column = working.read(Region((0, 0), (40, 1))).pixels[:, 0, 0]
    np.testing.assert_allclose(column[1:-1], (np.arange(1, 39) + 0.5) * 0.5 - 0.5)
    with pytest.raises(SpacingError, match=r"WSI203 array: .* 2\.51 times"):
        WorkingImage(source, (1 / 2.51, 1 / 2.51))


def test_borders() -> None:
    image = noise(10, 12, 3)
    source = open_source(image, mpp=0.5)
    region = Region((-25, -3), (60, 30))
    mirror = WorkingImage(source, (0.5, 0.5)).read(region).pixels
    want = np.pad(image, ((25, 25), (3, 15), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(mirror, want)
    flat = WorkingImage(source, (0.5, 0.5), border="constant", fill=7).read(region).pixels
    np.testing.assert_array_equal(flat, np.pad(image, ((25, 25), (3, 15), (0, 0)), constant_values=7))
    away = Region((100, 100), (4, 4))
    assert (WorkingImage(source, (0.5, 0.5), border="constant").read(away).pixels == 255).all()
    single = WorkingImage(open_source(noise(1, 1, 3), mpp=0.5), (0.5, 0.5))
    assert len(np.unique(single.read(Region((-2, -2), (5, 5))).pixels.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("border", ["reflect", "constant"])
def test_absent_is_a_majority_and_inside_only(border: Any) -> None:
    image = noise(8, 8, 3)
    hole = np.zeros((8, 8), np.bool_)
    hole[0:2, 0:2] = True  # working pixel (0, 0): 4 of 4
    hole[0, 2:4] = True  # (0, 1): 2 of 4, not more than half
    hole[6:8, 6] = hole[7, 7] = True  # (3, 3): 3 of 4
    working = WorkingImage(Pyramid([image], 0.25, [hole]), (0.5, 0.5), border=border)
    reading = working.read(Region((-2, -2), (8, 8)))
    assert reading.absent is not None
    assert {(int(y) - 2, int(x) - 2) for y, x in np.argwhere(reading.absent)} == {(0, 0), (3, 3)}
    assert working.read(Region((1, 0), (2, 2))).absent is None


def test_large_reads_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    image, hole = noise(90, 70, 3), np.zeros((90, 70), np.bool_)
    hole[40:60, 20:50] = True
    source = Pyramid([image], 1.0, [hole])
    working = WorkingImage(source, (2.7, 2.7), tolerance=0)
    region = Region((-3, -2), (40, 33))
    want = working.read(region)
    source.reads.clear()
    monkeypatch.setattr("wsitk.sources.working._PIECE_PIXELS", 400)
    got = working.read(region)
    assert len(source.reads) > 20
    assert max(r.size for _, r in source.reads) <= 400
    np.testing.assert_array_equal(got.pixels, want.pixels)
    assert got.absent is not None
    assert want.absent is not None
    np.testing.assert_array_equal(got.absent, want.absent)


def test_no_spacing() -> None:
    source = open_source(noise(20, 20, 3))
    working = WorkingImage(source, None)
    assert (working.spacing, working.scale, working.shape) == (None, (1.0, 1.0), (20, 20))
    with pytest.raises(SpacingError, match="WSI201"):
        WorkingImage(source, (0.5, 0.5))
    with pytest.raises(UsageError, match="WSI021"):
        WorkingImage(source, (0.5,))


def test_grey_gets_a_channel_axis() -> None:
    image = noise(12, 10)
    working = WorkingImage(open_source(image, mpp=1.0), (2.0, 2.0))
    assert working.read(Region((0, 0), (6, 5))).pixels.shape == (6, 5, 1)
    assert working.read(Region((0, 0), (0, 5))).pixels.shape == (0, 5, 1)


def test_narrow_sums_do_not_overflow() -> None:
    image = np.full((600, 600, 1), 255, np.uint8)
    taps = (make_taps(0, 2, 300.0, 600),) * 2
    assert (apply_taps(image, taps, np.dtype(np.uint8)) == 255).all()
