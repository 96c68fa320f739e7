"""Which objects a person should look at first: the most doubtful ones of a run, for QuPath, as a table and a picture.

Tables are read row group by row group; of each only those rows stay that are still among the first, so that memory
follows the list and not the slide.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import orjson
import shapely
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.evaluation.uncertainty_objects import role_of
from wsitk.json_stream import JsonReader, features, open_text
from wsitk.model import ObjectClass
from wsitk.review_sheet import Crop, draw_sheet
from wsitk.writers.base import atomic_dir
from wsitk.writers.geojson import fit_to_grid, measurement_name
from wsitk.writers.parquet import ObjectsFile

__all__ = ["Review", "ReviewItem", "most_doubtful", "runs_in", "write_review"]

Array = NDArray[Any]

_PREFERRED = ("mutual_information", "class_entropy", "existence", "probability")
_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:wsitk:review")


@final
@dataclass(frozen=True)
class ReviewItem:
    """One object to look at.

    Attributes
    ----------
    rank : int
        From 1 within the list.
    input : str
        Whose object: the input's folder below the run's.
    id : str
        As in `objects.parquet` and in QuPath.
    kind : ObjectClass
    score : float
        What it was ranked by.
    numbers : name -> float
        Its other measurements, those that are no number left out.
    centroid_xy : tuple of float
        Level-0 pixels.
    outline : shapely geometry
        Level-0 pixels.
    """

    rank: int
    input: str
    id: str
    kind: ObjectClass
    score: float
    numbers: Mapping[str, float]
    centroid_xy: tuple[float, float]
    outline: Any


@final
@dataclass(frozen=True)
class Review:
    """The lists: one of each input, and one over all."""

    by: str
    inputs: Mapping[str, tuple[ReviewItem, ...]]
    all: tuple[ReviewItem, ...]
    skipped: int


def runs_in(out: Path) -> dict[str, Path]:
    """Return name -> folder of every input with objects below `out`, or of `out` itself.

    Raises UsageError (WSI846) if there is none.
    """
    tables = sorted(p for p in out.rglob("objects.parquet") if not _hidden(p.relative_to(out)))
    if not tables:
        raise UsageError(
            "WSI846",
            f"{out}: no objects.parquet; name an output folder of `wsitk run` with a model that finds objects",
        )
    return {
        (t.parent.relative_to(out).as_posix() if t.parent != out else out.resolve().name): t.parent
        for t in tables
    }


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def most_doubtful(out: Path, count: int = 50, by: str = "") -> Review:
    """Return the `count` most doubtful objects of each input below `out`, and of all of them together.

    `by` names a column of `objects.parquet`; confidences are ranked upward and everything else downward. Left empty it
    is the first that all inputs have of mutual_information, class_entropy, existence and probability. Objects of
    equal score stand in the order of the table; those whose score is no number are left out and counted. Raises
    UsageError: WSI846 without objects, WSI847 if there is no such column; OutputError (WSI515) for a damaged table.
    """
    folders = runs_in(out)
    by = _column(folders, by)
    found: dict[str, tuple[ReviewItem, ...]] = {}
    skipped = 0
    for name, folder in folders.items():
        rows, nothing = _first_rows(folder / "objects.parquet", count, by)
        found[name] = tuple(_items(folder / "objects.parquet", name, rows, by))
        skipped += nothing
    sign = 1 if role_of(by) == "confidence" else -1
    ordered = sorted(
        (item for items in found.values() for item in items), key=lambda i: (sign * i.score, i.input, i.rank)
    )
    every = tuple(replace(item, rank=rank) for rank, item in enumerate(ordered[:count], 1))
    return Review(by, found, every, skipped)


def _column(folders: Mapping[str, Path], by: str) -> str:
    """Return the column to rank by, which all tables hold."""
    shared: list[str] | None = None
    for folder in folders.values():
        with ObjectsFile(folder / "objects.parquet") as file:
            held = ["probability", "area_um2", "perimeter_um", *file.columns]
        shared = held if shared is None else [c for c in shared if c in held]
    names = shared or []
    if by and by not in names:
        raise UsageError("WSI847", f"--by {by}: no such column in all tables; there are {', '.join(names)}")
    return by or next(c for c in _PREFERRED if c in names)


def _first_rows(path: Path, count: int, by: str) -> tuple[Array, int]:
    """Return the rows (in the table's order of doubt) of the `count` most doubtful, and how many say nothing."""
    sign = 1.0 if role_of(by) == "confidence" else -1.0
    keys, rows = np.zeros(0), np.zeros(0, np.int64)
    first = skipped = 0
    with ObjectsFile(path) as file:
        for group in file.groups([by]):
            values = sign * group[by].to_numpy().astype(np.float64)
            held = np.flatnonzero(np.isfinite(values))
            skipped += len(values) - len(held)
            keys, rows = np.concatenate([keys, values[held]]), np.concatenate([rows, first + held])
            order = np.argsort(keys, kind="stable")[:count]  # stable: of equals the earlier row
            keys, rows = keys[order], rows[order]
            first += len(values)
    return rows, skipped


def _items(path: Path, name: str, rows: Array, by: str) -> list[ReviewItem]:
    """Return the given rows as items, ranked in their order; only row groups that hold one are read."""
    import pyarrow.parquet as pq

    found: dict[int, ReviewItem] = {}
    rank = {int(row): k for k, row in enumerate(rows.tolist(), 1)}
    with ObjectsFile(path) as table, pq.ParquetFile(path) as file:
        columns = ("probability", "area_um2", "perimeter_um", *table.columns)
        wanted = ["id", "class_id", "centroid_x", "centroid_y", "geometry", *columns]
        first = 0
        for index in range(file.num_row_groups):
            size = file.metadata.row_group(index).num_rows
            mine = np.sort(rows[(rows >= first) & (rows < first + size)]) - first
            if len(mine):
                group = file.read_row_group(index, columns=wanted, use_threads=False).take(mine)
                for at, row in zip(mine.tolist(), group.to_pylist(), strict=True):
                    place = rank[first + at]
                    found[place] = _item(place, name, row, table.classes, columns, by)
            first += size
    return [found[k] for k in sorted(found)]


def _item(
    rank: int,
    name: str,
    row: Mapping[str, Any],
    classes: Sequence[ObjectClass],
    columns: Sequence[str],
    by: str,
) -> ReviewItem:
    numbers = {c: float(row[c]) for c in columns if row[c] is not None and np.isfinite(row[c])}
    centre = row["centroid_x"], row["centroid_y"]
    outline = shapely.from_wkb(row["geometry"])
    return ReviewItem(rank, name, row["id"], classes[row["class_id"]], numbers[by], numbers, centre, outline)


# --- writing -----------------------------------------------------------------------------------------------


def write_review(
    folder: Path,
    review: Review,
    runs: Mapping[str, Path],
    *,
    slides: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> None:
    """Write `review.csv` and `review.png` over all inputs, and for each `NAME/review.geojson`, `.csv` and `.png`.

    `slides` says where an input's slide lies; crops of the others show outlines only, and `on_note` is told.
    Raises OutputError (WSI510 to WSI512), and UsageError (WSI848) where `folder` holds results of an input.
    """
    if (folder / "provenance.json").exists() or (folder / "objects.parquet").exists():
        raise UsageError("WSI848", f"{folder} holds the results of an input; choose another place with --out")
    slides = slides or {}
    with atomic_dir(folder, overwrite=overwrite) as partial:
        _write_list(partial, review.all, review.by, slides, on_note)
        for name, items in review.inputs.items():
            inner = partial / name
            inner.mkdir(parents=True, exist_ok=True)
            _write_list(inner, items, review.by, slides, lambda text: None)
            layer = _layer(items, review.by, _shift(runs[name]))
            (inner / "review.geojson").write_bytes(layer)


def _write_list(
    folder: Path,
    items: Sequence[ReviewItem],
    by: str,
    slides: Mapping[str, Path],
    on_note: Callable[[str], None],
) -> None:
    (folder / "review.csv").write_text(_table(items, by), encoding="utf-8")
    crops = [
        Crop(i.input, i.outline, i.kind.color, f"{i.rank}", f"{i.score:.3g} {i.kind.name}") for i in items
    ]
    draw_sheet(folder / "review.png", crops, slides, f"Look at these first: by {by}", on_note)


def _table(items: Sequence[ReviewItem], by: str) -> str:
    """Return a row for each item, with all its measurements."""
    names = list(dict.fromkeys(n for i in items for n in i.numbers if n != by))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("rank", "input", "id", "class", by, "centroid_x", "centroid_y", *names))
    for i in items:
        centre = (f"{v:.2f}" for v in i.centroid_xy)
        numbers = (f"{i.numbers[n]:.6g}" if n in i.numbers else "" for n in names)
        table.writerow((i.rank, i.input, i.id, i.kind.name, f"{i.score:.6g}", *centre, *numbers))
    return text.getvalue()


def _layer(items: Sequence[ReviewItem], by: str, shift_xy: tuple[float, float]) -> bytes:
    """Return the items as annotations for QuPath, in the order of their rank."""
    shapes, _ = fit_to_grid(np.array([i.outline for i in items], object), shift_xy)
    parts = []
    for item, shape in zip(items, shapes, strict=True):
        if shape is None:  # no area is left of it on QuPath's grid, which would refuse the file
            continue
        properties = {
            "objectType": "annotation",
            "name": f"Review {item.rank}: {measurement_name(by)} {item.score:.3g}",
            "classification": {"name": item.kind.name, "color": list(item.kind.color)},
            "measurements": {"Review rank": item.rank}
            | {measurement_name(n): float(f"{v:.5g}") for n, v in item.numbers.items()},
        }
        # an id of its own: QuPath would take the detection of the same id for the same object
        name = str(uuid.uuid5(_IDS, item.id))
        body = {"type": "Feature", "id": name, "geometry": orjson.Fragment(shapely.to_geojson(shape))}
        parts.append(orjson.dumps(body | {"properties": properties}))
    return b'{"type":"FeatureCollection","features":[\n' + b",\n".join(parts) + b"\n]}\n"


def _shift(folder: Path) -> tuple[float, float]:
    """Return by how much QuPath's coordinates differ from level 0: the run's own GeoJSON tells, object by object.

    QuPath shows a slide cropped to the bounds that its scanner states. Zero where the run wrote no GeoJSON.
    """
    view = folder / "objects.geojson.gz"
    if not view.is_file():
        return 0.0, 0.0
    try:
        with open_text(view) as stream:
            for feature in features(JsonReader(stream)):
                if feature["properties"].get("objectType") == "detection":
                    return _shift_of(folder, feature)
    except (SourceError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise SourceError("WSI821", f"{view}: can't be read ({error}); is the file whole?") from error
    return 0.0, 0.0


def _shift_of(folder: Path, feature: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far an object of the table lies from where QuPath's view has it, in whole pixels."""
    seen = shapely.bounds(shapely.from_geojson(orjson.dumps(feature["geometry"])))[:2]
    with ObjectsFile(folder / "objects.parquet") as file:
        for group in file.groups(["id", "bbox"]):
            names = group["id"].to_pylist()
            if feature["id"] in names:
                box = group["bbox"][names.index(feature["id"])].as_py()
                x, y = np.rint(np.array([box["xmin"], box["ymin"]]) - seen).tolist()
                return x, y
    return 0.0, 0.0
