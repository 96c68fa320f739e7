"""The pixel size of an input: who says so, whether it can be true, and what to do if it cannot.

Candidates come in the order of a ladder, the most trusted first. The first one that is stated is judged;
magnification is never turned into a pixel size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from wsitk.errors import SpacingError
from wsitk.geometry import Spacing
from wsitk.sources.base import Source

__all__ = ["SLIDE_RANGE_UM", "VOLUME_RANGE_UM", "explicit", "judge", "parse_number", "require_spacing"]

SLIDE_RANGE_UM = (0.05, 20.0)
VOLUME_RANGE_UM = (1.0, 20_000.0)
MAX_ANISOTROPY = 0.02

# A pixel size that is stated but is no number (``"0,25 um"``) is as absurd as one of 250 µm.
UNREADABLE = math.nan


def parse_number(text: object) -> float:
    """Return the number that a text field states, NaN if it is none; a decimal comma is read as a point."""
    cleaned = str(text).strip()
    if re.fullmatch(r"\d+,\d+", cleaned):
        cleaned = cleaned.replace(",", ".")
    try:
        return float(cleaned)
    except ValueError:
        return UNREADABLE


def explicit(mpp: float | Sequence[float] | None, ndim: int) -> list[Spacing]:
    """Return what the caller gave as the first rung of the ladder; one number stands for all axes."""
    if mpp is None:
        return []
    values = tuple(float(v) for v in np.atleast_1d(mpp))
    return [Spacing(values * ndim if len(values) == 1 else values, "--mpp")]


def judge(
    name: str,
    candidates: Iterable[Spacing],
    looked_at: Sequence[str],
    ndim: int = 2,
    *,
    range_um: tuple[float, float] | None = None,
) -> tuple[Spacing | None, str]:
    """Return the first candidate if it can be true, or None and the one-line reason (WSI201, WSI202).

    For images of two dimensions the size must lie within 0.05 to 20 µm and its axes agree within 2 %; for
    volumes it must lie within 1 µm to 20 mm. `range_um` replaces these limits: a radiograph is flat, and has
    a volume's pixels.
    """
    stated = next(iter(candidates), None)
    if stated is None:
        where = ", ".join(looked_at) or "the caller's arguments"
        return None, f"WSI201 {name}: no pixel size found (looked at {where}); give it, e.g. --mpp 0.25"
    limits = range_um or (SLIDE_RANGE_UM if ndim <= 2 else VOLUME_RANGE_UM)
    fault = _fault(stated.um, ndim, limits)
    if not fault:
        return stated, ""
    values = " x ".join(f"{v:.6g}" for v in stated.um)
    return None, (
        f"WSI202 {name}: {stated.provenance} says {values} µm per pixel, {fault}; "
        "give the true size, e.g. --mpp 0.25"
    )


def _fault(um: tuple[float, ...], ndim: int, limits: tuple[float, float]) -> str:
    """Return what is wrong with a pixel size; empty if nothing is."""
    if len(um) != ndim:
        return f"{len(um)} numbers for {ndim} axes"
    low, high = limits
    if not all(low <= v <= high for v in um):  # False for NaN too
        return f"which is not within {low:g} to {high:g}"
    if ndim == 2 and max(um) / min(um) - 1.0 >= MAX_ANISOTROPY:
        return f"whose axes differ by {max(um) / min(um) - 1.0:.1%} (limit {MAX_ANISOTROPY:.0%})"
    return ""


def require_spacing(source: Source) -> Spacing:
    """Return the pixel size of `source`; raises SpacingError (WSI201, WSI202) where it has none."""
    if source.spacing is not None:
        return source.spacing
    code, _, message = source.spacing_error.partition(" ")
    raise SpacingError(code or "WSI201", message or f"{source.name}: no pixel size; give --mpp 0.25")
