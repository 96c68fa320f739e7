"""From an input's name and path to its plan, made where the input can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import final

from wsitk.blocks import BlockTask
from wsitk.errors import UsageError
from wsitk.model import ModelSpec
from wsitk.plan import Plan
from wsitk.reading.access import Access
from wsitk.reading.client import ReaderProcess
from wsitk.reading.server import TileImage
from wsitk.settings import Settings
from wsitk.sources.base import Source, SourceRef
from wsitk.sources.channel_choice import choose_channels

__all__ = ["Input", "Planner", "reference_to"]


@dataclass(frozen=True)
class Input:
    """One thing to work on: its name below the output folder, and a path or an open source.

    `also` are files of the same patient in the same position, which become further channels of a volume; `restored`
    is the folder of a restoration that is laid over the image.
    """

    name: str
    source: str | Source
    also: tuple[str, ...] = ()
    restored: str = ""


def reference_to(item: Input, mpp: Mapping[str, float] | float | None) -> SourceRef:
    """Return how any process opens an input that is a file; `mpp` is the pixel size of all inputs, or by name."""
    stated = mpp.get(item.name) if isinstance(mpp, Mapping) else mpp
    options = {
        "mpp": stated,
        "name": PurePosixPath(item.name).name,
        "also": item.also or None,
        "restored": item.restored or None,
    }
    return SourceRef(str(item.source), {k: v for k, v in options.items() if v is not None})


@final
@dataclass(frozen=True)
class Planner:
    """Plans inputs for one model; `spec` is resolved, `device` the kind that it runs on.

    `mpp` is the pixel size of all inputs, or by name. Sources without a file are kept as they are given, and
    refused unless the model runs `here`, in this process.
    """

    spec: ModelSpec
    settings: Settings
    device: str
    reader: ReaderProcess
    mpp: Mapping[str, float] | float | None = None
    here: bool = False
    _held: dict[str, Access] = field(default_factory=dict)

    def plan(self, item: Input) -> Plan:
        """Return the plan of an input; raises what stands against working on it."""
        _check_name(item.name)
        plan: Plan = self._way_to(item).look("wsitk.plan:plan_input", item.name, self.spec, self.settings)
        arithmetic = [self.device, self.settings.threads if self.device == "cpu" else 0]
        return replace(plan, key={**plan.key, "arithmetic": arithmetic})

    def access(self, ref: SourceRef) -> Access:
        """Return the way to an input that has been planned."""
        return self._held.get(ref.path) or Access(ref, self.reader)

    def tiles(self, task: BlockTask) -> TileImage:
        """Return a planned input on the model's grid."""
        return self.access(task.source).tiles(self.spec, task.view)

    def _way_to(self, item: Input) -> Access:
        if not isinstance(item.source, Source):
            return Access(self._chosen(reference_to(item, self.mpp)), self.reader)
        if item.source.ref is not None:
            return Access(self._chosen(item.source.ref), self.reader)
        if not self.here:
            raise UsageError(
                "WSI025",
                f"{item.name} is not a file, so the model must run here: give the model, not its name",
            )
        source = choose_channels(item.source, self.settings.channels, self.spec.channel_names)
        return self._held.setdefault(f"memory:{item.name}", Access(source, self.reader))

    def _chosen(self, ref: SourceRef) -> SourceRef:
        """Return how to open an input with the channels that the user asks for, or else the model."""
        asked = {"channels": self.settings.channels, "wanted": self.spec.channel_names}
        return SourceRef(ref.path, {**ref.options, **{k: v for k, v in asked.items() if v}})


def _check_name(name: str) -> None:
    """Refuse a name that would write outside of its own folder below the output (UsageError WSI015)."""
    parts = PurePosixPath(name).parts
    taken = name in ("run.json", "summary.csv", "index.html") or ".wsitk" in parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or taken:
        raise UsageError(
            "WSI015", f"an input cannot be called {name!r}: its results would have no folder of their own"
        )
