"""The one way in which wsitk compiles a loop: numba, without the GIL, cached between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Return `function` compiled on its first call; the type checker keeps seeing its signature.

    No fast-math: the same additions in the same order wherever the loop runs. The machine code is cached
    beside the source, or in numba's user cache where that folder cannot be written.
    """
    return cast(F, numba.njit(cache=True, nogil=True)(function))
