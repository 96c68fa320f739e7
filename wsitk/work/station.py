"""What a Dask worker does: one model for each run, in a process of its own, fed with the blocks that come in.

Blocks arrive in any of the worker's threads; those that wait together go to the model's process together, so that
it reads one block while it computes another.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.errors import ModelError
from wsitk.model import ModelSpec
from wsitk.settings import available_memory
from wsitk.work.apart import WorkApart
from wsitk.work.base import Order

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Answer", "DismissedError", "dask_setup", "describe", "dismiss", "estimate", "work"]

MEMORY_SHARE = 0.9

IDLE_SECONDS = 600.0
"""A model without work for so long is let go: whoever ran it may have been killed. Work brings it back."""

CLOSING_SECONDS = 6.0
"""How long a run that ends waits for its models to be gone."""


@dataclass(frozen=True)
class Answer:
    """What a worker says of blocks: their reports, what died on the way, and the most memory in MiB.

    `refusal` is why this worker, at `address`, can't run the model, which others may; then there are no reports.
    """

    reports: tuple[BlockReport, ...] = ()
    words: tuple[str, ...] = ()
    peak_mib: float = 0.0
    refusal: ModelError | None = None
    address: str = ""


class DismissedError(Exception):
    """The run has ended; nobody will hear of this."""


_Pending = tuple[BlockTask, "Future[BlockReport]"]


@final
class _Station:
    """A model at work on this machine; it starts with its first block."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._apart: WorkApart | None = None
        self._words: list[str] = []
        self._waiting: list[_Pending] = []
        self._open: dict[tuple[str, int], _Pending] = {}
        self._turn = threading.Lock()  # held by whoever talks to the model's process
        self._lock = threading.Lock()
        self._gone = False
        self._timer = threading.Timer(0, self.rest)

    # --- work ----------------------------------------------------------------------------------------

    def do(self, unit: Sequence[BlockTask]) -> Answer:
        """Have blocks done, in their order. Raises BlockError, and ModelError if the model can't be run here."""
        mine: list[_Pending] = [(task, Future()) for task in unit]
        with self._lock:
            self._waiting += mine
        while not all(future.done() for _, future in mine):
            with self._turn:  # whoever comes first does the work of all that wait
                if not all(future.done() for _, future in mine):
                    self._round()
        self._sleep_later()
        reports = tuple(future.result() for _, future in mine)
        with self._lock:
            words, self._words = tuple(self._words), []
        return Answer(reports, words, self._apart.peak_mib() if self._apart else 0.0)

    def _round(self) -> None:
        """Have everything done that waits."""
        try:
            for report in self.model().run(self._draw()):
                self._open.pop((report.input, report.block))[1].set_result(report)
        except BlockError as error:
            self._give_up(error)
        except Exception as error:  # the model can't be started (any more), or the run has ended
            with self._lock:
                lost, self._waiting = [*self._open.values(), *self._waiting], []
            self._open.clear()
            for _, future in lost:
                future.set_exception(error)

    def _draw(self) -> Iterator[BlockTask]:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                task, future = self._waiting[0]
                if (task.input, task.block) in self._open:  # sent twice: one after the other
                    return
                del self._waiting[0]
                self._open[task.input, task.block] = task, future
            yield task

    def _give_up(self, error: BlockError) -> None:
        """Fail all blocks of an input; others that were under way with it wait again."""
        with self._lock:
            every = [*self._open.values(), *self._waiting]
            self._waiting = [(t, f) for t, f in every if t.input != error.input]
        self._open.clear()
        for task, future in every:
            if task.input == error.input:
                future.set_exception(error)

    # --- the model's life ----------------------------------------------------------------------------

    @property
    def turn(self) -> threading.Lock:
        """Return the lock to be held around `model`."""
        return self._turn

    def model(self) -> WorkApart:
        """Return the model, which is loaded now if it has not been; to be called by whoever has the turn."""
        if self._gone:
            raise DismissedError
        if self._apart is None:
            limit = self._order.settings.max_ram
            self._apart = WorkApart(
                self._order,
                memory_limit=int(limit * 2**30 if limit else available_memory() * MEMORY_SHARE),
                on_death=self._hear,
            )
        return self._apart

    def _hear(self, words: str) -> None:
        if self._gone:  # it was we who ended the process: no other one is to take its place
            raise DismissedError
        with self._lock:
            self._words.append(words)

    def _sleep_later(self) -> None:
        with self._lock:
            self._timer.cancel()
            self._timer = threading.Timer(IDLE_SECONDS, self.rest)
            self._timer.daemon = True
            if not self._gone:
                self._timer.start()

    def rest(self) -> None:
        """End the model's process unless it has something to do; the next block starts it again."""
        if self._turn.acquire(blocking=False):
            try:
                if self._apart is not None:
                    self._apart.close()
            finally:
                self._turn.release()

    def close(self) -> None:
        """End the model's process, whatever it is doing: from now on no block of the run is committed here."""
        self._gone = True
        self._timer.cancel()
        while not self._turn.acquire(timeout=0.1):
            with contextlib.suppress(AttributeError):  # none yet, or it is being buried right now
                self._apart.close()  # type: ignore[union-attr]  # says the same
        try:
            if self._apart is not None:
                self._apart.close()
        finally:
            self._turn.release()


# --- what a client asks for --------------------------------------------------------------------------

_stations: dict[str, _Station] = {}
_dismissed: set[str] = set()
_guard = threading.Lock()


def _station(token: str, order: Order) -> _Station:
    """Return the station of a run; raises DismissedError if the run has ended: what was cancelled may come late."""
    with _guard:
        if token in _dismissed:
            raise DismissedError
        return _stations.setdefault(token, _Station(order))


def describe(token: str, order: Order) -> tuple[ModelSpec, str]:
    """Return the model's spec, and the kind of device that it runs on."""
    station = _station(token, order)
    with station.turn:
        return station.model().spec, station.model().device


def estimate(token: str, order: Order) -> tuple[float, float]:
    """Return seconds and MiB for a tile."""
    station = _station(token, order)
    with station.turn:
        return station.model().estimate()


def work(token: str, order: Order, unit: Sequence[BlockTask]) -> Answer:
    """Do blocks, in their order; see `Answer`. Raises BlockError."""
    from distributed import get_worker

    try:
        return _station(token, order).do(unit)
    except ModelError as error:
        return Answer(refusal=error, address=get_worker().address)


async def dismiss(token: str) -> None:
    """Let go of a run's model, whatever it is doing; a model that is just being loaded goes a little later."""
    with _guard:
        _dismissed.add(token)
        station = _stations.pop(token, None)
    if station is not None:
        with contextlib.suppress(TimeoutError):  # the thread goes on
            await asyncio.wait_for(asyncio.to_thread(station.close), CLOSING_SECONDS)


def dask_setup(worker: Worker) -> None:
    """Leave Ctrl-C to the run that has started this worker; Dask calls this in workers that preload the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
