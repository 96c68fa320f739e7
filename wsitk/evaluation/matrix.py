"""Every model on every data set, by class name: how much a model loses away from home.

After A-Eval (Wang et al., arXiv 2309.03906). What its script got wrong is what this one is careful about: classes
are known by name, not by number; no part of an image is cropped away, so that no false positive is free; a class that
a set or a model lacks is n/a and not perfect; and no class is forgotten, the unmapped ones are listed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, final

from wsitk.errors import UsageError
from wsitk.evaluation.classmap import NameMap, names_of, read_toml
from wsitk.evaluation.compare import ALL
from wsitk.evaluation.run import Evaluation, evaluate
from wsitk.evaluation.settings import Options
from wsitk.writers.base import atomic_dir

__all__ = ["Cell", "Matrix", "Row", "evaluate_matrix", "matrix_dict", "write_matrix"]

_FIGURES = {"nuclei": "bpq@images", "segmentation": "dice@images", "detection": "f1@images"}
"""What the table shows."""


@final
@dataclass(frozen=True)
class Cell:
    """One model on one set: the mean over `classes` of a figure; NaN where there is nothing to compare."""

    value: float
    low: float
    high: float
    in_domain: bool
    classes: Mapping[str, float]
    unmapped: Mapping[str, Sequence[str]]


@final
@dataclass(frozen=True)
class Row:
    """One model: its cells, the mean where it was trained and elsewhere, and what it drops by."""

    model: str
    cells: tuple[Cell, ...]
    diagonal: float
    elsewhere: float
    drop: float


@final
@dataclass(frozen=True)
class Matrix:
    """The table, what it shows, and what was left out."""

    label: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@final
@dataclass(frozen=True)
class _Dataset:
    name: str
    truth: Path
    names: NameMap
    options: Mapping[str, Any]


@final
@dataclass(frozen=True)
class _Model:
    name: str
    predictions: Mapping[str, Path]
    names: NameMap
    trained_on: tuple[str, ...]


def evaluate_matrix(
    models: Path,
    datasets: Path,
    options: Options,
    *,
    on_image: Callable[[str, int], None] = lambda name, total: None,
) -> Matrix:
    """Evaluate every model on every set that it has predictions for.

    `models` is a TOML of ``[NAME]`` tables with ``predictions = {SET = "folder"}``, ``trained_on = ["SET"]`` and
    ``classes = {"its name" = "common name", unmapped = ["..."]}``; `datasets` one of ``[NAME]`` tables with ``truth``,
    ``classes`` and, where files don't state it, ``mpp`` or ``table``. Folders are relative to their file. Raises
    UsageError (WSI836) for a TOML that says something else; else as `evaluate`.
    """
    sets = _datasets(datasets)
    rows = []
    notes: list[str] = []
    for model in _models(models, {s.name for s in sets}):
        cells = []
        for data in sets:
            cell, said = _cell(model, data, options, on_image)
            cells.append(cell)
            notes += said
        rows.append(_row(model.name, cells))
    key = _FIGURES[options.task]
    label = f"{options.task}: {key.split('@')[0]}, mean over images"
    notes.append("* in domain: the model was trained on this set; n/a: no class in common, or no predictions")
    return Matrix(label, tuple(s.name for s in sets), tuple(rows), tuple(notes))


def _cell(
    model: _Model, data: _Dataset, options: Options, on_image: Callable[[str, int], None]
) -> tuple[Cell, list[str]]:
    """Return one model on one set, and what there is to say about it."""
    home = data.name in model.trained_on
    folder = model.predictions.get(data.name)
    if folder is None:
        return Cell(nan, nan, nan, home, {}, {}), [f"{model.name} on {data.name}: no predictions named"]
    own = replace(options, truth_names=data.names, predicted_names=model.names, **data.options)
    evaluation = evaluate(folder, data.truth, own, on_image=on_image)
    words = evaluation.vocabulary
    unmapped = {"truth": words.truth_only, "prediction": words.predicted_only}
    notes = [
        f"{model.name} on {data.name}: unmapped in the {side}: {', '.join(names)}"
        for side, names in unmapped.items()
        if names
    ]
    if evaluation.extra:
        notes.append(
            f"{model.name} on {data.name}: {len(evaluation.extra)} predictions without truth left aside"
        )
    notes += [
        f"{model.name} on {data.name}: {w}" for w in evaluation.warnings if w.code in ("W-MISSING", "W-LEAK")
    ]
    return _value(evaluation, home, unmapped), notes


def _value(evaluation: Evaluation, home: bool, unmapped: Mapping[str, Sequence[str]]) -> Cell:
    """Return the figure of the task, and that of each class; NaN for a class that one side or the truth lacks.

    Areas are averaged over the classes that both sides can hold and the truth does hold; objects are counted
    whatever their class.
    """
    task, words = evaluation.options.task, evaluation.vocabulary
    held = {f.key: f for f in evaluation.figures}
    stem, way = {
        "nuclei": ("pq", "pooled"),
        "segmentation": ("dice", "images"),
        "detection": ("f1", "pooled"),
    }[task]
    kept = {n: held[f"{stem}:{n}@{way}"] for n in words.shared if _in_truth(evaluation, n)}
    absent = [n for n in (*words.shared, *words.truth_only, *words.predicted_only) if n not in kept]
    classes = {n: f.value for n, f in kept.items()} | dict.fromkeys(absent, nan)
    if task != "segmentation":
        figure = held[_FIGURES[task]]
    elif f"dice:{ALL}@images" in held and "in common" not in words.said:
        figure = held[f"dice:{ALL}@images"]
    elif len(kept) == 1:
        (figure,) = kept.values()
    elif kept and len(kept) == len(words.shared):
        figure = held["dice@images"]
    else:
        return Cell(_mean([f.value for f in kept.values()]), nan, nan, home, classes, unmapped)
    return Cell(figure.value, figure.low, figure.high, home, classes, unmapped)


def _in_truth(evaluation: Evaluation, name: str) -> bool:
    """Return whether the truth of any image holds the class."""
    for image in evaluation.images:
        counts, pixels = image.counts.get(name), image.pixels.get(name)
        if (counts and counts.truth) or (pixels and pixels.truth):
            return True
        if image.detection is not None and name in image.types:
            k = image.types.index(name)
            if image.detection.paired[k].sum() + image.detection.missed[k]:
                return True
    return False


def _row(model: str, cells: Sequence[Cell]) -> Row:
    diagonal = _mean([c.value for c in cells if c.in_domain])
    elsewhere = _mean([c.value for c in cells if not c.in_domain])
    return Row(model, tuple(cells), diagonal, elsewhere, diagonal - elsewhere)


def _mean(values: Sequence[float]) -> float:
    """Return the mean of what is defined; NaN if nothing is."""
    kept = [v for v in values if not isnan(v)]
    return sum(kept) / len(kept) if kept else nan


def _datasets(path: Path) -> list[_Dataset]:
    found = []
    for name, table in _tables(path):
        extra = set(table) - {"truth", "classes", "mpp", "table"}
        if extra or not isinstance(table.get("truth"), str):
            raise UsageError(
                "WSI836", f"{path} [{name}]: {sorted(table)}; wanted truth, and perhaps classes, mpp, table"
            )
        options: dict[str, Any] = {}
        if "mpp" in table:
            if not isinstance(table["mpp"], (int, float)) or not table["mpp"] > 0:
                raise UsageError(
                    "WSI836", f"{path} [{name}]: mpp = {table['mpp']!r}; wanted a pixel size in µm"
                )
            options["mpp"] = float(table["mpp"])
        if "table" in table:
            options["table"] = path.parent / str(table["table"])
        names = names_of(table.get("classes", {}), path)
        found.append(_Dataset(name, path.parent / table["truth"], names, options))
    return found


def _models(path: Path, datasets: set[str]) -> list[_Model]:
    found = []
    for name, table in _tables(path):
        extra = set(table) - {"predictions", "classes", "trained_on"}
        predictions, home = table.get("predictions"), table.get("trained_on", [])
        if extra or not isinstance(predictions, Mapping) or not isinstance(home, list):
            raise UsageError(
                "WSI836",
                f'{path} [{name}]: {sorted(table)}; wanted predictions = {{SET = "folder"}}, and perhaps classes,'
                ' trained_on = ["SET"]',
            )
        unknown = set(predictions) - datasets  # a model may well be trained on what is not evaluated
        if unknown:
            raise UsageError(
                "WSI836",
                f"{path} [{name}]: no data set is called {', '.join(sorted(unknown))}; check the spelling",
            )
        folders = {k: path.parent / str(v) for k, v in predictions.items()}
        found.append(_Model(name, folders, names_of(table.get("classes", {}), path), tuple(map(str, home))))
    return found


def _tables(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    content = read_toml(path, "WSI836")
    if not content or not all(isinstance(v, Mapping) for v in content.values()):
        raise UsageError("WSI836", f"{path}: wanted a table [NAME] for each model or data set")
    return list(content.items())


def matrix_dict(matrix: Matrix) -> dict[str, Any]:
    """Return a matrix as plain values; what is not defined is None."""
    return {
        "label": matrix.label,
        "datasets": list(matrix.datasets),
        "models": [
            {
                "model": row.model,
                "in_domain": _plain(row.diagonal),
                "elsewhere": _plain(row.elsewhere),
                "drop": _plain(row.drop),
                "cells": {
                    name: {
                        "value": _plain(c.value),
                        "low": _plain(c.low),
                        "high": _plain(c.high),
                        "in_domain": c.in_domain,
                        "classes": {k: _plain(v) for k, v in c.classes.items()},
                        "unmapped": {k: list(v) for k, v in c.unmapped.items()},
                    }
                    for name, c in zip(matrix.datasets, row.cells, strict=True)
                },
            }
            for row in matrix.rows
        ],
        "notes": list(matrix.notes),
    }


def write_matrix(folder: Path, matrix: Matrix, *, overwrite: bool = False) -> None:
    """Write a folder with `matrix.json` and `matrix.csv`. Raises OutputError (WSI510 to WSI512)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", *matrix.datasets, "in_domain", "elsewhere", "drop"])
    for row in matrix.rows:
        numbers = [*(c.value for c in row.cells), row.diagonal, row.elsewhere, row.drop]
        table.writerow([row.model, *(f"{v:.6g}" if isfinite(v) else "" for v in numbers)])
    with atomic_dir(folder, overwrite=overwrite) as partial:
        content = json.dumps(matrix_dict(matrix), indent=1, ensure_ascii=False, allow_nan=False)
        (partial / "matrix.json").write_text(content + "\n", encoding="utf-8")
        (partial / "matrix.csv").write_text(text.getvalue(), encoding="utf-8")


def _plain(value: float) -> float | None:
    return value if isfinite(value) else None
