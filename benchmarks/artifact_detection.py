"""How well are artifacts found? Pen and coverslip on real ones, the other kinds on painted ones.

    python benchmarks/artifact_detection.py DATA [--cases 15] [--part left|right|other] [--json FILE]

DATA is the folder that WSITK_TEST_DATA names. Rules were set on the left piece of tissue of the TCGA slide; the
right one was looked at for folds only, and `other` is CMU-1-Small-Region: another organ and scanner, on which
nothing was painted before. The intervals are over painted artifacts, not over slides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wsitk import Region, open_source
from wsitk.artifacts.classical import ClassicalDetector
from wsitk.artifacts.mask import KINDS
from wsitk.artifacts.planes import measure
from wsitk.artifacts.synthetic import paint
from wsitk.metrics.bootstrap import bootstrap_mean
from wsitk.sources.array import ArraySource
from wsitk.sources.working import WorkingImage
from wsitk.tissue import find_tissue

Mask = NDArray[np.bool_]

TCGA, CMU = "TCGA-DU-6399-01A-01-TS1.svs", "cmu-1-small-region.svs"
SMALL = {"left": ((1200, 900), (1450, 1250), (1350, 950)), "right": ((1150, 4500), (900, 5300), (800, 5700))}
"""Corners (y, x) of 1,000-pixel squares of TCGA at 1 µm, mostly tissue."""

LARGE = {"left": (1000, 500), "right": (700, 4300)}
"""Corner of 1,800 by 2,400 pixels for pen, whose strokes are broad."""

REAL = (
    ("pen", "histoqc_pen/1k_version/pen_red", ".png"),
    ("pen", "histoqc_pen/1k_version/pen_green", ".png"),
    ("pen", "histoqc_pen/1k_version/pen_black", ".png"),
    ("coverslip", "histoqc_models/coverslip_edge_he/coverslip_edge", ".png"),
)
REAL_UM = 20.0
"""Those pictures state no pixel size; a thousand pixels for two centimetres is a guess."""


def overlap(found: Mask, truth: Mask) -> dict[str, float]:
    """Return IoU, recall, precision of pixels, and both again where 3 pixels of border don't count."""
    wide = [cv2.dilate(m.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool) for m in (found, truth)]
    both, either = (found & truth).sum(), (found | truth).sum()
    return {
        "iou": float(both / max(1, either)),
        "recall": float(both / max(1, truth.sum())),
        "precision": float(both / found.sum()) if found.any() else float("nan"),
        "recall_3px": float((wide[0] & truth).sum() / max(1, truth.sum())),
        "precision_3px": float((found & wide[1]).sum() / found.sum()) if found.any() else float("nan"),
    }


def real(data: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield kind, name and figures of each real picture."""
    for kind, stem, suffix in REAL:
        base = data / "data/artifacts" / stem
        pixels = np.asarray(Image.open(f"{base}{suffix}").convert("RGB"))
        truth = np.asarray(Image.open(f"{base}_mask{suffix}").convert("L")) > 0
        planes = measure(ArraySource(pixels, axes="yxc", spacing=REAL_UM))
        found = ClassicalDetector().find(planes, (kind,))[kind]
        yield kind, base.name, overlap(found, truth)


def on_grid(mask: Mask, shape: tuple[int, int], step: int) -> Mask:
    """Return which pixels of the grid are covered by half or more."""
    whole = np.zeros((shape[0] * step, shape[1] * step), np.float32)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    return np.asarray(whole.reshape(shape[0], step, shape[1], step).mean((1, 3)) >= 0.5)


def clean_pieces(data: Path, part: str, kind: str) -> list[NDArray[np.uint8]]:
    """Return clean tissue at 1 µm per pixel to paint on."""
    with open_source(data / "data/wsi" / (CMU if part == "other" else TCGA)) as slide:
        image = WorkingImage(slide, (1.0, 1.0))
        places = [Region((0, 0), image.shape)]
        if part != "other" and kind == "pen":
            places = [Region(LARGE[part], (1800, 2400))]
        elif part != "other":
            places = [Region(corner, (1000, 1000)) for corner in SMALL[part]]
        return [image.read(place).pixels for place in places]


def painted(data: Path, part: str, kind: str, cases: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each painted artifact, and whether it was found: half of it, under its own name.

    A fold or a blur of bare glass is none, so only tissue counts for these.
    """
    pieces = clean_pieces(data, part, kind)
    rng = np.random.default_rng(0)
    for case in range(cases):
        clean = pieces[case % len(pieces)]
        size = rng.uniform(400, 700) if kind == "pen" else None
        done = paint(clean, kind, 1.0, seed=1000 * (part != "left") + case, size_um=size)
        planes = measure(ArraySource(done.pixels, axes="yxc", spacing=1.0))
        truth = on_grid(done.mask, planes.shape, 8)
        if kind in ("fold", "blur"):
            truth &= on_grid(clean.min(-1) < 225, planes.shape, 8)
        found = ClassicalDetector().find(planes, KINDS)
        others = [k for k in KINDS if k != kind and (found[k] & truth).sum() > 0.3 * truth.sum()]
        figures = overlap(found[kind], truth)
        yield {**figures, "found": float(figures["recall"] >= 0.5), "also": others}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean over painted artifacts and its 95 % interval; what is not a number is left out."""
    said = bootstrap_mean(values, [str(case) for case in range(len(values))])
    return said.value, said.low, said.high


def false_alarms(data: Path, name: str, region: Region | None = None) -> tuple[float, dict[str, float]]:
    """Return the tissue of a clean slide (mm²) and what was marked on it, kind by kind (mm²)."""
    with open_source(data / "data/wsi" / name) as slide:
        planes = measure(slide)
    found = ClassicalDetector().find(planes, KINDS)
    where = np.ones(planes.shape, bool)
    if region is not None:
        where[:] = False
        where[region.slices()] = True
    tissue = find_tissue(planes.rgb, planes.scale, planes.um).core
    pixel = (planes.um / 1000) ** 2
    return float((tissue & where).sum() * pixel), {
        k: float((m & where).sum() * pixel) for k, m in found.items()
    }


def main() -> None:
    """Print the tables of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=15)
    parser.add_argument("--part", choices=("left", "right", "other"), default="other")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    facts: dict[str, Any] = {"real": {}, "painted": {}, "clean": {}}
    for kind, name, figures in real(given.data):
        facts["real"][name] = {"kind": kind, **figures}
        print(f"{kind:10} {name:15}", *(f"{k} {v:.2f}" for k, v in figures.items()))
    for kind in KINDS:
        rows = list(painted(given.data, given.part, kind, given.cases))
        said = {k: interval([r[k] for r in rows]) for k in ("found", "iou", "recall", "precision")}
        also = {k: sum(k in r["also"] for r in rows) for k in KINDS if any(k in r["also"] for r in rows)}
        facts["painted"][kind] = {**said, "also": also}
        print(f"{kind:10}", *(f"{k} {v[0]:.2f} ({v[1]:.2f}–{v[2]:.2f})" for k, v in said.items()), also)
    right = Region((0, 480), (10**6, 10**6))
    for name, region in ((TCGA, right), (CMU, None)):
        tissue, areas = false_alarms(given.data, name, region)
        facts["clean"][name] = {"tissue_mm2": tissue, **areas}
        print(f"{name}: {tissue:.2f} mm² tissue,", *(f"{k} {v:.4f}" for k, v in areas.items() if v))
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
