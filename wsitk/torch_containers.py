"""The two formats of ``torch.save`` as descriptions: which tensor lies where, before a number is read.

Nothing is believed: a storage has the bytes that the file holds for it, a tensor lies inside of its storage and
is no larger. See `wsitk.torchfile` for what to call.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from wsitk.plainpickle import PLAIN_CALLS, Budget, Call, Global, Inert, MalformedError, interpret

__all__ = ["Archive", "Legacy", "Storage", "Stored", "Zip", "check_pickle_size"]

LARGEST_PICKLE = 64 << 20
"""Bytes of a pickle, without the tensors' own: training writes some hundred thousand."""

MAGIC = 0x1950A86A20F9469CFC6C
"""The first value in a file of ``torch.save`` before 1.6."""


def check_pickle_size(size: int) -> None:
    """Raise MalformedError for a pickle longer than any that describes weights."""
    if size > LARGEST_PICKLE:
        raise MalformedError(f"its pickle has {size} bytes, wanted {LARGEST_PICKLE} at most", oversized=True)


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, by its key."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor as the pickle describes it: a view of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    stands_for: ClassVar[str] = "torch.Tensor"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Refuse a view beyond its storage, or one that is larger than it (broadcast)."""
        reach = self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        inside = reach * self.dtype.itemsize <= self.storage.nbytes
        if self.nbytes > self.storage.nbytes or (self.nbytes and not inside):
            raise MalformedError(
                f"a tensor of shape {self.shape} claims {self.nbytes} bytes but stores {self.storage.nbytes}",
                oversized=True,
            )


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}


def _storage(found: dict[str, Storage], name: Any) -> Storage | Inert:
    """Return the storage that a persistent id names."""
    if not isinstance(name, tuple) or len(name) < 5 or name[0] != "storage":
        raise MalformedError("it refers to something that is no storage")
    _, kind, key, _, count, *view = name
    if not isinstance(kind, Global) or type(count) is not int or count < 0 or (view and view[0] is not None):
        raise MalformedError("it describes a storage of no kind")
    dtype = STORAGES.get(kind.name.removesuffix("Storage"))
    if dtype is None:
        return Inert(str(kind))
    storage = Storage(str(key), dtype, count)
    if found.setdefault(storage.key, storage) != storage:
        raise MalformedError(f"it describes storage {storage.key!r} in two ways")
    return storage


def _tensor(budget: Budget, arguments: tuple[Any, ...]) -> Stored | Inert:
    """Stand in for ``torch._utils._rebuild_tensor`` and its versions 2 and 3."""
    storage, offset, shape, stride = arguments[:4]
    if isinstance(storage, Inert):
        return storage
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise MalformedError("it describes a tensor by no numbers")
    if len(shape) != len(stride) or len(shape) > 32:
        raise MalformedError("it describes a tensor with as many strides as it has no axes")
    dtype = storage.dtype
    if len(arguments) > 6 and isinstance(arguments[6], Global):  # version 3 names the type apart
        named = getattr(torch, arguments[6].name, None) if arguments[6].module == "torch" else None
        if not isinstance(named, torch.dtype):
            return Inert(str(arguments[6]))
        dtype = named
    return Stored(storage, dtype, offset, shape, stride)


def _first(budget: Budget, arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


CALLS: Mapping[str, Call] = {
    **PLAIN_CALLS,
    **{f"torch._utils.{n}": _tensor for n in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": PLAIN_CALLS["builtins.tuple"],
    "torch.device": lambda budget, arguments: ":".join(str(part)[:20] for part in arguments[:2]),
    "torch.serialization._get_layout": lambda budget, arguments: Inert("torch.layout"),
}


# -- containers


class Archive(ABC):
    """A file of ``torch.save``: `content` as described, and the bytes of its storages on demand."""

    kind: str
    content: Any

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    @abstractmethod
    def read(self, storage: Storage) -> bytearray:
        """Return a storage's bytes; raises MalformedError if the file doesn't hold as many."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""


class Zip(Archive):
    """The format since torch 1.6: ``NAME/data.pkl`` and ``NAME/data/KEY``, stored without compression."""

    kind = "zip"

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        self.archive = zipfile.ZipFile(path)
        try:
            self.name = self._checked(size)
            pickle = self.archive.read(f"{self.name}/data.pkl")
            self.content = interpret(
                io.BytesIO(pickle), CALLS, Budget(len(pickle)), partial(_storage, self.storages)
            )
        except BaseException:
            self.archive.close()
            raise

    def _checked(self, size: int) -> str:
        """Return the archive's name, once its parts' claims fit into the file."""
        entries = self.archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise MalformedError("it is compressed inside, which torch.save never does", oversized=True)
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            raise MalformedError("its parts claim more bytes than the file has", oversized=True)
        pickles = [e for e in entries if e.filename.count("/") == 1 and e.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MalformedError("it is a zip archive without the one data.pkl of torch.save")
        check_pickle_size(pickles[0].file_size)
        name = pickles[0].filename.partition("/")[0]
        order = f"{name}/byteorder"
        if order in self.archive.NameToInfo and self.archive.read(order) != b"little":
            raise MalformedError("its numbers are big-endian; save it again on a common machine")
        return name

    def read(self, storage: Storage) -> bytearray:
        name = f"{self.name}/data/{storage.key}"
        entry = self.archive.NameToInfo.get(name)
        if entry is None:
            raise MalformedError(f"its part {name!r} is missing")
        if entry.file_size != storage.nbytes:
            raise MalformedError(
                f"storage {storage.key!r} claims {storage.nbytes} bytes and has {entry.file_size}",
                oversized=True,
            )
        content = bytearray(storage.nbytes)
        with cast(io.BufferedIOBase, self.archive.open(entry)) as part:
            # reading to the end, and not one byte less, is what checks the checksum
            position = 0
            while position < len(content):
                step = part.readinto(memoryview(content)[position:])
                if not step:
                    raise MalformedError(f"its part {name!r} ends early")
                position += step
            part.read(1)
        return content

    def close(self) -> None:
        self.archive.close()


class Legacy(Archive):
    """The format before torch 1.6: five pickles, one after the other, and then the storages' numbers."""

    kind = "legacy"

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        if not size:
            raise MalformedError("it is empty")
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.size = size
            self.places = self._walk()
        except BaseException:
            self.map.close()
            raise

    def _walk(self) -> dict[str, int]:
        """Read the pickles, and return where each storage's numbers start."""
        if self.map[:1] != b"\x80" or self._next({}) != MAGIC or self._next({}) != 1001:
            raise MalformedError("it is no file of torch.save, nor safetensors")
        about = self._next(PLAIN_CALLS)
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise MalformedError("its numbers are big-endian; save it again on a common machine")
        self.content = self._next(CALLS, partial(_storage, self.storages))
        keys = self._next(PLAIN_CALLS)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise MalformedError("its list of storages is none")
        places = {}
        for key in keys:
            storage = self.storages.get(key)
            if storage is None:
                raise MalformedError(f"its storage {key!r} is of no known kind")
            count = int.from_bytes(self.map.read(8), "little")
            places[key] = self.map.tell()
            if count != storage.count or places[key] + storage.nbytes > self.size:
                raise MalformedError(
                    f"storage {key!r} claims {storage.nbytes} bytes, which the file doesn't hold",
                    oversized=True,
                )
            self.map.seek(storage.nbytes, io.SEEK_CUR)
        return places

    def _next(self, calls: Mapping[str, Call], persistent: Any = None) -> Any:
        stream: Any = self.map  # reads as a file does
        return interpret(stream, calls, Budget(self.size), persistent)

    def read(self, storage: Storage) -> bytearray:
        start = self.places.get(storage.key)
        if start is None:
            raise MalformedError(f"its storage {storage.key!r} is missing")
        return bytearray(self.map[start : start + storage.nbytes])

    def close(self) -> None:
        self.map.close()
