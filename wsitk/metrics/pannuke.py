"""PanNuke's layout and averages: one channel of instances per class, mPQ and bPQ in both published meanings.

mPQ means two things in print. PanNuke's own script averages classes per image, images per tissue, and then
tissues; CellViT's `dataset_metrics` averages over images and knows no tissues. The two differ by points, and
so both are always given, by name. In either, a class that an image's truth does not hold is left out there,
so that false positives are free: set `pooled` beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsitk.errors import UsageError
from wsitk.metrics.contingency import LabelMap, as_labels
from wsitk.metrics.counts import Convention, Counts
from wsitk.metrics.panoptic import panoptic_counts

__all__ = ["CLASSES", "TISSUES", "ImageCounts", "PanNukeSummary", "binarize", "image_counts", "summarise"]

CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "nonneoplastic")
"""The classes of PanNuke's channels in order; a sixth channel is background."""

TISSUES = (
    "Adrenal_gland",
    "Bile-duct",
    "Bladder",
    "Breast",
    "Cervix",
    "Colon",
    "Esophagus",
    "HeadNeck",
    "Kidney",
    "Liver",
    "Lung",
    "Ovarian",
    "Pancreatic",
    "Prostate",
    "Skin",
    "Stomach",
    "Testis",
    "Thyroid",
    "Uterus",
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageCounts:
    """Counts of one image: of each class, and of all instances as one class."""

    classes: tuple[Counts, ...]
    binary: Counts


@dataclass(frozen=True)
class PanNukeSummary:
    """A dataset's figures. NaN means that there was nothing to average.

    `mpq_tissues`, `bpq_tissues` are PanNuke's means over tissues, `mpq_images`, `bpq_images` CellViT's over
    images. `class_pq` is the mean over images of each class, `tissue_mpq` and `tissue_bpq` the figures of each
    tissue; `pooled` are the summed counts of each class, in which false positives are not free, and
    `pooled_binary` those of all instances. `images` is the number of images, `skipped` how many of them have
    no true instance and drop out, `free_fp` the false positives that no mean has seen, for each class, and
    `free_fp_binary` those that bPQ has not seen.
    """

    mpq_tissues: float
    bpq_tissues: float
    mpq_images: float
    bpq_images: float
    class_pq: tuple[float, ...]
    tissue_mpq: dict[str, float]
    tissue_bpq: dict[str, float]
    pooled: tuple[Counts, ...]
    pooled_binary: Counts
    images: int
    skipped: int
    free_fp: tuple[int, ...]
    free_fp_binary: int


def binarize(channels: LabelMap) -> npt.NDArray[np.int32]:
    """All instances of (H, W, C) channels in one (H, W) map, numbered from 1.

    Channels are painted in order, so that a later one wins where they overlap; an instance that is painted
    over altogether is gone, and its number with it. Raises UsageError WSI801, WSI810.
    """
    if channels.ndim != 3:
        raise UsageError("WSI810", f"PanNuke masks are (height, width, classes), got shape {channels.shape}")
    out = np.zeros(channels.shape[:2], np.int32)
    count = 0
    for k in range(channels.shape[2]):
        labels = as_labels(channels[..., k])
        ids, index = np.unique(labels, return_inverse=True)
        background = int(ids.size > 0 and ids[0] == 0)
        numbers = index.reshape(labels.shape) - background + 1 + count
        np.copyto(out, numbers, where=labels > 0, casting="same_kind")
        count += ids.size - background
    return out


def image_counts(
    truth: LabelMap, predicted: LabelMap, classes: int = len(CLASSES), threshold: float = 0.5
) -> ImageCounts:
    """Counts of one image whose maps are (H, W, C); only the first `classes` channels are looked at.

    Raises UsageError: WSI810 for fewer channels or another layout, WSI800 for different sizes, WSI801 for
    channels that hold no labels.
    """
    for name, channels in (("truth", truth), ("prediction", predicted)):
        if channels.ndim != 3 or channels.shape[2] < classes:
            raise UsageError(
                "WSI810",
                f"{name} has shape {channels.shape}; wanted (height, width, classes) of {classes} classes or more",
            )
    each = tuple(panoptic_counts(truth[..., k], predicted[..., k], threshold) for k in range(classes))
    merged_truth, merged_predicted = (binarize(channels[..., :classes]) for channels in (truth, predicted))
    return ImageCounts(each, panoptic_counts(merged_truth, merged_predicted, threshold))


def summarise(
    images: Sequence[ImageCounts],
    tissues: Sequence[str] | None = None,
    convention: Convention = Convention.HOVERNET,
) -> PanNukeSummary:
    """Average a dataset; `tissues` names the tissue of each image (all one, if not given).

    With Convention.HOVERNET, `mpq_tissues` and `bpq_tissues` are to the last digit what PanNuke's script
    prints; with Convention.CELLVIT, `mpq_images` and `bpq_images` are CellViT's. Raises UsageError WSI811 if
    images and tissues differ in number, or images in their classes.
    """
    names = [""] * len(images) if tissues is None else list(map(str, tissues))
    if len(names) != len(images) or len({len(image.classes) for image in images}) > 1:
        raise UsageError(
            "WSI811",
            f"{len(images)} images, {len(names)} tissues; give one tissue per image, and the same classes in all",
        )
    classes = len(images[0].classes) if images else 0
    pq = np.array([[_pq(c, convention) for c in image.classes] for image in images]).reshape(
        len(images), classes
    )
    bpq = np.array([_pq(image.binary, convention) for image in images])
    mpq = np.array([_mean(row) for row in pq])
    groups = {name: np.array([n == name for n in names]) for name in sorted(set(names))}
    tissue_mpq = {name: _mean(mpq[chosen]) for name, chosen in groups.items()}
    tissue_bpq = {name: _mean(bpq[chosen]) for name, chosen in groups.items()}
    return PanNukeSummary(
        _mean(np.array(list(tissue_mpq.values()))),
        _mean(np.array(list(tissue_bpq.values()))),
        _mean(mpq),
        _mean(bpq),
        tuple(_mean(column) for column in pq.T),
        tissue_mpq,
        tissue_bpq,
        tuple(sum((image.classes[k] for image in images), Counts()) for k in range(classes)),
        sum((image.binary for image in images), Counts()),
        len(images),
        int(np.isnan(bpq).sum()),
        tuple(_free(image.classes[k] for image in images) for k in range(classes)),
        _free(image.binary for image in images),
    )


def _pq(counts: Counts, convention: Convention) -> float:
    """PQ, or NaN where the truth holds no instance of the class: PanNuke leaves those out."""
    return counts.quality(convention).pq if counts.truth else float("nan")


def _free(counts: Iterable[Counts]) -> int:
    """False positives where there is nothing true, which the means leave out."""
    return sum(c.fp for c in counts if c.truth == 0)


def _mean(values: Floats) -> float:
    """Mean of what is there; NaN, without a warning, if nothing is."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
