"""Inputs in, results out: plans, has blocks worked off, finishes each input when its last block is committed.

Pixels are read and models run in child processes, which may die; what runs here only plans, keeps the books
and writes. Planning runs one input ahead and finishing runs behind, each in a thread, so that the device goes
from one slide to the next without waiting. An input that fails ends in a row; the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from wsitk.anonymous import Veil
from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.blockstore import DamagedBlockError
from wsitk.durable import write_durably
from wsitk.errors import OutputError, UsageError, WsitkError
from wsitk.finish import finish
from wsitk.jobs import Job
from wsitk.journal import Journal
from wsitk.model import Model, ModelSpec
from wsitk.outcome import done_row, exit_code, failed_row, known_error, partial_row
from wsitk.plan import Plan, resolve_spec
from wsitk.planner import Input, Planner
from wsitk.reading.client import ReaderProcess
from wsitk.record import InputRow, earlier_rows, read_json
from wsitk.registry import load_model
from wsitk.reports import now, write_report
from wsitk.settings import Settings, available_cpus, available_memory
from wsitk.work.apart import WorkApart
from wsitk.work.base import ModelRef, Order, Work, slot_bytes
from wsitk.work.here import WorkHere

__all__ = ["Event", "Input", "ModelRef", "Runner", "exit_code"]

MEMORY_SHARE = 0.9
"""Of the machine's memory, what the model's process may hold unless `max_ram` says otherwise."""


@dataclass(frozen=True)
class Event:
    """Something a person may want to see: ``planned``, ``block``, ``death``, ``finishing``, ``ended``."""

    kind: str
    input: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@final
class Runner:
    """Runs one model over many inputs into one output folder.

    A model given by reference runs in a process of its own, a model object in this one. Use as a context
    manager, or call `close`, to end the processes when `run` is not the last thing asked of it.
    """

    def __init__(
        self,
        model: Model | ModelRef,
        out: Path,
        settings: Settings,
        *,
        mpp: Mapping[str, float] | float | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._out = out
        self._emit = on_event
        self._veil = Veil(settings, out)
        cores = available_cpus()
        self._settings = replace(
            settings, workers=settings.workers or cores, threads=settings.threads or cores
        )
        self._deaths: list[str] = []
        self._work = self._put_to_work(model)
        self._spec: ModelSpec = resolve_spec(self._work.spec, settings)
        self._reader = ReaderProcess(
            threads=max(2, self._settings.workers or 1),
            slot_bytes=slot_bytes(self._spec) if isinstance(self._work, WorkHere) else 0,
            preload=("wsitk.plan",),
            deadline=settings.deadline,
            on_death=lambda death: self._mourn(f"the reading process died ({death})"),
        )
        self._planner = Planner(
            self._spec,
            self._settings,
            self._work.device,
            self._reader,
            self._veil.mpp(mpp),
            here=isinstance(self._work, WorkHere),
        )
        self._jobs: dict[str, Job] = {}
        self._finishing: list[Future[None]] = []
        self.rows: dict[str, InputRow] = {}
        self.errors: list[Exception] = []

    def _put_to_work(self, model: Model | ModelRef) -> Work:
        if self._settings.scheduler:
            return self._on_a_cluster(model)
        if isinstance(model, ModelRef) and self._settings.supervise:
            limit = self._settings.max_ram
            order = Order(model, self._settings, self._out.absolute())
            return WorkApart(
                order,
                memory_limit=int(limit * 2**30 if limit else available_memory() * MEMORY_SHARE),
                on_death=self._mourn,
            )
        options = model.options if isinstance(model, ModelRef) else {}
        loaded = load_model(model.name, **options) if isinstance(model, ModelRef) else model
        return WorkHere(
            loaded, self._settings, self._out, lambda task: self._planner.tiles(task), options=options
        )

    def _on_a_cluster(self, model: Model | ModelRef) -> Work:
        if not isinstance(model, ModelRef):
            text = "a model object can't be sent to other machines; name the model, or say module:function"
            raise UsageError("WSI026", f"scheduler {self._settings.scheduler}: {text}")
        from wsitk.work.cluster import WorkCluster  # brings distributed along

        order = Order(model, self._settings, self._out.absolute())
        return WorkCluster(order, self._settings.scheduler, on_death=self._mourn)

    def close(self) -> None:
        """End the processes that read and compute."""
        self._work.close()
        self._reader.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- the whole run -------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Input]) -> list[InputRow]:
        """Work on all inputs; return a row for each. Raises OutputError if nothing can be written."""
        started, began = now(), time.perf_counter()
        try:
            inputs = self._veil.inputs(inputs)
            self._make_folder()
            self._veil.begin(earlier_rows(self._out / "run.json"))
            try:
                # the finisher is left first: it writes under the locks
                with contextlib.ExitStack() as locks, ThreadPoolExecutor(1, "wsitk-finish") as finisher:
                    self._work_off(inputs, finisher, locks)
                    for future in self._finishing:
                        future.result()
            except BaseException:
                with contextlib.suppress(OSError, OutputError):  # what is done is told, if there is room to
                    self._report(started, time.perf_counter() - began)
                raise
            self._report(started, time.perf_counter() - began)
        except OSError as error:
            if isinstance(error, WsitkError):
                raise
            self._raise_if_disk(error)
            text = f"{self._out}: {error.strerror or error}; what is done is kept: mend it and run the same command"
            raise OutputError("WSI502", text) from error
        finally:
            self.close()
        return list(self.rows.values())

    def _report(self, started: str, seconds: float) -> None:
        settings = replace(self._settings, device=self._work.device)
        write_report(self._out, self.rows, settings, started=started, seconds=seconds, deaths=self._deaths)

    def plans(self, inputs: Sequence[Input]) -> Iterator[Plan]:
        """Yield the plan of every input that can be run; the others end in `rows`. Writes nothing."""
        for item in self._veil.inputs(inputs):
            plan = self._guarded(item.name, partial(self._plan, item))
            if plan is not None:
                yield plan

    def estimate(self) -> tuple[float, float]:
        """Return what a tile costs on this machine: seconds in the network, and MiB of memory in all."""
        return self._work.estimate()

    # --- planning ------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            write_durably(self._out / ".wsitk-probe", b"")
            (self._out / ".wsitk-probe").unlink()
        except OSError as error:
            raise OutputError(
                "WSI502", f"cannot write to {self._out}: {error.strerror}; choose another --out"
            ) from error

    def _plan(self, item: Input) -> Plan:
        return self._veil.plan(self._planner.plan(item))

    def _guarded(self, name: str, action: Callable[[], Plan]) -> Plan | None:
        """Return the plan, or note the row of an input that cannot be run."""
        try:
            return action()
        except Exception as error:  # whatever it was, the other inputs go on
            self._fail(name, error)
            return None

    # --- working -------------------------------------------------------------------------------------

    def _work_off(
        self, inputs: Sequence[Input], finisher: ThreadPoolExecutor, locks: contextlib.ExitStack
    ) -> None:
        issued: dict[tuple[str, int], BlockTask] = {}

        def issue() -> Iterator[BlockTask]:
            for task in self._tasks(inputs, finisher, locks):
                issued[task.input, task.block] = task
                yield task

        fresh = issue()
        again: list[BlockTask] = []
        while True:
            try:
                for report in self._work.run(itertools.chain(again, fresh)):
                    del issued[report.input, report.block]
                    self._note(report, finisher)
                return
            except BlockError as failure:
                self._raise_if_disk(failure)
                self._abandon(failure)
                for key in [k for k in issued if k[0] == failure.input]:
                    del issued[key]
                again = list(issued.values())

    def _tasks(
        self, inputs: Sequence[Input], finisher: ThreadPoolExecutor, locks: contextlib.ExitStack
    ) -> Iterator[BlockTask]:
        """Yield the blocks still to do, input by input; the next input is planned meanwhile."""
        with ThreadPoolExecutor(1, "wsitk-plan") as planner:
            names = iter(inputs)
            ahead = [planner.submit(self._plan, item) for item in itertools.islice(names, 1)]
            for item in inputs:
                ahead += [planner.submit(self._plan, n) for n in itertools.islice(names, 1)]
                plan = self._guarded(item.name, ahead.pop(0).result)
                job = self._start(plan, locks) if plan is not None else None
                if job is None:
                    continue
                yield from job.tasks()
                if not job.left and job.plan.name in self._jobs and not job.ending:  # nothing was to be done
                    self._end_job(job, finisher)

    def _start(self, plan: Plan, locks: contextlib.ExitStack) -> Job | None:
        """Take the lock, look at what is done already, and announce the rest; None if there is none."""
        folder, part = self._out / plan.name, self._settings.part
        try:
            journal = locks.enter_context(
                Journal(
                    folder,
                    plan.key,
                    overwrite=self._settings.overwrite,
                    shared=part is not None,
                    stamp=plan.stamp,
                    name=plan.name,
                )
            )
            if journal.finished:
                journal.forget_blocks()  # a kill may have come between the last file and this
                journal.close()
                self._end(self._done_row(plan, folder, {}))
                return None
            job = Job(plan, folder, journal, self._planner.access(plan.ref), part)
            self._jobs[plan.name] = job
            self._announce(job)
            return job
        except OSError as error:
            self._raise_if_disk(error)
            text = f"{folder}: {error.strerror or error}; mend it or choose another --out"
            self._fail(plan.name, error if isinstance(error, WsitkError) else OutputError("WSI502", text))
        except Exception as error:  # whatever it was, the other inputs go on
            self._fail(plan.name, error)
        return None

    def _announce(self, job: Job) -> None:
        mine = [task for task in job.plan.tasks() if job.mine(task.block)]
        facts = {
            "tiles": sum(len(t.tiles) for t in mine),
            "tiles_done": sum(len(t.tiles) for t in mine if t.block not in job.left),
            "tissue_mm2": round(job.plan.tissue_mm2, 2),
            "warnings": list(job.plan.warnings),
        }
        self._emit(Event("planned", job.plan.name, facts))

    def _note(self, report: BlockReport, finisher: ThreadPoolExecutor) -> None:
        job = self._jobs[report.input]
        job.done(report)
        bad = [s.reason for s in report.statuses if s.status in ("unreadable", "model_failed")]
        facts = {"tiles": len(report.statuses), "objects": report.objects, "problems": bad}
        self._emit(Event("block", report.input, facts))
        for future in self._finishing:  # a full disk stops the run now, not at its end
            if future.done():
                future.result()
        if not job.left and not job.failed:
            self._end_job(job, finisher)

    def _abandon(self, failure: BlockError) -> None:
        job = self._jobs.pop(failure.input)
        job.failed = True
        job.close()
        self._fail(failure.input, failure)

    def _mourn(self, words: str) -> None:
        words = self._veil.text(words)
        self._deaths.append(words)
        self._emit(Event("death", "", {"message": words}))

    # --- ending --------------------------------------------------------------------------------------

    def _end_job(self, job: Job, finisher: ThreadPoolExecutor) -> None:
        job.ending = True
        self._finishing.append(finisher.submit(self._finish, job))

    def _finish(self, job: Job) -> None:
        """Merge the blocks of an input into its results; runs in the finisher's thread."""
        name = job.plan.name
        self._emit(Event("finishing", name))
        try:
            self._end(self._finished_row(job))
        except DamagedBlockError as error:
            job.journal.store.discard(error.block)
            self._fail(name, error)
        except Exception as error:  # whatever it was, the other inputs go on
            self._raise_if_disk(error)
            self._fail(name, error)
        finally:
            job.close()
            del self._jobs[name]  # its mask and grid: a run over many slides must not collect them

    def _finished_row(self, job: Job) -> InputRow:
        began = time.perf_counter()
        done, every = job.counts()
        if done < every and not job.journal.finished:  # another part may have finished it meanwhile
            return partial_row(job.plan, done, every)
        with job.journal.finishing() as needed:
            if needed:
                look = self._veil.look(job.access.look)
                job.journal.check_unchanged(look("wsitk.plan:stamp_of"))
                finish(job.plan, self._spec, job.journal, job.folder, look, self._settings)
        job.seconds["finish"] = time.perf_counter() - began
        job.seconds["total"] = time.perf_counter() - job.began
        return self._done_row(job.plan, job.folder, job.seconds)

    def _done_row(self, plan: Plan, folder: Path, seconds: Mapping[str, float]) -> InputRow:
        record = read_json(folder / "provenance.json")
        return done_row(plan, record, seconds, self._settings.max_unreadable, self._work.peak_mib())

    def _fail(self, name: str, error: Exception) -> None:
        known = self._veil.error(name, known_error(name, error))
        self.errors.append(known)
        self._end(failed_row(name, known))

    def _end(self, row: InputRow) -> None:
        self.rows[row.input] = row
        facts = {"status": row.status, "code": row.code, "message": row.message, "objects": dict(row.objects)}
        self._emit(Event("ended", row.input, facts))

    def _raise_if_disk(self, error: BaseException | None) -> None:
        """Stop everything when the disk is full, at whatever depth that is said: nothing could be written."""
        while error is not None:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    "WSI501", f"{self._out}: no space left; free some and run the same command to resume"
                ) from error
            error = error.__cause__
