"""Which cases a training learns from, and which it is judged on: by names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["split"]


def split(names: Sequence[str], parts: int, part: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return which cases to learn from and which are held out: an order by hash, cut into `parts`.

    Only a name and `seed` decide on which place of the order a case is.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode()).digest())
    held_out = sorted(order[part::parts])
    return sorted({*order} - {*held_out}), held_out
