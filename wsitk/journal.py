"""What is done, block by block: the record that makes a run restartable after a kill at any instant.

    .wsitk/
      lock          held while a process works on this input
      key.json      what these results are results of
      blocks/       000012.npz the block's arrays, then 000012.json its commit record

A block counts as done when its commit record exists: it is written last, after the data has reached the
disk. Both come into being by rename, so neither is ever half there under its own name.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import OutputError

__all__ = ["RESULTS", "Journal", "discard_results", "write_durably"]

RESULTS = (
    "objects.parquet",
    "objects.geojson.gz",
    "maps.ome.zarr",
    "tiles.parquet",
    "preview.png",
    "provenance.json",
)
"""Everything that a run writes into an input's folder; the last one says that it is complete."""


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that it is there whole or not at all, also after a power cut."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@final
class Journal:
    """The journal of one input, under its output folder. Use as a context manager: it holds the lock.

    Raises OutputError: WSI503 if another process holds it, WSI510 if the folder belongs to another run key;
    with `overwrite` the other run's results are removed instead.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = folder / ".wsitk"
        self._overwrite = overwrite
        self.key = json.loads(json.dumps(key))
        self._blocks = self.folder / "blocks"
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / "lock", "wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OutputError(
                "WSI503",
                f"{self.folder.parent} is in use by another run; wait for it or choose another output",
            ) from error
        self._lock = lock
        try:
            self._check_key()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_key(self) -> None:
        """Make sure that whatever lies in the folder belongs to this run's key."""
        path = self.folder / "key.json"
        old = self._stored_key(path)
        if old is not None and old != self.key:
            if not self._overwrite:
                raise OutputError("WSI510", self._difference(old))
            discard_results(self.folder.parent)
            old = None
        if old is None:  # the new key comes last: until then the folder is the other run's
            self.forget_blocks()
            write_durably(path, json.dumps(self.key, indent=1, sort_keys=True).encode())
        elif not path.is_file():
            write_durably(path, json.dumps(self.key, indent=1, sort_keys=True).encode())
        self._blocks.mkdir(exist_ok=True)

    def _stored_key(self, path: Path) -> dict[str, Any] | None:
        """Return the key of what is here, from the journal or else from complete results; None if nothing is."""
        complete = self.folder.parent / "provenance.json"
        try:
            if path.is_file():
                key: dict[str, Any] = json.loads(path.read_bytes())
                return key
            if complete.is_file():
                return dict(json.loads(complete.read_bytes())["key"])
        except (ValueError, KeyError, TypeError):
            return {"record": "damaged"}
        return None

    def _difference(self, old: Mapping[str, Any]) -> str:
        names = [n for n in sorted({*old, *self.key}) if old.get(n) != self.key.get(n)]
        first = names[0]
        return (
            f"{self.folder.parent} holds results of another run: {', '.join(names)} differ "
            f"({first}: {old.get(first)!r} there, {self.key.get(first)!r} now); "
            "use --overwrite or another output folder"
        )

    def committed(self) -> dict[int, dict[str, Any]]:
        """Return the commit records of the blocks that are done; leftovers of a crash are removed."""
        for stray in self._blocks.glob(".*.part"):
            stray.unlink()
        records = {}
        for path in sorted(self._blocks.glob("*.json")):
            record = json.loads(path.read_bytes())
            data = path.with_suffix(".npz")
            if data.is_file() and data.stat().st_size == record["bytes"]:
                records[int(path.stem)] = record
        return records

    def commit(self, block: int, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Store a block's arrays, then its commit record."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        data = buffer.getvalue()
        stem = self._blocks / f"{block:06d}"
        write_durably(stem.with_suffix(".npz"), data)
        full = {**record, "bytes": len(data)}  # the data carries its own checksum, looked at when it is read
        write_durably(stem.with_suffix(".json"), json.dumps(full, sort_keys=True).encode())

    def load(self, block: int, prefix: str) -> dict[str, NDArray[Any]]:
        """Return those arrays of a committed block whose name begins with `prefix`, which is cut off."""
        with np.load(self._blocks / f"{block:06d}.npz", allow_pickle=False) as stored:
            return {n.removeprefix(prefix): stored[n] for n in stored.files if n.startswith(prefix)}

    def forget_blocks(self) -> None:
        """Drop the blocks once the results made from them are complete."""
        shutil.rmtree(self._blocks, ignore_errors=True)


def discard_results(folder: Path) -> None:
    """Remove what a finished run leaves in an input's folder; whatever else lies there stays."""
    for name in RESULTS:
        for path in (folder / name, folder / f".{name}.partial", folder / f".{name}.part"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
