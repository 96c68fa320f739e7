"""The reading process seen from outside: it may die on a damaged file, and is started again.

Which of several reads killed it can't be told, so each of them is tried again alone. What kills the reader
alone, too, is given up.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from functools import partial
from typing import Any, final

from wsitk.errors import SourceError
from wsitk.geometry import Region
from wsitk.process import Child, ChildError, Death
from wsitk.reading.slots import Slots
from wsitk.sources.base import Reading

__all__ = ["DEATHS", "ReaderProcess", "RemoteImage"]

DEATHS = 3
"""A request that has seen so many readers die is given up."""

MEMORY = 1536 << 20
"""Address space that decoding may take, on top of what the process needs to start."""

ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Heaps and buffers of threads that never compute would use up the address space."""


@final
class _Gate:
    """Lets many pass together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextmanager
    def passing(self, *, alone: bool) -> Iterator[None]:
        """Wait for one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and (self._inside == 0 or not alone))
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()


@final
class _Reader:
    """One life of the reading process."""

    def __init__(self, threads: int, preload: Sequence[str], slots: Slots) -> None:
        self._child = Child(
            "wsitk.reading.server:serve", "reading process", files=[slots.descriptor], environment=ENVIRONMENT
        )
        self._child.send((MEMORY, threads, tuple(preload), (slots.count, slots.size, slots.descriptor)))
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._dead: ChildError | None = None
        threading.Thread(target=self._listen, name="wsitk-listen", daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the process's number."""
        return self._child.pid

    def ask(self, request: tuple[Any, ...], timeout: float) -> Any:
        """Return the answer; raises what the request raised there, or ChildError."""
        future: Future[Any] = Future()
        with self._lock:
            if self._dead is not None:
                raise self._dead
            number = next(self._numbers)
            self._waiting[number] = future
        self._child.send((number, *request))
        try:
            return future.result(timeout)
        except FutureTimeout:
            if future.done():  # the request itself ran into some time limit
                raise
            self._child.kill("deadline")
            raise self._child.died() from None

    def _listen(self) -> None:
        try:
            while True:
                number, error, value = self._child.receive()
                future = self._waiting.pop(number)
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)
        except ChildError as death:
            with self._lock:
                self._dead = death
            for future in self._waiting.values():
                future.set_exception(death)

    @property
    def peak_mib(self) -> float:
        """Return the most memory it has held."""
        return self._child.peak_mib

    def close(self) -> None:
        """End the process."""
        self._child.close()


@final
class ReaderProcess:
    """Decodes in a process of its own. Thread-safe; close it or use it as a context manager.

    `slot_bytes` bounds one tile with its mask of absent pixels; `preload` names modules to import before the
    address space is limited; a request without an answer after `deadline` seconds counts as a death.
    `on_death` hears of each.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        slot_bytes: int = 0,
        preload: Sequence[str] = (),
        deadline: float = 60.0,
        on_death: Callable[[Death], None] = lambda death: None,
    ) -> None:
        self._slots = Slots(threads if slot_bytes else 0, slot_bytes)
        self._start: Callable[[], _Reader] = partial(_Reader, threads, preload, self._slots)
        self._deadline = deadline
        self._on_death = on_death
        self._gate = _Gate()
        self._lock = threading.Lock()
        self._reader: _Reader | None = None
        self._peak = 0.0

    @property
    def peak_mib(self) -> float:
        """Return the most memory that any of its lives has held, in MiB."""
        return max(self._peak, self._reader.peak_mib if self._reader else 0.0)

    @property
    def pid(self) -> int:
        """Return the number of the process that reads now."""
        return self._living().pid

    def call(self, target: str, *arguments: Any) -> Any:
        """Return what ``module:function`` returns there; arguments and result are pickled."""
        return self._survive(("call", target, arguments))

    def image(self, target: str, *arguments: Any) -> RemoteImage:
        """Return the image that ``module:function`` opens there; raises SourceError if it can't be opened."""
        recipe = pickle.dumps((target, arguments))
        self._survive(("open", recipe))
        return RemoteImage(self, recipe)

    def read(self, recipe: bytes, region: Region) -> Reading:
        """Return a region of an image; raises SourceError, WSI151 if it kills every reader."""
        if not self._slots.count:
            raise ValueError("a reader without slots cannot read tiles; give slot_bytes")
        slot = self._slots.free.get()
        try:
            return self._slots.take(slot, self._survive(("read", recipe, region, slot)))
        finally:
            self._slots.free.put(slot)

    def _survive(self, request: tuple[Any, ...]) -> Any:
        """Ask, and ask again when the reader died: then alone, for others must not be blamed."""
        for deaths in itertools.count(1):
            with self._gate.passing(alone=deaths > 1):
                reader = self._living()
                try:
                    return reader.ask(request, self._deadline)
                except ChildError as died:
                    self._replace(reader, died.death)
                    last = died.death
            if deaths == (DEATHS if last.cause != "deadline" else DEATHS - 1):
                raise SourceError(
                    "WSI151", f"the reading process died {deaths} times here ({last.reason}); set aside"
                )
        raise AssertionError("unreachable")

    def _living(self) -> _Reader:
        with self._lock:
            if self._reader is None:
                self._reader = self._start()
            return self._reader

    def _replace(self, dead: _Reader, death: Death) -> None:
        with self._lock:
            if self._reader is dead:
                self._peak = max(self._peak, death.peak_mib)
                self._reader = None
                self._on_death(death)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._peak = max(self._peak, self._reader.peak_mib)
            self._reader = None
        self._slots.close()

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@final
class RemoteImage:
    """An image that lives in the reading process."""

    def __init__(self, reader: ReaderProcess, recipe: bytes) -> None:
        self._reader = reader
        self._recipe = recipe

    def read(self, region: Region) -> Reading:
        """Return the pixels of a region in working pixels; raises SourceError."""
        return self._reader.read(self._recipe, region)

    def close(self) -> None:
        """Do nothing: the reading process closes what has not been used for long."""
