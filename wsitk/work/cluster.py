"""The model on the workers of a Dask cluster, which may come and go: whole blocks travel there, reports come back.

Output and inputs lie on storage that all machines see. Workers commit blocks themselves, so that nothing large
crosses the network. A worker that dies takes no block with it: its blocks are sent to another, or to its
successor. A block that kills the model is found out on the worker, by `WorkApart`, as on a single machine.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.errors import ModelError, UsageError, WorkError, WsitkError
from wsitk.settings import available_cpus, available_memory
from wsitk.work import station
from wsitk.work.base import Order, Work

__all__ = ["ClusterError", "WorkCluster"]

TRIES = 100
"""How often a block is sent out again after its worker died: machines are lost more often than blocks are bad."""

FAILURES = 3
"""So many workers may fail at a block in a way that nobody foresaw, before its input fails."""

PER_THREAD = 2
"""Blocks under way or waiting for each thread of a worker, or for each GPU."""

PATIENCE_SECONDS = 60.0
"""How long to wait for the first worker, and for a scheduler that no longer answers."""

LOOK_SECONDS = 1.0
"""How often to look who is there, while nothing comes back."""

LOADING_SECONDS = 1000.0


class ClusterError(WorkError):
    """Raised when nobody is left who could do the blocks (WSI403): what is committed is kept."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class _Sent:
    """Blocks on their way: `lost` counts workers that died with them, `failed` those that failed otherwise."""

    unit: tuple[BlockTask, ...]
    lost: int = 0
    failed: int = 0
    future: Any = None

    def __str__(self) -> str:
        numbers = sorted(task.block for task in self.unit)
        more = f" to {numbers[-1]}" if len(numbers) > 1 else ""
        return f"{self.unit[0].input} block {numbers[0]}{more}"


@final
class WorkCluster(Work):
    """Runs a model by name on a Dask cluster: ``local``, ``local:N``, or the address of a scheduler.

    Where any worker has the resource ``GPU``, blocks go to such workers only, one for each unit. The blocks of a
    volume go to one worker together, since each of its layers goes on with what the one before has left. A worker
    that can't run the model is not asked again, as long as there are others. `on_death` hears of all that had to
    be done again.

    Raises UsageError (WSI026) without `distributed` or a scheduler, ClusterError (WSI403) without workers,
    ModelError if the model can't be loaded.
    """

    def __init__(
        self, order: Order, address: str, *, on_death: Callable[[str], None] = lambda text: None
    ) -> None:
        self._order = order
        self._address = address
        self._token = uuid.uuid4().hex
        self._on_death = on_death
        self._peak = 0.0
        self._numbers = itertools.count()
        self._sent: dict[str, _Sent] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._barred: set[str] = set()
        self._seen, self._seen_at = dict[str, Any](), 0.0
        self._client, self._cluster = _connect(address)
        try:
            self._order = self._shared(order)
            self._wait_for_workers()
            offered = {name for worker in self._workers().values() for name in worker.get("resources", {})}
            self._wishes: dict[str, float] = {"GPU": 1} if "GPU" in offered else {}
            self.spec, self.device = self._ask(station.describe)
        except BaseException:
            self.close()
            raise
        if order.settings.device == "auto":  # what the key of the results says holds for all workers
            self._order = replace(self._order, settings=replace(self._order.settings, device=self.device))

    def _shared(self, order: Order) -> Order:
        """Return the order with this machine's memory divided among workers that were started here."""
        if self._cluster is None or order.settings.max_ram is not None:
            return order
        share = available_memory() * station.MEMORY_SHARE / len(self._cluster.workers) / 2**30
        return replace(order, settings=replace(order.settings, max_ram=share))

    # --- work ----------------------------------------------------------------------------------------

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task; see `Work`. Raises ClusterError if nobody is left to work."""
        units = self._units(tasks)
        while True:
            for unit in itertools.islice(units, max(0, self._room() - len(self._sent))):
                self._send(_Sent(unit))
            if not self._sent:
                return
            future = self._next()
            sent = self._sent.pop(future.key, None)
            if sent is not None:  # else it was of an input that failed
                yield from self._reports(future, sent)

    def _units(self, tasks: Iterator[BlockTask]) -> Iterator[tuple[BlockTask, ...]]:
        """Yield what is sent together, less what is under way since an earlier call of `run`."""
        under_way = {(task.input, task.block) for sent in self._sent.values() for task in sent.unit}
        fresh = (task for task in tasks if (task.input, task.block) not in under_way)
        if self.spec.labels:
            for _, group in itertools.groupby(fresh, key=lambda task: task.input):
                yield tuple(group)
        else:
            for task in fresh:
                yield (task,)

    def _reports(self, future: Any, sent: _Sent) -> Sequence[BlockReport]:
        """Return what came back; nothing where blocks had to be sent again. Raises BlockError."""
        try:
            answer: station.Answer = future.result(timeout=PATIENCE_SECONDS)
        except BlockError as error:
            self._forget(error.input)
            raise
        except (TimeoutError, CancelledError) as error:  # it was done, and is lost with its worker
            self._lose(sent, error)
        except Exception as error:
            if type(error).__name__ in ("KilledWorker", "FutureCancelledError"):
                self._lose(sent, error)
            else:
                self._fail(sent, error)
        else:
            self._peak = max(self._peak, answer.peak_mib)
            for each in answer.words:
                self._on_death(each)
            if answer.refusal is None:
                return answer.reports
            self._bar(sent, answer.address, answer.refusal)
        return ()

    def _lose(self, sent: _Sent, error: BaseException) -> None:
        since = time.monotonic()
        while self._client.status != "running":  # all are lost with the scheduler, which may come back
            if self._client.status == "closed" or time.monotonic() - since > PATIENCE_SECONDS:
                raise self._alone() from error
            time.sleep(LOOK_SECONDS / 10)
        if sent.lost == TRIES:
            self._forget(sent.unit[0].input)
            text = f"{sent}: {TRIES} workers were lost with it; see their logs"
            raise BlockError("WSI402", text, sent.unit[0].input) from error
        self._on_death(f"a worker was lost with {sent}; it is sent again")
        self._send(replace(sent, lost=sent.lost + 1))

    def _fail(self, sent: _Sent, error: Exception) -> None:
        words = f"{type(error).__name__}: {error}"
        if sent.failed + 1 == FAILURES:
            self._forget(sent.unit[0].input)
            text = f"{sent} failed on {FAILURES} Dask workers, the last time with {words}; see their logs"
            raise BlockError("WSI404", text, sent.unit[0].input) from error
        self._on_death(f"a worker failed at {sent} ({words}); it is sent again")
        self._send(replace(sent, failed=sent.failed + 1))

    def _bar(self, sent: _Sent, address: str, error: ModelError) -> None:
        """Send blocks to others than the worker that can't run the model; raises the error if there are none."""
        self._barred.add(address)
        if not self._willing():
            raise error
        self._on_death(f"the worker at {address} can't run the model and is not asked again: {error}")
        self._send(sent)

    def _send(self, sent: _Sent) -> None:
        name = f"wsitk-{self._token}-{next(self._numbers)}"
        try:
            future = self._client.submit(
                station.work, self._token, self._order, sent.unit, key=name, pure=False,
                workers=self._willing() if self._barred else None, resources=self._wishes or None,
            )  # fmt: skip
            self._sent[name] = replace(sent, future=future)
            future.add_done_callback(self._ended.put)
        except RuntimeError as error:  # the client has given its scheduler up
            raise self._alone() from error

    def _forget(self, name: str) -> None:
        """Drop the blocks of an input that has failed."""
        for key in [k for k, sent in self._sent.items() if sent.unit[0].input == name]:
            self._sent.pop(key).future.cancel()

    # --- who is there --------------------------------------------------------------------------------

    def _next(self) -> Any:
        """Return the next future that has ended. Raises ClusterError when there is nobody to wait for."""
        missed, told = time.monotonic(), False
        while True:
            try:
                return self._ended.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                pass
            answers = self._client.status == "running"
            if answers and self._willing():
                missed, told = time.monotonic(), False
                continue
            patience = self._order.settings.deadline if answers else PATIENCE_SECONDS
            if self._client.status == "closed" or time.monotonic() - missed > patience:
                raise self._alone()
            if not told:
                who = "no worker is there" if answers else "the scheduler does not answer"
                self._on_death(f"{who}; waiting for {patience:.0f} s")
                told = True

    def _alone(self) -> ClusterError:
        if self._client.status == "running":
            text = f"the scheduler at {self._address} has had no workers for {self._order.settings.deadline:.0f} s"
        else:
            text = f"the scheduler at {self._address} no longer answers"
        return ClusterError("WSI403", f"{text}; what is done is kept: start them and run the same command")

    def _wait_for_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE_SECONDS)
        except TimeoutError as error:
            text = (
                f"no worker has come to {self._address} in {PATIENCE_SECONDS:.0f} s; start some: dask worker"
            )
            raise ClusterError("WSI403", f"{text} {self._address}") from error

    def _workers(self) -> dict[str, Any]:
        """Return the workers by address, as of a second ago at most; none while the scheduler does not answer."""
        now = time.monotonic()
        if now - self._seen_at > LOOK_SECONDS:
            try:
                self._seen = self._client.scheduler_info(n_workers=-1)["workers"]
            except (OSError, RuntimeError, TimeoutError):
                self._seen = {}
            self._seen_at = now
        return self._seen

    def _willing(self) -> list[str]:
        """Return the workers that may be asked."""
        return [address for address in self._workers() if address not in self._barred]

    def _room(self) -> int:
        """Return how many blocks may be under way, with the workers that there are now."""
        workers = [self._workers()[address] for address in self._willing()]
        units = (w["resources"].get("GPU", 0) if self._wishes else w["nthreads"] for w in workers)
        return max(1, int(PER_THREAD * sum(units)))

    # --- the rest ------------------------------------------------------------------------------------

    def _ask(self, question: Callable[..., Any]) -> Any:
        """Return a worker's answer."""
        future = self._client.submit(
            question, self._token, self._order, pure=False, resources=self._wishes or None
        )
        try:
            return future.result(timeout=LOADING_SECONDS)
        except WsitkError:
            raise
        except Exception as error:
            text = (
                f"{self._order.model.name} could not be loaded on a worker: {type(error).__name__}: {error}"
            )
            raise ModelError("WSI336", text) from error

    def estimate(self) -> tuple[float, float]:
        """Return seconds and MiB for a tile on one worker; see `Work`."""
        seconds, mib = self._ask(station.estimate)
        return float(seconds), float(mib)

    def peak_mib(self) -> float:
        """Return the most that the model's process of any worker has held; see `Work`."""
        return self._peak

    def close(self) -> None:
        """Have the workers let go of the model, whatever it is doing; end the cluster if it is ours."""
        with contextlib.suppress(Exception):  # workers may be gone, and so may the scheduler
            if self._client.status == "running":
                self._client.cancel([sent.future for sent in self._sent.values()], force=True)
                if self._cluster is None:  # workers of our own end below, and their models with them
                    self._client.run(station.dismiss, self._token, on_error="ignore")
        self._sent.clear()
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _connect(address: str) -> tuple[Any, Any]:
    """Return a client, and the cluster that was started for it, if it was."""
    try:
        distributed: Any = importlib.import_module("distributed")  # untyped, for the most part
    except ImportError as error:
        raise UsageError(
            "WSI026", f"--scheduler {address} needs distributed; pip install 'wsitk[cluster]'"
        ) from error
    if address == "local" or address.startswith("local:"):
        cluster = _local(distributed, address)
        return distributed.Client(cluster), cluster
    try:
        return distributed.Client(address, timeout=20), None
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            "WSI026",
            f"no scheduler answers at {address} ({error}); start one with `dask scheduler`, or say --scheduler local",
        ) from error


def _local(distributed: Any, address: str) -> Any:
    """Start workers on this machine, where only this machine reaches them."""
    text = address.partition(":")[2] or str(max(1, available_cpus() // 4))
    if not text.isdigit() or not int(text):
        raise UsageError("WSI026", f"--scheduler wants local, local:N or tcp://HOST:PORT, got {address!r}")
    return distributed.LocalCluster(
        n_workers=int(text), threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False}, preload=["wsitk.work.station"],
        local_directory=os.environ.get("TMPDIR"),
    )  # fmt: skip
