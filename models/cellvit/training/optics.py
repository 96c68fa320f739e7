"""The changes of appearance that CellViT's recipe lists, each a pure function of the image and of chance."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsitk.models.cellvit.training.data import Image

__all__ = ["downscale", "blur", "noise", "jitter", "superpixels", "zoom_blur"]


def downscale(image: Image, rng: np.random.Generator) -> Image:
    """Return the image with half its resolution: every second pixel, twice."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def blur(image: Image, rng: np.random.Generator) -> Image:
    """Return the mean over a square of 3, 5, 7 or 9 pixels."""
    side = int(rng.choice((3, 5, 7, 9)))
    return np.asarray(cv2.blur(image, (side, side)), np.uint8)


def noise(image: Image, rng: np.random.Generator) -> Image:
    """Return the image with normal noise of a variance up to 50 grey levels squared."""
    spread = np.sqrt(rng.uniform(0, 50))
    return _bytes(image + rng.normal(0, spread, image.shape))


def jitter(image: Image, rng: np.random.Generator) -> Image:
    """Return other brightness, contrast (both ±25 %), saturation (±10 %) and hue (±5 % of the circle), in any order."""
    factor = rng.uniform(0.75, 1.25, 2)
    saturation, hue = rng.uniform(0.9, 1.1), rng.uniform(-0.05, 0.05)
    pixels = image.astype(np.float32) / 255.0
    for change in rng.permutation(4):
        if change == 0:
            pixels = pixels * factor[0]
        elif change == 1:
            pixels = (pixels - _grey(pixels).mean()) * factor[1] + _grey(pixels).mean()
        elif change == 2:
            pixels = (pixels - _grey(pixels)[..., None]) * saturation + _grey(pixels)[..., None]
        else:
            pixels = _turn_hue(np.clip(pixels, 0, 1).astype(np.float32), hue)
        pixels = np.clip(pixels, 0, 1).astype(np.float32)
    return _bytes(pixels * 255)


def _grey(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(pixels @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)


def _turn_hue(pixels: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * share) % 360
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32)


def superpixels(image: Image, rng: np.random.Generator) -> Image:
    """Return the image with a tenth of about 200 superpixels (SLIC, at half the resolution) in their mean colour."""
    from skimage.segmentation import slic

    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_LINEAR)
    parts = slic(small, n_segments=200, compactness=10, start_label=0, channel_axis=-1)
    flat = parts.ravel()
    count = np.bincount(flat)
    chosen = rng.random(len(count)) < 0.1
    mean = np.stack([np.bincount(flat, small[..., c].ravel()) / np.maximum(count, 1) for c in range(3)], 1)
    painted = np.where(chosen[parts][..., None], np.rint(mean[parts]), small).astype(np.uint8)
    large = cv2.resize(painted, (width, height), interpolation=cv2.INTER_LINEAR)
    # only where something was replaced: the rest keeps its resolution
    where = cv2.resize(chosen[parts].astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return np.where(where[..., None] > 0, large, image).astype(np.uint8)


def zoom_blur(image: Image, rng: np.random.Generator) -> Image:
    """Return the mean of the image and of enlargements of itself by up to 5 %."""
    height, width = image.shape[:2]
    most, step = rng.uniform(1.0, 1.05), rng.uniform(0.01, 0.03)
    total, count = image.astype(np.float32), 1
    for factor in np.arange(1.0 + step, most, step):
        middle = ((width - 1) / 2, (height - 1) / 2)
        matrix = cv2.getRotationMatrix2D(middle, 0.0, float(factor))
        total += cv2.warpAffine(
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        count += 1
    return _bytes(total / count)


def _bytes(pixels: NDArray[Any]) -> Image:
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)
