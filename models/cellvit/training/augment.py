"""Random changes of a crop: geometry, stain, optics and compression.

A network for slides meets stains and scanners that its training set has not seen; what stands in for them is
varying colour far more than any one laboratory does.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint16]
Float = npt.NDArray[np.float32]

# Optical density of haematoxylin, eosin and a residual, one unit vector a row (Ruifrok and Johnston 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)


def scale_factor(rng: np.random.Generator) -> float:
    """How much larger a window to read than the crop: mostly 0.8 to 1.25, now and then 0.6 to 1.6."""
    widest = np.log(1.6 if rng.random() < 0.12 else 1.25)
    return float(np.exp(rng.uniform(-widest, widest)))


def flip(image: Image, inst: Labels, rng: np.random.Generator) -> tuple[Image, Labels]:
    """One of the eight symmetries of the square."""
    turns, mirror = int(rng.integers(4)), rng.random() < 0.5
    image, inst = np.rot90(image, turns), np.rot90(inst, turns)
    if mirror:
        image, inst = image[:, ::-1], inst[:, ::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(inst)


def stain_jitter(image: Image, rng: np.random.Generator) -> Image:
    """The same tissue from another laboratory."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.85:
        pixels = restain(pixels, rng)
    if rng.random() < 0.6:
        pixels = recolour(pixels, rng)
    if rng.random() < 0.5:
        pixels = expose(pixels, rng)
    return degrade(np.clip(pixels, 0, 255).astype(np.uint8), rng)


def restain(pixels: Float, rng: np.random.Generator) -> Float:
    """Unmix the stains, change their amounts, and mix them again with other vectors."""
    density = -np.log(np.maximum(pixels, 1.0) / 255.0)
    amounts = density.reshape(-1, 3) @ np.linalg.inv(STAINS)
    gain = np.exp(rng.normal(0, 0.25, 3)).astype(np.float32)
    shift = rng.normal(0, 0.025, 3).astype(np.float32)
    vectors = np.maximum(STAINS + rng.normal(0, 0.07, (3, 3)), 0.01)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    mixed = np.maximum((amounts * gain + shift) @ vectors, 0).reshape(pixels.shape)
    return np.asarray(255.0 * np.exp(-mixed), np.float32)


def recolour(pixels: Float, rng: np.random.Generator) -> Float:
    """Turn the hue and change the saturation, by a linear map about the grey axis."""
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = pixels - grey[..., None]
    angle = rng.normal(0, 0.22)
    axis = np.ones((3, 3)) / 3.0
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3.0)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * axis
    saturation = 0.0 if rng.random() < 0.03 else rng.uniform(0.5, 1.5)
    return np.asarray(grey[..., None] + colour @ (turn.T * saturation).astype(np.float32), np.float32)


def expose(pixels: Float, rng: np.random.Generator) -> Float:
    """White balance, gamma, contrast and brightness of a scanner."""
    balance = rng.uniform(0.85, 1.05, 3).astype(np.float32)
    gamma = float(np.exp(rng.normal(0, 0.2)))
    pixels = 255.0 * (np.clip(pixels, 0, 255) / 255.0) ** gamma * balance
    contrast = rng.uniform(0.75, 1.25)
    middle = pixels.mean()
    return np.asarray((pixels - middle) * contrast + middle * rng.uniform(0.85, 1.15), np.float32)


def degrade(image: Image, rng: np.random.Generator) -> Image:
    """Focus, sharpening, JPEG and sensor noise."""
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
