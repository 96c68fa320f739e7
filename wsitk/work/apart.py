"""The model in a process of its own, which may die: it is started again, and what keeps killing it set aside."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, final

from wsitk.blocks import BlockReport, BlockTask, OpenBlock
from wsitk.blockstore import BlockStore
from wsitk.errors import ModelError
from wsitk.model import ModelSpec
from wsitk.process import Child, ChildError, Death
from wsitk.work.base import Order, Work

__all__ = ["DEATHS", "WorkApart"]

DEATHS = 3
"""A block that has seen so many deaths is set aside; so many that hang, less one."""

AHEAD = 4
"""Blocks that lie ready beside those under way, so that the process never waits."""

LOADING_SECONDS = 900.0

Key = tuple[str, int]


@final
class WorkApart(Work):
    """Runs a model by name in a child process. `on_death` hears of each death, in words.

    `memory_limit` is in bytes of resident memory; a child that finishes no tile for the settings' `deadline`
    is taken for hung. Raises ModelError if the model can't be loaded.
    """

    def __init__(
        self,
        order: Order,
        *,
        memory_limit: int | None = None,
        on_death: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._order = order
        self._limit = memory_limit
        self._on_death = on_death
        self._child: Child | None = None
        self._peak = 0.0
        self._queued: dict[Key, BlockTask] = {}
        self._open: dict[Key, BlockTask] = {}
        self.spec, self.device = self._start()

    # --- life and death ------------------------------------------------------------------------------

    def _start(self) -> tuple[ModelSpec, str]:
        """Start the process and wait until the model is loaded; it may be killed meanwhile, too."""
        for attempt in itertools.count(1):
            self._child = Child("wsitk.work.child:serve", "model's process", memory_limit=self._limit)
            try:
                self._child.send(self._order)
                answer = self._child.receive(LOADING_SECONDS)
            except ChildError as died:
                self._bury(died.death)
                if attempt == DEATHS:
                    text = f"{self._order.model.name} could not be loaded: its process died ({died.death})"
                    raise ModelError("WSI336", text) from died
                continue
            if answer[0] == "refused":
                self.close()
                raise answer[1]
            return answer[1], answer[2]
        raise AssertionError("unreachable")

    def _living(self) -> Child:
        if self._child is None:
            self._start()
        assert self._child is not None
        return self._child

    def _bury(self, death: Death) -> None:
        self._peak = max(self._peak, death.peak_mib)
        self._child = None
        self._on_death(f"the model's process died ({death})")

    # --- work ----------------------------------------------------------------------------------------

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task; see `Work`. Deaths on the way are survived."""
        while True:
            try:
                yield from self._batch(tasks)
                return
            except ChildError as died:
                self._bury(died.death)
                suspects, waiting = list(self._open.values()), list(self._queued.values())
            yield from self._one_by_one(suspects)
            tasks = itertools.chain(waiting, tasks)

    def _one_by_one(self, suspects: list[BlockTask]) -> Iterator[BlockReport]:
        """Do blocks that were under way when the process died: one at a time, to see which it was."""
        for task in suspects:
            for deaths in itertools.count(2):
                try:
                    yield from self._batch(iter([task]))
                    break
                except ChildError as died:
                    self._bury(died.death)
                    if deaths == (DEATHS if died.death.cause != "deadline" else DEATHS - 1):
                        yield self._set_aside(task, deaths, died.death)
                        break

    def _batch(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Have tasks done until none is left. Raises ChildError, with what was under way in `_open`."""
        self._queued, self._open = {}, {}
        child = self._living()
        child.send("run")
        ended = False
        while True:
            while not ended and len(self._queued) < AHEAD:
                task = next(tasks, None)
                if task is not None:
                    self._queued[task.input, task.block] = task
                child.send(task)
                ended = task is None
            kind, *facts = child.receive(self._order.settings.deadline)
            if kind == "done":
                yield self._reported(facts[0])
            elif kind == "flushed":
                return
            elif kind == "failed":
                if not ended:
                    child.send(None)
                raise facts[0]
            else:
                self._hear(kind, facts)

    def _reported(self, report: BlockReport) -> BlockReport:
        del self._open[report.input, report.block]
        return report

    def _hear(self, kind: str, facts: list[Any]) -> None:
        if kind == "open":
            key = (facts[0], facts[1])
            self._open[key] = self._queued.pop(key)
        elif kind == "death":
            self._on_death(facts[0])

    def _set_aside(self, task: BlockTask, deaths: int, last: Death) -> BlockReport:
        """Commit a block of nothing but failed tiles.

        What earlier layers of a volume say of its rows is computed once more; if that fails, too, these rows are
        lost, and the record says so of the tiles that own them.
        """
        reason = f"WSI401 the model's process died {deaths} times on this block ({last.reason}); set aside"
        task = replace(task, aside=reason)
        store = BlockStore(self._order.out / task.input)
        block = OpenBlock(task, self.spec, records=store.record)
        if block.again:
            try:
                (report,) = self._batch(iter([task]))
                return report
            except ChildError as died:
                self._bury(died.death)
        arrays, record = block.contents()
        store.commit(task.block, arrays, record)
        return block.report(0)

    # --- the rest ------------------------------------------------------------------------------------

    def estimate(self) -> tuple[float, float]:
        """Return seconds and MiB for a tile; see `Work`."""
        child = self._living()
        child.send("estimate")
        _, seconds, mib = child.receive(LOADING_SECONDS)
        return seconds, mib

    def peak_mib(self) -> float:
        """Return the most that any of its lives has held; see `Work`."""
        return max(self._peak, self._child.peak_mib if self._child else 0.0)

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.close()
