"""Who works on an input, for which run, and what is done: what makes a run restartable after any kill.

    .wsitk/
      lock          held by the process that works on this input, or shared by those that divide it
      opening       held while one of them looks at the key
      finish        held by the one that makes the results from the blocks
      key.json      what these results are results of
      seen.json     size and time of the input's files when the first block was begun
      blocks/       what is done (wsitk.blockstore)
      claims/       held by the process that works on a block, where several divide an input
      seal.json     the input's name and the sha256 of provenance.json, written just before it

Locks are flocks: the kernel frees them when a process dies, so none is ever stale. A finished input keeps
`lock`, `opening`, `finish`, `key.json` and `seal.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Self, final

from numpy.typing import NDArray

from wsitk.blockstore import BlockStore, DamagedBlockError
from wsitk.discard import RESULTS, discard_results
from wsitk.durable import (
    locked,
    open_own,
    own_folder,
    read_own,
    refuse_link,
    same_file,
    try_lock,
    write_durably,
)
from wsitk.errors import OutputError, SourceError
from wsitk.seal import key_bytes, results_intact, seal_of

__all__ = [
    "RESULTS",
    "BlockStore",
    "Claim",
    "DamagedBlockError",
    "Journal",
    "discard_results",
    "write_durably",
]


@final
class Claim:
    """The right to work on one block, until it is let go or its process dies. Use as a context manager."""

    def __init__(self, block: int, file: IO[bytes] | None) -> None:
        self.block = block
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the block."""
        if self._file is not None:
            self._file.close()
            self._file = None


@final
class Journal:
    """The journal of one input, under its output folder. Use as a context manager: it holds the lock.

    With `shared` any number of processes with the same key may hold it at once and divide the blocks by
    `claim`; without, one process owns the input. `stamp` is what `file_stamp` says of the input's files,
    `name` the input's name where it has several parts: none of its folders may be a link.

    Raises OutputError: WSI503 if other processes hold it, WSI510 if the folder belongs to another run key,
    WSI511 for links, WSI518 without locks; SourceError: WSI160 if the input's files have changed since its
    first block was begun. With `overwrite` the other run's results are removed instead of WSI510, WSI160;
    and finished results of the same key are looked at, and removed if they are not what was written.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        overwrite: bool = False,
        shared: bool = False,
        stamp: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.folder = folder / ".wsitk"
        self.key = json.loads(json.dumps(key))
        self.store = BlockStore(folder)
        self._input = folder
        self._name = PurePosixPath(name or folder.name)
        self._overwrite = overwrite
        self._shared = shared
        self._stamp = json.loads(json.dumps(stamp))
        self._lock: IO[bytes] | None = None

    # --- opening -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        root = self._input.parents[len(self._name.parts) - 1]
        own_folder(root, *self._name.parts, ".wsitk")
        lock = os.fdopen(open_own(self.folder / "lock", os.O_RDWR | os.O_CREAT), "r+b")
        try:
            # Whoever enters or changes the kind of a lock does so alone: flock cannot upgrade in one step.
            with locked(self.folder / "opening"):
                if not try_lock(lock, fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX):
                    raise self._in_use()
                self._lock = lock
                self._prepare()
        except BaseException:
            self._lock = None
            lock.close()
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

    def _in_use(self) -> OutputError:
        return OutputError(
            "WSI503", f"{self._input} is in use by another run; wait for it or choose another output"
        )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Yield whether nobody else holds the input; while the block lasts, nobody else can."""
        if self._lock is None or not self._shared:
            yield self._lock is not None
            return
        alone = try_lock(self._lock, fcntl.LOCK_EX)
        try:
            yield alone
        finally:  # a failed upgrade has lost the old lock too; nobody can have taken it: we hold `opening`
            if not try_lock(self._lock, fcntl.LOCK_SH):
                raise self._in_use()

    def _prepare(self) -> None:
        """Make sure that whatever lies in the folder belongs to this run's key, and to the same files."""
        with self._alone() as alone:
            for name in ("key.json", "seen.json", "seal.json", "discarding.json", "claims", "blocks"):
                refuse_link(self.folder / name)
            refuse_link(self._input / "provenance.json")
            self._check_key(alone)
            if alone:
                self.store.sweep()
            if not self.finished:
                self._check_stamp(alone)
                self.store.make()
                if self._shared:
                    (self.folder / "claims").mkdir(exist_ok=True)
        # every way of running leaves the same files
        os.close(open_own(self.folder / "finish", os.O_RDWR | os.O_CREAT))

    def _check_key(self, alone: bool) -> None:
        path = self.folder / "key.json"
        if (self.folder / "discarding.json").exists() and alone:  # a kill came between: the user has said so
            discard_results(self._input)
        old = self._stored_key(path)
        other = old is not None and old != self.key
        if other and not self._overwrite:
            raise OutputError("WSI510", self._difference(old or {}))
        if other or (self._overwrite and self.finished and not results_intact(self._input, str(self._name))):
            if not alone:
                raise self._in_use()
            discard_results(self._input)
            old = None
        if old is None:  # the new key comes last: until then the folder is the other run's
            self.store.forget()
            self._drop("seen.json")
        if old is None or not path.is_file():
            write_durably(path, key_bytes(self.key))

    def _stored_key(self, path: Path) -> dict[str, Any] | None:
        """Return the key of what is here, from the journal or else from complete results; None if nothing is."""
        try:
            if path.is_file():
                key: dict[str, Any] = json.loads(read_own(path))
                return key
            if self.finished:
                return dict(json.loads(read_own(self._input / "provenance.json"))["key"])
        except (ValueError, KeyError, TypeError):
            return {"record": "damaged"}
        return None

    def _difference(self, old: Mapping[str, Any]) -> str:
        names = [n for n in sorted({*old, *self.key}) if old.get(n) != self.key.get(n)]
        first = names[0]
        return (
            f"{self._input} holds results of another run: {', '.join(names)} differ "
            f"({first}: {old.get(first)!r} there, {self.key.get(first)!r} now); "
            "use --overwrite or another output folder"
        )

    # --- has the input changed? ----------------------------------------------------------------------

    def _check_stamp(self, alone: bool) -> None:
        """Compare the input's files with those of the first block; note them if there is no block yet."""
        path = self.folder / "seen.json"
        if self._stamp is None:
            return
        try:
            seen = json.loads(read_own(path))
        except FileNotFoundError:
            seen = None
        except ValueError:
            seen = "damaged"
        if seen == self._stamp:
            return
        if seen is not None and (self.store.blocks() or not alone):
            if not (self._overwrite and alone):
                raise self._changed(seen)
            self.store.forget()
        write_durably(path, json.dumps(self._stamp, sort_keys=True).encode())

    def check_unchanged(self, stamp: Mapping[str, Any]) -> None:
        """Raise SourceError (WSI160) unless `stamp` is that of the beginning; to be asked before finishing."""
        if self._stamp is not None and json.loads(json.dumps(stamp)) != self._stamp:
            raise self._changed(self._stamp)

    def _changed(self, seen: object) -> SourceError:
        return SourceError(
            "WSI160",
            f"{self._input.name} changed since block 0 was written: its files had {_stamp_text(seen)} then; "
            "make sure that it is whole, then use --overwrite to start again",
        )

    # --- dividing an input ---------------------------------------------------------------------------

    def claim(self, block: int) -> Claim | None:
        """Return the right to work on `block`; None if it is done, another process has it, or all is finished."""
        if not self._shared:
            return None if self.store.record(block) is not None else Claim(block, None)
        path = self.folder / "claims" / f"{block:06d}"
        while not self.finished:
            try:
                file = os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+b")
            except FileNotFoundError:  # the finisher has removed the folder
                return None
            if not try_lock(file, fcntl.LOCK_EX) or self.store.record(block) is not None:
                file.close()
                return None
            if same_file(file, path):
                return Claim(block, file)
            file.close()  # the finisher removed it between open and lock
        return None

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Wait for the right to make the results; yields False if another process has made them meanwhile."""
        with locked(self.folder / "finish"):
            yield not self.finished

    @property
    def finished(self) -> bool:
        """Tell whether the results are complete."""
        return (self._input / "provenance.json").is_file()

    # --- blocks --------------------------------------------------------------------------------------

    def committed(self, *, verify: bool = False) -> dict[int, dict[str, Any]]:
        """Return the commit records of the blocks that are done; with `verify` damaged ones are dropped first."""
        if not self._shared:
            return self.store.committed(verify=verify)
        for block in self.store.blocks() if verify else ():
            if not self.store.intact(block):
                self._discard_claimed(block)
        return self.store.committed()

    def _discard_claimed(self, block: int) -> None:
        """Drop a damaged block unless another process is redoing it right now."""
        path = self.folder / "claims" / f"{block:06d}"
        with (
            contextlib.suppress(FileNotFoundError),  # all was finished meanwhile
            os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+b") as file,
        ):
            if try_lock(file, fcntl.LOCK_EX) and same_file(file, path) and not self.store.intact(block):
                self.store.discard(block)

    def commit(self, block: int, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Store a block's arrays, then its commit record."""
        self.store.commit(block, arrays, record)

    def load(self, block: int, prefix: str) -> dict[str, NDArray[Any]]:
        """Return those arrays of a committed block whose name begins with `prefix`, which is cut off."""
        return self.store.load(block, prefix)

    # --- ending --------------------------------------------------------------------------------------

    def complete(self, record: Mapping[str, Any]) -> None:
        """Write `provenance.json`, which says that the results are complete, and forget the blocks.

        The seal comes first: a kill between the two leaves an unfinished input, which is finished again
        to the same bytes; so no finished input is without its seal.
        """
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        write_durably(self.folder / "seal.json", seal_of(str(self._name), data))
        write_durably(self._input / "provenance.json", data)
        self.forget_blocks()

    def forget_blocks(self) -> None:
        """Drop the blocks, claims and stamp once the results made from them are complete."""
        with locked(self.folder / "opening"):  # nobody who enters may make them again meanwhile
            self.store.forget()
            self._forget_claims()
            self._drop("seen.json")

    def _forget_claims(self) -> None:
        folder = self.folder / "claims"
        refuse_link(folder)
        with contextlib.suppress(FileNotFoundError):
            foreign = False
            while not foreign:  # another process may just be opening one more
                for name in os.listdir(folder):
                    if name.isdigit():
                        (folder / name).unlink(missing_ok=True)
                    else:
                        foreign = True
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    return

    def _drop(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


def _stamp_text(seen: object) -> str:
    try:
        files = seen["files"]  # type: ignore[index]  # whatever lies in seen.json
        return ", ".join(f"{size:,} bytes" for _, size, _ in files)
    except (KeyError, TypeError, ValueError):
        return "another size or time"
