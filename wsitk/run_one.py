"""`wsitk.run`: one model over one slide, image or array."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.anonymous import Veil
from wsitk.model import Model
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.registry import load_model
from wsitk.result import Result
from wsitk.settings import Settings
from wsitk.sources import open_source
from wsitk.sources.base import Source

__all__ = ["run"]


def run(
    model: Model | str | Path,
    source: Source | str | Path | NDArray[np.generic],
    *,
    out: str | Path,
    spacing: float | tuple[float, ...] | None = None,
    **settings: Any,
) -> Result:
    """Run `model` over one slide, image or array and return the result in `out`.

    A file is read, and a model given by name or path is run, in a process of its own; a model object and an
    array stay in this one. `spacing` (µm) is for arrays, and for files instead of what they state; `settings`
    are the fields of `wsitk.settings.Settings`. Running again continues where a killed run stopped. Raises
    the WsitkError that stopped the input.
    """
    hidden = bool(settings.get("anonymize")) and isinstance(source, str | Path)
    named = Veil(Settings(**settings), Path(out)).name(Path(str(source)).name) if hidden else None
    opened = open_source(source, mpp=spacing, name=named)
    with contextlib.nullcontext(opened) if opened is source else opened:
        reference = _reference(model, opened)
        runner = Runner(reference, Path(out), Settings(**settings))
        runner.run([Input(opened.name, opened)])
    if runner.errors:
        raise runner.errors[0]
    return Result(Path(out) / opened.name)


def _reference(model: Model | str | Path, source: Source) -> Model | ModelRef:
    """Return how to run a model over a source: by name where both can go to other processes."""
    if isinstance(model, Model):
        return model
    return ModelRef(str(model)) if source.ref is not None else load_model(model)
