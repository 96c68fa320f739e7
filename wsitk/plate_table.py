"""`plate.csv` and `plate.png`: a row and a square for each well, when the inputs of a run are wells.

Both are a merge of what lies in the inputs' folders, which anyone may make again. Objects are read a row group
at a time, and kept as the numbers that quantiles need: eight bytes for each.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from wsitk.durable import write_durably
from wsitk.errors import OutputError
from wsitk.record import InputRow
from wsitk.sources.plate import Well, key_place, well_in_name
from wsitk.writers.parquet import ObjectsFile

__all__ = ["UNCERTAIN_EXISTENCE", "UNCERTAIN_INFORMATION", "plates_of", "write_plates"]

UNCERTAIN_EXISTENCE = 0.9
"""An object that fewer than so many of the samples see counts as uncertain."""

UNCERTAIN_INFORMATION = 0.1
"""Where there is no ``existence``: the mean mutual information (0 to 1) above which an object is uncertain."""

_FILES = (".tif", ".tiff", ".png")
_DONE = ("done", "gaps")
_WORST = ("failed", "partial", "gaps", "done")
_SHAPES = ("area_um2", "equivalent_diameter_um")
_QUANTILES = {"median": 50, "p10": 10, "p90": 90}

Values = NDArray[np.float32]


@dataclass
class _Measured:
    """What the objects of a well add up to; arrays hold a value for each object."""

    classes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[Values]] = field(default_factory=lambda: {name: [] for name in _SHAPES})
    kinds: list[NDArray[np.int64]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    uncertain: int | None = None
    count: int = 0

    def add(self, path: Path) -> None:
        """Read the objects of a field; raises OutputError (WSI515) if they cannot be read."""
        with ObjectsFile(path) as file:
            number = [self.classes.setdefault(c.name, len(self.classes)) for c in file.classes]
            means = [n for n in file.columns if n.startswith("intensity_") or n == "mutual_information"]
            doubt = next((n for n in ("existence", "mutual_information") if n in file.columns), "")
            wanted = [*_SHAPES, "class_id", *means, *([doubt] if doubt and doubt not in means else [])]
            for name in means:
                self.sums.setdefault(name, 0.0)
            if doubt:
                self.uncertain = self.uncertain or 0
            for group in file.groups(wanted):
                columns = {name: group.column(name).to_numpy() for name in wanted}
                self._add(columns, means, doubt, np.asarray(number, np.int64))

    def _add(
        self, columns: Mapping[str, NDArray[Any]], means: Sequence[str], doubt: str, number: NDArray[np.int64]
    ) -> None:
        self.count += len(columns["class_id"])
        self.kinds.append(number[columns["class_id"]])
        for name in _SHAPES:
            self.shapes[name].append(columns[name])
        for name in means:
            self.sums[name] += float(columns[name].astype(np.float64).sum())
        if doubt and self.uncertain is not None:
            values = columns[doubt]
            unsure = values < UNCERTAIN_EXISTENCE if doubt == "existence" else values > UNCERTAIN_INFORMATION
            self.uncertain += int(unsure.sum())


def plates_of(names: Iterable[str]) -> dict[str, dict[Well, list[str]]]:
    """Return plate -> well -> names of inputs, for those inputs that are wells; all in order.

    A plate is a file of wells (``plate.ome.tiff/A01_f1``), or a folder in which every TIFF or PNG names a well
    (``exp/dose_A01_f1.tif``). Files of several plates in one folder are told apart by what precedes the well.
    """
    plates: dict[str, dict[Well, list[str]]] = {}
    loose: dict[str, list[str]] = {}
    for name in sorted(names):
        parent, _, last = name.rpartition("/")
        place = key_place(last)
        if place is not None and parent.lower().endswith((".tif", ".tiff")):
            plates.setdefault(parent, {}).setdefault(place[0], []).append(name)
        elif last.lower().endswith(_FILES):
            loose.setdefault(parent, []).append(name)
    for parent, members in loose.items():
        plates |= _folder(parent, members)
    return {plate: dict(sorted(plates[plate].items())) for plate in sorted(plates)}


def _folder(parent: str, members: Sequence[str]) -> dict[str, dict[Well, list[str]]]:
    """Return the plates of a folder's images; none unless there are two or more, and all of them name a well."""
    stems = {name: PurePosixPath(name).name.partition(".")[0] for name in members}
    places = {name: place for name, stem in stems.items() if (place := well_in_name(stem)) is not None}
    if len(places) < max(2, len(members)):
        return {}
    seen = Counter((well, number) for _, well, number in places.values())
    apart = max(seen.values()) > 1  # two images in one place: two plates
    plates: dict[str, dict[Well, list[str]]] = {}
    for name, (before, well, _) in places.items():
        title = "/".join(t for t in (parent, before.strip(" _-.") if apart else "") if t) or "plate"
        plates.setdefault(title, {}).setdefault(well, []).append(name)
    return plates


def write_plates(out: Path, rows: Iterable[InputRow]) -> bool:
    """Write `plate.csv` and `plate.png` into `out` if inputs are wells; tell whether they are."""
    from wsitk.writers.plate_picture import draw_plates

    known = {row.input: row for row in rows}
    plates = plates_of(known)
    if not plates:
        return False
    cells: list[dict[str, str]] = []
    counts: dict[str, dict[Well, int | None]] = {}
    for plate, wells in plates.items():
        counts[plate] = {}
        for well, names in wells.items():
            row = _well(out, plate, well, [known[name] for name in names])
            cells.append(row)
            counts[plate][well] = int(row["objects"]) if row["objects"] else None
    write_durably(out / "plate.csv", _table(cells).encode())
    write_durably(out / "plate.png", draw_plates(counts))
    return True


def _table(cells: Sequence[Mapping[str, str]]) -> str:
    """Return the CSV; columns in the order in which they first occur, those of all wells."""
    names = list(dict.fromkeys(name for row in cells for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(cells)
    return text.getvalue()


def _well(out: Path, plate: str, well: Well, rows: Sequence[InputRow]) -> dict[str, str]:
    """Return one line: only fields that are done count."""
    measured = _Measured()
    done = [row for row in rows if row.status in _DONE]
    statuses = {row.status for row in rows}
    try:
        for row in done:
            if (out / row.input / "objects.parquet").is_file():  # a model may find none
                measured.add(out / row.input / "objects.parquet")
    except (OutputError, OSError, pyarrow.ArrowException):  # `wsitk verify` says what became of it
        done = []
        statuses.add("failed")
    areas = [row.tissue_mm2 for row in done if row.tissue_mm2 is not None]
    area = sum(areas) if done and len(areas) == len(done) else None
    return {
        "plate": plate,
        "well": str(well),
        "row": well.letters,
        "column": str(well.column + 1),
        "status": next(s for s in _WORST if s in statuses),
        "fields": str(len(done)),
        "fields_failed": str(len(rows) - len(done)),
        "area_mm2": _number(area),
        **(_numbers(measured, area) if done and measured.classes else {"objects": ""}),
    }


def _numbers(measured: _Measured, area_mm2: float | None) -> dict[str, str]:
    """Return the columns of a well's objects; empty where there is nothing to take a mean of."""
    count = measured.count
    kinds = np.concatenate(measured.kinds) if measured.kinds else np.zeros(0, np.int64)
    cells = {"objects": str(count)}
    for name, number in measured.classes.items():
        cells[f"objects_{name}"] = str(int((kinds == number).sum()))
    cells["objects_per_mm2"] = _number(count / area_mm2 if area_mm2 else None)
    groups: dict[str, Any] = {"": slice(None)}
    if len(measured.classes) > 1:
        groups |= {f"_{name}": kinds == number for name, number in measured.classes.items()}
    for suffix, chosen in groups.items():
        for name in _SHAPES:
            parts = measured.shapes[name]
            values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
            cells |= _distribution(name, suffix, values[chosen].astype(np.float64))
    for name, total in measured.sums.items():
        cells[f"{name}_mean"] = _number(total / count if count else None)
    if measured.uncertain is not None:
        cells["uncertain_fraction"] = _number(measured.uncertain / count if count else None)
    return cells


def _distribution(name: str, suffix: str, values: NDArray[np.float64]) -> dict[str, str]:
    """Return mean, median and the outer tenths of a measure."""
    cells = {f"{name}_mean{suffix}": _number(float(values.mean()) if len(values) else None)}
    for word, percent in _QUANTILES.items():
        value = float(np.percentile(values, percent)) if len(values) else None
        cells[f"{name}_{word}{suffix}"] = _number(value)
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
