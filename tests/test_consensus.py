"""Labels on which a teacher agrees with itself."""

from __future__ import annotations

import cv2
import numpy as np

from wsitk.models.cellvit.training.consensus import agreed
from wsitk.models.cellvit.training.data import UNLABELLED


def picture() -> tuple[np.ndarray, np.ndarray]:
    """Return pink tissue (128, 128, 3) with two dark nuclei beside glass, and their labels."""
    image = np.full((128, 128, 3), (230, 170, 200), np.uint8)
    image[:, 96:] = 245
    truth = np.zeros((128, 128), np.int32)
    for number, at in enumerate(((30, 30), (80, 60)), 1):
        cv2.circle(image, at, 10, (90, 50, 140), -1)
        cv2.circle(truth, at, 10, number, -1)
    return image, truth


def dark(image: np.ndarray) -> np.ndarray:
    """Label the dark components: a teacher that is sure of itself."""
    return cv2.connectedComponents((image[..., 1] < 110).astype(np.uint8))[1]


def iou(labels: np.ndarray, truth: np.ndarray, number: int) -> float:
    here = truth == number
    label = np.bincount(labels[here]).argmax()
    return float((here & (labels == label)).sum() / (here | (labels == label)).sum())


def test_what_all_views_show_becomes_a_label() -> None:
    image, truth = picture()
    labels = agreed(dark, image)
    assert set(np.unique(labels)) == {0, 1, 2}
    assert min(iou(labels, truth, n) for n in (1, 2)) > 0.85


def test_what_one_view_shows_is_left_open() -> None:
    image, _ = picture()
    calls = []

    def unsure(seen: np.ndarray) -> np.ndarray:
        calls.append(1)
        found = dark(seen)
        if len(calls) == 1:
            found[5:12, 30:40] = found.max() + 1
        return found

    labels = agreed(unsure, image)
    assert labels.max() == 2
    assert (labels[10:24, 60:80] == UNLABELLED).mean() > 0.8
    assert (labels == UNLABELLED).sum() < 400


def test_glass_is_background_whatever_the_teacher_says() -> None:
    image, _ = picture()

    def blocks(seen: np.ndarray) -> np.ndarray:
        bright = seen.min(axis=2) > 240
        found = dark(seen)
        found[bright] = found.max() + 1
        return found

    assert not agreed(blocks, image)[:, 104:].any()
    assert not agreed(lambda seen: np.ones(seen.shape[:2], np.int32), np.full_like(image, 240)).any()


def test_where_another_network_sees_a_nucleus_nothing_is_said() -> None:
    image, truth = picture()
    probability = np.zeros(truth.shape, np.float32)
    probability[100:110, 10:20] = 0.9
    labels = agreed(dark, image, probability)
    assert (labels[100:110, 10:20] == UNLABELLED).all()
    assert (labels == UNLABELLED).sum() == 100
