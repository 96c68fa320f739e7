"""What a person or a program sees while a run is going on."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from wsitk.pipeline import Event
    from wsitk.record import InputRow

__all__ = ["Display", "JsonLines", "JsonStream"]


class JsonStream:
    """Base of what says every event as one line of JSON on stdout."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def _say(self, fact: object) -> None:
        sys.stdout.write(json.dumps(fact) + "\n")
        sys.stdout.flush()


@final
class JsonLines(JsonStream):
    """Says every event of a run as one line of JSON on stdout."""

    def event(self, event: Event) -> None:
        """Print one event."""
        self._say({"event": event.kind, "input": event.input, **event.facts})

    def close(self, out: Path, rows: Sequence[InputRow]) -> None:
        """Print the totals and where to look."""
        done = sum(row.status == "done" for row in rows)
        self._say({"event": "finished", "inputs": len(rows), "done": done, "out": str(out)})


@final
class Display:
    """A progress bar over the tiles of all planned inputs, a line for each input, a table at the end."""

    def __init__(self, inputs: int, skipped: dict[str, int]) -> None:
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._inputs = inputs
        self._objects = 0
        self._problems: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tiles · {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("planning", total=None, rate="")
        for reason, count in skipped.items():
            self._say(f"skipped {count}: {reason}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def event(self, event: Event) -> None:
        """Take note of an event; called from several threads."""
        with self._lock:
            getattr(self, f"_{event.kind}")(event)

    def _planned(self, event: Event) -> None:
        bar = self._progress.tasks[0]
        self._progress.update(
            self._task, total=(bar.total or 0) + event.facts["tiles"], description=event.input
        )
        self._progress.advance(self._task, event.facts["tiles_done"])
        resumed = f", {event.facts['tiles_done']} done before" if event.facts["tiles_done"] else ""
        area = event.facts["tissue_mm2"]
        tissue = f"{area} mm² of tissue, " if area else ""
        text = f"{event.input}: {tissue}{event.facts['tiles']} tiles{resumed}"
        self._say(text)
        for warning in event.facts["warnings"]:
            self._say(f"  {warning}")

    def _block(self, event: Event) -> None:
        self._objects += event.facts["objects"]
        self._progress.advance(self._task, event.facts["tiles"])
        speed = self._progress.tasks[0].speed
        rate = f"{speed:.2f}/s · {self._objects:,} objects" if speed else ""
        self._progress.update(self._task, description=event.input, rate=rate)
        seen = self._problems.get(event.input, 0)
        for problem in event.facts["problems"][: max(0, 5 - seen)]:
            self._say(f"  {problem}")
        self._problems[event.input] = seen + len(event.facts["problems"])

    def _death(self, event: Event) -> None:
        self._say(f"  {event.facts['message']}; going on")

    def _finishing(self, event: Event) -> None:
        self._progress.update(self._task, rate=f"writing {event.input}")

    def _ended(self, event: Event) -> None:
        count = sum(event.facts["objects"].values())
        said = f"{count:,} objects" if event.facts["objects"] and event.facts["status"] != "failed" else ""
        parts = (event.facts["status"], said, event.facts["code"], event.facts["message"])
        self._say(f"{event.input}: {' '.join(p for p in parts if p)}")

    def close(self, out: Path, rows: Sequence[InputRow]) -> None:
        """Show a table of all inputs and where to look."""
        self._progress.stop()
        table = Table(box=None, pad_edge=False)
        for name in ("input", "status", "µm/px", "tissue mm²", "objects", "seconds"):
            table.add_column(name, justify="left" if name in ("input", "status") else "right")
        for row in sorted(rows, key=lambda r: r.input):
            table.add_row(
                row.input,
                row.status if not row.code else f"{row.status} {row.code}",
                f"{row.spacing_um:.4f}" if row.spacing_um else "",
                f"{row.tissue_mm2:.1f}" if row.tissue_mm2 is not None else "",
                f"{sum(row.objects.values()):,}" if row.objects and row.status != "failed" else "",
                f"{row.seconds['total']:.0f}" if "total" in row.seconds else "",
            )
        self._console.print(table, highlight=False, markup=False)
        self._say(f"\nLook at {out / 'index.html'}; numbers in {out / 'summary.csv'}")

    def _say(self, text: str) -> None:
        # A message is one line, also in a log file, where rich would break it at 80 columns.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
