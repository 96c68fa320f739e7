"""Boxes and pixel sizes in n dimensions: integers and micrometres, nothing else.

All coordinates are in array order (slowest axis first: ``(y, x)`` or ``(z, y, x)``). A pixel ``i``
covers the half-open interval ``[i, i + 1)``, so that a scale factor maps edges to edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

__all__ = ["Region", "Spacing"]


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A half-open box ``[start, start + shape)`` of whole pixels; may reach below zero."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.shape):
            raise ValueError(f"start {self.start} and shape {self.shape} differ in length")
        if any(n < 0 for n in self.shape):
            raise ValueError(f"shape must not be negative, got {self.shape}")

    @classmethod
    def between(cls, start: Iterable[int], stop: Iterable[int]) -> Region:
        """Return the box from `start` to `stop`; empty along an axis where stop <= start."""
        first = tuple(int(a) for a in start)
        return cls(first, tuple(max(0, int(b) - a) for a, b in zip(first, stop, strict=True)))

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.start)

    @property
    def stop(self) -> tuple[int, ...]:
        """Return the first coordinate beyond the box along each axis."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Return the number of pixels."""
        return prod(self.shape)

    def slices(self, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
        """Return the box as slices of an array whose first pixel lies at `origin` (default 0)."""
        base = origin or (0,) * self.ndim
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, base, strict=True))

    def intersect(self, other: Region) -> Region:
        """Return the common box; empty (a zero in `shape`) if there is none."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        return Region.between(start, (min(a, b) for a, b in zip(self.stop, other.stop, strict=True)))

    def grow(self, margin: tuple[int, ...]) -> Region:
        """Return the box with `margin` pixels more (or fewer, if negative) on both sides of each axis."""
        return Region.between(
            (a - m for a, m in zip(self.start, margin, strict=True)),
            (b + m for b, m in zip(self.stop, margin, strict=True)),
        )

    def contains(self, other: Region) -> bool:
        """Tell whether `other` lies wholly inside."""
        return self.intersect(other) == other

    def has_point(self, point: Iterable[float]) -> bool:
        """Tell whether a (continuous) point lies in the half-open box."""
        return all(a <= p < b for a, p, b in zip(self.start, point, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class Spacing:
    """Pixel size in micrometres along each spatial axis, and where that knowledge came from.

    `provenance` names the field or option that said so, e.g. ``openslide.mpp-x`` or ``--mpp``.
    """

    um: tuple[float, ...]
    provenance: str

    @property
    def mean(self) -> float:
        """Return the geometric mean over the axes, in micrometres."""
        return float(prod(self.um) ** (1.0 / len(self.um)))
