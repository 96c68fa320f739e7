"""Small damages, each a function of the file's path; one function for one kind of damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tifffile

__all__ = [
    "Mutation", "append", "cut", "directory", "drop", "link", "loop_of_ifds", "nothing", "overwrite", "pipe",
    "replace", "spoil_tile", "tag", "tags", "tile", "vanish", "write",
]  # fmt: skip

Mutation = Callable[[Path], None]


def nothing(path: Path) -> None:
    """Leave the file as it is."""


def vanish(path: Path) -> None:
    """Remove the file."""
    path.unlink()


def cut(keep: float) -> Mutation:
    """Keep the first bytes: a number of them, or below 1 a share; negative: all but so many."""

    def mutate(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, int(size * keep) if 0 < keep < 1 else int(keep) if keep >= 0 else size + int(keep))

    return mutate


def write(data: bytes | str) -> Mutation:
    """Put other bytes in place of all."""
    return lambda path: void(path.write_bytes(data.encode() if isinstance(data, str) else data))


def append(data: bytes) -> Mutation:
    """Put bytes behind the end."""
    return lambda path: void(path.write_bytes(path.read_bytes() + data))


def overwrite(offset: int, data: bytes) -> Mutation:
    """Put bytes over those at `offset`."""

    def mutate(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    return mutate


def replace(old: bytes, new: bytes) -> Mutation:
    """Put `new` in place of the first `old`, which must be there; same length."""

    def mutate(path: Path) -> None:
        data = path.read_bytes()
        assert old in data, f"{path.name} holds no {old!r}"
        assert len(old) == len(new)
        path.write_bytes(data.replace(old, new, 1))

    return mutate


def tag(code: int | str, value: Any, page: int = 0, **how: Any) -> Mutation:
    """Give a TIFF's tag another value."""

    def mutate(path: Path) -> None:
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[page].aspage().tags[code].overwrite(value, **how)

    return mutate


def tags(*each: Mutation) -> Mutation:
    """Do one after the other."""

    def mutate(path: Path) -> None:
        for one in each:
            one(path)

    return mutate


def drop(code: int, page: int = 0) -> Mutation:
    """Hide a TIFF's tag: its code becomes one that nobody knows."""

    def mutate(path: Path) -> None:
        with tifffile.TiffFile(path) as file:
            found = file.pages[page].aspage().tags[code]
            order = "little" if file.byteorder == "<" else "big"
        overwrite(found.offset, (65_001).to_bytes(2, order))(path)  # type: ignore[arg-type]  # "little" or "big"

    return mutate


def tile(number: int, *, offset: int | None = None, length: int | None = None, page: int = 0) -> Mutation:
    """Say something else of where a tile lies, or how long it is."""

    def mutate(path: Path) -> None:
        with tifffile.TiffFile(path, mode="r+b") as file:
            tags = file.pages[page].aspage().tags
            for code, value in ((324, offset), (325, length)):
                if value is not None:
                    told = list(tags[code].value)
                    told[number] = value
                    tags[code].overwrite(told)

    return mutate


def spoil_tile(number: int = 7, *, at: float = 0.3, count: int = 200, value: int = 0x5A) -> Mutation:
    """Put nonsense over the middle of a stored tile."""

    def mutate(path: Path) -> None:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0].aspage()
            start, length = page.dataoffsets[number], page.databytecounts[number]
        first = start + int(length * at)
        overwrite(first, bytes([value]) * min(count, start + length - first))(path)

    return mutate


def loop_of_ifds(path: Path) -> None:
    """Let the last directory of a TIFF name the first as its successor."""
    with tifffile.TiffFile(path) as file:
        last, first = file.pages[-1].aspage(), file.pages[0].aspage()
        wide = file.is_bigtiff
        size, entry, head = (8, 20, 8) if wide else (4, 12, 2)
        place, order = last.offset + head + entry * len(last.tags), file.byteorder
        target = first.offset
    overwrite(place, target.to_bytes(size, "little" if order == "<" else "big"))(path)


def directory(path: Path) -> None:
    """Put a folder in the file's place."""
    path.unlink()
    path.mkdir()


def link(target: str) -> Mutation:
    """Put a symbolic link in the file's place."""

    def mutate(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return mutate


def pipe(path: Path) -> None:
    """Put a pipe in the file's place, into which nobody will ever write."""
    path.unlink()
    os.mkfifo(path)


def void(_: object) -> None:
    """Return nothing."""
