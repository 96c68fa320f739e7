"""Predictions beside truth: figures with their intervals, warnings, and a picture of the worst."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsitk.evaluation.run import Evaluation as Evaluation
    from wsitk.evaluation.run import evaluate as evaluate
    from wsitk.evaluation.settings import Length as Length
    from wsitk.evaluation.settings import Options as Options

_HOMES = {
    "Evaluation": "wsitk.evaluation.run",
    "evaluate": "wsitk.evaluation.run",
    "Length": "wsitk.evaluation.settings",
    "Options": "wsitk.evaluation.settings",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line needs the settings only."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'wsitk.evaluation' has no attribute {name!r}")
