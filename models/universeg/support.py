"""The support: the examples that tell a network its task, from a folder of images and masks.

FOLDER/images/a.png  FOLDER/masks/a.png     the same names; `labels` for `masks` will do
FOLDER/a.npz                                or arrays `image` and `mask` (H, W) in one file

A volume gives its slices along the first axis in which there is something to see.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.models.universeg.planes import Planes, bare_name, is_picture, open_planes

__all__ = ["LARGEST", "Example", "Support", "examples_at", "read_support", "unit_range"]

logger = logging.getLogger("wsitk.models")

LARGEST = 64
"""Most examples that are used: as many as the published networks were trained for."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue, ITU-R BT.601."""

Intensity = tuple[float, float]


@dataclass(frozen=True)
class Example:
    """An image (H, W), float32 in its own units, and a mask of the same shape."""

    name: str
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Support:
    """Examples of one task; `colour` tells whether their images are RGB, of which the luminance was taken.

    `found` is how many examples the folder held; where that is more than there are here, these are spread
    evenly over them. `sha256` is of images and masks.
    """

    examples: tuple[Example, ...]
    colour: bool
    found: int
    sha256: str


@dataclass(frozen=True)
class _Pair:
    """A file of an image and one of its mask; the same file twice where it holds both."""

    name: str
    image: Path
    mask: Path


def read_support(folder: str | Path, *, label: int | None = None, largest: int = LARGEST) -> Support:
    """Return the examples of a folder; see the module for its layout.

    `label` is the value of the mask that is meant; None takes whatever isn't zero.

    Raises UsageError: WSI070 (no such folder, or no pairs in it), WSI071 (a file without its partner), WSI072
    (image and mask differ in shape, or one of them is neither grey nor RGB), WSI073 (nothing is marked).
    SourceError for files that can't be read.
    """
    folder = Path(folder)
    pairs = _pairs(folder)
    kinds = {pair.name: _colour(pair) for pair in pairs}
    if len(set(kinds.values())) > 1:
        grey, rgb = (next(n for n, colour in kinds.items() if colour is c) for c in (False, True))
        raise UsageError("WSI072", f"{folder}: {grey} is grey and {rgb} in colour; give one kind")
    places = [(pair, z) for pair in pairs for z in _marked(pair, label)]
    chosen = _spread(places, largest)
    if len(chosen) < len(places):
        logger.warning("%s: %d examples of %d are used", folder.name, len(chosen), len(places))
    examples = tuple(_example(pair, z, label) for pair, z in chosen)
    if not any(example.mask.any() for example in examples):
        what = "isn't zero" if label is None else f"is {label}"
        raise UsageError("WSI073", f"{folder}: no mask holds anything that {what}; mark what is to be found")
    return Support(examples, kinds[pairs[0].name], len(places), _sha256(examples))


def examples_at(
    support: Support, size: Sequence[int], intensity: Intensity | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return images in 0..1 and masks of zeros and ones, (S, 1, H, W) each, at `size` = (H, W).

    Images are averaged over areas where they shrink and interpolated where they grow; a pixel of a mask is set
    where half of it was.
    """
    import cv2

    height, width = size
    images, masks = [], []
    for example in support.examples:
        # cv2 wants width first
        shrinks = example.image.shape[0] >= height and example.image.shape[1] >= width
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(example.image, (width, height), interpolation=way)
        share = cv2.resize(example.mask.astype(np.float32), (width, height), interpolation=way)
        images.append(unit_range(image, intensity))
        masks.append((share >= 0.5).astype(np.float32))
    return np.stack(images)[:, None], np.stack(masks)[:, None]


def unit_range(image: NDArray[np.float32], intensity: Intensity | None) -> NDArray[np.float32]:
    """Return the image in 0..1: from its own smallest to its largest value, or between two given ones.

    An image of one value becomes zero.
    """
    low, high = intensity or (float(image.min()), float(image.max()))
    if high <= low:
        return np.zeros_like(image)
    return ((image - np.float32(low)) / np.float32(high - low)).clip(0, 1)


# --- which files belong together ---------------------------------------------------------------------


def _pairs(folder: Path) -> list[_Pair]:
    """Return the pairs by name. Raises UsageError WSI070, WSI071."""
    if not folder.is_dir():
        raise UsageError("WSI070", f"{folder} is no folder; give one with images/ and masks/")
    inner = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    images, masks = inner.get("images"), inner.get("masks") or inner.get("labels")
    if images is None and masks is None:
        pairs = [_Pair(p.stem, p, p) for p in sorted(folder.glob("*.npz"))]
    elif images is None or masks is None:
        raise UsageError("WSI070", f"{folder} has only one of images/ and masks/; it needs both")
    else:
        pairs = _matched(images, masks)
    if not pairs:
        raise UsageError(
            "WSI070",
            f"{folder} holds no examples; put images into images/, masks of the same names into masks/",
        )
    return pairs


def _matched(images: Path, masks: Path) -> list[_Pair]:
    ours, theirs = _by_name(images), _by_name(masks)
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        name = alone[0]
        what, where = ("image", masks) if name in ours else ("mask", images)
        more = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
        raise UsageError(
            "WSI071", f"the {what} {name!r} has no partner in {where}{more}; add it, or remove that"
        )
    return [_Pair(name, ours[name], theirs[name]) for name in sorted(ours)]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and is_picture(p)):
        name = bare_name(path)
        if name in found:
            raise UsageError("WSI071", f"{folder} has {found[name].name} and {path.name}; keep one of them")
        found[name] = path
    return found


# --- their pixels ------------------------------------------------------------------------------------


def _colour(pair: _Pair) -> bool:
    with open_planes(pair.image, "image") as image:
        return image.colour


def _marked(pair: _Pair, label: int | None) -> list[int]:
    """Return which planes count: all of a flat image, also an empty one; of a volume those with something."""
    with open_planes(pair.image, "image") as image, open_planes(pair.mask, "mask") as mask:
        if image.shape != mask.shape:
            raise UsageError(
                "WSI072",
                f"{pair.name}: the image is {image.shape} and its mask {mask.shape}; wanted the same",
            )
        if image.shape[0] == 1:
            return [0]
        return [z for z in range(mask.shape[0]) if _mask(mask, z, label).any()]


def _example(pair: _Pair, z: int, label: int | None) -> Example:
    with open_planes(pair.image, "image") as image, open_planes(pair.mask, "mask") as mask:
        name = pair.name if image.shape[0] == 1 else f"{pair.name} slice {z}"
        values = image.read(z).astype(np.float32)
        if image.colour:
            values = values @ np.array(LUMINANCE, np.float32)
        if not np.isfinite(values).all():
            raise SourceError("WSI102", f"{name}: the image has values that are not finite; write it again")
        return Example(name, np.ascontiguousarray(values), _mask(mask, z, label))


def _mask(mask: Planes, z: int, label: int | None) -> NDArray[np.bool_]:
    """Return what is marked in a plane. Raises UsageError WSI072 for a label in a mask of colours."""
    values: NDArray[Any] = mask.read(z)
    if not mask.colour:
        return np.asarray(values != 0 if label is None else values == label)
    if label is not None:
        raise UsageError("WSI072", f"{mask.name}: a mask in colours has no label {label}; save it in grey")
    return np.asarray((values != 0).any(axis=-1))


def _spread(places: list[tuple[_Pair, int]], largest: int) -> list[tuple[_Pair, int]]:
    """Return at most `largest` of the places, evenly spread."""
    if len(places) <= largest:
        return places
    return [places[(2 * k + 1) * len(places) // (2 * largest)] for k in range(largest)]


def _sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example.image.shape).encode())
        digest.update(example.image.astype("<f4", copy=False).tobytes())
        digest.update(np.packbits(example.mask).tobytes())
    return digest.hexdigest()
