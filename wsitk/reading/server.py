"""What the reading process does: opens inputs and decodes tiles, in threads, under a limit of memory."""

from __future__ import annotations

import importlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol, final

from wsitk.anonymous import discreet
from wsitk.errors import SourceError, WorkError, WsitkError
from wsitk.geometry import Region
from wsitk.process import limit_address_space
from wsitk.reading.slots import Slots
from wsitk.sources.base import Reading

__all__ = ["TileImage", "serve"]

OPEN_INPUTS = 3
"""Inputs kept open at once: the one being computed, the one being read ahead, one to spare."""


class TileImage(Protocol):
    """Something whose tiles can be read: an input on the grid that a model works on."""

    def read(self, region: Region) -> Reading:
        """Return the pixels of a region in working pixels; raises SourceError."""

    def close(self) -> None:
        """Let go of it."""


@final
class _Images:
    """The inputs that are open here, by how they were asked for; the least recently used is closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[bytes, TileImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, recipe: bytes) -> TileImage:
        """Return the image of a pickled (opener, arguments), opened if it is not."""
        with self._lock:
            if recipe not in self._open:
                target, arguments = pickle.loads(recipe)  # written by the parent process
                with discreet(arguments):
                    self._open[recipe] = _resolve(target)(*arguments)
            self._open.move_to_end(recipe)
            while len(self._open) > OPEN_INPUTS:
                self._open.popitem(last=False)[1].close()
            return self._open[recipe]


def serve(connection: Connection) -> None:
    """Answer requests until the parent leaves. The first message says how much memory and how many threads.

    Requests are ``(number, "open", recipe)``, ``(number, "read", recipe, region, slot)`` and
    ``(number, "call", target, arguments)``; answers ``(number, error or None, value)``.
    """
    extra, threads, preload, slots = connection.recv()
    for module in preload:
        importlib.import_module(module)
    places = Slots(*slots)
    images = _Images()
    actions: dict[str, Callable[..., Any]]
    actions = {"open": partial(_open, images), "read": partial(_read, images, places), "call": _call}
    limit_address_space(extra)
    with ThreadPoolExecutor(threads, "wsitk-read") as pool:
        while True:
            number, kind, *rest = connection.recv()
            pool.submit(_answer, connection, number, partial(actions[kind], *rest))


def _answer(connection: Connection, number: int, action: Callable[[], Any]) -> None:
    """Send what `action` returns, or the error it raised: one of ours as it is, others by their words."""
    try:
        reply: tuple[int, Exception | None, Any] = (number, None, action())
    except WsitkError as error:
        reply = (number, error, None)
    except MemoryError:
        text = "decoding it needs more memory than a reader may use; the file is damaged or not tiled"
        reply = (number, SourceError("WSI142", text), None)
    except Exception as error:  # the parent decides what it means
        reply = (number, WorkError("WSI410", f"{type(error).__name__}: {error}"), None)
    connection.send(reply)


def _open(images: _Images, recipe: bytes) -> None:
    images.get(recipe)


def _read(images: _Images, places: Slots, recipe: bytes, region: Region, slot: int) -> Any:
    image = images.get(recipe)
    try:
        return places.put(slot, image.read(region))
    except Exception:
        with discreet(pickle.loads(recipe)[1]):
            raise


def _call(target: str, arguments: tuple[Any, ...]) -> Any:
    with discreet(arguments):
        return _resolve(target)(*arguments)


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
