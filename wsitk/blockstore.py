"""The blocks of one input that are done: arrays and a commit record each, every byte under a checksum.

    blocks/
      000012.npz    the block's arrays
      000012.json   its commit record: what happened, size and CRC-32 of the arrays, CRC-32 of itself

A block counts as done when its commit record exists: it is written last, after the data has reached the
disk. Both come into being by rename, so neither is ever half there under its own name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wsitk.durable import open_own, read_own, refuse_link, write_durably
from wsitk.errors import OutputError

__all__ = ["BlockStore", "DamagedBlockError"]

_OURS = re.compile(r"\d{6,}\.(npz|json)|\.\d{6,}\.(npz|json)(\.\d+)?\.part")
_CHUNK = 1 << 20


class DamagedBlockError(OutputError):
    """A committed block whose bytes have changed since (WSI517): `discard(error.block)` and do it again."""

    def __init__(self, block: int, message: str) -> None:
        super().__init__("WSI517", message)
        self.block = block

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Keep block and message when the error crosses a process border."""
        return type(self), (self.block, self.message)


@dataclass(frozen=True, slots=True)
class BlockStore:
    """The blocks kept for one input; `folder` is the input's folder.

    A value without lock or open file, so that a worker process can commit through it while its supervisor
    holds the journal. Whoever writes a block must hold the input or have claimed the block.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """Return where the blocks lie."""
        return self.folder / ".wsitk" / "blocks"

    def make(self) -> None:
        """Make the folder of the blocks; raises OutputError (WSI511) if it is a link."""
        refuse_link(self.path)
        self.path.mkdir(exist_ok=True)

    def commit(self, block: int, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Store a block's arrays, then its commit record."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        data = buffer.getbuffer()
        body = {**json.loads(json.dumps(record)), "bytes": len(data), "crc32": zlib.crc32(data)}
        full = {**body, "record_crc32": _crc_of(body)}
        # The process's number keeps an orphan of a killed run, not yet dead, from mixing into our file.
        mark = f".{os.getpid()}{secrets.randbits(40):013d}"  # two containers may share a number
        write_durably(self._data(block), data, mark=mark)
        write_durably(self._record(block), json.dumps(full, sort_keys=True).encode(), mark=mark)

    def committed(self, *, verify: bool = False) -> dict[int, dict[str, Any]]:
        """Return the commit records of the blocks that are done, by block.

        A block whose record or data is missing, cut short or unreadable is not done. With `verify` the
        data's checksums are looked at too, and damaged blocks are dropped: only for who holds the input.
        """
        records = {}
        for block in self.blocks():
            record = self.record(block)
            if record is not None and not (verify and not self.intact(block)):
                records[block] = record
            elif verify:
                self.discard(block)
        return records

    def blocks(self) -> list[int]:
        """Return the numbers of all blocks that have a commit record, whole or not, in order."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(
            int(n[:-5]) for n in names if n.endswith(".json") and _OURS.fullmatch(n) and n[0] != "."
        )

    def record(self, block: int) -> dict[str, Any] | None:
        """Return a block's commit record; None if it is not done (its data is not read)."""
        try:
            full = json.loads(read_own(self._record(block)))
            record = {k: v for k, v in full.items() if k != "record_crc32"}
            whole = full["record_crc32"] == _crc_of(record)
            size = os.stat(self._data(block), follow_symlinks=False).st_size
            return record if whole and size == record["bytes"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # cut short by a power failure, or not ours: to be done again

    def intact(self, block: int) -> bool:
        """Tell whether a block is committed and its data has the recorded checksum."""
        record = self.record(block)
        if record is None:
            return False
        with contextlib.suppress(FileNotFoundError), self._open(block) as file:
            return _crc_file(file) == int(record["crc32"])
        return False

    def load(self, block: int, prefix: str) -> dict[str, NDArray[Any]]:
        """Return those arrays of a committed block whose name begins with `prefix`, which is cut off.

        Raises DamagedBlockError (WSI517) if the bytes are not those that were committed.
        """
        record = self.record(block)
        if record is None:
            raise self._damaged(block, "its commit record or a part of its data is gone")
        with self._open(block) as file:
            # The names in a zip lie outside its own checksums: one flipped bit would hide an array.
            if _crc_file(file) != record["crc32"]:
                raise self._damaged(block, "its data has another checksum than when it was written")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                return {n.removeprefix(prefix): stored[n] for n in stored.files if n.startswith(prefix)}

    def size(self, block: int) -> int:
        """Return the bytes of a block's data; 0 if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._data(block), follow_symlinks=False).st_size
        return 0

    def discard(self, block: int) -> None:
        """Take back a block's commit, so that it is done again."""
        self._record(block).unlink(missing_ok=True)  # first: data without a record does not count
        self._data(block).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what kills left half written; only for who holds the input alone."""
        self._remove(lambda name: name.startswith("."))

    def forget(self) -> None:
        """Drop all blocks, once the results made from them are complete; files of others stay."""
        self._remove(lambda name: True)
        with contextlib.suppress(OSError):  # not empty: someone else's file lies there
            self.path.rmdir()

    def _remove(self, wanted: Callable[[str], bool]) -> None:
        refuse_link(self.path)
        with contextlib.suppress(FileNotFoundError):
            # records first: a kill half way must not leave a record without its data
            for name in sorted(os.listdir(self.path), key=lambda n: (not n.endswith(".json"), n)):
                if _OURS.fullmatch(name) and wanted(name):
                    (self.path / name).unlink(missing_ok=True)

    def _data(self, block: int) -> Path:
        return self.path / f"{block:06d}.npz"

    def _record(self, block: int) -> Path:
        return self.path / f"{block:06d}.json"

    def _open(self, block: int) -> IO[bytes]:
        return os.fdopen(open_own(self._data(block), os.O_RDONLY), "rb")

    def _damaged(self, block: int, how: str) -> DamagedBlockError:
        return DamagedBlockError(block, f"{self._data(block)}: {how}; run the same command again to redo it")


def _crc_of(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _crc_file(file: IO[bytes]) -> int:
    value = 0
    while chunk := file.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value
