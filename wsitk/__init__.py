"""wsitk: whole-slide pathology through one n-dimensional tile engine. Research use only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsitk.geometry import Region as Region
    from wsitk.geometry import Spacing as Spacing
    from wsitk.grid import Tile as Tile
    from wsitk.grid import TileGrid as TileGrid
    from wsitk.registry import load_model as load_model
    from wsitk.result import Result as Result
    from wsitk.run_one import run as run
    from wsitk.sources import open_source as open_source

__version__ = "0.1.0"

_HOMES = {
    "Region": "wsitk.geometry",
    "Spacing": "wsitk.geometry",
    "Tile": "wsitk.grid",
    "TileGrid": "wsitk.grid",
    "open_source": "wsitk.sources",
    "load_model": "wsitk.registry",
    "run": "wsitk.run_one",
    "Result": "wsitk.result",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import wsitk` stays light."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'wsitk' has no attribute {name!r}")
