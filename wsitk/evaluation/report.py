"""What an evaluation leaves behind: `evaluation.json`, `images.csv` and a picture of cases."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

from wsitk.evaluation.compare import ALL, ImageScores
from wsitk.evaluation.figures import Figure, image_quality
from wsitk.evaluation.run import Evaluation
from wsitk.evaluation.settings import Length
from wsitk.metrics.counts import Counts
from wsitk.writers.base import atomic_dir

__all__ = ["as_dict", "image_row", "totals", "write_report"]

_NOTICE = "Research use only; not a medical device."


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain values; what is not defined is None."""
    words = evaluation.vocabulary
    return {
        "notice": _NOTICE,
        "options": {f.name: _plain(getattr(evaluation.options, f.name)) for f in fields(evaluation.options)},
        "truth": evaluation.truth_said,
        "prediction": evaluation.predicted_said,
        "images": len(evaluation.images),
        "missing": [i.name for i in evaluation.images if i.missing],
        "without_truth": list(evaluation.extra),
        "classes": {
            "compared": list(words.shared),
            "truth_only": list(words.truth_only),
            "prediction_only": list(words.predicted_only),
        },
        "figures": [_figure(f) for f in evaluation.figures],
        "counts": totals(evaluation),
        "warnings": [asdict(w) for w in evaluation.warnings],
        **_doubt(evaluation),
    }


def _doubt(evaluation: Evaluation) -> dict[str, Any]:
    """Return what was found out about the predictions' own certainty, where that was asked."""
    if evaluation.uncertainty is None:
        return {}
    from wsitk.evaluation.uncertainty_report import uncertainty_dict

    return {"uncertainty": uncertainty_dict(evaluation.uncertainty)}


def _figure(figure: Figure) -> dict[str, Any]:
    return {name: _plain(value) for name, value in asdict(figure).items()}


def totals(evaluation: Evaluation) -> dict[str, dict[str, int]]:
    """Return the summed counts: objects at IoU > 0.5, centroids, pixels."""
    found: dict[str, dict[str, int]] = {}
    for name in (ALL, *evaluation.vocabulary.shared):
        objects = sum((i.counts.get(name, Counts()) for i in evaluation.images), Counts())
        if objects.truth or objects.predicted:
            found[f"objects:{name}"] = {"tp": objects.tp, "fp": objects.fp, "fn": objects.fn}
        pixels = [i.pixels[name] for i in evaluation.images if name in i.pixels]
        if pixels:
            found[f"pixels:{name}"] = {
                k: sum(getattr(p, k) for p in pixels) for k in ("tp", "fp", "fn", "tn")
            }
    points = [i.detection.detection for i in evaluation.images if i.detection is not None]
    if points:
        total = sum(points, Counts())
        found["centroids"] = {"tp": total.tp, "fp": total.fp, "fn": total.fn}
    return found


def image_row(image: ImageScores, evaluation: Evaluation) -> dict[str, Any]:
    """Return one image as flat columns."""
    row: dict[str, Any] = dict(image.facts) | {"missing": int(image.missing), "unit": image.unit}
    protocol = evaluation.options.protocol
    for name in (ALL, *evaluation.vocabulary.shared):
        if name in image.counts:
            c = image.counts[name]
            lost = image.missing and (name == ALL or c.truth > 0)
            row |= {f"pq:{name}": image_quality(c, protocol, lost)}
            row |= {f"tp:{name}": c.tp, f"fp:{name}": c.fp, f"fn:{name}": c.fn}
    if image.detection is not None:
        d = image.detection.detection
        row |= {
            "f1": 0.0 if image.missing else d.f1,
            "centroid_tp": d.tp,
            "centroid_fp": d.fp,
            "centroid_fn": d.fn,
        }
    return row | dict(image.values)


def write_report(
    folder: Path, evaluation: Evaluation, *, overwrite: bool = False, picture: bool = True
) -> None:
    """Write a folder with `evaluation.json`, `images.csv` and `cases.png`, and the files of uncertainty.

    Raises OutputError: WSI510 if it exists and `overwrite` is False, WSI511, WSI512.
    """
    from wsitk.evaluation.picture import draw_cases

    with atomic_dir(folder, overwrite=overwrite) as partial:
        text = json.dumps(as_dict(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
        (partial / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        (partial / "images.csv").write_text(_table(evaluation), encoding="utf-8")
        if evaluation.uncertainty is not None:
            from wsitk.evaluation.uncertainty_report import write_uncertainty

            write_uncertainty(partial, evaluation.uncertainty)
        if picture:
            draw_cases(partial / "cases.png", evaluation)


def _table(evaluation: Evaluation) -> str:
    rows = [image_row(i, evaluation) for i in evaluation.images]
    names = list(dict.fromkeys(n for row in rows for n in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: _cell(v) for k, v in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if isfinite(value) else ""


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, (Path, Length)) else value
