"""The loop of `resample`."""

from __future__ import annotations

from typing import Any

from wsitk.compiled import compiled

__all__ = ["add_up"]


@compiled
def add_up(source: Any, first: Any, weights: Any, out: Any) -> None:
    """Add to `out` (o, k, c) the `weights` (k, j) times `source` (o, first[k] + j, c), j in rising order."""
    outer, length, inner = source.shape
    for o in range(outer):
        for k in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                i = first[k] + j
                weight = weights[k, j]
                if weight == 0 or i >= length:
                    continue
                for c in range(inner):
                    out[o, k, c] += weight * source[o, i, c]
