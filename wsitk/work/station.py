"""What a Dask worker does: one model for each run, in a process of its own, fed with the blocks that come in.

Blocks arrive one by one, in any of the worker's threads; whatever has come meanwhile goes to the model's process
together, so that it reads one block while it computes another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, final

from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.model import ModelSpec
from wsitk.settings import available_memory
from wsitk.work.apart import WorkApart
from wsitk.work.base import Order

__all__ = ["describe", "dismiss", "estimate", "work"]

MEMORY_SHARE = 0.9

Answer = tuple[BlockReport, list[str], float]


@final
class _Station:
    """A model at work on this machine. `words` are the deaths since they were last asked for."""

    def __init__(self, order: Order) -> None:
        limit = order.settings.max_ram
        self._words: list[str] = []
        self.work = WorkApart(
            order,
            memory_limit=int(limit * 2**30 if limit else available_memory() * MEMORY_SHARE),
            on_death=self._words.append,
        )
        self._waiting: list[tuple[BlockTask, Future[Answer]]] = []
        self._open: dict[tuple[str, int], Future[Answer]] = {}
        self._tasks: dict[tuple[str, int], BlockTask] = {}
        self._turn = threading.Lock()
        self._lock = threading.Lock()

    def do(self, task: BlockTask) -> Answer:
        """Return a block's report, what died on the way, and the most memory in MiB. Raises BlockError."""
        mine: Future[Answer] = Future()
        with self._lock:
            self._waiting.append((task, mine))
        while not mine.done():
            with self._turn:  # whoever comes first does the work of all that wait
                if not mine.done():
                    self._round()
        return mine.result()

    def _round(self) -> None:
        """Have everything done that waits, and what comes while the model's process draws tasks."""
        try:
            for report in self.work.run(self._draw()):
                words, self._words[:] = list(self._words), []
                answer = (report, words, self.work.peak_mib())
                self._open.pop((report.input, report.block)).set_result(answer)
        except BlockError as error:
            for key in [k for k in self._open if k[0] == error.input]:
                self._open.pop(key).set_exception(error)
            with self._lock:  # others were under way with it
                self._waiting[:0] = [(self._tasks[key], future) for key, future in self._open.items()]
            self._open.clear()
        except Exception as error:  # the model can't be started any more, for instance
            for future in self._open.values():
                future.set_exception(error)
            self._open.clear()

    def _draw(self) -> Iterator[BlockTask]:
        self._tasks.clear()
        while True:
            with self._lock:
                if not self._waiting:
                    return
                task, future = self._waiting.pop(0)
            self._open[task.input, task.block] = future
            self._tasks[task.input, task.block] = task
            yield task


_stations: dict[str, _Station] = {}
_guard = threading.Lock()


def _station(token: str, order: Order) -> _Station:
    """Return the station of a run, which starts with its first block."""
    with _guard:
        if token not in _stations:
            _stations[token] = _Station(order)
        return _stations[token]


def describe(token: str, order: Order) -> tuple[ModelSpec, str]:
    """Return the model's spec, and the kind of device that it runs on."""
    at_work = _station(token, order).work
    return at_work.spec, at_work.device


def estimate(token: str, order: Order) -> tuple[float, float]:
    """Return seconds and MiB for a tile."""
    return _station(token, order).work.estimate()


def work(token: str, order: Order, task: BlockTask) -> Answer:
    """Do one block and return its report, what died on the way, and the most memory in MiB."""
    return _station(token, order).do(task)


def dismiss(token: str) -> None:
    """Let go of a run's model."""
    with _guard:
        gone: Any = _stations.pop(token, None)
    if gone is not None:
        gone.work.close()
