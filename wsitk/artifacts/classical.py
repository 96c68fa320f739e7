"""The classical detector: for each kind a rule of optics or of shape, with few numbers in it.

All rules look at the planes of a slide. Optical density is measured over the slide's own glass, and what is
dense, sharp or dark over the slide's own tissue, since stains and scanners differ more than artifacts do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import pi
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from wsitk.artifacts.detector import ArtifactDetector
from wsitk.artifacts.mask import KINDS
from wsitk.artifacts.planes import Planes
from wsitk.artifacts.shapes import Pieces, along_lines, closed, filled, grown, held, opened, smooth, thinner
from wsitk.tissue import THRESHOLD_RANGE

__all__ = ["ClassicalDetector"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]


@final
@dataclass(frozen=True)
class _View:
    """A slide's planes, and what several rules derive from them."""

    planes: Planes

    @property
    def um(self) -> float:
        """Return the pixel size in micrometres."""
        return self.planes.um

    @cached_property
    def density(self) -> NDArray[np.float32]:
        """Return the optical density over glass, (y, x, 3); glass is the brightest common colour."""
        rgb = self.planes.rgb
        glass = np.maximum(np.percentile(rgb[self.planes.seen][:, :3], 95, axis=0), 200.0)
        table = np.log10(glass[None] / np.arange(1, 257)[:, None].clip(1)).clip(0).astype(np.float32)
        return np.stack([table[rgb[..., c], c] for c in range(3)], axis=-1)

    @cached_property
    def tissue(self) -> Mask:
        """Return where something absorbs light."""
        return np.asarray(smooth(self.density.max(-1), 1.0) > THRESHOLD_RANGE[1], np.bool_)

    @cached_property
    def pen(self) -> Mask:
        """Return the ink, which other rules leave alone."""
        return _pen(self)

    @cached_property
    def coverslip(self) -> Mask:
        """Return the coverslip's edge, which is no fold."""
        return _coverslip(self)


@final
class ClassicalDetector(ArtifactDetector):
    """Rules for all kinds; see the functions below for what each takes for its own."""

    name: ClassVar[str] = "classical"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    limits_um: ClassVar[Mapping[str, float]] = {"blur": 1.25, "dust": 1.25, "fold": 10.0}

    def find(self, planes: Planes, kinds: Sequence[str]) -> Mapping[str, Mask]:
        """Return a boolean array of the planes' shape for each of `kinds`."""
        if not planes.seen.any():
            return {kind: np.zeros(planes.shape, np.bool_) for kind in kinds}
        view = _View(planes)
        return {kind: _RULES[kind](view) for kind in kinds}


def _pen(v: _View) -> Mask:
    """Ink has a colour that no mixture of haematoxylin and eosin has, or none at all, over a broad stroke.

    Both stains absorb green most. Green and blue ink absorb red most; red ink absorbs blue nearly as much
    as green, and far more than a layer of red cells does; black ink all three. A stroke begins where that is
    beyond doubt and ends where it fades.
    """
    red, green, blue = (smooth(v.density[..., c], 1.0) for c in range(3))
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    cold = np.maximum(red - 1.25 * green, np.where(red > 0.4, 1.2 * (red - 1.05 * green) - 0.06, 0))
    scarlet = np.minimum(blue - 0.55 * green, 0.5 * green - red)
    grey = (low > 0.2) & (high - low < 0.35 * high)
    broad = opened(closed(grey & (low > 0.4), 30 / v.um), 180 / v.um)
    strong = (cold > 0.15) | ((scarlet > 0.1) & (green > 0.5)) | broad
    weak = (cold > 0.04) | ((scarlet > 0.03) & (green > 0.2)) | grown(broad, 90 / v.um) & grey | broad
    pieces = Pieces.of(closed(held(weak, strong), 16 / v.um), v.um)
    return pieces.keep(pieces.area_um2 > 20_000)


def _coverslip(v: _View) -> Mask:
    """A long thin line that absorbs all colours alike, darker than what lies on its two sides."""
    ridges = [thinner(smooth(v.density[..., c], 0.7), 500 / v.um) for c in range(3)]
    low, high = np.minimum.reduce(ridges), np.maximum.reduce(ridges)
    weak = (low > 0.12) & (low > 0.75 * high) & ~v.pen
    pieces = Pieces.of(held(weak, low > 0.25), v.um)
    long = (pieces.length_um > 900) & (pieces.width_um < 500) & (pieces.length_um > 6 * pieces.width_um)
    return np.asarray(grown(pieces.keep(long), 8 / v.um) & (low > 0.05), np.bool_)


def _fold(v: _View) -> Mask:
    """A band whose density exceeds that of the tissue around it in every colour.

    Crowded nuclei are denser in red and green, hardly in blue; two layers of tissue are so in all three.
    """
    clean = v.tissue & ~v.pen & ~v.coverslip
    weight = clean.astype(np.float32)
    near = smooth(weight, 200 / v.um) + 1e-3
    excess = np.full(v.planes.shape, 1.0, np.float32)
    for c in range(3):
        own = smooth(v.density[..., c], 4 / v.um)
        around = smooth(np.minimum(v.density[..., c], 1.0) * weight, 200 / v.um) / near
        np.minimum(excess, np.log((own + 0.01) / (around + 0.01)), out=excess)
    level = along_lines(excess.clip(-1, None), 150 / v.um, 20 / v.um)
    usable = clean & (v.density.max(-1) > 0.15)
    pieces = Pieces.of(held((level > 0.15) & usable, (level > 0.25) & usable), v.um)
    band = (pieces.length_um > 300) & (pieces.width_um < 200) & (pieces.length_um > 5 * pieces.width_um)
    return pieces.keep(band)


def _bubble(v: _View) -> Mask:
    """A closed dark rim, round, darker than what lies inside and outside of it."""
    import cv2

    rim = thinner(v.density.min(-1), 100 / v.um) > 0.1

    def is_round(outline: Array) -> bool:
        area, length = cv2.contourArea(outline), cv2.arcLength(outline, True)
        return pi * 40**2 < area * v.um**2 < pi * 3000**2 and 4 * pi * area > 0.65 * length**2

    return grown(filled(rim, is_round), 8 / v.um)


def _blur(v: _View) -> Mask:
    """Tissue whose detail of 1 to 2 µm is weak for what it has of 2 to 4 µm.

    The ratio of the two says how sharp the image is, whatever is in it: defocus takes the finer away first.
    """
    inside = smooth(v.tissue.astype(np.float32), 8 / v.um) > 0.9
    if not inside.any():
        return inside
    # logarithms: a sharp nucleus next to a blurred region must not outshine all of it
    fine, coarse = (smooth(p, 4 / v.um) + 0.02 for p in (v.planes.fine, v.planes.coarse))
    share = smooth(inside.astype(np.float32), 24 / v.um) + 1e-3
    ratio = smooth(np.log(fine / coarse) * inside, 24 / v.um) / share
    usual = float(np.median(ratio[inside]))
    soft = inside & ~v.pen & (ratio < max(usual - 0.6, -2.0))
    pieces = Pieces.of(opened(soft, 24 / v.um), v.um)
    return grown(pieces.keep(pieces.area_um2 > 10_000), 8 / v.um) & v.tissue


def _dust(v: _View) -> Mask:
    """A small spot that lets no colour through, darker than the darkest nuclei of the slide."""
    darkest = v.planes.darkest
    nuclei = float(np.percentile(darkest[v.tissue], 1)) if v.tissue.any() else 255.0
    limit = np.clip(0.7 * nuclei, 40, 110)
    around = smooth(darkest.astype(np.float32), 40 / v.um)
    spot = (darkest < 1.3 * limit) & (darkest < 0.6 * around) & ~v.pen
    pieces = Pieces.of(held(spot, darkest < limit), v.um)
    return pieces.keep((pieces.area_um2 < 60_000) & (pieces.length_um < 500))


_RULES: dict[str, Callable[[_View], Mask]] = {
    "fold": _fold,
    "bubble": _bubble,
    "blur": _blur,
    "pen": lambda view: view.pen,
    "dust": _dust,
    "coverslip": lambda view: view.coverslip,
}
