"""Inputs in, results out: plans, feeds the worker, finishes each input when its last block is committed.

Planning runs one input ahead and finishing runs behind, each in a thread, so that the device goes from one
slide to the next without waiting. An input that fails ends in a row; the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.contact_sheet import write_contact_sheet
from wsitk.device import choose_device, fix_arithmetic
from wsitk.errors import OutputError, UsageError, WsitkError
from wsitk.finish import finish
from wsitk.journal import Journal
from wsitk.model import ModelSpec, TileModel
from wsitk.outcome import done_row, exit_code, failed_row, known_error
from wsitk.plan import Plan, make_plan, resolve_spec, working_image
from wsitk.predictor import Predictor
from wsitk.record import InputRow, earlier_rows, peak_memory_mib, read_json, write_run, write_summary
from wsitk.registry import load_model
from wsitk.result import Result
from wsitk.settings import Settings, available_cpus
from wsitk.sources import open_source
from wsitk.sources.base import Source, SourceRef
from wsitk.sources.working import WorkingImage
from wsitk.worker import BlockWorker

__all__ = ["Event", "Input", "Result", "Runner", "exit_code", "run"]


@dataclass(frozen=True)
class Input:
    """One thing to work on: its name below the output folder, and a path or an open source."""

    name: str
    source: str | Source


@dataclass(frozen=True)
class Event:
    """Something a person may want to see: ``planned``, ``block``, ``finishing``, ``ended``."""

    kind: str
    input: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Job:
    """An input under way."""

    plan: Plan
    folder: Path
    journal: Journal
    left: set[int]
    began: float
    seconds: dict[str, float] = field(default_factory=dict)
    failed: bool = False


def run(
    model: TileModel | str | Path,
    source: Source | str | Path | NDArray[np.generic],
    *,
    out: str | Path,
    spacing: float | tuple[float, ...] | None = None,
    **settings: Any,
) -> Result:
    """Run `model` over one slide, image or array and return the result in `out`.

    `spacing` (µm) is for arrays, and for files instead of what they state; `settings` are the fields of
    `wsitk.settings.Settings`. Running again continues where a killed run stopped. Raises the WsitkError
    that stopped the input.
    """
    chosen = model if isinstance(model, TileModel) else load_model(model)
    opened = open_source(source, mpp=spacing)
    with contextlib.nullcontext(opened) if opened is source else opened:
        runner = Runner(chosen, Path(out), Settings(**settings))
        runner.run([Input(opened.name, opened)])
    if runner.errors:
        raise runner.errors[0]
    return Result(Path(out) / opened.name)


@final
class Runner:
    """Runs one model over many inputs into one output folder."""

    def __init__(
        self,
        model: TileModel,
        out: Path,
        settings: Settings,
        *,
        mpp: Mapping[str, float] | float | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._model = model
        self._out = out
        self._mpp = mpp
        self._emit = on_event
        self._device = choose_device(settings.device)
        cores = available_cpus()
        self._settings = replace(
            settings, workers=settings.workers or cores, threads=settings.threads or cores
        )
        self._spec: ModelSpec = resolve_spec(model.spec, settings)
        self._jobs: dict[str, _Job] = {}
        self._sources: dict[str, Source] = {}
        self._finishing: list[Future[None]] = []
        self.rows: dict[str, InputRow] = {}
        self.errors: list[Exception] = []

    def run(self, inputs: Sequence[Input]) -> list[InputRow]:
        """Work on all inputs; return a row for each. Raises OutputError if nothing can be written."""
        started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        self._make_folder()
        fix_arithmetic(self._settings.threads or 1)
        try:
            # the finisher is left first: it writes under the locks
            with contextlib.ExitStack() as locks, ThreadPoolExecutor(1, "wsitk-finish") as finisher:
                self._work(inputs, finisher, locks)
                for future in self._finishing:
                    future.result()
        except BaseException:
            with contextlib.suppress(OSError):  # what is done is told, if there is room to
                self._report(started, time.perf_counter() - began)
            raise
        self._report(started, time.perf_counter() - began)
        return list(self.rows.values())

    def _report(self, started: str, seconds: float) -> None:
        """Write the files over all inputs, those of earlier runs into this folder included."""
        rows = list({**earlier_rows(self._out / "run.json"), **self.rows}.values())
        write_summary(self._out / "summary.csv", rows)
        write_contact_sheet(self._out, rows)
        settings = {**asdict(self._settings), "device": str(self._device)}
        write_run(self._out / "run.json", started=started, seconds=seconds, rows=rows, settings=settings)

    def plans(self, inputs: Sequence[Input]) -> Iterator[Plan]:
        """Yield the plan of every input that can be run; the others end in `rows`. Writes nothing."""
        for item in inputs:
            plan = self._guarded(item.name, partial(self._plan, item))
            if plan is not None:
                yield plan

    def estimate(self) -> tuple[float, float]:
        """Return what a tile costs on this machine: seconds in the network, and MiB of memory in all.

        Runs a blank group of tiles twice and times the second time.
        """
        fix_arithmetic(self._settings.threads or 1)
        predictor = Predictor(self._model, self._device, self._settings.precision)
        blank = [np.full((*self._spec.tile, self._spec.channels), 255, np.uint8)] * self._spec.compute_batch
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            for outputs in predictor(blank)[0]:
                for value in outputs.values():
                    value.cpu()
            seconds = time.perf_counter() - began
        return seconds / len(blank), peak_memory_mib()

    # --- planning ------------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            probe = self._out / ".wsitk-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(
                "WSI502", f"cannot write to {self._out}: {error.strerror}; choose another --out"
            ) from error

    def _open(self, item: Input) -> Source:
        if isinstance(item.source, Source):
            return item.source
        mpp = self._mpp.get(item.name) if isinstance(self._mpp, Mapping) else self._mpp
        return open_source(item.source, mpp=mpp, name=Path(item.name).name)

    def _plan(self, item: Input) -> Plan:
        _check_name(item.name)
        source = self._open(item)
        try:
            ref = source.ref
            if ref is None or isinstance(item.source, Source):
                ref = SourceRef(f"memory:{item.name}")
                self._sources[ref.path] = source
            plan = make_plan(item.name, ref, source, self._spec, self._settings)
        finally:
            if source is not item.source:
                source.close()
        arithmetic = [self._device.type, self._settings.threads if self._device.type == "cpu" else 0]
        return replace(plan, key={**plan.key, "arithmetic": arithmetic})

    def _image(self, ref: SourceRef) -> WorkingImage:
        source = self._sources.get(ref.path) or open_source(ref)
        return working_image(source, self._spec)

    def _guarded(self, name: str, action: Callable[[], Plan]) -> Plan | None:
        """Return the plan, or note the row of an input that cannot be run."""
        try:
            return action()
        except Exception as error:  # whatever it was, the other inputs go on
            self._fail(name, error)
            return None

    # --- working -------------------------------------------------------------------------------------

    def _work(
        self, inputs: Sequence[Input], finisher: ThreadPoolExecutor, locks: contextlib.ExitStack
    ) -> None:
        issued: dict[tuple[str, int], BlockTask] = {}

        def issue(tasks: Iterable[BlockTask]) -> Iterator[BlockTask]:
            nonlocal issued
            for task in tasks:
                issued[task.input, task.block] = task
                yield task

        fresh = issue(self._tasks(inputs, finisher, locks))
        predictor = Predictor(self._model, self._device, self._settings.precision)
        again: list[BlockTask] = []
        while True:
            worker = BlockWorker(
                self._model,
                predictor,
                workers=self._settings.workers or 1,
                groups=self._settings.batch,
                open_image=self._image,
                journal=lambda name: self._jobs[name].journal,
                keep_open=frozenset(i.name for i in inputs if isinstance(i.source, Source)),
            )
            try:
                for report in worker.run(itertools.chain(again, fresh)):
                    del issued[report.input, report.block]
                    self._note(report, finisher)
                return
            except BlockError as failure:
                _raise_if_disk(failure.__cause__, self._out)
                self._abandon(failure)
                issued = {k: t for k, t in issued.items() if t.input != failure.input}
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
                if not job.left:  # all was committed by a run that was stopped
                    self._finishing.append(finisher.submit(self._finish, job))
                    continue
                todo = frozenset(job.left)
                for task in job.plan.tasks():
                    if task.block in todo and not job.failed:
                        yield task

    def _start(self, plan: Plan, locks: contextlib.ExitStack) -> _Job | None:
        """Take the lock, look at what is done already, and announce the rest; None if there is none."""
        folder = self._out / plan.name
        try:
            journal = locks.enter_context(Journal(folder, plan.key, overwrite=self._settings.overwrite))
            if (folder / "provenance.json").is_file():
                journal.forget_blocks()  # a kill may have come between the last file and this
                journal.close()
                self._already_done(plan, folder)
                return None
            return self._begin(plan, folder, journal)
        except OSError as error:
            _raise_if_disk(error, self._out)
            text = f"{folder}: {error.strerror or error}; mend it or choose another --out"
            self._fail(plan.name, error if isinstance(error, WsitkError) else OutputError("WSI502", text))
        except Exception as error:  # whatever it was, the other inputs go on
            self._fail(plan.name, error)
        return None

    def _begin(self, plan: Plan, folder: Path, journal: Journal) -> _Job:
        todo, done = list(plan.tasks()), journal.committed()
        job = _Job(plan, folder, journal, {t.block for t in todo} - done.keys(), time.perf_counter())
        self._jobs[plan.name] = job
        facts = {
            "tiles": sum(len(t.tiles) for t in todo),
            "tiles_done": sum(len(t.tiles) for t in todo if t.block in done),
            "tissue_mm2": round(plan.tissue_mm2, 2),
            "warnings": list(plan.warnings),
        }
        self._emit(Event("planned", plan.name, facts))
        return job

    def _note(self, report: BlockReport, finisher: ThreadPoolExecutor) -> None:
        job = self._jobs[report.input]
        job.left.discard(report.block)
        for stage, value in report.seconds.items():
            job.seconds[stage] = job.seconds.get(stage, 0.0) + value
        bad = [s.reason for s in report.statuses if s.status in ("unreadable", "model_failed")]
        facts = {"tiles": len(report.statuses), "objects": report.objects, "problems": bad}
        self._emit(Event("block", report.input, facts))
        for future in self._finishing:  # a full disk stops the run now, not at its end
            if future.done():
                future.result()
        if not job.left and not job.failed:
            self._finishing.append(finisher.submit(self._finish, job))

    def _abandon(self, failure: BlockError) -> None:
        job = self._jobs.pop(failure.input)
        job.failed = True
        job.journal.close()
        self._fail(failure.input, failure)

    # --- ending --------------------------------------------------------------------------------------

    def _finish(self, job: _Job) -> None:
        """Merge the blocks of an input into its results; runs in the finisher's thread."""
        name = job.plan.name
        self._emit(Event("finishing", name))
        began = time.perf_counter()
        try:
            source = self._sources.get(job.plan.ref.path) or open_source(job.plan.ref)
            try:
                record = finish(job.plan, self._spec, job.journal, job.folder, source, self._settings)
            finally:
                if job.plan.ref.path not in self._sources:
                    source.close()
        except Exception as error:  # whatever it was, the other inputs go on
            _raise_if_disk(error, self._out)
            self._fail(name, error)
            return
        finally:
            job.journal.close()
            del self._jobs[name]  # its mask and grid: a run over many slides must not collect them
        job.seconds["finish"] = time.perf_counter() - began
        job.seconds["total"] = time.perf_counter() - job.began
        self._end(done_row(job.plan, record, job.seconds, self._settings.max_unreadable))

    def _already_done(self, plan: Plan, folder: Path) -> None:
        record = read_json(folder / "provenance.json")
        self._end(done_row(plan, record, {}, self._settings.max_unreadable))

    def _fail(self, name: str, error: Exception) -> None:
        known = known_error(name, error)
        self.errors.append(known)
        self._end(failed_row(name, known))

    def _end(self, row: InputRow) -> None:
        self.rows[row.input] = row
        facts = {"status": row.status, "code": row.code, "message": row.message, "objects": dict(row.objects)}
        self._emit(Event("ended", row.input, facts))


def _check_name(name: str) -> None:
    """Refuse a name that would write outside of its own folder below the output (UsageError WSI015)."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or name in ("run.json", "summary.csv", "index.html"):
        raise UsageError(
            "WSI015", f"an input cannot be called {name!r}: its results would have no folder of their own"
        )


def _raise_if_disk(error: BaseException | None, out: Path) -> None:
    """Stop everything when the disk is full, at whatever depth that is said: nothing else could be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                "WSI501",
                f"{out}: {os.strerror(error.errno)}; free some space and run the same command to resume",
            ) from error
        error = error.__cause__
