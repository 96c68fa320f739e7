"""Files that are there whole or not at all, locks that die with their process, and links never followed.

A symbolic link below an output folder could lead a write or a deletion anywhere; so every file of ours is
opened with O_NOFOLLOW, and a link in its place is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from wsitk.errors import OutputError

__all__ = [
    "locked",
    "locked_folder",
    "open_own",
    "own_folder",
    "read_own",
    "refuse_link",
    "same_file",
    "sync_folder",
    "try_lock",
    "write_durably",
]

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def write_durably(path: Path, data: bytes | memoryview, *, mark: str = "") -> None:
    """Put `data` at `path` so that it is there whole or not at all, also after a power cut.

    `mark` makes the temporary name unique where two processes might write the same file.
    """
    part = path.with_name(f".{path.name}{mark}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()  # left by a kill, or a link that someone planted
    with os.fdopen(open_own(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the renames inside a folder outlast a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for, and hold, a lock on a folder itself: no file is left in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_link(path: Path) -> None:
    """Raise OutputError (WSI511) if `path` itself is a symbolic link."""
    if path.is_symlink():
        raise OutputError(
            "WSI511", f"{path} is a symbolic link; results are never written through one: remove it"
        )


def open_own(path: Path, flags: int) -> int:
    """Return a descriptor of a file of ours; raises OutputError (WSI511) for a link, OSError as `os.open`."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)
        raise


def read_own(path: Path) -> bytes:
    """Return the bytes of a file of ours; raises OutputError (WSI511) for a link, OSError if there is none."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


def own_folder(root: Path, *names: str) -> Path:
    """Return `root` / names…, made where absent; `root` may be a link, what lies below it may not (WSI511)."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root
    for name in names:
        folder = folder / name
        refuse_link(folder)
        folder.mkdir(exist_ok=True)
    return folder


def try_lock(file: IO[bytes], mode: int) -> bool:
    """Take an flock of `mode` without waiting; False if another process holds it.

    Raises OutputError (WSI518) where the storage has no locks: two runs could not be kept apart.
    """
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise _no_locks(file, error) from error
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive flock of the file `path`, waiting for it; the kernel frees it if we die."""
    with os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise _no_locks(file, error) from error
        yield


def _no_locks(file: IO[bytes], error: OSError) -> OutputError:
    name = file.name if isinstance(file.name, str) else "the lock file"
    return OutputError(
        "WSI518", f"{name}: this storage cannot lock files ({error.strerror}); choose another output folder"
    )


def same_file(file: IO[bytes], path: Path) -> bool:
    """Tell whether `path` still names the open file: another process may have removed it meanwhile."""
    try:
        now = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(now.st_mode) and os.path.samestat(os.fstat(file.fileno()), now)
