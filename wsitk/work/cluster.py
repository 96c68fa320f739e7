"""The model on the workers of a Dask cluster, which may come and go: whole blocks travel there, reports come back.

Output and inputs lie on storage that all machines see. Workers commit blocks themselves, so that nothing large
crosses the network. A worker that dies takes no block with it: its blocks are sent to another, or to its
successor. A block that kills the model is found out on the worker, by `WorkApart`, as on a single machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, final

from wsitk.blocks import BlockReport, BlockTask
from wsitk.errors import ModelError, UsageError, WorkError, WsitkError
from wsitk.settings import available_cpus
from wsitk.work import station
from wsitk.work.base import Order, Work

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["WorkCluster"]

TRIES = 100
"""How often a block is sent out again after its worker died: machines are lost more often than blocks are bad."""

PER_THREAD = 2
"""Blocks under way or waiting for each thread of a worker."""


@final
class WorkCluster(Work):
    """Runs a model by name on a Dask cluster: ``local``, ``local:N``, or the address of a scheduler.

    Where any worker has the resource ``GPU``, blocks go to such workers only, one for each unit. `on_death` hears of
    blocks that had to be sent again. Raises UsageError (WSI026) without `distributed` or a scheduler, ModelError if
    the model can't be loaded.
    """

    def __init__(
        self, order: Order, address: str, *, on_death: Callable[[str], None] = lambda text: None
    ) -> None:
        self._order = order
        self._token = uuid.uuid4().hex
        self._on_death = on_death
        self._client, self._cluster = _connect(address)
        self._peak = 0.0
        resources = {n for w in self._workers().values() for n in w.get("resources", {})}
        self._wishes: dict[str, float] = {"GPU": 1} if "GPU" in resources else {}
        try:
            self.spec, self.device = self._ask(station.describe)
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task; see `Work`."""
        from distributed import as_completed

        waiting: dict[Any, tuple[BlockTask, int]] = {}
        done = as_completed(raise_errors=False)
        try:
            for task in itertools.islice(tasks, self._room()):
                self._send(task, 0, waiting, done)
            for future in done:
                task, tries = waiting.pop(future.key)
                report = self._report(future, task, tries, waiting, done)
                if report is not None:
                    yield report
                for task in itertools.islice(tasks, max(0, self._room() - len(waiting))):
                    self._send(task, 0, waiting, done)
        finally:
            self._client.cancel([f for f, _ in list(done.futures.items())])

    def _report(
        self,
        future: Future,
        task: BlockTask,
        tries: int,
        waiting: dict[Any, tuple[BlockTask, int]],
        done: Any,
    ) -> BlockReport | None:
        """Return what came back; None where the block had to be sent again."""
        if future.status == "finished":
            report, words, peak = future.result()
            self._peak = max(self._peak, peak)
            for each in words:
                self._on_death(each)
            return report
        error = future.exception() if future.status == "error" else None
        if isinstance(error, WsitkError):
            raise error
        if tries == TRIES:
            text = f"{task.input} block {task.block}: {TRIES} workers were lost with it; see their logs"
            raise WorkError("WSI402", text) from error
        if error is not None and type(error).__name__ != "KilledWorker":
            raise error
        self._on_death(f"a worker was lost with {task.input} block {task.block}; it is sent again")
        self._send(task, tries + 1, waiting, done)
        return None

    def _send(
        self, task: BlockTask, tries: int, waiting: dict[Any, tuple[BlockTask, int]], done: Any
    ) -> None:
        key = f"wsitk-{self._token}-{task.input}-{task.block}-{tries}"
        future = self._client.submit(
            station.work, self._token, self._order, task, key=key, pure=False, resources=self._wishes or None
        )  # fmt: skip
        waiting[future.key] = (task, tries)
        done.add(future)

    def _workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return found

    def _room(self) -> int:
        """Return how many blocks may be under way; workers may have come since it was asked last."""
        threads = sum(w["nthreads"] for w in self._workers().values())
        return max(1, PER_THREAD * threads)

    def _ask(self, question: Callable[..., Any]) -> Any:
        """Return a worker's answer."""
        future = self._client.submit(
            question, self._token, self._order, pure=False, resources=self._wishes or None
        )
        try:
            return future.result()
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
        """Have the workers let go of the model; end the cluster if it is ours."""
        with contextlib.suppress(Exception):  # workers may be gone, and so may the scheduler
            self._client.run(station.dismiss, self._token)
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _connect(address: str) -> tuple[Client, Any]:
    """Return a client, and the cluster that was started for it, if it was."""
    try:
        import distributed
    except ImportError as error:
        raise UsageError(
            "WSI026", f"--scheduler {address} needs distributed; pip install 'wsitk[cluster]'"
        ) from error
    if address == "local" or address.startswith("local:"):
        cluster = _local(address)
        return distributed.Client(cluster), cluster
    try:
        return distributed.Client(address, timeout=20), None
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            "WSI026",
            f"no scheduler answers at {address} ({error}); start one with `dask scheduler`, or say --scheduler local",
        ) from error


def _local(address: str) -> Any:
    """Start workers on this machine, where only this machine reaches them."""
    import distributed

    text = address.partition(":")[2] or str(max(1, available_cpus() // 4))
    if not text.isdigit() or not int(text):
        raise UsageError("WSI026", f"--scheduler wants local, local:N or tcp://HOST:PORT, got {address!r}")
    return distributed.LocalCluster(
        n_workers=int(text), threads_per_worker=2, host="127.0.0.1", dashboard_address=None,
        local_directory=os.environ.get("TMPDIR"),
    )  # fmt: skip
