"""What is said about a run: a row per input, the deterministic provenance, and the record with the times."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wsitk.anonymous import veiled_record
from wsitk.discard import RESULTS, result_files
from wsitk.durable import write_durably
from wsitk.writers.base import sha256_file

__all__ = [
    "InputRow",
    "earlier_rows",
    "peak_memory_mib",
    "provenance",
    "read_json",
    "write_run",
    "write_summary",
]

NOTICE = "Research use only; not a medical device."

VERSIONED = ("wsitk", "numpy", "torch", "timm", "openslide-python", "openslide-bin", "tifffile", "imagecodecs",
             "opencv-python-headless", "numba", "zarr", "shapely", "pyarrow")  # fmt: skip


@dataclass(frozen=True)
class InputRow:
    """One line of `summary.csv`.

    `status` is ``done``, ``gaps`` (done, but more tiles were unreadable than allowed) or ``failed``.
    """

    input: str
    status: str
    code: str = ""
    message: str = ""
    spacing_um: float | None = None
    spacing_provenance: str = ""
    tissue_mm2: float | None = None
    tiles: Mapping[str, int] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)
    voxels: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, float | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    exit_code: int = 0

    def cells(self) -> dict[str, object]:
        """Return the row as flat columns."""
        flat: dict[str, object] = {
            "input": self.input,
            "status": self.status,
            "code": self.code,
            "spacing_um": "" if self.spacing_um is None else f"{self.spacing_um:.4f}",
            "spacing_from": self.spacing_provenance,
            "tissue_mm2": "" if self.tissue_mm2 is None else f"{self.tissue_mm2:.2f}",
        }
        flat |= {f"tiles_{k}": v for k, v in self.tiles.items()}
        flat |= {f"objects_{k}": v for k, v in self.objects.items()}
        flat |= {f"voxels_{k}": v for k, v in self.voxels.items()}
        flat |= {k: "" if v is None else f"{v:.6g}" for k, v in self.measures.items()}
        flat |= {f"seconds_{k}": f"{v:.1f}" for k, v in self.seconds.items()}
        return flat | {
            "peak_mib": "" if self.peak_mib is None else f"{self.peak_mib:.0f}",
            "message": self.message,
        }


def write_summary(path: Path, rows: Iterable[InputRow]) -> None:
    """Write `summary.csv`, a line for each input, in the order of their names."""
    cells = [row.cells() for row in sorted(rows, key=lambda r: r.input)]
    names = list(dict.fromkeys(n for row in cells for n in row if n not in ("peak_mib", "message")))
    text = io.StringIO()
    table = csv.DictWriter(text, [*names, "peak_mib", "message"], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(cells)
    write_durably(path, text.getvalue().encode())


def write_run(
    path: Path,
    *,
    started: str,
    seconds: float,
    rows: Iterable[InputRow],
    settings: Mapping[str, Any],
    deaths: Sequence[str] = (),
) -> None:
    """Write `run.json`: the command, the machine, the times, what died, and how each input ended."""
    command, settings = veiled_record(sys.argv, settings)
    record = {
        "notice": NOTICE,
        "command": command,
        "started": started,
        "seconds": round(seconds, 2),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "settings": settings,
        "deaths": list(deaths),
        "inputs": {r.input: asdict(r) for r in rows},
    }
    write_durably(path, json.dumps(record, indent=1).encode())


def earlier_rows(path: Path) -> dict[str, InputRow]:
    """Return the rows of earlier runs into the same folder, from its `run.json`; none if there is none."""
    try:
        stored = json.loads(path.read_bytes())["inputs"]
        return {name: InputRow(**row) for name, row in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent, or of another version: the results of each input are told by its own folder


def provenance(folder: Path, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what made the bytes in `folder`: `body`, versions, and the hash of every file of its results."""
    # By the names that our writers give: what others put beside them is not vouched for.
    files = [name for name in result_files(folder) if name != RESULTS[-1]]  # all but the record itself
    outputs = {name: sha256_file(folder / name) for name in files}
    return {"notice": NOTICE, **body, "versions": versions(), "outputs": outputs}


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file that wsitk wrote."""
    value: dict[str, Any] = json.loads(path.read_bytes())
    return value


def peak_memory_mib() -> float:
    """Return the most memory this process has held at once, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 1024**2
