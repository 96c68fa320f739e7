"""From what a person types to the inputs of a run."""

from __future__ import annotations

from pathlib import Path

__all__ = ["companions"]


def companions(path: Path) -> list[Path]:
    """Return every file that a slide consists of, itself included."""
    return [path]
