"""Read what a pickle holds without running it: an interpreter that knows plain values, and calls nothing.

Python's own unpickler imports whatever a file names and calls it. This one imports nothing. The few calls
that plain data need (ordered dicts, NumPy's arrays and scalars) are functions of ours; an object of any other
class becomes an `Inert`, a name with its state; a file that wants a *function* called, or anything of a module
that rules the machine, is refused by that function's name. Sizes are checked before memory is taken: what
the values together take is bounded by the size of the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from wsitk.plaincalls import (
    HOSTILE,
    PLAIN_CALLS,
    Budget,
    Call,
    ForbiddenError,
    Global,
    Inert,
    MalformedError,
    NumpyArray,
    NumpyType,
    pairs,
    safe_key,
)

__all__ = [
    "Budget",
    "Call",
    "ForbiddenError",
    "Global",
    "Inert",
    "MalformedError",
    "PLAIN_CALLS",
    "interpret",
    "plain",
]

HARMLESS = frozenset(
    ("functools.partial", "collections.deque", "datetime.datetime", "datetime.date", "datetime.timedelta")
)
"""Classes whose names don't start as classes' do; like all others, they become inert."""

LONGEST = 5_000_000
"""Opcodes in a pickle. The largest that training makes, with an optimizer's state, have some ten thousand."""

LARGEST_META = 1_000_000
"""Values in what `plain` returns, counted as often as they are mentioned."""

DEEPEST = 64
"""Containers inside of each other."""


def interpret(
    stream: IO[bytes],
    calls: Mapping[str, Call],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the value of the one pickle that starts at the stream's position, which ends up behind it.

    `calls` maps ``module.name`` to what stands in for it; `persistent` resolves references to storages.
    Raises ForbiddenError for a call that is none of them, MalformedError for all else that is no pickle of
    data.
    """
    machine = _Machine(calls, budget, persistent)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > LONGEST:
                raise MalformedError(f"it has more than {LONGEST} steps", oversized=True)
            machine.step(opcode.name, argument)
    except (ForbiddenError, MalformedError):
        raise
    except Exception as error:  # opcodes of a damaged file meet a stack of anything
        text = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise MalformedError(f"its pickle is damaged ({text})") from error
    return machine.result()


class _Mark:
    """What MARK leaves on the stack."""


_MARK = _Mark()


class _Machine:
    """The stack, the memo, and one method for each family of opcodes."""

    def __init__(
        self, calls: Mapping[str, Call], budget: Budget, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.calls, self.budget, self.persistent = calls, budget, persistent
        self.last: Any = _MARK

    def result(self) -> Any:
        if self.last is _MARK:
            raise MalformedError("its pickle has no end")
        return self.last

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _IGNORED:
            return
        else:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise MalformedError(f"its pickle uses {name}, which no data need")
            handler(self, argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedError("its pickle is damaged (a mark where a value belongs)")
        return value

    def pop_mark(self) -> list[Any]:
        """Return what lies above the last mark, and take both away."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise MalformedError("its pickle is damaged (no mark)")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def drop(self) -> None:
        self.stack.pop()

    def drop_mark(self) -> None:
        self.pop_mark()

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise MalformedError("its pickle is damaged (a mark where a value belongs)")
        return self.stack[-1]

    # -- containers

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(safe_key(value) for value in values)
        elif not isinstance(target, Inert):
            raise MalformedError(f"its pickle appends to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict):
            raise MalformedError(f"its pickle sets items of a {type(target).__name__}")
        target.update(pairs(values))

    # -- names and calls

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedError("its pickle names something by no text")
        self.stack.append(Global(module, name))

    def call(self, function: Any, arguments: Any) -> Any:
        """Return what stands in for the call of `function`; raises ForbiddenError unless it is known or a class."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ForbiddenError(_describe(function))
        if function in (REBUILD_TYPE, REBUILD_PARAMETER_STATE) and arguments:
            function, arguments = _unwrapped(function, arguments)
        stand_in = self.calls.get(str(function))
        if stand_in is not None:
            return stand_in(self.budget, arguments)
        return self.make(function, looks_like_class=True)

    def make(self, kind: Any, looks_like_class: bool = False) -> Inert:
        """Return an inert object of class `kind`; `looks_like_class` asks the name to start as classes' do."""
        if not isinstance(kind, Global):
            raise ForbiddenError(_describe(kind))
        root, last = kind.module.partition(".")[0], kind.name.rpartition(".")[2]
        rebuilt = kind.module == "torch._utils" and last.startswith("_rebuild_")  # sparse, quantised, …
        known = rebuilt or str(kind) in HARMLESS or last.lstrip("_")[:1].isupper()
        function = looks_like_class and not known
        if root in HOSTILE or function:
            raise ForbiddenError(str(kind))
        return Inert(str(kind))

    def new(self, arguments: int) -> None:
        for _ in range(arguments):
            self.pop()
        kind = self.pop()
        known = isinstance(kind, Global) and self.calls.get(str(kind))
        self.stack.append(known(self.budget, ()) if known else self.make(kind))

    def reduce(self) -> None:
        arguments = self.pop()
        self.stack.append(self.call(self.pop(), arguments))

    def instance(self, text: str) -> None:
        module, _, name = text.partition(" ")
        self.stack.append(self.call(Global(module, name), tuple(self.pop_mark())))

    def object(self) -> None:
        kind, *arguments = self.pop_mark()
        self.stack.append(self.call(kind, tuple(arguments)))

    def build(self) -> None:
        """Give the object on top its state; state of plain containers (``_metadata``) is left out."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, NumpyType):
            target.order(state)
        elif isinstance(target, NumpyArray):
            target.fill(state)
            self._replace(target)

    def _replace(self, shell: NumpyArray) -> None:
        self.stack[-1] = shell.value
        for place in shell.places:
            self.memo[place] = shell.value

    def reference(self, name: Any) -> None:
        if self.persistent is None:
            raise MalformedError("it refers to data outside of itself")
        self.stack.append(self.persistent(name))

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def put(self, index: Any) -> None:
        value = self.top()
        self.memo[int(index)] = value
        if isinstance(value, NumpyArray):
            value.places.append(int(index))

    def stop(self) -> None:
        self.last = self.pop()


_PUSH = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
"""
_PUSHED = frozenset(_PUSH.split())
_IGNORED = frozenset(("PROTO", "FRAME"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.drop_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "STOP": lambda m, _: m.stop(),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "DICT": lambda m, _: m.stack.append(pairs(m.pop_mark())),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(safe_key, m.pop_mark()))),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "PUT": lambda m, index: m.put(index),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": lambda m, index: m.get(index),
    "BINGET": lambda m, index: m.get(index),
    "LONG_BINGET": lambda m, index: m.get(index),
    "GLOBAL": lambda m, text: m.stack.append(Global(*text.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "INST": lambda m, text: m.instance(text),
    "OBJ": lambda m, _: m.object(),
    "NEWOBJ": lambda m, _: m.new(1),
    "NEWOBJ_EX": lambda m, _: m.new(2),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, name: m.reference(name),
    "BINPERSID": lambda m, _: m.reference(m.pop()),
}


def _describe(function: Any) -> str:
    return str(function) if isinstance(function, Global) else f"a {type(function).__name__}"


REBUILD_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
REBUILD_PARAMETER_STATE = Global("torch._utils", "_rebuild_parameter_with_state")


def _unwrapped(function: Global, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the call inside of a wrapper that torch puts around tensors with attributes."""
    if function == REBUILD_PARAMETER_STATE:
        return Global("torch._utils", "_rebuild_parameter"), arguments[:3]
    inner, _, values = arguments[:3]
    if not isinstance(inner, Global) or inner == REBUILD_TYPE or not isinstance(values, tuple):
        raise ForbiddenError(_describe(inner))
    return inner, values


# -- what comes out


def plain(value: Any, objects: bool = True) -> Any:
    """Return a pickle's value with only plain values in it, and `Inert` for all else.

    With `objects` false, objects of classes are refused instead (ForbiddenError). Raises MalformedError for values that
    contain themselves, or mention each other so often that walking them would never end.
    """
    return _Plain(objects).convert(value, DEEPEST)[0]


class _Plain:
    """Conversion that visits a container once, however often it is mentioned."""

    def __init__(self, objects: bool) -> None:
        self.objects = objects
        self.done: dict[int, tuple[Any, int]] = {}

    def convert(self, value: Any, depth: int) -> tuple[Any, int]:
        """Return the plain value, and how many values it has when written out."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return value, 1
        if isinstance(value, np.ndarray):
            return value, value.size
        if not depth:
            raise MalformedError(
                f"its values are nested deeper than {DEEPEST}, or contain themselves", oversized=True
            )
        if id(value) not in self.done:
            self.done[id(value)] = self._convert(value, depth - 1)
        return self.done[id(value)]

    def _convert(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, dict):
            keys = [self.convert(k, depth)[0] for k in value]
            return self._counted(list(value.values()), depth, lambda v: dict(zip(keys, v, strict=True)))
        if isinstance(value, list | tuple):
            return self._counted(value, depth, type(value))
        if isinstance(value, set | frozenset):  # of values that can be hashed, and so are plain
            return value, len(value) + 1
        if isinstance(value, bytearray):
            return bytes(value), 1
        if isinstance(value, NumpyType):
            return value.dtype.str, 1
        name = _name(value)
        if not self.objects:
            raise ForbiddenError(name)
        if not isinstance(value, Inert):
            return Inert(name), 1
        parts: list[Any] = [value.state, value.items]
        return self._counted(parts, depth, lambda v: Inert(name, v[0], v[1]))

    def _counted(self, values: Any, depth: int, make: Callable[[list[Any]], Any]) -> tuple[Any, int]:
        converted = [self.convert(v, depth) for v in values]
        count = 1 + sum(n for _, n in converted)
        if count > LARGEST_META:
            raise MalformedError(f"its values expand to more than {LARGEST_META}", oversized=True)
        return make([v for v, _ in converted]), count


def _name(value: Any) -> str:
    if isinstance(value, Inert):
        return value.name
    return str(value) if isinstance(value, Global) else getattr(value, "stands_for", type(value).__name__)
