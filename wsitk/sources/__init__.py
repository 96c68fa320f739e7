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
from wsitk.sources.channel_choice import Names, choose_channels, parse_channels
from wsitk.sources.files import refuse_special
from wsitk.sources.plate import split_path
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


def _planes(path: str, **options: Any) -> Source:
    """Read the channels of a fluorescence TIFF, and the wells of plates."""
    from wsitk.sources.planes import PlanesSource

    return PlanesSource(path, **options)


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


def _nifti(path: str, **options: Any) -> Source:
    """Read a volume from NIfTI."""
    from wsitk.sources.nifti import NiftiSource

    return NiftiSource(path, **options)


def _nrrd(path: str, **options: Any) -> Source:
    """Read a volume from NRRD."""
    from wsitk.sources.nrrd import NrrdSource

    return NrrdSource(path, **options)


def _dicom(path: str, **options: Any) -> Source:
    """Read a volume from the slices of a DICOM series."""
    from wsitk.sources.dicom_series import DicomSeriesSource

    return DicomSeriesSource(path, **options)


def _x_ray(path: str, **options: Any) -> Source:
    """Read a radiograph from DICOM."""
    from wsitk.sources.xray import XRaySource

    return XRaySource(path, **options)


# Volumes and radiographs are tried first: they know their files by the first bytes, and a folder of slices,
# and OpenSlide need not meet DICOM that is no slide.
_BY_FIRST_BYTES = ("planes", "nifti", "nrrd", "dicom", "xray")
OPENERS: dict[str, Opener] = {
    "nifti": _nifti, "nrrd": _nrrd, "dicom": _dicom, "xray": _x_ray,
    "planes": _planes, "tiff": _direct, "openslide": _openslide, "image": _image,
}  # fmt: skip


def open_source(
    source: Any,
    *,
    mpp: float | Sequence[float] | None = None,
    name: str | None = None,
    axes: Sequence[str] | None = None,
    reader: str | None = None,
    also: Sequence[str | os.PathLike[str]] = (),
    channels: Names | None = None,
    wanted: Sequence[str] = (),
    restored: str | os.PathLike[str] | None = None,
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
        ``nifti``, ``nrrd``, ``dicom``, ``xray``, ``planes``, ``tiff``, ``openslide`` or ``image``: use this one
        only.
    also
        For volumes: files of the same patient in the same position (PET beside CT, further MR sequences).
        They become further channels, interpolated on the grid of `source`.
    channels
        Which channels, in which order: ``"DAPI,HSP70"``, or a list of names and positions. Given, the pages of
        a TIFF that does not say what they are count as channels.
    wanted
        Names of the channels that a model is made for: taken if the file names all of them.
    restored
        A folder with the results of a restoration, which are laid over the image.

    Raises
    ------
    SourceError
        WSI100 if the system refuses the file; WSI101 if no reader takes it, with what each said; WSI102 if it
        is cut short; WSI140, WSI141 if it would need more memory than allowed; WSI170 if it is a plate and no
        well was named (``plate.ome.tiff#A01``); WSI171 for a channel that it doesn't have. A missing pixel
        size is no error here: `spacing` is then None.
    """
    asked = parse_channels(channels)
    if isinstance(source, Source):
        if not (mpp is None and name is None and axes is None and reader is None and not also and not asked):
            raise UsageError("WSI020", f"{source.name} is open already; give options when opening it")
        return source
    if isinstance(source, SourceRef):
        options = {
            "mpp": mpp,
            "name": name,
            "reader": reader,
            "also": also,
            "channels": asked,
            "wanted": wanted,
            "restored": restored,
        }
        given = {k: v for k, v in options.items() if v is not None and v != ()}
        return open_source(source.path, **{**source.options, **given})
    opened = _open(source, mpp, name, axes, reader, also, stacked=bool(asked))
    try:
        return _laid_over(choose_channels(opened, asked, wanted), restored)
    except BaseException:
        opened.close()
        raise


def _laid_over(source: Source, restored: str | os.PathLike[str] | None) -> Source:
    """Return a source with restored pixels in the place of its own, if there are any."""
    if restored is None:
        return source
    from wsitk.sources.restored import RestoredSource

    return RestoredSource(source, os.fspath(restored))


def _open(
    source: Any,
    mpp: float | Sequence[float] | None,
    name: str | None,
    axes: Sequence[str] | None,
    reader: str | None,
    also: Sequence[str | os.PathLike[str]],
    *,
    stacked: bool,
) -> Source:
    """Return the source for a path or an array, with all of its channels."""
    if isinstance(source, str | os.PathLike):
        if axes is not None:
            raise UsageError("WSI020", "axes belong to arrays; a file states its own")
        if also:
            from wsitk.sources.channels import open_channels

            return open_channels(os.fspath(source), also, mpp=mpp, name=name, reader=reader)
        return _open_path(Path(source), mpp, name, reader, stacked=stacked)
    if not hasattr(source, "shape") or not hasattr(source, "dtype"):
        raise UsageError("WSI020", f"cannot read from {type(source).__name__}; give a path or an array")
    if also:
        raise UsageError("WSI020", "also belongs to files; stack arrays along an axis c")
    from wsitk.sources.array import ArraySource

    return ArraySource(source, axes=axes, spacing=mpp, name=name)


def _open_path(
    path: Path,
    mpp: float | Sequence[float] | None,
    name: str | None,
    reader: str | None,
    *,
    stacked: bool = False,
) -> Source:
    """Try the readers in order; a refusal that no other reader could mend ends the search."""
    if reader is not None and reader not in OPENERS:
        raise UsageError("WSI022", f"no reader {reader!r}; there are {', '.join(OPENERS)}")
    refuse_special(path, name or path.name)
    said: dict[str, SourceError] = {}
    if split_path(str(path))[1]:  # one image of many: other readers would look for a file of that name
        reader = "planes"
    usual = ["dicom", "tiff"] if path.is_dir() else list(OPENERS)  # the latter has the system's words for it
    for key in [reader] if reader else usual:
        more = {"stacked": stacked} if key == "planes" else {}
        try:
            return OPENERS[key](str(path), mpp=mpp, name=name, **more)
        except SourceError as error:
            if error.code != "WSI101":
                raise
            said[key] = error
    title = name or path.name
    ordered = sorted(said, key=lambda key: key in _BY_FIRST_BYTES)  # who looked closest speaks first
    words = "; ".join(dict.fromkeys(said[key].message.removeprefix(f"{title}: ") for key in ordered))
    raise SourceError("WSI101", f"{title}: no reader takes it: {words}") from said[ordered[-1]]
