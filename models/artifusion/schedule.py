"""Which times a chain has, how noisy each is, and in which order RePaint visits them. Plain numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["cosine_betas", "even_times", "jump_times", "linear_betas", "spaced_times"]

Times = NDArray[np.int64]


def linear_betas(steps: int) -> NDArray[np.float64]:
    """Return variances that grow in a line, as steep as 1e-4 .. 0.02 over 1000 steps (Ho et al. 2020, sec. 4)."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 2e-2, steps)


def cosine_betas(steps: int) -> NDArray[np.float64]:
    """Return variances whose signal falls as a squared cosine (Nichol and Dhariwal 2021, eq. 17)."""
    place = np.arange(steps + 1) / steps
    signal = np.cos((place + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - signal[1:] / signal[:-1], 0.999))


def spaced_times(steps: int, sections: Sequence[int]) -> Times:
    """Return the times of 0 .. steps - 1 that are kept: equal sections, and so many in each, ends included.

    Raises ValueError where a section is asked for more times than it has.
    """
    share, extra = divmod(steps, len(sections))
    kept: list[int] = []
    start = 0
    for k, count in enumerate(sections):
        length = share + (k < extra)
        if not 1 <= count <= length:
            raise ValueError(f"{count} times of a section of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # summed, not multiplied: rounding at one half falls as in the published schedules
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += length
    return np.array(sorted(set(kept)), np.int64)


def even_times(steps: int, count: int) -> Times:
    """Return `count` times at one whole stride from 0 on, as DDIM's paper spaces them.

    Raises ValueError where no whole stride gives that many.
    """
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return np.arange(0, steps, stride, dtype=np.int64)
    raise ValueError(f"no whole stride keeps {count} of {steps} times")


def jump_times(steps: int, length: int, visits: int) -> Times:
    """Return the times that RePaint visits (Lugmayr et al. 2022, sec. 4.2), ending at -1, the clean image.

    Wherever a multiple of `length` is reached, the chain goes up `length` steps and comes down again, until it
    has been there `visits` times. 1 goes straight down.
    """
    left = dict.fromkeys(range(0, steps - length, length), visits - 1)
    t, visited = steps, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            visited += range(t + 1, t + length + 1)
            t += length
    return np.array([*visited, -1], np.int64)
