"""The working grid of a volume, window by window, beside nnU-Net's preprocessing of all of it at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_reference import resample
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from wsitk.errors import SourceError, SpacingError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.resample import apply_taps, interpolate
from wsitk.sources.view import ViewRules, foreground_of
from wsitk.sources.volume_grid import VolumeGrid, view_of
from wsitk.volumes import nnunet_rules as rules_of
from wsitk.volumes.nnunet_rules import IntensityRule, Moments, resampling

DOUBLE = np.dtype(np.float64)


@settings(max_examples=40)
@given(
    length=st.integers(1, 60),
    outputs=st.integers(1, 90),
    rule=st.sampled_from(["nearest", "linear", "cubic"]),
    cut=st.floats(0, 0.99),
)
def test_interpolation_is_scipys_whatever_part_is_asked_for(
    length: int, outputs: int, rule: Any, cut: float
) -> None:
    values = np.random.default_rng(length * 100 + outputs).normal(size=length)
    order = {"nearest": 0, "linear": 1, "cubic": 3}[rule]
    wanted = zoom(values, outputs / length, order=order, mode="nearest", grid_mode=True)
    assert len(wanted) == outputs
    low = int(cut * outputs)
    taps = interpolate(low, outputs, length / outputs, length, rule)
    got = apply_taps(values[taps.start : taps.stop, None], (taps,), DOUBLE)[:, 0]
    assert got == pytest.approx(wanted[low:], abs=1e-6)
    whole = interpolate(0, outputs, length / outputs, length, rule)
    every = apply_taps(values[whole.start : whole.stop, None], (whole,), DOUBLE)[:, 0]
    assert np.array_equal(every[low:], got)


def scan(channels: int = 1) -> NDArray[np.int16]:
    smooth = (
        gaussian_filter(np.random.default_rng(0).normal(size=(30, 50, 44, channels)), (1, 1, 1, 0)) * 1000
    )
    smooth[np.abs(smooth) < 20] = 0
    smooth[:3], smooth[:, :, 40:] = 0, 0
    smooth[12:15, 20:24, 20:24] = 0  # a hole belongs to the foreground
    return smooth.astype(np.int16)


def reference(
    data: NDArray[np.float32], mask: NDArray[Any], spacing: Any, target: Any, rule: IntensityRule, first: bool
) -> NDArray[np.float32]:
    """Return (C, Z, Y, X) cropped already, resampled and normalised in the given order."""

    def normal(values: NDArray[np.float32], inside: NDArray[Any]) -> NDArray[np.float32]:
        out = []
        for channel in values:
            new = rule.numbers(Moments.of(channel[inside] if rule.masked else channel))(channel)
            out.append(np.where(inside, new, 0) if rule.masked else new)
        return np.stack(out).astype(np.float32)

    plan = resampling(mask.shape, spacing, target)
    if first:
        return resample(normal(data, mask), plan)
    smooth = resampling(mask.shape, spacing, target, order=1)
    return normal(resample(data, plan), resample(mask[None].astype(np.float32), smooth)[0] >= 0.5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("spacing", "target"),
    [
        ((1.0, 0.8, 0.8), (1.5, 1.5, 1.5)),
        ((5.0, 1.0, 1.0), (3.0, 0.8, 0.8)),
        ((1.0, 1.0, 1.0), (4.0, 0.9, 0.9)),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ],
)
def test_the_grid_is_nnunets_preprocessing(spacing: Any, target: Any, masked: bool, first: bool) -> None:
    pixels = scan(2)
    source = open_source(pixels, axes="zyxc", mpp=[1000 * s for s in spacing])
    rule = IntensityRule("zscore", masked=masked)
    view = view_of(source, ViewRules(tuple(1000 * t for t in target), crop=True, rules=(rule,), first=first))
    data = np.moveaxis(pixels[view.crop.slices()], -1, 0).astype(np.float32)
    wanted = reference(data, rules_of.foreground(data), spacing, target, rule, first)
    grid = VolumeGrid(source, view)
    assert grid.dtype == np.float32
    whole = grid.read(Region((0, 0, 0), grid.shape)).pixels
    assert np.moveaxis(whole, -1, 0) == pytest.approx(wanted, abs=5e-6)
    window = Region((2, 3, 4), (5, 6, 7))
    assert np.array_equal(grid.read(window).pixels, whole[window.slices()])


def test_large_windows_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(scan()[..., 0], axes="zyx", mpp=1000.0)
    grid = VolumeGrid(source, view_of(source, ViewRules((1300.0, 700.0, 2100.0))))
    whole = grid.read(Region((0, 0, 0), grid.shape)).pixels
    monkeypatch.setattr("wsitk.sources.volume_grid._PIECE_VALUES", 20_000)
    assert np.array_equal(grid.read(Region((0, 0, 0), grid.shape)).pixels, whole)


def test_beyond_the_volume_lies_what_the_model_wants() -> None:
    source = open_source(scan()[..., 0] + 100, axes="zyx", mpp=1000.0)
    view = view_of(source, ViewRules(None, rules=(IntensityRule("zscore"),)))
    region = Region((-2, -1, 0), (6, 5, 4))
    padded = VolumeGrid(source, view).read(region).pixels
    inside = VolumeGrid(source, view, border="clip").read(region).pixels
    assert inside.shape == (4, 4, 4, 1)
    assert np.array_equal(padded[2:, 1:], inside)
    assert not padded[:2].any()  # zero in normalised units, as nnU-Net pads
    assert not padded[:, :1].any()


def test_the_box_is_the_smallest_around_what_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((9, 8, 7), np.uint8)
    pixels[2, 3, 6], pixels[5, 1, 2] = 1, 1
    monkeypatch.setattr("wsitk.sources.view._SLAB_PIXELS", 50)  # slab by slab
    source = open_source(pixels, axes="zyx", mpp=1000.0)
    assert foreground_of(source) == Region((2, 1, 2), (4, 3, 5))
    with pytest.raises(SourceError, match="WSI114"):
        foreground_of(open_source(pixels * 0, axes="zyx", mpp=1000.0))


def test_what_cannot_be_meant_is_refused() -> None:
    source = open_source(np.ones((4, 4, 4), np.float32), axes="zyx", mpp=19_000.0)
    with pytest.raises(SpacingError, match="WSI205"):
        view_of(source, ViewRules((10.0, 10.0, 10.0)))
    broken = np.ones((4, 4, 4), np.float32)
    broken[1, 1, 1] = np.nan
    with pytest.raises(SourceError, match=r"WSI114 .*finite"):
        view_of(
            open_source(broken, axes="zyx", mpp=1000.0), ViewRules(None, rules=(IntensityRule("zscore"),))
        )
