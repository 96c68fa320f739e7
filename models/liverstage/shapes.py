"""What fields are drawn with: blobs, smooth noise, spots, and planes of focus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Blob", "Box", "Floats", "blob", "box_at", "smooth_noise", "spots"]

Floats = NDArray[np.float32]
Box = tuple[tuple[slice, slice], tuple[slice, slice]]


@dataclass(frozen=True)
class Blob:
    """A closed shape in a square of its own, whose middle is the shape's.

    Attributes
    ----------
    rho
        Distance from the middle as a share of the outline's in that direction: inside, it is below 1.
    radius
        Of the circle of the same area, in pixels.
    """

    rho: Floats
    radius: float

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Return the exact mask."""
        return self.rho < 1

    def thickness(self, flatness: float) -> Floats:
        """Return how much of the body a pixel looks through: 1 in the middle, 0 outside.

        `flatness` 1 is a slab, 0 a ball; the rim is one pixel wide, as a detector's pixels make it.
        """
        rim = np.clip((1 - self.rho) * self.radius + 0.5, 0, 1)
        ball = np.sqrt(np.clip(1 - self.rho**2, 0, 1))
        found: Floats = (rim * ball ** (1 - flatness)).astype(np.float32)
        return found


def blob(rng: np.random.Generator, radius: float, *, stretch: float = 1.0, wobble: float = 0.0) -> Blob:
    """Return a shape of the area of a circle of `radius` pixels, `stretch` times as long as wide.

    Its outline departs from an ellipse by harmonics of orders 2 to 5, each of a standard deviation of `wobble`
    over its order.
    """
    reach = int(np.ceil(radius * np.sqrt(stretch) * (1 + 2 * wobble))) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    turn = rng.uniform(0, np.pi)
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.sqrt(stretch)
    across = (y * np.cos(turn) - x * np.sin(turn)) * np.sqrt(stretch)
    angle = np.arctan2(across, along)
    outline = np.full(angle.shape, radius, np.float32)
    for order in range(2, 6):
        outline *= 1 + wobble / order * rng.normal() * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    rho = np.hypot(along, across) / np.maximum(outline, 0.5)
    area = max(int((rho < 1).sum()), 1)
    return Blob((rho * np.sqrt(area / np.pi) / radius).astype(np.float32), radius)


def box_at(centre_yx: NDArray[np.float64], side: int, shape: tuple[int, int]) -> Box | None:
    """Return where a square of odd `side` about `centre_yx` meets an image of `shape`: there, and in the square."""
    start = np.round(centre_yx).astype(int) - side // 2
    low, high = np.maximum(start, 0), np.minimum(start + side, shape)
    if (high <= low).any():
        return None
    there = (slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1])))
    first, last = low - start, high - start
    return there, (slice(int(first[0]), int(last[0])), slice(int(first[1]), int(last[1])))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Floats:
    """Return normal noise without structure below `sigma` pixels, of mean 0 and deviation 1.

    Coarse noise is made small and enlarged: where it is smooth nothing is lost by that.
    """
    step = max(1, int(sigma / 2))
    small = tuple(-(-n // step) + 2 for n in shape)
    noise = ndimage.gaussian_filter(rng.normal(size=small).astype(np.float32), sigma / step, mode="wrap")
    noise = (noise - noise.mean()) / max(float(noise.std()), 1e-6)
    if step > 1:
        noise = ndimage.zoom(noise, step, order=1)
    found: Floats = noise[tuple(slice(n) for n in shape)].astype(np.float32)
    return found


def spots(
    rng: np.random.Generator, where: NDArray[np.bool_], count: int, sigma: float, spread: float = 0.4
) -> Floats:
    """Return `count` Gaussian spots with peaks near 1 at random pixels of `where`; log-normal brightness."""
    drawn = np.zeros(where.shape, np.float32)
    places = np.flatnonzero(where)
    if not places.size or not count:
        return drawn
    chosen = rng.choice(places, count)
    np.add.at(drawn.reshape(-1), chosen, np.exp(rng.normal(0, spread, count)).astype(np.float32))
    peak = max(2 * np.pi * sigma**2, 1.0)
    found: Floats = ndimage.gaussian_filter(drawn, sigma) * np.float32(peak)
    return found
