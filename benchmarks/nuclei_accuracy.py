"""Accuracy of the default nucleus model, and of InstanSeg, by the same code on the same images.

    WSITK_TEST_DATA=... python benchmarks/nuclei_accuracy.py [--images 30] [--skip-instanseg]

Images are the 30 training images of MoNuSeg 2018 (1000 px at 0.25 µm/px, CC BY-NC-SA: measured on, never
trained on), once as they are, and once shrunk to 0.5 µm/px by averaging 2 x 2 pixels, as a scan at 20x would
show them. Each model reads them at its own pixel size, through the engine's own resampling; its label map is
brought back to 0.25 by nearest neighbour, where all comparisons are made.

- bPQ: panoptic quality of one class at IoU > 0.5, per image, then the mean over images.
- F1: centroids are paired one to one, at most 12 px (3 µm) apart, as many as there can be and of those the
  nearest; the mean over images, and the one of the summed counts beside it.
- F1 as published: the least total distance over all centroids, near or far, and then the cut at 12 px, as the
  code of HoVer-Net and CellViT does it. Far pairs take partners from near ones, so it is lower.

Behind each mean stands its 95 % interval, from 2,000 bootstrap samples of the images.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.metrics.counts import Counts
from wsitk.metrics.detection import centroids, detection_counts
from wsitk.metrics.panoptic import panoptic_counts
from wsitk.models.cellvit.compact import LATTICE
from wsitk.models.cellvit.hover import segment
from wsitk.models.cellvit.model import default_model
from wsitk.models.cellvit.training import prepare
from wsitk.sources.array import ArraySource
from wsitk.sources.working import WorkingImage

Array = NDArray[Any]

TRUTH_UM = 0.25
SCANS_UM = (0.25, 0.5)
RADIUS_PX = 12.0
INSTANSEG = "data/weights/instanseg/brightfield_nuclei/0.1.1/instanseg.pt"
IMAGES = "data/nuclei/monuseg_train"


@dataclass(frozen=True)
class Predictor:
    """A model: the pixel size that it wants, and from (H, W, 3) uint8 to (H, W) labels."""

    name: str
    spacing_um: float
    label: Callable[[Array], Array]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--skip-instanseg", action="store_true")
    options = parser.parse_args()
    if "WSITK_TEST_DATA" not in os.environ:
        parser.exit(2, "set WSITK_TEST_DATA to the folder that holds data/nuclei/monuseg_train\n")
    root = Path(os.environ["WSITK_TEST_DATA"])
    predictors = [cellvit()]
    if not options.skip_instanseg:
        predictors.append(instanseg(root / INSTANSEG))
    for predictor in predictors:
        for scan_um in SCANS_UM:
            report(predictor, scan_um, root / IMAGES, options.images)


def report(predictor: Predictor, scan_um: float, folder: Path, limit: int) -> None:
    """Print one line of figures for one model and one kind of scan."""
    detections, published, instances = [], [], []
    started = time.perf_counter()
    for image, truth in examples(folder, limit):
        pixels = at_spacing(scanned(image, scan_um), scan_um, predictor.spacing_um)
        labels = cv2.resize(
            predictor.label(pixels).astype(np.uint16),
            truth.shape[::-1],
            interpolation=cv2.INTER_NEAREST_EXACT,
        ).astype(np.int32)
        points = centroids(truth), centroids(labels)
        detections.append(detection_counts(*points, RADIUS_PX))
        published.append(detection_counts(*points, RADIUS_PX, "hovernet"))
        instances.append(panoptic_counts(truth, labels))
    seconds = time.perf_counter() - started
    found, overlap = sum(detections, Counts()), sum(instances, Counts())
    print(
        f"{predictor.name:10s} {scan_um} µm/px  images {len(instances)}  F1 {mean([c.f1 for c in detections])} "
        f"(pooled {found.f1:.3f}, precision {found.precision:.3f}, recall {found.recall:.3f}; "
        f"tp {found.tp} fp {found.fp} fn {found.fn})  F1 as published {mean([c.f1 for c in published])}  "
        f"bPQ {mean([c.pq for c in instances])} "
        f"(pooled {overlap.pq:.3f} = DQ {overlap.f1:.3f} x SQ {overlap.sq:.3f}; "
        f"tp {overlap.tp} fp {overlap.fp} fn {overlap.fn})  {seconds:.0f} s"
    )


def mean(values: list[float]) -> str:
    """The mean and its bootstrap interval."""
    rng = np.random.default_rng(0)
    each = np.array(values)
    low, high = np.percentile(rng.choice(each, (2000, len(each))).mean(1), (2.5, 97.5))
    return f"{each.mean():.3f} [{low:.3f}, {high:.3f}]"


def examples(folder: Path, limit: int) -> Iterator[tuple[Array, Array]]:
    """Images and their instances, in the order of their names."""
    for path in sorted(folder.glob("*.jpg"))[:limit]:
        with np.load(path.with_name(f"{path.stem}_inst.npz")) as data:
            yield np.ascontiguousarray(cv2.imread(str(path))[..., ::-1]), data["inst"].astype(np.int32)


def scanned(image: Array, scan_um: float) -> Array:
    """The image as a scanner of `scan_um` would show it."""
    if scan_um == TRUTH_UM:
        return image
    size = (round(image.shape[1] * TRUTH_UM / scan_um), round(image.shape[0] * TRUTH_UM / scan_um))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def at_spacing(image: Array, have_um: float, want_um: float) -> Array:
    """The image as the engine gives it to a model that wants `want_um`."""
    working = WorkingImage(ArraySource(image, spacing=have_um), (want_um, want_um))
    return np.ascontiguousarray(working.read(Region((0, 0), working.shape)).pixels)


def cellvit() -> Predictor:
    """The default model: its network on the whole image at once, padded by reflection to its lattice."""
    model = default_model()
    spacing_um = (model.spec.spacing or (TRUTH_UM,))[0]

    def label(image: Array) -> Array:
        height, width = image.shape[:2]
        padded = cv2.copyMakeBorder(image, 0, -height % LATTICE, 0, -width % LATTICE, cv2.BORDER_REFLECT_101)
        with torch.inference_mode():
            maps = model.predict(torch.from_numpy(padded).permute(2, 0, 1)[None])
        nuclei, hv = (maps[name][0, :, :height, :width].numpy() for name in ("nuclei", "hv"))
        return segment(np.ascontiguousarray(nuclei[0]), np.ascontiguousarray(hv), spacing_um, model.settings)

    return Predictor("cellvit", spacing_um, label)


def instanseg(path: Path) -> Predictor:
    """InstanSeg's published TorchScript, as the training uses it for a teacher."""
    teacher = prepare.instanseg(path)
    return Predictor("instanseg", prepare.SPACING, lambda image: np.asarray(teacher(image), np.int32))


if __name__ == "__main__":
    main()
