"""How one input is got at: through the reading process, or here where the caller holds it open."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from wsitk.reading.client import ReaderProcess
from wsitk.reading.server import TileImage
from wsitk.sources import Origin
from wsitk.sources.base import Source

__all__ = ["Access"]


@dataclass(frozen=True)
class Access:
    """An input and the process that opens it; an open source stays where it is."""

    origin: Origin
    reader: ReaderProcess

    @property
    def here(self) -> bool:
        """Tell whether the input is an open source of this process."""
        return isinstance(self.origin, Source)

    def look(self, target: str, *arguments: Any) -> Any:
        """Return what ``module:function`` says of the input; raises what it raises."""
        if not self.here:
            return self.reader.call(target, self.origin, *arguments)
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(self.origin, *arguments)

    def tiles(self, *arguments: Any) -> TileImage:
        """Return the input on a model's grid; `arguments` are those of `wsitk.plan.tile_image`."""
        target = "wsitk.plan:tile_image"
        if self.here:
            image: TileImage = self.look(target, *arguments)
            return image
        return self.reader.image(target, self.origin, *arguments)
