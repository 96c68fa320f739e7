"""Objects that say how sure they are: which of them are right, and how large they truly are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.evaluation.compare import pixel_frame
from wsitk.evaluation.labels import Labels, Outlines
from wsitk.evaluation.outline_table import AREA_UNIT, draw, outline_table
from wsitk.evaluation.settings import Options
from wsitk.metrics.contingency import Contingency
from wsitk.metrics.panoptic import matches

__all__ = ["INTERVAL", "JudgedObjects", "Role", "judge_objects", "role_of"]

Array = NDArray[Any]
Role = Literal["confidence", "doubt"]

INTERVAL = ("area_low_um2", "area_high_um2")
"""The columns that bound an object's area."""

_DOUBTS = (
    "mutual_information",
    "class_entropy",
    "predictive_entropy",
    "expected_entropy",
    "entropy",
    "variance",
)
_CONFIDENCES = ("probability", "existence")


@final
@dataclass(frozen=True)
class JudgedObjects:
    """The predicted objects of one image that can be judged.

    Attributes
    ----------
    columns : name -> float64 (N,)
        What each says of itself; NaN where it says nothing.
    found : bool (N,)
        It matches a true object at IoU > 0.5.
    right : bool (N,)
        And has its class, where both sides name classes; the same as `found` where they don't.
    typed : bool
        Whether classes were compared.
    truth_um2 : float64 (N,)
        Area of the true object; NaN where there is none, or where the size of a pixel is unknown.
    left_out : int
        Objects that no pixel of the truth's grid shows, hidden or beyond its border.
    """

    columns: Mapping[str, Array]
    found: Array
    right: Array
    typed: bool
    truth_um2: Array
    left_out: int = 0


def role_of(column: str) -> Role | None:
    """Return whether a column of `objects.parquet` grows with confidence, with doubt, or says nothing of either."""
    if column in _CONFIDENCES:
        return "confidence"
    if column in _DOUBTS or re.match("uncertainty_", column):
        return "doubt"
    return None


def judge_objects(
    name: str, objects: Path, truth: Labels | Outlines, predicted: Outlines, options: Options
) -> JudgedObjects:
    """Return which predicted objects are right; `objects` is the table that `predicted` was read from."""
    truth, predicted = truth.renamed(options.truth_names), predicted.renamed(options.predicted_names)
    steps, unit = pixel_frame(name, truth, predicted, options)
    typed = truth.typed and predicted.typed and bool(set(truth.names) & set(predicted.names))
    if isinstance(truth, Labels):
        drawn, _ = draw(predicted, truth.shape)
        table, part = Contingency.of(truth.flat(), drawn.flat()), 1.0
        rows = table.predicted_ids - 1
        right = _typed_labels(truth, drawn, table) if typed else None
    else:
        table, part = outline_table(truth, predicted), 1.0 / AREA_UNIT
        rows = np.arange(len(predicted))
        right = (
            _typed_pairs(truth.kinds, predicted.kinds, truth.names, predicted.names, table) if typed else None
        )
    chosen = matches(table)
    found = np.zeros(len(rows), bool)
    found[table.predicted[chosen]] = True
    area = np.full(len(rows), np.nan)
    if unit != "px":
        um = prod(steps) * (1e6 if unit == "mm" else 1.0)
        area[table.predicted[chosen]] = table.truth_area[table.truth[chosen]] * part * um
    columns = {key: values[rows] for key, values in _columns(objects).items()}
    return JudgedObjects(
        columns, found, found if right is None else right, typed, area, len(predicted) - len(rows)
    )


def _typed_pairs(
    truth: Array, predicted: Array, true_names: tuple[str, ...], names: tuple[str, ...], table: Contingency
) -> Array:
    """Return which objects match one of their own class; a true object without a class agrees with any."""
    place = np.array([*(names.index(n) if n in names else -2 for n in true_names), -1])
    chosen = matches(table)
    t, p = place[truth[table.truth[chosen]]], predicted[table.predicted[chosen]]
    right = np.zeros(len(table.predicted_ids), bool)
    right[table.predicted[chosen]] = (t == p) | (t == -1)
    return right


def _typed_labels(truth: Labels, drawn: Labels, table: Contingency) -> Array:
    """Return the same on a pixel grid; layers of classes may overlap, and are compared class by class."""
    if not truth.layered:
        kinds = truth.kinds[table.truth_ids], drawn.kinds[table.predicted_ids]
        return _typed_pairs(*kinds, truth.names, drawn.names, table)
    right = np.zeros(len(table.predicted_ids), bool)
    for name in set(truth.names) & set(drawn.names):
        mine = Contingency.of(truth.of(name), drawn.of(name))
        hit = mine.predicted_ids[mine.predicted[matches(mine)]]
        right |= np.isin(table.predicted_ids, hit)
    return right


def _columns(objects: Path) -> dict[str, Array]:
    """Return the columns that say how sure an object is, and its interval of area; 8 bytes for each value."""
    from wsitk.writers.parquet import ObjectsFile

    with ObjectsFile(objects) as file:
        held = ("probability", *file.columns)
        wanted = [c for c in held if role_of(c) is not None or c in INTERVAL]
        parts = [[g[c].to_numpy().astype(np.float64) for c in wanted] for g in file.groups(wanted)]
    none = [np.zeros(0)] * len(wanted)
    columns = {c: np.concatenate(v) for c, *v in zip(wanted, none, *parts, strict=True)}
    if set(INTERVAL) <= set(columns):
        low, high = (columns[c] for c in INTERVAL)
        middle = (low + high) / 2
        columns["area_interval"] = np.divide(high - low, middle, out=np.zeros_like(middle), where=middle > 0)
    return columns
