"""Accuracy of the default nucleus model, and of InstanSeg, by the same code on the same images.

    WSITK_TEST_DATA=... python benchmarks/nuclei_accuracy.py [--images 30] [--skip-instanseg]

Images are the 30 training images of MoNuSeg 2018 (1000 px at 0.25 µm/px, CC BY-NC-SA: measured on, never
trained on). Each is averaged down to 0.5 µm/px, predicted, and its label map brought back to 0.25 by nearest
neighbour; all comparisons are at 0.25.

- bPQ: panoptic quality of one class at IoU > 0.5, per image, then the mean over images.
- F1: centroids are paired one to one by the Hungarian method, at most 12 px (3 µm) apart, as in CellViT; the
  mean over images, and the one of the summed counts beside it.
"""

from __future__ import annotations

import argparse
import os
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model

from wsitk.metrics.panoptic import Counts, centroids, detection_counts, panoptic_counts
from wsitk.models.cellvit.compact import LATTICE, MEAN, STD, compact_cellvit
from wsitk.models.cellvit.hover import HoverSettings, segment
from wsitk.models.cellvit.training import prepare

Array = NDArray[Any]
Predictor = Callable[[Array], Array]
"""(H, W, 3) uint8 at 0.5 µm/px -> (H, W) labels."""

SPACING = 0.5
RADIUS_PX = 12.0
INSTANSEG = "data/weights/instanseg/brightfield_nuclei/0.1.1/instanseg.pt"
IMAGES = "data/nuclei/monuseg_train"


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
    predictors: dict[str, Predictor] = {"cellvit": cellvit()}
    if not options.skip_instanseg:
        predictors["instanseg"] = instanseg(root / INSTANSEG)
    for name, predict in predictors.items():
        report(name, predict, root / IMAGES, options.images)


def report(name: str, predict: Predictor, folder: Path, limit: int) -> None:
    """Print one line of figures for one model."""
    detections, instances = [], []
    started = time.perf_counter()
    for image, truth in examples(folder, limit):
        labels = enlarge(predict(shrink(image)), truth.shape)
        detections.append(detection_counts(centroids(truth), centroids(labels), RADIUS_PX))
        instances.append(panoptic_counts(truth, labels))
    seconds = time.perf_counter() - started
    found, overlap = sum(detections, Counts()), sum(instances, Counts())
    print(
        f"{name:10s} images {len(instances)}  F1 {np.mean([c.f1 for c in detections]):.3f} "
        f"(pooled {found.f1:.3f}, precision {found.precision:.3f}, recall {found.recall:.3f}; "
        f"tp {found.tp} fp {found.fp} fn {found.fn})  "
        f"bPQ {np.mean([c.pq for c in instances]):.3f} "
        f"(pooled {overlap.pq:.3f} = DQ {overlap.f1:.3f} x SQ {overlap.sq:.3f}; "
        f"tp {overlap.tp} fp {overlap.fp} fn {overlap.fn})  {seconds:.0f} s"
    )


def examples(folder: Path, limit: int) -> Iterator[tuple[Array, Array]]:
    """Images and their instances, in the order of their names."""
    for path in sorted(folder.glob("*.jpg"))[:limit]:
        with np.load(path.with_name(f"{path.stem}_inst.npz")) as data:
            yield np.asarray(cv2.imread(str(path)))[..., ::-1], data["inst"].astype(np.int32)


def shrink(image: Array) -> Array:
    """0.25 to 0.5 µm/px by averaging."""
    size = (image.shape[1] // 2, image.shape[0] // 2)
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA))


def enlarge(labels: Array, shape: tuple[int, ...]) -> Array:
    """Labels at 0.5 µm/px to `shape`, each pixel doubled."""
    doubled = np.repeat(np.repeat(labels, 2, axis=0), 2, axis=1)
    return doubled[: shape[0], : shape[1]]


def cellvit() -> Predictor:
    """The default model: its network on the whole image at once, padded by reflection to its lattice."""
    folder = files("wsitk.models.cellvit")
    card = tomllib.loads(folder.joinpath("card.toml").read_text(encoding="utf-8"))
    settings = HoverSettings(**card["postprocessing"])
    network = compact_cellvit().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_model(network, str(folder.joinpath("weights", "cellvit.safetensors")), strict=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    def predict(image: Array) -> Array:
        height, width = image.shape[:2]
        padded = cv2.copyMakeBorder(image, 0, -height % LATTICE, 0, -width % LATTICE, cv2.BORDER_REFLECT_101)
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].float().div(255).sub(mean).div(std)
        with torch.inference_mode():
            maps = network(pixels.contiguous(memory_format=torch.channels_last))
        nuclei = maps["nuclei_binary_map"].softmax(1)[0, 1, :height, :width].numpy()
        hv = maps["hv_map"][0, :, :height, :width].numpy()
        return segment(np.ascontiguousarray(nuclei), np.ascontiguousarray(hv), SPACING, settings)

    return predict


def instanseg(path: Path) -> Predictor:
    """InstanSeg's published TorchScript, as the training uses it for a teacher."""
    teacher = prepare.instanseg(path)
    return lambda image: np.asarray(teacher(image), np.int32)


if __name__ == "__main__":
    main()
