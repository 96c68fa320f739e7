"""The files over all inputs of a folder: summary, contact sheet, plates, and the record of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from wsitk.contact_sheet import write_contact_sheet
from wsitk.durable import locked_folder
from wsitk.plate_table import write_plates
from wsitk.record import InputRow, earlier_rows, write_run, write_summary
from wsitk.settings import Settings

__all__ = ["now", "write_report"]


def write_report(
    out: Path,
    rows: Mapping[str, InputRow],
    settings: Settings,
    *,
    seconds: float,
    started: str = "",
    deaths: Sequence[str] = (),
) -> None:
    """Write the files over all inputs, those of other runs into this folder included."""
    with locked_folder(out):  # another part of this run may be saying the same
        every = {**earlier_rows(out / "run.json")}
        for name, row in rows.items():
            if row.status != "partial" or every.get(name, row).status not in ("done", "gaps"):
                every[name] = row
        write_summary(out / "summary.csv", every.values())
        write_contact_sheet(out, list(every.values()))
        write_plates(out, every.values())
        write_run(
            out / "run.json",
            started=started or now(),
            seconds=seconds,
            rows=every.values(),
            settings=asdict(settings),
            deaths=deaths,
        )


def now() -> str:
    """Return the time as `run.json` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
