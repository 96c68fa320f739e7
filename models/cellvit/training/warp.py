"""Changes of place: image, instances and types move together.

Images are interpolated, labels take the nearest pixel. Afterwards no instance is in two pieces, and specks
that a cut leaves of a nucleus are nobody's: their centre would not be the nucleus's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Example, Image, Labels, Types

__all__ = ["SPECK_PX", "tidy", "symmetry", "window", "resized", "fit", "sized_crop", "elastic", "mosaic"]

SPECK_PX = 10
"""Pieces of a nucleus with fewer pixels are unlabelled after a move."""

_SAME = 0.02

Array = NDArray[Any]


def tidy(inst: Labels, types: Types | None, smallest: int = SPECK_PX) -> tuple[Labels, Types | None]:
    """Return labels in which each instance is one 8-connected piece of at least `smallest` px, numbered from 1.

    Smaller pieces become `UNLABELLED`. Numbers follow the first pixel of each, row by row.
    """
    from skimage.measure import label

    pieces = np.asarray(label(np.maximum(inst, 0), connectivity=2, background=0))
    size = np.bincount(pieces.ravel())
    keep = size >= smallest
    keep[0] = True
    number = np.where(keep, np.cumsum(keep) - 1, UNLABELLED).astype(np.int32)
    out = number[pieces]
    out[inst == UNLABELLED] = UNLABELLED
    if types is None:
        return out, None
    return out, np.where(out == UNLABELLED, IGNORE, types).astype(np.uint8)


def symmetry(example: Example, turns: int, mirror_x: bool = False, mirror_y: bool = False) -> Example:
    """Return the example turned by `turns` right angles, then mirrored: nothing is interpolated or lost."""

    def move(pixels: Array) -> Array:
        moved = np.rot90(pixels, turns)
        moved = moved[:, ::-1] if mirror_x else moved
        return np.ascontiguousarray(moved[::-1] if mirror_y else moved)

    types = None if example.types is None else move(example.types)
    return replace(example, image=move(example.image), inst=move(example.inst), types=types)


def window(example: Example, y: int, x: int, height: int, width: int) -> Example:
    """Return a window; beyond the image lies its mirror, of which the labels say nothing."""
    before = (max(0, -y), max(0, -x))
    after = (max(0, y + height - example.inst.shape[0]), max(0, x + width - example.inst.shape[1]))
    if any(before + after):
        edges = tuple(zip(before, after, strict=True))
        types = None if example.types is None else np.pad(example.types, edges, constant_values=IGNORE)
        example = replace(
            example,
            # "symmetric" repeats for as long as it takes, whatever the size of the image
            image=np.pad(example.image, (*edges, (0, 0)), mode="symmetric"),
            inst=np.pad(example.inst, edges, constant_values=UNLABELLED),
            types=types,
        )
        y, x = y + before[0], x + before[1]
    here = (slice(y, y + height), slice(x, x + width))
    types = None if example.types is None else example.types[here]
    return replace(example, image=example.image[here], inst=example.inst[here], types=types)


def resized(example: Example, height: int, width: int) -> Example:
    """Return the example resampled: mean of the area when shrinking, else linear; labels by the nearest centre."""
    if example.inst.shape == (height, width):
        return example
    shrinks = height < example.inst.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    image = cv2.resize(np.ascontiguousarray(example.image), (width, height), interpolation=how)
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * old / n, old - 1).astype(np.intp)
        for n, old in zip((height, width), example.inst.shape, strict=True)
    )
    place = np.ix_(rows, columns)
    types = None if example.types is None else example.types[place]
    spacing_um = example.spacing_um * example.inst.shape[0] / height
    return replace(
        example, image=cast(Image, image), inst=example.inst[place], types=types, spacing_um=spacing_um
    )


def fit(
    example: Example, size: int, spacing_um: float, rng: np.random.Generator | None = None, zoom: float = 1.0
) -> Example:
    """Return a square crop of `size` pixels of `spacing_um`, at random, or from the middle without `rng`.

    `zoom` above 1 shows the tissue larger than life: augmentation, not truth. Where the image is too small, its
    mirror fills the crop, unlabelled. The result's `spacing_um` is exactly the one asked for. Raises
    UsageError WSI919 if the image would be enlarged more than 4 times.
    """
    factor = spacing_um / example.spacing_um / zoom
    # 0.499 µm is 0.5 µm: not worth an interpolation
    side = size if abs(factor - 1) < _SAME else max(1, round(size * factor))
    if side * 4 < size:
        raise UsageError(
            "WSI919",
            f"{example.group}: pixels of {example.spacing_um:g} µm cannot train a network for {spacing_um:g} µm; "
            "leave the image out, or train for coarser pixels",
        )
    y, x = (_start(n, side, rng) for n in example.inst.shape)
    crop = resized(window(example, y, x, side, side), size, size)
    inst, types = tidy(crop.inst, crop.types)
    return replace(crop, inst=inst, types=types, spacing_um=spacing_um)


def _start(length: int, side: int, rng: np.random.Generator | None) -> int:
    room = length - side
    if rng is None or room == 0:
        return room // 2
    return int(rng.integers(0, room + 1)) if room > 0 else int(rng.integers(room, 1))


def sized_crop(example: Example, rng: np.random.Generator) -> Example:
    """Return a random square of half to all of the image, enlarged to the whole."""
    height, width = example.inst.shape
    side = int(rng.integers(height // 2, height + 1))
    across = max(1, round(side * width / height))
    y, x = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - across + 1))
    moved = resized(window(example, y, x, side, across), height, width)
    inst, types = tidy(moved.inst, moved.types)
    return replace(moved, inst=inst, types=types, spacing_um=example.spacing_um)


def elastic(
    example: Example,
    rng: np.random.Generator,
    affine_px: float = 15.0,
    alpha: float = 0.5,
    sigma: float = 25.0,
) -> Example:
    """Return the tissue sheared and rippled: three points move by up to `affine_px`, and a smooth field follows.

    The field is uniform noise, smoothed over `sigma` pixels, times `alpha` (Simard et al. 2003). With upstream's
    numbers it moves nothing by a tenth of a pixel: what works is the shear.
    """
    height, width = example.inst.shape
    centre, reach = np.array([width, height], np.float32) / 2, min(height, width) / 3
    anchor = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    moved = (anchor + rng.uniform(-affine_px, affine_px, (3, 2))).astype(np.float32)
    matrix = cv2.getAffineTransform(moved, anchor.astype(np.float32))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ripple = [
        cv2.GaussianBlur(rng.uniform(-1, 1, (height, width)).astype(np.float32), (0, 0), sigma) * alpha
        for _ in range(2)
    ]
    at_x = (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + ripple[0]).astype(np.float32)
    at_y = (matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + ripple[1]).astype(np.float32)
    image = cv2.remap(example.image, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    column, row = np.rint(at_x).astype(np.intp), np.rint(at_y).astype(np.intp)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    row, column = np.where(inside, row, 0), np.where(inside, column, 0)
    labels = np.where(inside, example.inst[row, column], UNLABELLED).astype(np.int32)
    kinds = (
        None
        if example.types is None
        else np.where(inside, example.types[row, column], IGNORE).astype(np.uint8)
    )
    inst, types = tidy(labels, kinds)
    return replace(example, image=cast(Image, image), inst=inst, types=types)


def mosaic(parts: Sequence[Example]) -> Example:
    """Return four examples of one size side by side: small images become one as large as the network wants.

    Types are kept only if all four have them. Raises UsageError WSI919 for another number or sizes.
    """
    if len(parts) != 4 or len({p.inst.shape for p in parts}) != 1:
        sizes = ", ".join(str(p.inst.shape) for p in parts)
        raise UsageError("WSI919", f"a mosaic of {len(parts)} images of {sizes}; wanted four of one size")

    def joined(maps: Sequence[Array]) -> Array:
        return np.vstack([np.hstack(maps[:2]), np.hstack(maps[2:])])

    used = np.cumsum([0, *(int(p.inst.max(initial=0)) for p in parts)])
    inst = [np.where(p.inst > 0, p.inst + n, p.inst) for p, n in zip(parts, used, strict=False)]
    kinds = [p.types for p in parts if p.types is not None]
    return replace(
        parts[0],
        image=joined([p.image for p in parts]),
        inst=joined(inst).astype(np.int32),
        types=joined(kinds) if len(kinds) == 4 else None,
    )
