"""Which windows a mask needs, on a lattice that belongs to the image and not to the region that is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lattice"]

_FLOOR = 1e-3


@dataclass(frozen=True)
class Lattice:
    """Windows of `size` pixels whose first pixels lie at multiples of ``size - overlap`` in the image.

    A window answers for its middle only: the outermost `rim` pixels, an eighth of the overlap, weigh next to nothing,
    since the network knows least there. From there weights rise in a line to 1.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(
                f"overlap {self.overlap} of windows of {self.size}; wanted 0 .. {self.size // 2}"
            )

    @property
    def stride(self) -> int:
        return self.size - self.overlap

    @property
    def rim(self) -> int:
        return self.overlap // 8

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """Return a window's weights, (size, size)."""
        place = np.arange(self.size)
        depth = np.minimum(place, self.size - 1 - place) - self.rim + 0.5
        # never zero: beyond an image's border a rim may be all that looks at a pixel
        axis = (depth / max(1, self.overlap - 2 * self.rim)).clip(_FLOOR, 1)
        return np.asarray(np.multiply.outer(axis, axis), np.float32)

    def windows(self, mask: NDArray[np.bool_], start_yx: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the first pixels (y, x), relative to the mask's own, of windows that answer for a masked pixel.

        In raster order; they may reach beyond the mask, whose first pixel lies at `start_yx` in the image.
        """
        columns = list(self._places(start_yx[1], mask.shape[1]))
        return [
            (y, x)
            for y in self._places(start_yx[0], mask.shape[0])
            for x in columns
            if mask[self._middle(y), self._middle(x)].any()
        ]

    def groups(self, windows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Return windows that share pixels, one way or another, together; groups and windows in raster order."""
        left = dict.fromkeys(windows)
        reach = (-self.stride, 0, self.stride) if self.overlap else (0,)
        found = []
        while left:
            group, ahead = [], [next(iter(left))]
            del left[ahead[0]]
            while ahead:
                y, x = ahead.pop()
                group.append((y, x))
                near = [(y + dy, x + dx) for dy in reach for dx in reach if (y + dy, x + dx) in left]
                for place in near:
                    del left[place]
                ahead += near
            found.append(sorted(group))
        return found

    def _places(self, start: int, length: int) -> Iterator[int]:
        """Yield where windows begin along an axis, relative to `start`, that reach into `length` pixels."""
        first = floor((start - self.size) / self.stride) + 1
        last = ceil((start + length) / self.stride) - 1
        yield from (k * self.stride - start for k in range(first, last + 1))

    def _middle(self, start: int) -> slice:
        return slice(max(0, start + self.rim), max(0, start + self.size - self.rim))
