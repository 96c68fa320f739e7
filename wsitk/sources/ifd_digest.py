"""A hash over all headers of a TIFF: every IFD with its values, the places of its tiles among them.

Samples of a file's bytes miss what lies between them, and a re-written slide may keep its size. Its tile
tables hardly stay the same: each re-compressed tile has another length. Nothing here trusts a number in the
file: loops end, sizes are limits of reading, and no more than a chunk is held at once.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, final

__all__ = ["BUDGET_BYTES", "MAX_ENTRIES", "MAX_IFDS", "ifd_digest"]

BUDGET_BYTES = 256 << 20
MAX_IFDS = 4096
MAX_ENTRIES = 65_536

_CHUNK = 1 << 20
_SUB_IFDS = 330
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """How a TIFF writes numbers: byte order, and the sizes that BigTIFF doubled."""

    order: str
    big: bool

    @property
    def word(self) -> int:
        """Return the bytes of an offset."""
        return 8 if self.big else 4

    @property
    def count_bytes(self) -> int:
        return 8 if self.big else 2

    @property
    def entry(self) -> struct.Struct:
        """Return tag, type and count; the value or its offset follows."""
        return struct.Struct(self.order + ("HHQ" if self.big else "HHI"))

    @property
    def entry_bytes(self) -> int:
        return self.entry.size + self.word

    def numbers(self, data: bytes) -> list[int]:
        """Return offsets."""
        whole = len(data) // self.word
        return list(struct.unpack_from(f"{self.order}{whole}{'Q' if self.big else 'I'}", data))


def ifd_digest(path: str | os.PathLike[str]) -> str | None:
    """Return the sha256 over a TIFF's IFDs and their values; None if the file is no TIFF.

    At most 4096 IFDs, 65,536 entries and 256 MiB of values are read (a slide of 10¹¹ pixels has some 25
    MiB); what lies beyond is left to the samples of `file_identity`. Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        layout = _layout(file.read(8))
        return None if layout is None else _Walk(file, layout).digest()


def _layout(head: bytes) -> _Layout | None:
    for order, name in (("<", b"II"), (">", b"MM")):
        for big, magic in ((False, 42), (True, 43)):
            if head[:4] == name + struct.pack(order + "H", magic):
                return _Layout(order, big)
    return None


@final
class _Walk:
    """One pass over the headers of an open file."""

    def __init__(self, file: IO[bytes], layout: _Layout) -> None:
        self._file = file
        self._layout = layout
        self._size = file.seek(0, os.SEEK_END)
        self._hash = hashlib.sha256()
        self._left = BUDGET_BYTES
        self._entries_left = MAX_ENTRIES

    def digest(self) -> str:
        start = 8 if self._layout.big else 4
        waiting = self._layout.numbers(self._read(start, self._layout.word))
        seen: set[int] = set()
        while waiting and len(seen) < MAX_IFDS:
            offset = waiting.pop(0)
            if 0 < offset < self._size and offset not in seen:
                seen.add(offset)
                waiting += list(self._ifd(offset))[: MAX_IFDS - len(waiting)]
        return self._hash.hexdigest()

    def _ifd(self, offset: int) -> Iterator[int]:
        """Hash one IFD; yield where further ones lie."""
        layout = self._layout
        # entries that would lie beyond the end are not there, whatever the count says
        stated = int.from_bytes(
            self._read(offset, layout.count_bytes), "little" if layout.order == "<" else "big"
        )
        offset += layout.count_bytes
        count = min(stated, self._entries_left, max(0, self._size - offset) // layout.entry_bytes)
        self._entries_left -= count
        entries = self._read(offset, count * layout.entry_bytes)
        for place in range(0, len(entries) - layout.entry_bytes + 1, layout.entry_bytes):
            yield from self._value(entries[place : place + layout.entry_bytes])
        following = self._read(offset + count * layout.entry_bytes, layout.word)
        yield from layout.numbers(following)

    def _value(self, entry: bytes) -> Iterator[int]:
        """Hash the value that an entry points to; yield the IFDs that it names."""
        tag, kind, count = self._layout.entry.unpack_from(entry)
        nbytes = _TYPE_BYTES.get(kind, 0) * count
        field = entry[self._layout.entry.size :]
        if nbytes <= self._layout.word:  # the value itself, already hashed with the entry
            inside = field[:nbytes]
        else:
            place = self._layout.numbers(field)[0]
            inside = self._read(place, min(nbytes, 8 * MAX_IFDS) if tag == _SUB_IFDS else 0)
            self._digest_span(place + len(inside), nbytes - len(inside))
        if tag == _SUB_IFDS:
            yield from self._layout.numbers(inside)

    def _digest_span(self, offset: int, length: int) -> None:
        while length > 0:
            data = self._read(offset, min(length, _CHUNK))
            if not data:
                return
            offset += len(data)
            length -= len(data)

    def _read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, hashed, as far as it and the budget reach."""
        length = min(length, self._left, max(0, self._size - offset))
        if length <= 0:
            return b""
        self._file.seek(offset)
        data = self._file.read(length)
        self._left -= len(data)
        self._hash.update(data)
        return data
