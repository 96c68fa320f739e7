"""The few header fields that say which DICOM files make one input; no pixel and no patient's name is read."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SeriesFile", "read_header"]

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_STACKS = {  # CT, MR, PET and X-ray 3D, each as slices, as enhanced and as converted multi-frame files
    *("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "128.1", "130", "13.1.1", "13.1.2"),
}
_X_RAYS = {"1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "12.1", "12.2"}
_SECONDARY = "7"
_X_RAY_MODALITIES = {"CR", "DX", "DR", "MG", "IO", "PX", "RG", "XA", "RF"}
_IMPLICIT = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_UNDEFINED = 0xFFFFFFFF
_HEAD_BYTES = 1 << 20

_SOP_CLASS, _IMAGE_TYPE, _SERIES, _MODALITY = 0x00080016, 0x00080008, 0x0020000E, 0x00080060
_SYNTAX = 0x00020010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# Value representations with a 4-byte length behind two reserved bytes (PS3.5, 7.1.2).
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}


@dataclass(frozen=True, slots=True)
class SeriesFile:
    """What one file says of itself; strings are empty where it says nothing."""

    sop_class: str
    image_type: str
    series: str
    modality: str = ""

    @property
    def is_stack(self) -> bool:
        """Tell whether the file is a slice, or all slices, of a volume: CT, MR, PET."""
        return self.sop_class.removeprefix(_STORAGE) in _STACKS and bool(self.series)

    @property
    def is_x_ray(self) -> bool:
        """Tell whether the file is a radiograph, or a secondary capture that calls itself one."""
        kind = self.sop_class.removeprefix(_STORAGE)
        return kind in _X_RAYS or (kind == _SECONDARY and self.modality in _X_RAY_MODALITIES)

    @property
    def is_slide(self) -> bool:
        """Tell whether the file is part of a whole-slide image."""
        return self.sop_class == WSI_STORAGE and bool(self.series)

    @property
    def is_volume(self) -> bool:
        """Tell whether it holds the tissue itself, not a label, an overview or a thumbnail."""
        kind = self.image_type.split("\\")
        return len(kind) > 2 and kind[2] == "VOLUME"


def read_header(path: str | os.PathLike[str]) -> SeriesFile | None:
    """Return the fields of a DICOM file, None if it is none or its header is damaged or compressed.

    Raises OSError where the system refuses the file.
    """
    with open(path, "rb") as file:
        data = file.read(_HEAD_BYTES)
    if data[128:132] != b"DICM":
        return None
    found: dict[int, str] = {}
    try:
        for tag, value in _elements(data):
            if tag in (_SOP_CLASS, _IMAGE_TYPE, _SERIES, _MODALITY):
                found[tag] = value.decode("ascii", "replace").rstrip("\0 ")
    except (struct.error, ValueError, RecursionError):
        return None
    return SeriesFile(*(found.get(tag, "") for tag in (_SOP_CLASS, _IMAGE_TYPE, _SERIES, _MODALITY)))


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and value of the top-level elements up to the series' identifier."""
    at, order, implicit, syntax = 132, "<", False, ""
    while at + 8 <= len(data):
        in_meta = data[at : at + 2] == b"\x02\0"
        if not in_meta and syntax:  # the group behind the meta header follows the transfer syntax
            if syntax == _DEFLATED:
                raise ValueError("deflated")
            order, implicit = (">" if syntax == _BIG_ENDIAN else "<"), syntax == _IMPLICIT
            syntax = ""
        tag, length, start = _element(data, at, order, implicit)
        if tag > _SERIES:
            return
        if length == _UNDEFINED:
            at = _skip_items(data, start, order, implicit)
            continue
        value = data[start : start + length]
        at = start + length
        if tag == _SYNTAX:
            syntax = value.decode("ascii", "replace").rstrip("\0 ")
        yield tag, value


def _element(data: bytes, at: int, order: str, implicit: bool) -> tuple[int, int, int]:
    """Return tag, length and start of the value of the element at `at`."""
    group, number = struct.unpack_from(order + "HH", data, at)
    tag = group << 16 | number
    if implicit or group == 0xFFFE:
        return tag, struct.unpack_from(order + "I", data, at + 4)[0], at + 8
    if data[at + 4 : at + 6] in _LONG:
        return tag, struct.unpack_from(order + "I", data, at + 8)[0], at + 12
    return tag, struct.unpack_from(order + "H", data, at + 6)[0], at + 8


def _skip_items(data: bytes, at: int, order: str, implicit: bool) -> int:
    """Return the place behind a sequence of undefined length (PS3.5, 7.5.2)."""
    while True:
        tag, length, at = _element(data, at, order, implicit)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise ValueError("a sequence holds something other than items")
        if length != _UNDEFINED:
            at += length
            continue
        while True:
            tag, length, at = _element(data, at, order, implicit)
            if tag == _ITEM_END:
                break
            at = _skip_items(data, at, order, implicit) if length == _UNDEFINED else at + length
