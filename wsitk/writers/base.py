"""Writing so that nothing half-made ever looks whole, and naming bytes by their hash.

A file or folder is made under ``.NAME.partial`` beside its final place, synced to the disk and renamed
when it is whole. A killed run leaves at most that partial, which the next run removes: one input has one
writer (its lock is the pipeline's), so the name need not be random.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wsitk.discard import settle
from wsitk.errors import OutputError, WsitkError

__all__ = ["atomic_file", "atomic_dir", "sha256_file", "tree_files", "tree_sha256"]

_CHUNK = 1 << 20


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` if, and only if, the block ends without an exception.

    Raises OutputError: WSI510 if `path` exists and `overwrite` is False, WSI511 if it is a symbolic link,
    WSI512 if the disk refuses.
    """
    target = Path(path)
    _check_target(target, overwrite)
    partial = target.with_name(f".{target.name}.partial")
    with _refusals(target, partial):
        _remove(partial)
        # O_EXCL | O_NOFOLLOW: a link planted at the partial's name is refused, never followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(partial, flags, 0o666), "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _check_target(target, overwrite)
        os.replace(partial, target)
        _sync_folder(target.parent)


@contextmanager
def atomic_dir(
    path: str | Path, *, overwrite: bool = False, ours: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` if, and only if, the block ends without an exception.

    Raises OutputError as `atomic_file` does. An old folder is replaced in two renames: between them
    neither exists, and the old one is deleted last. Files in it whose relative path is not `ours` are
    taken over into the new one, unless that has a file of the same name.
    """
    target = Path(path)
    _check_target(target, overwrite)
    partial, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    with _refusals(target, partial):
        settle(old, target, ours)
        _remove(partial)
        partial.mkdir()
        yield partial
        for file in tree_files(partial):
            _sync(partial / file)
        for folder, _, _ in os.walk(partial):
            _sync_folder(Path(folder))
        _check_target(target, overwrite)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        _sync_folder(target.parent)
        settle(old, target, ours)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a link always, and an existing result unless told to replace it."""
    if target.is_symlink():
        raise OutputError(
            "WSI511", f"{target} is a symbolic link; results are never written through one: remove it"
        )
    if target.exists() and not overwrite:
        raise OutputError(
            "WSI510", f"{target} exists; pass --overwrite to replace it, or choose another output"
        )


@contextmanager
def _refusals(target: Path, partial: Path) -> Iterator[None]:
    """Remove `partial` after any exception, and say what the disk refused."""
    try:
        yield
    except WsitkError:  # before OSError: a SourceError is one, and must arrive as it is
        _remove(partial)
        raise
    except OSError as error:
        _remove(partial)
        reason = error.strerror or str(error)
        raise OutputError(
            "WSI512",
            f"{target}: cannot be written ({reason}); make room or choose another output, then run again",
        ) from error
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Make renames inside `path` durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_files(path: str | Path) -> list[str]:
    """Return the files below folder `path`, relative, with forward slashes, sorted by code point.

    Raises OutputError (WSI511) if there is a symbolic link among them.
    """
    root = Path(path)
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            if (Path(folder) / name).is_symlink():
                raise OutputError(
                    "WSI511", f"{Path(folder) / name} is a symbolic link; results hold none: remove it"
                )
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(found)


def tree_sha256(path: str | Path) -> str:
    """Return one SHA-256 for a file, or for a folder: of its sorted lines ``HASH  RELATIVE/PATH\\n``.

    ``sha256sum`` over the same sorted list gives the same lines, so that anyone can redo it.
    """
    root = Path(path)
    if not root.is_dir():
        return sha256_file(root)
    lines = (f"{sha256_file(root / name)}  {name}\n" for name in tree_files(root))
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
