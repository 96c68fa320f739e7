"""What the pickles of plain data call, as functions of ours: dicts, sets, numbers, NumPy's arrays and scalars.

`wsitk.plainpickle` looks them up by the names that files use. They check sizes before they take memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Budget",
    "Call",
    "ForbiddenError",
    "Global",
    "HOSTILE",
    "Inert",
    "MalformedError",
    "NumpyArray",
    "NumpyType",
    "PLAIN_CALLS",
    "pairs",
    "safe_key",
]

_HOSTILE = """
    asyncio bdb cProfile code codeop commands ctypes dill cloudpickle doctest ftplib gc http idlelib
    importlib imp inspect io joblib linecache marshal mmap multiprocessing nt ntpath numba operator os
    pdb pickle _pickle pip pkgutil platform posix posixpath pty pydoc requests runpy shelve shutil
    signal smtplib socket sqlite3 ssl subprocess sys tempfile threading timeit types unittest urllib
    venv webbrowser winreg xmlrpc zipimport
"""
HOSTILE = frozenset(_HOSTILE.split())
"""Modules of which no weight file needs an object: to name one in a call is an attack, or looks like one."""


class ForbiddenError(Exception):
    """The pickle asks for a call; the message is the name of what it wants to call."""


class MalformedError(Exception):
    """The pickle is damaged, or claims what it doesn't hold; `oversized` says that it is the latter."""

    def __init__(self, message: str, oversized: bool = False) -> None:
        super().__init__(message)
        self.oversized = oversized


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions, as ``module.name``; nothing was imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """An object of a class that we don't build: the class's name, the state it was given, and its items."""

    name: str
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """How many bytes calls may still make: one value, named a million times, must not become a million."""

    left: int

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise MalformedError("its values expand beyond the size of the file", oversized=True)


Call = Callable[[Budget, tuple[Any, ...]], Any]


def pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise MalformedError("its pickle is damaged (a key without a value)")
    return {safe_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def safe_key(value: Any, depth: int = 3) -> Any:
    """Return a dict's key if it is safe to hash: Python's hash of deeply nested tuples overruns the C stack."""
    if isinstance(value, tuple) and depth:
        return tuple(safe_key(part, depth - 1) for part in value)
    if isinstance(value, tuple | list | dict | set | bytearray | np.ndarray):
        raise MalformedError(f"it has a {type(value).__name__} as a key")
    return value


@dataclass(eq=False)
class NumpyType:
    """A NumPy dtype while it is being read."""

    dtype: np.dtype[Any]

    def order(self, state: Any) -> None:
        """Set the byte order, which a pickle holds apart from the type."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise MalformedError("it has a NumPy type that is none")
        if any(part is not None for part in state[2:5]):
            raise MalformedError("it has a NumPy type with fields; wanted plain numbers or text")
        self.dtype = self.dtype.newbyteorder(state[1])


@dataclass(eq=False)
class NumpyArray:
    """A NumPy array between its making and the BUILD that fills it."""

    value: NDArray[Any] | None = None
    places: list[int] = field(default_factory=list)

    def fill(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


def _array(content: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    """Return an array over `content` itself: nothing is copied, so nothing can expand."""
    if not isinstance(dtype, NumpyType) or not isinstance(content, bytes | bytearray):
        raise MalformedError("it has a NumPy array of objects; wanted numbers or text")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise MalformedError("it has a NumPy array without a shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise MalformedError(
            f"it has a NumPy array that claims {math.prod(shape)} numbers in {len(content)} bytes",
            oversized=True,
        )
    flat = np.frombuffer(content, dtype.dtype) if content else np.empty(0, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _dtype(budget: Budget, arguments: tuple[Any, ...]) -> NumpyType:
    text = arguments[0] if arguments else None
    if isinstance(text, Global) and text.module == "numpy":
        text = text.name.rstrip("_")
    if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?[biufcSU]\d{1,6}|bool|u?int\d+|float\d+", text):
        raise MalformedError(f"it has a NumPy type {str(text)[:20]!r}; wanted plain numbers or text")
    dtype = np.dtype(text)
    if not dtype.itemsize:
        raise MalformedError("it has a NumPy type of no size")
    return NumpyType(dtype)


def _scalar(budget: Budget, arguments: tuple[Any, ...]) -> Any:
    dtype, content = arguments
    budget.spend(len(content))
    return _array(content, dtype, (1,), "C")[0].item()


def _frombuffer(budget: Budget, arguments: tuple[Any, ...]) -> NDArray[Any]:
    content, dtype, shape, order = arguments
    return _array(content, dtype, shape, order)


def _encode(budget: Budget, arguments: tuple[Any, ...]) -> bytes:
    """Return the bytes that protocol 2 has written as text."""
    text, encoding = (*arguments, "utf-8")[:2]
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise MalformedError("it has bytes in an encoding that no pickle uses")
    budget.spend(len(text))
    return text.encode(encoding)


def _bytes(budget: Budget, arguments: tuple[Any, ...]) -> bytes:
    """Return bytes from a list or text; a number, which asks for that many zeros, is none of a pickle's."""
    if not arguments:
        return b""
    if isinstance(arguments[0], str):
        return _encode(budget, arguments)
    if not isinstance(arguments[0], bytes | bytearray | list):
        raise MalformedError("it has bytes made of no bytes")
    budget.spend(len(arguments[0]))
    return bytes(arguments[0])


def _mapping(budget: Budget, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Return a dict: ordered, counting or of mappings with defaults, whose factory is left out."""
    given = next((a for a in arguments if isinstance(a, dict | list)), {})
    budget.spend(16 * len(given))
    if isinstance(given, dict):
        return dict(given)
    return pairs([part for pair in given for part in (pair[0], pair[1])])


def _sequence(kind: Callable[[Any], Any]) -> Call:
    def make(budget: Budget, arguments: tuple[Any, ...]) -> Any:
        values = arguments[0] if arguments else ()
        if not isinstance(values, list | tuple | set | frozenset):
            raise MalformedError("it has a list of no list")
        budget.spend(8 * len(values))
        return kind([safe_key(v) for v in values] if kind in (set, frozenset) else values)

    return make


def _number(kind: Callable[..., Any]) -> Call:
    def make(budget: Budget, arguments: tuple[Any, ...]) -> Any:
        if not all(isinstance(a, int | float) for a in arguments):
            raise MalformedError("it has a number made of no number")
        return kind(*arguments)

    return make


def _reconstructed(budget: Budget, arguments: tuple[Any, ...]) -> Inert:
    """Return the inert object that ``copyreg`` would make of a class."""
    if not arguments or not isinstance(arguments[0], Global):
        raise ForbiddenError("copyreg._reconstructor")
    if arguments[0].module.partition(".")[0] in HOSTILE:
        raise ForbiddenError(str(arguments[0]))
    return Inert(str(arguments[0]))


_BUILTINS: dict[str, Call] = {
    "dict": _mapping,
    "list": _sequence(list),
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "bytes": _bytes,
    "bytearray": _bytes,
    "int": _number(int),
    "float": _number(float),
    "bool": _number(bool),
    "complex": _number(complex),
}
_MULTIARRAY: dict[str, Call] = {"_reconstruct": lambda budget, arguments: NumpyArray(), "scalar": _scalar}

PLAIN_CALLS: Mapping[str, Call] = {
    **{
        f"{module}.{name}": call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()
    },
    **{f"collections.{name}": _mapping for name in ("OrderedDict", "defaultdict", "Counter")},
    # private, and it moved in NumPy 2: files carry either name
    **{f"numpy.{c}.multiarray.{n}": call for c in ("core", "_core") for n, call in _MULTIARRAY.items()},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
}
