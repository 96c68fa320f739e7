"""Labels of a teacher that agrees with itself: four views of the same tissue, and silence where they differ.

The teacher works at 0.5 µm/px. Of an image at 0.25 it sees four views: turned, mirrored, and shifted by half of
its own pixel. A nucleus that three of them show becomes a label, its outline the mean of theirs, finer than any
one of them; what only one or two show, and what another network takes for a nucleus without their support,
becomes `UNLABELLED`: no loss is taken there. Teachers that stretch contrast see nuclei in empty glass, in the
blocks of its compression; they are not asked there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wsitk.models.cellvit.training.data import UNLABELLED, Image, Labels

__all__ = ["VOTES", "agreed", "glass"]

Array = NDArray[Any]

VOTES = 3
"""Views of the four that must show a nucleus."""

SHIFTS = ((0, 0), (1, 0), (0, 1), (1, 1))


def agreed(
    teacher: Callable[[Image], Array], image: Image, probability: NDArray[np.float32] | None = None
) -> Labels:
    """Return int32 labels (H, W) of an image at 0.25 µm/px, `UNLABELLED` where no statement can be made.

    `teacher` labels images of half the size. `probability` (H, W) is another network's of being a nucleus: where
    it is above a half and the teacher silent, nothing is said. Height and width must be even.
    """
    blank = glass(image)
    if blank.mean() > 0.95:
        return np.zeros(image.shape[:2], np.int32)
    labels, doubt = consensus([_view(teacher, image, k) for k in range(len(SHIFTS))])
    if probability is not None:
        doubt |= probability > 0.5
    counts = np.bincount(labels.ravel())
    empty = np.bincount(labels.ravel(), blank.ravel()) > 0.5 * np.maximum(counts, 1)
    labels[empty[labels]] = 0
    labels[(labels == 0) & doubt & ~blank] = UNLABELLED
    return labels


def glass(image: Image) -> NDArray[np.bool_]:
    """Return where there is no tissue, boolean (H, W): bright and without colour."""
    smooth = cv2.blur(image, (9, 9)).astype(np.int16)
    return np.asarray((np.ptp(smooth, axis=2) < 22) & (smooth.min(axis=2) > 195))


def _view(teacher: Callable[[Image], Array], image: Image, number: int) -> Labels:
    """Return the teacher's labels of one of the four views, brought back to the image."""
    dy, dx = SHIFTS[number]
    height, width = image.shape[:2]
    moved = np.ascontiguousarray(np.roll(image, (-dy, -dx), (0, 1)))
    seen = np.rot90(cv2.resize(moved, (width // 2, height // 2), interpolation=cv2.INTER_AREA), number)
    seen = seen[:, ::-1] if number % 2 else seen
    labels = teacher(np.ascontiguousarray(seen)).astype(np.int32)
    labels = np.rot90(labels[:, ::-1] if number % 2 else labels, -number)
    return np.roll(np.repeat(np.repeat(labels, 2, axis=0), 2, axis=1), (dy, dx), (0, 1))


def consensus(views: list[Labels]) -> tuple[Labels, NDArray[np.bool_]]:
    """Return labels that `VOTES` of the views share (IoU > 0.5), and where fewer of them saw something."""
    shape = views[0].shape
    labels, doubt = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    strength, number = np.zeros(shape, np.float32), 0
    boxes = [ndimage.find_objects(view) for view in views]
    used = [np.zeros(int(view.max()) + 1, np.bool_) for view in views]
    partner = {(i, j): _partners(a, b) for i, a in enumerate(views) for j, b in enumerate(views) if i != j}
    for i in range(len(views)):
        for label in range(1, used[i].size):
            if used[i][label] or boxes[i][label - 1] is None:
                continue
            group = [(i, label)]
            group += [
                (j, other)
                for j in range(len(views))
                if j != i and (other := int(partner[i, j][label])) and not used[j][other]
            ]
            for j, other in group:
                used[j][other] = True
            where = _hull_box([boxes[j][other - 1] for j, other in group])
            share = np.mean([views[j][where] == other for j, other in group], axis=0, dtype=np.float32)
            if len(group) < VOTES:
                doubt[where] |= share >= 0.5
                continue
            share, number = cv2.GaussianBlur(share, (0, 0), 1.0), number + 1
            won = (share >= 0.5) & (share > strength[where])
            labels[where][won], strength[where][won] = number, share[won]
    return labels, doubt


def _partners(one: Labels, other: Labels) -> NDArray[np.int64]:
    """Return for each label of `one` the label of `other` with which its IoU is above a half, or 0."""
    rows, columns = int(one.max()) + 1, int(other.max()) + 1
    table = np.bincount((one.astype(np.int64) * columns + other).ravel(), minlength=rows * columns)
    shared = table.reshape(rows, columns).astype(np.float32)
    union = shared.sum(1, keepdims=True) + shared.sum(0) - shared
    iou = shared / np.maximum(union, 1)
    iou[0], iou[:, 0] = 0, 0
    return np.where(iou.max(1) > 0.5, iou.argmax(1), 0)


def _hull_box(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Return the box that holds all `boxes`."""
    return tuple(
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in (0, 1)
    )
