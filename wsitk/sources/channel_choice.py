"""Which channels of an input a model sees, and in which order: by name, by number, or as the model asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.sources.base import Reading, Source, SourceRef
from wsitk.sources.files import reopen

__all__ = ["ChosenChannels", "Names", "choose_channels", "parse_channels"]

Names = str | Sequence[str | int]
"""Channels as a person gives them: ``"DAPI,HSP70"``, or names and numbers one by one."""


def parse_channels(given: Names | None) -> tuple[str | int, ...]:
    """Return the channels asked for; none for None and for what is empty.

    Raises UsageError (WSI085) for an empty name, or one that is there twice.
    """
    if given is None or len(given) == 0:
        return ()
    parts = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
    asked: tuple[str | int, ...] = tuple(parts)
    odd = [a for a in asked if asked.count(a) > 1 or str(a).strip() == ""]
    if odd:
        fault = f"{odd[0]!r} twice" if str(odd[0]).strip() else "an empty name"
        raise UsageError(
            "WSI085", f"--channels wants names or numbers such as DAPI,HSP70 or 2,0; got {fault} in {given!r}"
        )
    return asked


def choose_channels(source: Source, asked: Names | None = None, wanted: Sequence[str] = ()) -> Source:
    """Return `source` with the channels `asked` for, in that order; without any, with those `wanted`.

    Names are compared without regard to case; a whole number that is nobody's name is a position, from 0.
    What is `wanted` is taken if the source names all of it; otherwise the channels stay as they are stored,
    with a warning (WSI174). Raises SourceError (WSI171) for a channel that is not there.
    """
    names = source.channel_names or ("c0",)
    chosen = parse_channels(asked)
    if chosen:
        return ChosenChannels(source, [_position(source.name, names, each) for each in chosen])
    if not wanted:
        return source
    lower = [name.casefold() for name in names]
    if all(lower.count(each.casefold()) == 1 for each in wanted):
        picks = [lower.index(each.casefold()) for each in wanted]
        return source if picks == list(range(len(names))) else ChosenChannels(source, picks)
    text = (
        f"WSI174 {source.name}: the model wants channels {', '.join(wanted)}; this file names "
        f"{', '.join(names)}: taken in the order stored"
    )
    return ChosenChannels(source, range(len(names)), warnings=(text,), named=False)


def _position(title: str, names: Sequence[str], asked: str | int) -> int:
    """Return the position of one channel."""
    word = str(asked)
    exact = [k for k, name in enumerate(names) if name == word]
    loose = [k for k, name in enumerate(names) if name.casefold() == word.casefold()]
    found = exact or loose
    if isinstance(asked, int) or (not found and word.isdecimal()):
        found = [int(asked)] if 0 <= int(asked) < len(names) else []
    if len(found) == 1:
        return found[0]
    fault = f"{len(found)} channels called {word!r}; give its number" if found else f"no channel {word!r}"
    listed = ", ".join(f"{k} {name}" for k, name in enumerate(names))
    raise SourceError("WSI171", f"{title}: has {fault}; there are {listed}")


@final
class ChosenChannels(Source):
    """Some channels of a source, in the order of `picks`, read without the others where the file allows it.

    `named` says that the choice is part of the input's identity. The source is closed with this one.
    """

    def __init__(
        self, source: Source, picks: Sequence[int], *, warnings: tuple[str, ...] = (), named: bool = True
    ) -> None:
        self._source = source
        self._picks = tuple(picks)
        self._named = named
        names = source.channel_names or ("c0",)
        self.name = source.name
        self.axes = source.axes if "c" in source.axes else (*source.axes, "c")
        self.levels = source.levels
        self.dtype = source.dtype
        self.channel_names = tuple(names[k] for k in self._picks)
        self.spacing, self.spacing_error = source.spacing, source.spacing_error
        self.bounds = source.bounds
        self.frame = source.frame
        self.warnings = (*source.warnings, *warnings)
        ref = source.ref
        self.ref = SourceRef(ref.path, {**ref.options, "channels": self._picks}) if ref else None

    def read_inside(self, region: Region, level: int) -> Reading:
        """Return the chosen channels of a region."""
        return self._source.read_channels(region, level, self._picks)

    def read_channels(self, region: Region, level: int, channels: Sequence[int]) -> Reading:
        """Return some of the chosen channels; see `Source`."""
        return self._source.read_channels(region, level, [self._picks[k] for k in channels])

    def __reduce__(self) -> tuple[Any, tuple[SourceRef]]:
        """Pickle as a reference; the file is opened again where it arrives."""
        if self.ref is None:
            raise TypeError("channels of a source without a file cannot be pickled")
        return reopen, (self.ref,)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the source, and which of its channels these are."""
        inner = self._source.identity()
        return (
            {**inner, "channels": list(self.channel_names), "picks": list(self._picks)}
            if self._named
            else inner
        )

    def stamp(self) -> dict[str, Any] | None:
        """Return size and times of the input's files."""
        return self._source.stamp()

    def close(self) -> None:
        """Close the source."""
        self._source.close()
