"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Kind", "factor"]

Kind = Literal["constant", "exponential", "cosine"]


def factor(
    kind: Kind, step: int, *, steps: int, epoch_steps: int, warmup: float, gamma: float, floor: float
) -> float:
    """Return what the learning rate of step `step` (from 0) is multiplied by.

    Linear warm-up over the share `warmup` of all `steps`, then ``exponential``: `gamma` to the power of whole
    epochs done (warm-up's included, as in CellViT's recipe), ``cosine``: half a cosine from 1 to `floor`, or 1.
    """
    ramp = round(warmup * steps)
    if step < ramp:
        return (step + 1) / (ramp + 1)
    if kind == "exponential":
        return float(gamma ** (step // epoch_steps))
    if kind == "cosine":
        done = min(1.0, (step - ramp) / max(1, steps - 1 - ramp))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
