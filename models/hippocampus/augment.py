"""Random crops of a labelled volume: turned, scaled, bent, mirrored left to right; other intensities."""

from __future__ import annotations

from dataclasses import dataclass
from math import radians

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from wsitk.models.hippocampus.cases import Case

__all__ = ["Recipe", "random_crop"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """How far a crop may be from its case.

    Attributes
    ----------
    turn, scale, shift
        Largest angle about each axis (degrees), largest factor along each axis, largest shift (voxels).
    bend, knots
        Largest standard deviation of displacements (voxels), of a grid of so many knots along each axis.
    mirror
        How often left and right change places. A brain has two hippocampi, each the other's mirror image to
        first order; the data show mostly one side, and this is how the other is learned.
    gain, offset, gamma, noise, blur
        Largest factor and summand of the normalised intensities, largest exponent of them scaled to 0..1,
        deviation of noise, and how often neighbours are averaged.
    """

    turn: float = 15.0
    scale: float = 1.2
    shift: float = 3.0
    bend: float = 1.5
    knots: int = 5
    mirror: float = 0.25
    gain: float = 1.25
    offset: float = 0.2
    gamma: float = 1.5
    noise: float = 0.15
    blur: float = 0.2


def random_crop(
    case: Case, shape: tuple[int, int, int], rng: np.random.Generator, recipe: Recipe
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return an image and its labels of `shape`: a pure function of `case`, `recipe` and the state of `rng`."""
    at = _where(case.image.shape, shape, rng, recipe)
    image = _sampled(case.image, at, "bilinear")
    labels = _sampled(case.labels.astype(np.float32), at, "nearest").astype(np.uint8)
    return _recoloured(image, rng, recipe), labels


def _where(
    size: tuple[int, ...], shape: tuple[int, int, int], rng: np.random.Generator, recipe: Recipe
) -> NDArray[np.float32]:
    """Return the place in the case (z, y, x, voxels) of each voxel of the crop: (*shape, 3)."""
    matrix = _rotation(rng.uniform(-1, 1, 3) * radians(recipe.turn))
    matrix = matrix * recipe.scale ** rng.uniform(-1, 1, 3)  # columns: the axes of the crop
    if rng.random() < recipe.mirror:
        matrix[:, 2] *= -1
    # a case larger than the crop is seen in parts
    room = np.maximum(np.array(size) - shape, 0) / 2 + recipe.shift
    middle = (np.array(size) - 1) / 2 + rng.uniform(-1, 1, 3) * room
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    at = np.stack(axes, -1) @ matrix.T + middle
    knots = rng.normal(size=(1, 3, *(recipe.knots,) * 3)) * rng.uniform(0, recipe.bend)
    bent = F.interpolate(torch.from_numpy(knots), shape, mode="trilinear", align_corners=True)
    found: NDArray[np.float32] = (at + bent[0].permute(1, 2, 3, 0).numpy()).astype(np.float32)
    return found


def _rotation(angles: Floats) -> Floats:
    """Return the rotation about the first, then the second, then the third axis."""
    whole = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        whole = turn @ whole
    return whole


def _sampled(volume: NDArray[np.float32], at: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """Return the values at `at`; beyond the volume 0, as the engine pads."""
    size = np.array(volume.shape, np.float32)
    scaled = (2 * at + 1) / size - 1
    places = torch.from_numpy(np.ascontiguousarray(scaled[..., ::-1]))[None]  # torch wants x first
    found = F.grid_sample(
        torch.from_numpy(volume)[None, None], places, mode=mode, padding_mode="zeros", align_corners=False
    )
    values: NDArray[np.float32] = found[0, 0].numpy()
    return values


def _recoloured(image: NDArray[np.float32], rng: np.random.Generator, recipe: Recipe) -> NDArray[np.float32]:
    low, high = float(image.min()), float(image.max())
    exponent = recipe.gamma ** rng.uniform(-1, 1)
    image = ((image - low) / max(high - low, 1e-6)) ** exponent * (high - low) + low
    if rng.random() < recipe.blur:
        image = F.avg_pool3d(torch.from_numpy(image)[None, None], 3, 1, 1)[0, 0].numpy()
    gain, offset = recipe.gain ** rng.uniform(-1, 1), rng.uniform(-1, 1) * recipe.offset
    noise = rng.normal(size=image.shape) * rng.uniform(0, recipe.noise)
    changed: NDArray[np.float32] = (image * gain + offset + noise).astype(np.float32)
    return changed
