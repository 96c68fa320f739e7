"""Models that kill or hang the process they run in, for the tests of supervision; built by ``dying:name``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.model import TileModel, TileResult
from wsitk.testing import OracleModel

POISON = 4
"""The tile that is bad."""


class _Dying(TileModel):
    """The oracle, but something happens at the poisoned tile."""

    def __init__(self, fate: Callable[[], None]) -> None:
        self._oracle = OracleModel(tile=(128, 128), halo=(32, 32))
        self._fate = fate
        self.spec = self._oracle.spec

    @property
    def network(self) -> Any:
        return self._oracle.network

    def predict(self, batch: Any) -> Any:
        return self._oracle.predict(batch)

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        if tile.index == POISON:
            self._fate()
        return self._oracle.postprocess(outputs, tile)


def oracle() -> TileModel:
    """Return a model that does what it should."""
    return OracleModel(tile=(128, 128), halo=(32, 32))


def killed() -> TileModel:
    """Return a model that is killed, as the kernel does where memory ends."""
    return _Dying(lambda: os.kill(os.getpid(), signal.SIGKILL))


def crashing() -> TileModel:
    """Return a model that ends in a segmentation fault."""
    return _Dying(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hanging() -> TileModel:
    """Return a model that never answers."""
    return _Dying(lambda: time.sleep(3600))


def greedy() -> TileModel:
    """Return a model that takes memory until it is stopped."""

    def grow() -> None:
        kept = []
        while True:
            kept.append(np.ones(1 << 23))
            time.sleep(0.05)

    return _Dying(grow)


def killed_once() -> TileModel:
    """Return a model that is killed the first time that it meets the tile; a file remembers."""
    mark = Path(os.environ["WSITK_TEST_MARK"])

    def once() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return _Dying(once)


def killed_at_step() -> TileModel:
    """Return a model whose process is killed before its n-th call that makes something durable, once.

    The file ``WSITK_TEST_MARK`` holds n, and is removed when it has happened.
    """
    mark = Path(os.environ["WSITK_TEST_MARK"])
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if mark.exists() and count == int(mark.read_text()):
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    return oracle()


def broken() -> TileModel:
    """Fail to build."""
    raise RuntimeError("no such weights")


def dead_on_arrival() -> TileModel:
    """Die while being built."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# --- functions for the reading process ---------------------------------------------------------------


def abort() -> None:
    """Die as a C library does that meets a damaged header."""
    os.abort()


def sleep() -> None:
    """Hang."""
    time.sleep(3600)


def twice(number: int) -> int:
    """Answer."""
    return 2 * number


def imported(name: str) -> bool:
    """Tell whether this process has imported a module."""
    import sys

    return name in sys.modules


def take(mib: int) -> int:
    """Take so much memory."""
    return int(np.ones(mib << 17).nbytes)


class Fragile:
    """An image of which one place kills whoever reads it."""

    def __init__(self, place: tuple[int, int]) -> None:
        self._place = place

    def read(self, region: Any) -> Any:
        from wsitk.sources.base import Reading

        if tuple(region.start) == self._place:
            os.abort()
        return Reading(np.full((*region.shape, 3), region.start[1] % 251, np.uint8))

    def close(self) -> None: ...
