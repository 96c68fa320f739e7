"""`samples.csv`: what a person knows of each image beside its pixels."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wsitk.errors import UsageError

__all__ = ["FILE", "Sample", "read_samples", "write_samples"]

FILE = "samples.csv"
COLUMNS = ("file", "tissue", "group", "weight", "spacing_um")


@dataclass(frozen=True)
class Sample:
    """One row: tissue, slide or patient, factor of how often it is drawn, pixel size if it has its own."""

    tissue: str = ""
    group: str = ""
    weight: float = 1.0
    spacing_um: float | None = None


def read_samples(folder: Path) -> dict[str, Sample]:
    """Return the rows of a folder's ``samples.csv`` by file name; empty if there is none.

    Columns: ``file``, and any of ``tissue``, ``group``, ``weight``, ``spacing_um``. Raises UsageError WSI912.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError("WSI912", f"{path} cannot be read: {error}; save it as CSV in UTF-8") from error
    unknown = {str(c) for row in rows for c in row} - set(COLUMNS)
    if unknown or any(not row.get("file") for row in rows):
        got = ", ".join(sorted(unknown)) or "a row without a file"
        raise UsageError("WSI912", f"{path} has {got}; wanted columns {', '.join(COLUMNS)}")
    return {row["file"]: _sample(path, row) for row in rows}


def _sample(path: Path, row: Mapping[str, str | None]) -> Sample:
    name = str(row["file"])
    weight = _number(path, name, row.get("weight"), 1.0)
    spacing = _number(path, name, row.get("spacing_um"), 0.0)
    return Sample(row.get("tissue") or "", row.get("group") or name, weight, spacing or None)


def _number(path: Path, name: str, text: str | None, default: float) -> float:
    try:
        value = float(text) if text else default
    except ValueError as error:
        raise UsageError("WSI912", f"{path}: {name} has {text!r} where a number belongs") from error
    if not math.isfinite(value) or value < 0:
        raise UsageError("WSI912", f"{path}: {name} has {text!r}; wanted a number that is not negative")
    return value


def write_samples(folder: Path, rows: Mapping[str, Sample]) -> None:
    """Write ``samples.csv``, whole or not at all."""
    partial = folder / f"{FILE}.partial"
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for name, row in rows.items():
            writer.writerow([name, row.tissue, row.group, f"{row.weight:g}", row.spacing_um or ""])
    partial.replace(folder / FILE)
