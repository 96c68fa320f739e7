"""What an evaluation of doubt leaves behind: figures and curves as CSV, three charts as PNG and SVG."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.evaluation.figures import Figure
from wsitk.evaluation.uncertainty import Doubt, Uncertainty
from wsitk.evaluation.uncertainty_charts import COLORS, Chart, Curve, draw_charts
from wsitk.metrics.selective import precision_recall, risk_coverage, roc

__all__ = ["FILES", "uncertainty_dict", "write_uncertainty"]

Array = NDArray[Any]

FILES = ("reliability", "risk_coverage", "error_detection")
"""Stems of the charts."""

_ERRORS = {"object": "no true object", "class": "no true object of the class", "pixel": "wrong side of 0.5"}
_RIGHT = {
    "object": "share that is a true object",
    "class": "share that is a true object of the class",
    "pixel": "share that is foreground",
}
_GRAY = (150, 158, 165)


def uncertainty_dict(uncertainty: Uncertainty) -> dict[str, Any]:
    """Return an `Uncertainty` as plain values; what is not defined is None. Curves are in `curves.csv`."""
    return {
        "scores": [
            {
                "score": d.score,
                "error": d.error,
                "items": d.items,
                "errors": d.errors,
                "figures": [_plain(f) for f in d.figures],
                "reliability": _bins(d),
            }
            for d in uncertainty.doubts
        ],
        "intervals": [_plain(f) for f in uncertainty.intervals],
        "notes": list(uncertainty.notes),
    }


def _plain(figure: Figure) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(figure).items()}


def _bins(doubt: Doubt) -> list[dict[str, float | None]] | None:
    if doubt.calibration is None:
        return None
    confidence, right = doubt.calibration.points
    edges = doubt.calibration.edges.tolist()
    rows = zip(edges[:-1], edges[1:], doubt.calibration.count, confidence, right, strict=True)
    names = ("low", "high", "items", "confidence", "right")
    return [{n: float(v) if isfinite(v) else None for n, v in zip(names, row, strict=True)} for row in rows]


def write_uncertainty(folder: Path, uncertainty: Uncertainty) -> None:
    """Write `uncertainty.csv`, `curves.csv` and the charts into `folder`."""
    (folder / "uncertainty.csv").write_text(_figures_csv(uncertainty), encoding="utf-8")
    (folder / "curves.csv").write_text(_curves_csv(uncertainty), encoding="utf-8")
    for stem, charts in zip(FILES, _charts(uncertainty), strict=True):
        if charts:
            draw_charts(folder / stem, charts)


def _figures_csv(uncertainty: Uncertainty) -> str:
    """Return a row for each figure of each score."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("score", "error", "figure", "value", "low", "high", "items", "errors", "images", "key"))
    for d in uncertainty.doubts:
        for f in d.figures:
            numbers = [_cell(v) for v in (f.value, f.low, f.high)]
            table.writerow((d.score, d.error, f.label, *numbers, d.items, d.errors, f.n, f.key))
    for f in uncertainty.intervals:
        table.writerow(
            ("area", "", f.label, *[_cell(v) for v in (f.value, f.low, f.high)], "", "", f.n, f.key)
        )
    return text.getvalue()


def _cell(value: float) -> str:
    return f"{value:.6g}" if isfinite(value) else ""


def _curves_csv(uncertainty: Uncertainty) -> str:
    """Return a row for each point of each curve, as far as they are drawn."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("curve", "score", "error", "x", "y"))
    for d in uncertainty.doubts:
        curves = {
            "coverage, risk": risk_coverage(d.graded),
            "right items shown, errors shown": roc(d.graded),
            "errors shown, precision": precision_recall(d.graded),
        }
        if d.calibration is not None:
            curves["confidence, right"] = d.calibration.points
        for name, (x, y) in curves.items():
            rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), 1000)).astype(int))
            for a, b in zip(x[rows].tolist(), y[rows].tolist(), strict=True):
                table.writerow((name, d.score, d.error, _cell(a), _cell(b)))
    return text.getvalue()


def _charts(uncertainty: Uncertainty) -> tuple[list[Chart], list[Chart], list[Chart]]:
    """Return the charts of each file: one for each kind of error."""
    kinds = list(dict.fromkeys(d.error for d in uncertainty.doubts))
    sets = {k: [d for d in uncertainty.doubts if d.error == k and d.items] for k in kinds}
    calibrated = [d for d in uncertainty.doubts if d.calibration is not None and d.items]
    return (
        [_reliability(d) for d in calibrated],
        [_risk(kind, mine) for kind, mine in sets.items() if mine],
        [c for kind, mine in sets.items() if mine for c in _detection(kind, mine)],
    )


def _reliability(doubt: Doubt) -> Chart:
    assert doubt.calibration is not None
    x, y = doubt.calibration.points
    shares = doubt.calibration.count / max(1.0, float(doubt.calibration.count.max()))
    ece = next(f.value for f in doubt.figures if f.key.startswith("ece:"))
    name = "p of foreground" if doubt.error == "pixel" else doubt.score
    return Chart(
        f"Reliability of {name}",
        "stated probability",
        _RIGHT[doubt.error],
        (
            Curve("what it would be if it were honest", np.array([0.0, 1]), np.array([0.0, 1]), _GRAY, "guide"),
            Curve(f"{name}: ECE {ece:.3f}, {doubt.items:,} items (bars)", x, y, COLORS[0], "dots"),
        ),
        bars=tuple(shares.tolist()),
    )  # fmt: skip


def _risk(kind: str, doubts: list[Doubt]) -> Chart:
    curves = []
    for k, d in enumerate(doubts):
        x, y = risk_coverage(d.graded)
        area = next(f.value for f in d.figures if f.key.startswith("aurc:"))
        curves.append(Curve(f"{d.score}: AURC {area:.3f}", x, y, COLORS[k % len(COLORS)]))
    share = max(d.errors / d.items for d in doubts)
    curves.append(
        Curve(
            f"a doubt that knows nothing: {share:.3f}", np.array([0.0, 1]), np.full(2, share), _GRAY, "guide"
        )
    )
    # the first few items may all be wrong, which says little and would flatten the rest
    top = max([share, *(float(c.y[c.x >= 0.05].max()) for c in curves)]) * 1.05
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    return Chart(
        f"Risk and coverage ({kind})",
        "coverage, least doubtful first",
        f"share of errors: {_ERRORS[kind]}",
        tuple(curves),
        top=next((s for s in steps if s >= top), 1.0),
    )


def _detection(kind: str, doubts: list[Doubt]) -> tuple[Chart, Chart]:
    found: tuple[list[Curve], list[Curve]] = ([], [])
    for k, d in enumerate(doubts):
        for curves, (x, y), key in zip(
            found, (roc(d.graded), _steps(*precision_recall(d.graded))), ("auroc:", "auprc:"), strict=True
        ):
            value = next(f.value for f in d.figures if f.key.startswith(key))
            curves.append(Curve(f"{d.score}: {value:.3f}", x, y, COLORS[k % len(COLORS)]))
    share = max(d.errors / d.items for d in doubts)
    ends = np.array([0.0, 1.0])
    found[0].append(Curve("a doubt that knows nothing: 0.500", ends, ends, _GRAY, "guide"))
    found[1].append(
        Curve(f"a doubt that knows nothing: {share:.3f}", ends, np.full(2, share), _GRAY, "guide")
    )
    return (
        Chart(f"Errors found ({kind}), ROC", "right items shown", "errors shown", tuple(found[0])),
        Chart(f"Errors found ({kind}), precision", "errors shown", "precision", tuple(found[1])),
    )


def _steps(recall: Array, precision: Array) -> tuple[Array, Array]:
    """Return a curve of steps, whose area is the average precision: a straight line would promise more."""
    return np.concatenate([[0.0], np.repeat(recall, 2)[:-1]]), np.repeat(precision, 2)
