"""Time to evaluate one image of many nuclei on one core, beside the loop over masks that scripts use.

    OMP_NUM_THREADS=1 python benchmarks/metrics_speed.py [--points 1000000] [--skip-naive]

The image is 1024 by 1024 px with 2,704 nuclei of 5 classes; the prediction is shifted by a pixel and lacks
every tenth nucleus. All instance metrics are measured: PQ of all and of each class, AJI, AJI+, both Dice, and
F1 by centroids with types. The naive figure is PQ alone, with a mask per object and pairs found in a loop;
the two must agree. Centroids of a whole slide are paired too, a million by default.

Times are of the processor, which on one core and an idle machine is what a clock shows.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.metrics.contingency import Contingency
from wsitk.metrics.counts import Counts
from wsitk.metrics.detection import centroids, pair_points, typed_counts
from wsitk.metrics.panoptic import (
    aji,
    aji_plus,
    class_counts,
    count_matches,
    ensemble_dice,
    foreground_dice,
)

Array = NDArray[Any]

SIDE, LATTICE = 1024, 52
CLASSES = (1, 2, 3, 4, 5)
RADIUS_PX = 12.0
REPEATS = 5
NUCLEUS_PX = 40.0
"""Mean distance of nuclei on a slide at 0.25 µm/px: one in 10 by 10 µm."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--skip-naive", action="store_true")
    options = parser.parse_args()
    truth, predicted = nuclei(0), nuclei(1)
    evaluate(truth, predicted)  # imports and caches are no part of the figure
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        counts = evaluate(truth, predicted)
        times.append(time.process_time() - started)
    ours = float(np.median(times))
    print(f"{truth.max()} nuclei at {SIDE}x{SIDE}: all instance metrics {ours:.3f} s (PQ {counts.pq:.4f})")
    slide(options.points)
    if options.skip_naive:
        return
    started = time.process_time()
    naive = naive_counts(truth, predicted)
    seconds = time.process_time() - started
    if (naive.tp, naive.fp, naive.fn) != (counts.tp, counts.fp, counts.fn) or abs(
        naive.pq - counts.pq
    ) > 1e-9:
        raise SystemExit(f"the two disagree: {naive} and {counts}")
    print(f"a mask per object, PQ alone: {seconds:.1f} s, {seconds / ours:.0f} times as long")


def nuclei(variant: int) -> Array:
    """Discs on a lattice; variant 1 is shifted by a pixel, and lacks every tenth disc."""
    y, x = np.mgrid[:SIDE, :SIDE]
    step = SIDE / LATTICE
    row, column = ((axis - variant) // step for axis in (y, x))
    inside = np.hypot(y - variant - (row + 0.5) * step, x - variant - (column + 0.5) * step) < 0.4 * step
    inside &= (row >= 0) & (column >= 0)
    labels = np.where(inside, row * LATTICE + column + 1, 0).astype(np.int32)
    # Numbered by chance, as no one promises an order.
    numbers = np.append(0, np.random.default_rng(variant).permutation(LATTICE * LATTICE) + 1)
    if variant:  # as the truth still has them, these are missed
        labels[labels % 10 == 0] = 0
    return numbers[labels].astype(np.int32)


def evaluate(truth: Array, predicted: Array) -> Counts:
    """Every instance metric of one image."""
    table = Contingency.of(truth, predicted)
    counts = count_matches(table)
    t_classes, p_classes = table.truth_ids % 5 + 1, table.predicted_ids % 5 + 1
    class_counts(table, t_classes, p_classes, CLASSES)
    for metric in (aji, aji_plus, ensemble_dice, foreground_dice):
        metric(table)
    pairs = pair_points(centroids(truth), centroids(predicted), RADIUS_PX)
    typed = typed_counts(pairs, t_classes, p_classes, CLASSES)
    for type_id in CLASSES:
        typed.score(type_id)
    return counts


def naive_counts(truth: Array, predicted: Array) -> Counts:
    """PQ with a mask per object: the definition, word for word."""
    p_masks = {label: predicted == label for label in np.unique(predicted) if label}
    t_labels = [label for label in np.unique(truth) if label]
    overlaps = []
    for t_label in t_labels:
        mask = truth == t_label
        for label in np.unique(predicted[mask]):
            if label:
                shared = (mask & p_masks[label]).sum()
                overlaps.append(shared / (mask | p_masks[label]).sum())
    matched = [iou for iou in overlaps if iou > 0.5]
    tp = len(matched)
    return Counts(tp, len(p_masks) - tp, len(t_labels) - tp, float(np.sum(matched)))


def slide(number: int) -> None:
    """Pair the centroids of a whole slide, a tenth missed and a tenth invented."""
    random = np.random.default_rng(0)
    side = NUCLEUS_PX * number**0.5
    truth = random.uniform(0, side, (number, 2))
    found = truth[random.random(number) > 0.1]
    invented = random.uniform(0, side, (number // 10, 2))
    predicted = np.concatenate([found + random.normal(0, 4, found.shape), invented])
    started = time.process_time()
    counts = pair_points(truth, predicted, RADIUS_PX).counts
    seconds = time.process_time() - started
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    print(
        f"{number} points with {len(predicted)}, gated: {seconds:.1f} s "
        f"(F1 {counts.f1:.3f}), peak of the process {kilobytes / 1e6:.2f} GB"
    )


if __name__ == "__main__":
    main()
