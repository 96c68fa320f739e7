"""What the OME-XML of a TIFF says: images, their channels and planes, and the wells of a plate.

Parsed without entities: a document type, which nobody writes and which can explode, makes it no OME-XML.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from xml.etree import ElementTree

from wsitk.errors import SourceError
from wsitk.geometry import Spacing
from wsitk.sources.spacing import parse_number

__all__ = ["OmeChannel", "OmeDocument", "OmeImage", "OmeWell", "first_description", "parse_ome"]

MAX_DESCRIPTION = 64 << 20
"""Bytes of XML that are looked at: a plate of 1,536 wells and nine fields needs some ten MiB."""

_UNIT_UM = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6, "in": 25_400.0}
_DESCRIPTION = 270
_TYPE_BYTES = {1: 1, 2: 1, 7: 1, 129: 1}  # bytes of a text, however it is declared

Element = ElementTree.Element


@dataclass(frozen=True, slots=True)
class OmeChannel:
    """A channel: its name, empty if the file gives none, and the samples that a pixel has of it."""

    name: str
    samples: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Planes in a row: the first one's page and place (c, z, t), how many, and in which other file if so."""

    page: int
    first: tuple[int, int, int]
    count: int
    elsewhere: str


@dataclass(frozen=True, slots=True)
class OmeImage:
    """One image (series): `shape` (y, x), `planes` along c, z and t, and the order in which they are stored."""

    id: str
    name: str
    shape: tuple[int, int]
    planes: tuple[int, int, int]
    order: str
    channels: tuple[OmeChannel, ...]
    spacing: Spacing | None
    runs: tuple[_Run, ...]

    def pages(self, file_name: str, limit: int) -> tuple[int, ...]:
        """Return the page of each channel's plane (z and t are 1), of `limit` that the file has.

        Raises SourceError: WSI172 if planes lie in other files or are missing.
        """
        found: dict[int, int] = {}
        for run in self.runs:
            if run.elsewhere:
                raise SourceError(
                    "WSI172",
                    f"{file_name}: planes of {self.name or self.id} lie in another file, {run.elsewhere}; save it "
                    "as one file that holds its own planes",
                )
            # a count is only a claim: there are no more planes than channels
            for k in range(min(run.count, self.planes[0] - run.first[0], limit)):
                found[run.first[0] + k] = run.page + k
        wanted = range(min(self.planes[0], limit + 1))
        missing = [c for c in wanted if not 0 <= found.get(c, -1) < limit]
        if missing:
            raise SourceError(
                "WSI172",
                f"{file_name}: channel {missing[0]} of {self.name or self.id} has no page among the file's {limit}; "
                "write the file again",
            )
        return tuple(found[c] for c in wanted)


@dataclass(frozen=True, slots=True)
class OmeWell:
    """One field of a well: row and column from 0, its number among the well's fields, and the image's id."""

    plate: int
    row: int
    column: int
    number: int
    image: str


@dataclass(frozen=True, slots=True)
class OmeDocument:
    """The images in their order, and the fields of all wells that have an image."""

    images: tuple[OmeImage, ...]
    wells: tuple[OmeWell, ...]


def first_description(path: str) -> str:
    """Return the ImageDescription of a TIFF's first page, at most 64 MiB; empty if there is none.

    Nothing is decoded and nothing in the file believed. Raises OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        kind = struct.unpack(order + "H", head[2:4])[0] if order and len(head) == 16 else 0
        if kind not in (42, 43):
            return ""
        word, count, entry, at = ("I", "H", "HHI", 4) if kind == 42 else ("Q", "Q", "HHQ", 8)
        layout, offset = struct.Struct(order + entry), struct.Struct(order + word)
        file.seek(min(offset.unpack_from(head, at)[0], 1 << 62))
        stated = file.read(struct.calcsize("=" + count))
        number = int.from_bytes(stated, "little" if order == "<" else "big")
        size = layout.size + offset.size
        entries = file.read(min(number, 4096) * size)
        for place in range(0, len(entries) - size + 1, size):
            tag, form, length = layout.unpack_from(entries, place)
            length *= _TYPE_BYTES.get(form, 0)
            if tag != _DESCRIPTION or not length:
                continue
            text = entries[place + layout.size : place + size][:length]
            if length > offset.size:
                file.seek(min(offset.unpack_from(entries, place + layout.size)[0], 1 << 62))
                text = file.read(min(length, MAX_DESCRIPTION))
            return text.rstrip(b"\0").decode("utf-8", "replace")
    return ""


@lru_cache(maxsize=2)  # every well of a plate brings the same megabytes
def parse_ome(text: str | None, file_name: str = "") -> OmeDocument | None:
    """Return what an OME-XML document says; None if it is none, or is broken.

    `file_name` is the TIFF's: planes that the document places in a file of another name lie elsewhere.
    """
    if (
        not text
        or "<OME" not in text.replace("<ome:OME", "<OME")
        or "<!DOCTYPE" in text
        or "<!ENTITY" in text
    ):
        return None
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    uuid = root.get("UUID", "")
    images = tuple(
        _image(e, pixels, uuid, file_name)
        for e in _children(root, "Image")
        for pixels in _children(e, "Pixels")
    )
    return OmeDocument(images, tuple(_wells(root)))


def _whole(text: str | None, default: int) -> int:
    """Return a whole number, `default` for what is none: writers differ, and each image counts by itself."""
    try:
        return int(text) if text is not None else default
    except ValueError:
        return default


def _children(element: Element, tag: str) -> Iterator[Element]:
    """Yield the children of a name, whatever their namespace."""
    return (e for e in element if e.tag.rpartition("}")[2] == tag)


def _image(element: Element, pixels: Element, uuid: str, file_name: str) -> OmeImage:
    """Read an Image and its Pixels."""
    sizes = {axis: max(1, _whole(pixels.get(f"Size{axis}"), 1)) for axis in "XYCZT"}
    channels = tuple(
        OmeChannel((e.get("Name") or "").strip(), max(1, _whole(e.get("SamplesPerPixel"), 1)))
        for e in _children(pixels, "Channel")
    )
    deep = channels and sum(c.samples for c in channels) == sizes["C"]
    count = len(channels) if deep else sizes["C"]  # planes: a colour's samples share one
    order = pixels.get("DimensionOrder", "XYCZT")
    planes = (count, sizes["Z"], sizes["T"])
    return OmeImage(
        element.get("ID", ""),
        (element.get("Name") or "").strip(),
        (sizes["Y"], sizes["X"]),
        planes,
        order,
        channels if deep else (),
        _spacing(pixels),
        tuple(_run(e, math.prod(planes), uuid, file_name) for e in _children(pixels, "TiffData")),
    )


def _run(element: Element, every: int, uuid: str, file_name: str) -> _Run:
    """Read a TiffData; a UUID other than the document's own is another file's, unless the names agree."""
    page = element.get("IFD")
    count = _whole(element.get("PlaneCount"), every if page is None else 1)
    first = (_whole(element.get(f"First{axis}"), 0) for axis in "CZT")
    elsewhere = ""
    for other in _children(element, "UUID"):
        named = PurePosixPath(other.get("FileName", "").replace("\\", "/")).name
        if (other.text or "").strip() != uuid and named != file_name:
            elsewhere = named or "unnamed"
    c, z, t = first
    return _Run(_whole(page, 0), (c, z, t), max(0, count), elsewhere)


def _spacing(pixels: Element) -> Spacing | None:
    """Return PhysicalSizeY and X in micrometres; one of them stands for both."""
    size = {a: pixels.get(f"PhysicalSize{a}") for a in "XY"}
    if size["X"] is None and size["Y"] is None:
        return None
    values = []
    for axis, other in (("Y", "X"), ("X", "Y")):
        told = axis if size[axis] is not None else other
        unit = pixels.get(f"PhysicalSize{told}Unit", "µm").replace("\u03bc", "µ")
        values.append(parse_number(size[told]) * _UNIT_UM.get(unit, math.nan))
    return Spacing(tuple(values), "OME PhysicalSizeX")


def _wells(root: Element) -> Iterator[OmeWell]:
    """Yield the fields of every well that refer to an image; of fields without an index the order counts."""
    for plate, element in enumerate(_children(root, "Plate")):
        for well in _children(element, "Well"):
            row, column = _whole(well.get("Row"), 0), _whole(well.get("Column"), 0)
            samples = [
                (_whole(e.get("Index"), k), ref.get("ID", ""))
                for k, e in enumerate(_children(well, "WellSample"))
                for ref in _children(e, "ImageRef")
            ]
            for number, (_, image) in enumerate(sorted(samples), start=1):
                yield OmeWell(plate, row, column, number, image)
