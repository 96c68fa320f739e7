"""Artifacts painted over real tissue, with the exact mask of what was changed: for tests and for figures.

Each is a simple piece of optics. Ink and dirt absorb, so their density adds to the tissue's; a fold is tissue
twice; air under the glass refracts at its rim and throws what lies below out of focus. Pixels outside of the
mask are those that were given, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.artifacts.mask import KINDS, check_kinds

__all__ = ["Painted", "paint"]

WHITE = 243.0
"""Clear glass, in grey values."""

INKS = {
    "red": (0.10, 1.00, 0.80),
    "green": (0.95, 0.28, 0.40),
    "blue": (1.00, 0.60, 0.15),
    "black": (1.10, 1.10, 1.10),
}
"""Optical density of a full stroke in R, G and B."""

USUAL_UM = {"fold": 60.0, "bubble": 500.0, "blur": 800.0, "pen": 900.0, "dust": 50.0, "coverslip": 60.0}
"""Width of folds, strokes and edges; diameter of the others. Drawn from half to one and a half times this."""

Array = NDArray[Any]
Painter = Callable[["_Canvas"], tuple[Array, Array]]


@dataclass(frozen=True)
class Painted:
    """Pixels (y, x, 3) uint8 with an artifact, and where it lies: elsewhere nothing has changed."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def paint(
    pixels: NDArray[np.uint8], kind: str, um: float, *, seed: int = 0, size_um: float | None = None
) -> Painted:
    """Return `pixels` (y, x, 3) uint8 with one artifact of a kind; the same seed paints the same.

    `um` is the pixel size; `size_um` the width of a fold, stroke or edge, or the diameter of a bubble, a
    blurred patch or a speck. Without it the size is drawn, and at most a third of the shorter side. Raises
    UsageError (WSI660) for an unknown kind.
    """
    check_kinds((kind,), KINDS)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    usual = USUAL_UM[kind] * rng.uniform(0.5, 1.5)
    limit = min(pixels.shape[:2]) * um / 3
    canvas = _Canvas(pixels.astype(np.float32), um, min(usual, limit) if size_um is None else size_um, rng)
    density, weight = _PAINTERS[kind](canvas)
    painted = WHITE * 10.0 ** -density.clip(0)
    mixed = canvas.pixels + weight[..., None] * (painted - canvas.pixels)
    mask = weight > 0
    return Painted(np.where(mask[..., None], np.rint(mixed).clip(0, 255), pixels).astype(np.uint8), mask)


class _Canvas:
    """The pixels, their optical density, and what painters need to draw on them."""

    def __init__(self, pixels: Array, um: float, size_um: float, rng: np.random.Generator) -> None:
        self.pixels = pixels
        self.um = um
        self.size = size_um / um
        self.rng = rng
        self.shape = pixels.shape[0], pixels.shape[1]

    def density(self, pixels: Array | None = None) -> Array:
        """Return the optical density over glass, (y, x, 3)."""
        return np.log10(WHITE / np.maximum(self.pixels if pixels is None else pixels, 1.0)).clip(0)

    def blurred(self, pixels: Array, sigma_um: float) -> Array:
        """Return a Gaussian blur."""
        import cv2

        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), max(0.1, sigma_um / self.um)))

    def shifted(self, reach: float) -> Array:
        """Return the pixels moved by `reach` pixels in some direction; mirrored at the border."""
        import cv2

        angle = self.rng.uniform(0, 2 * np.pi)
        move = np.array([[1, 0, reach * np.cos(angle)], [0, 1, reach * np.sin(angle)]])
        size = self.shape[::-1]
        return np.asarray(cv2.warpAffine(self.pixels, move, size, borderMode=cv2.BORDER_REFLECT_101))

    def noise(self, grain_um: float) -> Array:
        """Return a smooth random field of mean 0 and standard deviation about 1, (y, x)."""
        import cv2

        grain = max(1.0, grain_um / self.um)
        coarse = [int(n / grain) + 4 for n in self.shape]
        field = self.rng.standard_normal(coarse).astype(np.float32)
        return np.asarray(cv2.resize(field, self.shape[::-1], interpolation=cv2.INTER_CUBIC))

    def from_curve(self, bend: float) -> Array:
        """Return the distance (y, x) in pixels from a curve that crosses the picture; `bend` 0 is straight."""
        import cv2

        height, width = self.shape
        angle = self.rng.uniform(0, np.pi)
        middle = np.array([width, height]) * self.rng.uniform(0.35, 0.65, 2)
        along = np.linspace(-1, 1, 200)[:, None] * np.hypot(height, width)
        sway = np.sin(along / np.hypot(height, width) * self.rng.uniform(3, 7) + self.rng.uniform(0, 6))
        line = middle + along * [np.cos(angle), np.sin(angle)]
        line = line + bend * min(height, width) * sway * [-np.sin(angle), np.cos(angle)]
        drawn = np.ones(self.shape, np.uint8)
        cv2.polylines(drawn, [np.rint(line).astype(np.int32)], False, 0, 1)
        return np.asarray(cv2.distanceTransform(drawn, cv2.DIST_L2, cv2.DIST_MASK_PRECISE))

    def from_centre(self, wobble: float) -> Array:
        """Return the distance (y, x) from a point inside, 1 at the border of a roundish blob."""
        height, width = self.shape
        radius = self.size / 2
        low, high = np.minimum(radius, np.array(self.shape) / 2), np.array(self.shape) - radius
        centre = self.rng.uniform(low, np.maximum(low, high))
        y, x = np.mgrid[:height, :width]
        dy, dx = y - centre[0], x - centre[1]
        angle = np.arctan2(dy, dx)
        phases = self.rng.uniform(0, 2 * np.pi, 3)
        border = 1 + wobble * sum(np.sin(n * angle + p) / n for n, p in zip((2, 3, 5), phases, strict=True))
        return np.asarray(np.hypot(dy, dx) / (radius * border))


def _inside(distance: Array, edge: float) -> Array:
    """Return a weight (y, x) that rises from 0 at distance 1 to 1 at distance `1 - edge`."""
    return ((1 - distance) / edge).clip(0, 1)


def _fold(c: _Canvas) -> tuple[Array, Array]:
    """Two layers of tissue, the upper one from nearby, a little out of focus, darker at the crease."""
    distance = c.from_curve(0.15) / (c.size / 2 * (1 + 0.2 * c.noise(150).clip(-2, 2)))
    upper = c.density(c.blurred(c.shifted(2 * c.size), 1.5))
    lower = c.density(c.blurred(c.pixels, 1.0))
    crease = 1 + 0.25 * np.exp(-(((distance - 0.9) / 0.15) ** 2))
    return (lower + c.rng.uniform(0.7, 1.0) * upper) * crease[..., None], _inside(distance, 0.1)


def _bubble(c: _Canvas) -> tuple[Array, Array]:
    """A dark rim with a bright line inside it; what lies below is pale and out of focus."""
    distance = c.from_centre(0.08)
    rim = max(0.05, 10.0 / (c.size * c.um))
    inner = c.density(c.blurred(c.pixels, 5.0)) * c.rng.uniform(0.35, 0.7)
    dark = c.rng.uniform(0.5, 1.0) * np.exp(-(((distance - 1 + rim) / (0.5 * rim)) ** 2))
    bright = 0.15 * np.exp(-(((distance - 1 + 3 * rim) / (0.7 * rim)) ** 2))
    return (inner - bright[..., None]).clip(0) + dark[..., None], _inside(distance, 0.3 * rim)


def _blur(c: _Canvas) -> tuple[Array, Array]:
    """A patch that lies out of focus."""
    return c.density(c.blurred(c.pixels, c.rng.uniform(2.5, 6.0))), _inside(c.from_centre(0.25), 0.1)


def _pen(c: _Canvas) -> tuple[Array, Array]:
    """A stroke of ink over the coverslip: tissue shows through, and the felt leaves streaks."""
    distance = c.from_curve(0.1) / (c.size / 2 * (1 + 0.1 * c.noise(300).clip(-2, 2)))
    ink = np.array(INKS[str(c.rng.choice(list(INKS)))]) * c.rng.uniform(0.6, 1.2)
    streaks = (0.8 + 0.2 * c.noise(40)).clip(0.3, 1.2)
    return c.density(c.blurred(c.pixels, 2.0)) + streaks[..., None] * ink, _inside(distance, 0.1)


def _dust(c: _Canvas) -> tuple[Array, Array]:
    """Some dark specks that lie above the plane of focus."""
    density, weight = c.density(), np.zeros(c.shape, np.float32)
    for _ in range(c.rng.integers(3, 9)):
        distance = c.from_centre(0.3)
        here = _inside(distance, 0.25)
        density = density + (c.rng.uniform(0.7, 1.5) * here)[..., None]
        weight = np.maximum(weight, here > 0)
    return density, weight


def _coverslip(c: _Canvas) -> tuple[Array, Array]:
    """A straight dark line with a bright one beside it."""
    distance = c.from_curve(0.0) / (c.size / 2)
    dark = c.rng.uniform(0.5, 1.0) * np.exp(-((distance / 0.5) ** 2))
    bright = 0.1 * np.exp(-(((distance - 0.8) / 0.1) ** 2))
    return (c.density() + (dark - bright)[..., None]).clip(0), _inside(distance, 0.1)


_PAINTERS: dict[str, Painter] = {
    "fold": _fold,
    "bubble": _bubble,
    "blur": _blur,
    "pen": _pen,
    "dust": _dust,
    "coverslip": _coverslip,
}
