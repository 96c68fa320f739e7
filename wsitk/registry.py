"""From a model's name, folder or checkpoint file to a model. The engine's only upward look-up, and lazy.

Built-ins come from the table in `wsitk.models`; others announce themselves through the entry-point group
``wsitk.models``, whose names map to a builder taking keyword options and returning a `TileModel` or a
`RegionModel`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from wsitk.errors import ModelError, UsageError, WsitkError
from wsitk.model import Model

__all__ = ["load_model", "model_names"]

Builder = Callable[..., Model]


def _table() -> dict[str, str]:
    """Return name -> ``module:builder``; a name claimed twice is an error (WSI305)."""
    built_in: dict[str, str] = importlib.import_module("wsitk.models").BUILTIN
    table = dict(built_in)
    for point in entry_points(group="wsitk.models"):
        if table.get(point.name, point.value) != point.value:
            raise ModelError(
                "WSI305", f"two models are called {point.name!r}: {table[point.name]} and {point.value}"
            )
        table[point.name] = point.value
    return table


def model_names() -> tuple[str, ...]:
    """Return the names that `load_model` knows, without importing any model."""
    return tuple(sorted(_table()))


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_model(name: str | Path, **options: Any) -> Model:
    """Return the model called `name`, read from the checkpoint or folder `name`, or built by ``module:function``.

    Raises UsageError (WSI030) for an unknown name, ModelError for a file that is no model.
    """
    table = _table()
    if str(name) in table:
        return _build(_resolve(table[str(name)]), str(name), options)
    path = Path(name)
    if path.is_file() or path.is_dir():
        return _from_path(path, options)
    if re.fullmatch(r"[\w.]+:\w+", str(name)):
        return _build(_builder(str(name)), str(name), options)
    known = ", ".join(sorted(table))
    raise UsageError(
        "WSI030", f"no model is called {str(name)!r}, and no such file or folder exists; known: {known}"
    )


def _builder(target: str) -> Builder:
    """Return a function of the user's own; raises UsageError (WSI030) if there is none."""
    try:
        build: Builder = _resolve(target)
    except (ImportError, AttributeError) as error:
        raise UsageError("WSI030", f"no model {target!r}: {error}; check module and function") from error
    return build


def _build(build: Builder, name: str, options: dict[str, Any]) -> Model:
    """Call a builder; an option that it doesn't take is the user's mistake (UsageError WSI031)."""
    taken = inspect.signature(build).parameters
    odd = [n for n in options if n not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values())]
    if odd:
        raise UsageError("WSI031", f"model {name!r} takes no option {', '.join(odd)}; leave it out")
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        if not options or isinstance(error, WsitkError):
            raise
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(
            "WSI031", f"model {name!r} can't be built with {told}: {error}; mend the options"
        ) from error


def _from_path(path: Path, options: dict[str, Any]) -> Model:
    """Read a checkpoint file or a model's folder by whatever knows it by its content."""
    table = importlib.import_module("wsitk.models")
    choose = _resolve(table.FOLDER_READER if path.is_dir() else table.CHECKPOINT_READER)
    return _build(partial(choose(path), path), path.name, options)
