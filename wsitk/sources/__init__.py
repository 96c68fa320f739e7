"""Opening inputs: an ordered table of readers, and one error that says what each of them said."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region, Spacing
from wsitk.sources.base import Level, Reading, Source, SourceRef
from wsitk.sources.spacing import require_spacing

__all__ = [
    "Level", "Origin", "Reading", "Region", "Source", "SourceRef", "Spacing",
    "borrowed", "open_source", "require_spacing",
]  # fmt: skip

Opener = Callable[..., Source]

Origin = Source | SourceRef
"""An open source, or how to open one."""


@contextmanager
def borrowed(origin: Origin) -> Iterator[Source]:
    """Open a source for a while; one that is open already is left open."""
    if isinstance(origin, Source):
        yield origin
        return
    with open_source(origin) as source:
        yield source


def _direct(path: str, **options: Any) -> Source:
    """Decode a tiled TIFF ourselves: several times as fast as OpenSlide."""
    from wsitk.sources.tiff import TiffSource

    return TiffSource(path, **options)


def _openslide(path: str, **options: Any) -> Source:
    """Read whatever OpenSlide reads."""
    from wsitk.sources.openslide import OpenSlideSource

    return OpenSlideSource(path, **options)


def _image(path: str, **options: Any) -> Source:
    """Read a plain image whole."""
    from wsitk.sources.image import ImageSource

    return ImageSource(path, **options)


OPENERS: dict[str, Opener] = {"tiff": _direct, "openslide": _openslide, "image": _image}


def open_source(
    source: Any,
    *,
    mpp: float | Sequence[float] | None = None,
    name: str | None = None,
    axes: Sequence[str] | None = None,
    reader: str | None = None,
) -> Source:
    """Return the source for a path, a `SourceRef` or an array (NumPy, dask, zarr).

    Parameters
    ----------
    mpp
        Micrometres per pixel, over whatever the file says: one number, or one per axis in array order.
    name
        What to call it; the file name unless given.
    axes
        For arrays: one letter for each dimension, such as ``yxc`` or ``zyx``.
    reader
        ``tiff``, ``openslide`` or ``image``: use this one only.

    Raises
    ------
    SourceError
        WSI100 if the system refuses the file; WSI101 if no reader takes it, with what each said; WSI102 if it
        is cut short; WSI140, WSI141 if it would need more memory than allowed. A missing pixel size is no
        error here: `spacing` is then None.
    """
    if isinstance(source, Source):
        if not (mpp is None and name is None and axes is None and reader is None):
            raise UsageError("WSI020", f"{source.name} is open already; give options when opening it")
        return source
    if isinstance(source, SourceRef):
        given = {k: v for k, v in {"mpp": mpp, "name": name, "reader": reader}.items() if v is not None}
        return open_source(source.path, **{**source.options, **given})
    if isinstance(source, str | os.PathLike):
        if axes is not None:
            raise UsageError("WSI020", "axes belong to arrays; a file states its own")
        return _open_path(Path(source), mpp, name, reader)
    if not hasattr(source, "shape") or not hasattr(source, "dtype"):
        raise UsageError("WSI020", f"cannot read from {type(source).__name__}; give a path or an array")
    from wsitk.sources.array import ArraySource

    return ArraySource(source, axes=axes, spacing=mpp, name=name)


def _open_path(
    path: Path, mpp: float | Sequence[float] | None, name: str | None, reader: str | None
) -> Source:
    """Try the readers in order; a refusal that no other reader could mend ends the search."""
    if reader is not None and reader not in OPENERS:
        raise UsageError("WSI022", f"no reader {reader!r}; there are {', '.join(OPENERS)}")
    said: list[SourceError] = []
    for key in [reader] if reader else OPENERS:
        try:
            return OPENERS[key](str(path), mpp=mpp, name=name)
        except SourceError as error:
            if error.code != "WSI101":
                raise
            said.append(error)
    title = name or path.name
    words = "; ".join(e.message.removeprefix(f"{title}: ") for e in said)
    raise SourceError("WSI101", f"{title}: no reader takes it: {words}") from said[-1]
