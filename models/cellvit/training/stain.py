"""The same tissue from other laboratories and scanners: stains, colour, exposure, focus, compression.

A network for slides meets stains that its training set has not seen; what stands in for them is colour that
varies far more than any one laboratory's does. Every function is pure in the image and the source of chance.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from wsitk.models.cellvit.training.data import Image

__all__ = ["STAINS", "unmix", "remix", "estimate_stains", "restain", "recolour", "expose", "degrade"]

Float = NDArray[np.float32]

_RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
STAINS: Float = (_RUIFROK / np.linalg.norm(_RUIFROK, axis=1, keepdims=True)).astype(np.float32)
"""Optical density of haematoxylin, eosin and a residual, a unit vector a row (Ruifrok and Johnston 2001)."""

_CLEAR = 0.15  # optical density (natural logarithm) below which a pixel is glass


def unmix(pixels: Float, stains: Float = STAINS) -> Float:
    """Return the amounts of three stains, (..., 3), in RGB of 0 to 255 (..., 3): optical density in their basis."""
    density = -np.log(np.maximum(pixels, 1.0) / 255.0)
    return np.asarray(density @ np.linalg.inv(stains.astype(np.float64)), np.float32)


def remix(amounts: Float, stains: Float = STAINS) -> Float:
    """Return RGB of 0 to 255 from amounts of stains: the inverse of `unmix`, and never brighter than glass."""
    return np.asarray(255.0 * np.exp(-np.maximum(amounts @ stains, 0)), np.float32)


def estimate_stains(image: Image, angle: float = 1.0) -> Float:
    """Return an image's own stain vectors, float32 (3, 3): haematoxylin, eosin, and what is normal to both.

    Macenko et al. 2009: the extreme directions, but for `angle` per cent, in the plane of most variance of
    optical density. `STAINS` where there is too little stain, or one stain only, to tell.
    """
    density = -np.log(np.maximum(image.reshape(-1, 3).astype(np.float64), 1.0) / 255.0)
    density = density[(density > _CLEAR).all(1)]
    if len(density) < 200:
        return STAINS
    plane = np.linalg.eigh(np.cov(density.T))[1][:, :0:-1]
    plane *= np.where(plane.sum(0) < 0, -1.0, 1.0)
    direction = np.arctan2(*(density @ plane).T[::-1])
    ends = np.percentile(direction, (angle, 100 - angle))
    pair = np.stack([np.cos(ends), np.sin(ends)], 1) @ plane.T
    pair = pair[np.argsort(-pair[:, 0])]  # haematoxylin takes more of the red
    third = np.cross(*pair)
    if np.linalg.norm(third) < 0.1 or (pair < -0.05).any():
        return STAINS
    basis = np.vstack([np.maximum(pair, 0.01), np.abs(third) + 0.01])
    return np.asarray(basis / np.linalg.norm(basis, axis=1, keepdims=True), np.float32)


def restain(
    pixels: Float,
    rng: np.random.Generator,
    *,
    amount: float = 0.25,
    shift: float = 0.025,
    hue: float = 0.07,
    stains: Float = STAINS,
) -> Float:
    """Return RGB with its stains unmixed, changed in amount, and mixed again with other vectors.

    `amount` is the spread of the logarithm of each stain's factor, `shift` of what is added, `hue` of the
    vectors' parts.
    """
    gain = np.exp(rng.normal(0, amount, 3)).astype(np.float32)
    offset = rng.normal(0, shift, 3).astype(np.float32)
    vectors = np.maximum(stains + rng.normal(0, hue, (3, 3)), 0.01)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return remix(unmix(pixels, stains) * gain + offset, vectors)


def recolour(pixels: Float, rng: np.random.Generator) -> Float:
    """Return RGB with its hue turned and its saturation changed, by a linear map about the grey axis."""
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = pixels - grey[..., None]
    angle = rng.normal(0, 0.22)
    axis = np.ones((3, 3)) / 3.0
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3.0)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * axis
    saturation = 0.0 if rng.random() < 0.03 else rng.uniform(0.5, 1.5)
    return np.asarray(grey[..., None] + colour @ (turn.T * saturation).astype(np.float32), np.float32)


def expose(pixels: Float, rng: np.random.Generator) -> Float:
    """Return RGB under another white balance, gamma, contrast and brightness."""
    balance = rng.uniform(0.85, 1.05, 3).astype(np.float32)
    gamma = float(np.exp(rng.normal(0, 0.2)))
    pixels = 255.0 * (np.clip(pixels, 0, 255) / 255.0) ** gamma * balance
    contrast = rng.uniform(0.75, 1.25)
    middle = pixels.mean()
    return np.asarray((pixels - middle) * contrast + middle * rng.uniform(0.85, 1.15), np.float32)


def degrade(image: Image, rng: np.random.Generator) -> Image:
    """Return the image blurred or sharpened, coarser, through JPEG, and with a sensor's noise: each now and then."""
    dice = rng.random(4)
    if dice[0] < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.3)).astype(np.uint8)
    elif dice[0] < 0.40:
        soft = cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32)
        sharp = image + rng.uniform(0.2, 1.0) * (image.astype(np.float32) - soft)
        image = np.clip(sharp, 0, 255).astype(np.uint8)
    if dice[1] < 0.10:
        small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    if dice[2] < 0.30:
        quality = int(rng.integers(35, 95))
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    if dice[3] < 0.20:
        noise = rng.normal(0, rng.uniform(2, 9), image.shape).astype(np.float32)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image
