"""Artifacts: masks hold what was marked wherever one looks, detectors find what was painted, clean tissue is clean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsitk.artifacts import KINDS, ArtifactDetector, ArtifactMask, find_artifacts
from wsitk.artifacts.planes import Planes, measure
from wsitk.artifacts.synthetic import paint
from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources.array import ArraySource
from wsitk.sources.base import Reading

Mask = NDArray[np.bool_]


def tissue(side: int = 1000, seed: int = 0) -> NDArray[np.uint8]:
    """Return pink tissue with sharp dark nuclei of 8 µm, at 1 µm per pixel, and glass around it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 243, np.uint8)
    margin = side // 10
    inner = (slice(margin, side - margin),) * 2
    pink = np.array([225, 165, 200]) + rng.integers(-12, 13, (side, side, 1))
    pixels[inner] = pink[inner]
    y, x = np.mgrid[-4:5, -4:5]
    disk = y**2 + x**2 <= 16
    for cy, cx in rng.integers(margin + 8, side - margin - 8, (side**2 // 600, 2)):
        pixels[cy - 4 : cy + 5, cx - 4 : cx + 5][disk] = (90, 60, 130)
    return pixels


def source(pixels: NDArray[np.uint8], um: float = 1.0) -> ArraySource:
    return ArraySource(pixels, axes="yxc", spacing=um)


# --- masks -------------------------------------------------------------------------------------------


def slow_over(mask: ArtifactMask, region: Region, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return `codes_over`, pixel by pixel, by the areas that pixels share."""
    out = np.zeros(shape, np.uint8)
    step = [n / s for n, s in zip(region.shape, shape, strict=True)]
    for row in range(shape[0]):
        for column in range(shape[1]):
            for (y, x), code in np.ndenumerate(mask.codes):
                shared = 1.0
                for k, (own, cell) in enumerate(((row, y), (column, x))):
                    low = max(region.start[k] + own * step[k], mask.corner[k] + cell * mask.scale[k])
                    high = min(
                        region.start[k] + (own + 1) * step[k], mask.corner[k] + (cell + 1) * mask.scale[k]
                    )
                    shared *= max(0.0, high - low)
                out[row, column] |= code if shared > 1e-5 else 0
    return out


@given(st.data())
def test_over_marks_every_pixel_that_shares_area(data: st.DataObject) -> None:
    side = st.integers(1, 6)
    codes = data.draw(
        st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=4, max_size=4), min_size=1, max_size=5)
    )
    scale = st.sampled_from([0.5, 1.0, 2.5, 4.0, 7.0])
    corner = st.sampled_from([-3.0, 0.0, 5.5])
    mask = ArtifactMask(
        ("fold", "pen"),
        np.array(codes, np.uint8),
        (data.draw(scale), data.draw(scale)),
        (data.draw(corner), data.draw(corner)),
    )
    region = Region(tuple(data.draw(st.integers(-6, 20)) for _ in "yx"), tuple(data.draw(side) for _ in "yx"))
    shape = (data.draw(side), data.draw(side))
    assert np.array_equal(mask.codes_over(region, shape), slow_over(mask, region, shape))
    assert mask.any(region) == slow_over(mask, region, (1, 1)).any()


def test_kinds_are_kept_apart_and_may_overlap() -> None:
    fold, pen = np.eye(4, dtype=bool), np.ones((4, 4), bool)
    mask = ArtifactMask.of_kinds({"fold": fold, "pen": pen}, (8.0, 8.0), um=(0.5, 0.5))
    assert np.array_equal(mask.of("fold"), fold)
    assert np.array_equal(mask.of("pen"), pen)
    assert mask.any(Region((0, 8), (8, 8)), ("pen",))
    assert not mask.any(Region((0, 8), (8, 8)), ("fold",))
    assert mask.area_um2("fold") == 4 * 16
    assert mask.area_um2() == mask.area_um2("pen") == 16 * 16
    with pytest.raises(UsageError, match="WSI660"):
        mask.of("blur")


def test_areas_want_a_pixel_size() -> None:
    with pytest.raises(UsageError, match="WSI661"):
        ArtifactMask(("pen",), np.ones((2, 2), np.uint8), (1.0, 1.0)).area_um2()


# --- painting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_painting_changes_nothing_outside_its_mask(kind: str) -> None:
    pixels = tissue(400)
    for seed in range(3):
        done = paint(pixels, kind, 1.0, seed=seed)
        assert np.array_equal(done.pixels[~done.mask], pixels[~done.mask])
        changed = (done.pixels != pixels).any(-1)
        assert changed[done.mask].mean() > 0.7
        assert 0 < done.mask.mean() < 0.6
    again = paint(pixels, kind, 1.0, seed=2)
    assert np.array_equal(again.pixels, done.pixels)
    assert np.array_equal(again.mask, done.mask)


def test_a_size_is_in_micrometres() -> None:
    for um in (0.5, 1.0):
        mask = paint(tissue(800), "bubble", um, seed=1, size_um=100).mask
        assert mask.sum() * um**2 == pytest.approx(np.pi * 50**2, rel=0.1)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="WSI660"):
        paint(tissue(100), "hair", 1.0)


# --- finding -----------------------------------------------------------------------------------------


def overlap(found: Mask, truth: Mask) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize(
    ("kind", "size_um", "least"),
    [
        ("fold", 80, 0.5),
        ("bubble", 300, 0.85),
        ("blur", 400, 0.75),
        ("pen", 500, 0.8),
        ("dust", 50, 0.6),
        ("coverslip", 60, 0.5),
    ],
)
def test_what_was_painted_is_found(kind: str, size_um: float, least: float) -> None:
    clean = tissue()
    done = paint(clean, kind, 1.0, seed=4, size_um=size_um)
    truth = done.mask.reshape(125, 8, 125, 8).mean((1, 3)) >= 0.5
    if kind in ("fold", "blur"):  # bare glass neither folds nor blurs
        truth &= clean.min(-1).reshape(125, 8, 125, 8).mean((1, 3)) < 225
    mask = find_artifacts(source(done.pixels))
    assert mask.kinds == KINDS
    assert overlap(mask.of(kind), truth) > least


def test_clean_tissue_is_clean() -> None:
    mask = find_artifacts(source(tissue()))
    assert {k: mask.area_um2(k) for k in mask.kinds} == dict.fromkeys(KINDS, 0.0)


@pytest.mark.parametrize("value", [255, 243, 128, 0])
def test_a_slide_of_one_colour_is_survived(value: int) -> None:
    mask = find_artifacts(source(np.full((300, 500, 3), value, np.uint8)))
    assert mask.codes.shape == (38, 63)


def test_tiny_slides_are_survived() -> None:
    for shape in ((1, 1), (3, 40), (40, 3)):
        assert find_artifacts(source(np.zeros((*shape, 3), np.uint8))).codes.ndim == 2


def test_windows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    done = paint(tissue(seed=3), "blur", 1.0, seed=1)
    whole = measure(source(done.pixels))
    monkeypatch.setattr("wsitk.artifacts.planes._WINDOW", 136)
    parts = measure(source(done.pixels))
    for name in ("rgb", "fine", "coarse", "darkest"):
        assert np.allclose(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-3), name


def test_the_grid_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.artifacts.planes.MAX_PIXELS", 1000)
    mask = find_artifacts(source(tissue()))
    assert mask.codes.size <= 1000
    assert mask.scale[0] > 30
    assert mask.codes.shape[0] * mask.scale[0] >= 1000


def test_coarse_slides_are_searched_for_what_they_show() -> None:
    coarse = source(tissue(300), um=8.0)
    assert find_artifacts(coarse).kinds == ("fold", "bubble", "pen", "coverslip")
    with pytest.raises(UsageError, match=r"WSI662.*blur"):
        find_artifacts(coarse, ("pen", "blur"))


class Broken(ArraySource):
    """A slide whose right half can't be decoded."""

    def read_inside(self, region: Region, level: int) -> Reading:
        if region.stop[1] > 1100:
            raise SourceError("WSI111", "broken")
        return super().read_inside(region, level)


def test_what_cannot_be_read_is_not_searched() -> None:
    black = np.zeros((1000, 2000, 3), np.uint8)
    mask = find_artifacts(Broken(black, axes="yxc", spacing=1.0), ("pen",))
    assert "WSI665" in mask.warnings[0]
    assert not mask.of("pen")[:, 128:].any()


def test_other_detectors_fit_in() -> None:
    class Everything(ArtifactDetector):
        name = "everything"
        kinds = ("pen", "fold")

        def find(self, planes: Planes, kinds: tuple[str, ...]) -> dict[str, Mask]:
            return {kind: np.ones(planes.shape, bool) for kind in kinds}

    mask = find_artifacts(source(tissue(200)), detector=Everything())
    assert mask.kinds == ("pen", "fold")
    assert mask.of("pen").all()
    with pytest.raises(UsageError, match="WSI663"):
        find_artifacts(source(tissue(200)), detector="oracle")


def test_only_brightfield_slides_are_searched() -> None:
    with pytest.raises(UsageError, match="WSI664"):
        find_artifacts(ArraySource(np.zeros((64, 64), np.uint8), axes="yx", spacing=1.0))
    with pytest.raises(SourceError, match="WSI201"):
        find_artifacts(ArraySource(np.zeros((64, 64, 3), np.uint8), axes="yxc"))


# --- real pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stem", "least"),
    [
        ("pen", "histoqc_pen/1k_version/pen_red", 0.75),
        ("pen", "histoqc_pen/1k_version/pen_green", 0.7),
        ("pen", "histoqc_pen/1k_version/pen_black", 0.9),
        ("coverslip", "histoqc_models/coverslip_edge_he/coverslip_edge", 0.7),
    ],
)
def test_real_pen_and_coverslip(data: Path, kind: str, stem: str, least: float) -> None:
    from PIL import Image

    base = data / "data" / "artifacts" / stem
    pixels = np.asarray(Image.open(f"{base}.png").convert("RGB"))
    truth = np.asarray(Image.open(f"{base}_mask.png").convert("L")) > 0
    found = find_artifacts(source(pixels, um=20.0), (kind,)).of(kind)
    assert overlap(found, truth) > least


@pytest.mark.slow
def test_a_clean_real_slide_is_nearly_clean(data: Path) -> None:
    from wsitk import open_source

    with open_source(data / "data" / "wsi" / "TCGA-DU-6399-01A-01-TS1.svs") as slide:
        mask = find_artifacts(slide)
    assert mask.area_um2() < 2_000
