"""Images that show the same: copied, recompressed, resized, mirrored or turned, found among very many.

Each image becomes a thumbnail of 32 x 32 grey values, and the signs of its lowest 63 frequencies a hash
(Zauner 2010). Mirroring and turning only permute the frequencies and change their signs, so all eight come from
one thumbnail. Hashes that differ in few bits agree in one of a few pieces of theirs (the pigeonhole principle):
only images with a piece in common are compared, first by hash, then by the correlation of their thumbnails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import WsitkError
from wsitk.settings import available_cpus

__all__ = ["DISTANCE", "Thumbnails", "lookalikes", "read_thumbnails"]

SIDE = 32
KEPT = 8
BITS = KEPT * KEPT - 1
DISTANCE = 6
"""Differing bits of 63 up to which two images may be one."""

CORRELATION = 0.95
"""Least correlation of two thumbnails of one image."""

FLATTEST = 4.0
"""Least standard deviation (grey values) of a thumbnail: below it, glass looks like any other glass."""

BLOCK = 1 << 21
SIMPLE = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
LARGEST = 1 << 25
"""Pixels of a level that is read for its thumbnail."""

_POPCOUNT = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class Thumbnails:
    """Small grey pictures (N, 32, 32) uint8, and why some are missing: index -> reason."""

    pixels: NDArray[np.uint8]
    missing: dict[int, str]


def read_thumbnails(paths: Sequence[Path]) -> Thumbnails:
    """Return a thumbnail of each image or slide; those that can't be read are named, not guessed."""
    pixels = np.zeros((len(paths), SIDE, SIDE), np.uint8)
    missing: dict[int, str] = {}
    with ThreadPoolExecutor(available_cpus()) as pool:
        for index, found in enumerate(pool.map(_thumbnail, paths)):
            if isinstance(found, str):
                missing[index] = found
            else:
                pixels[index] = found
    return Thumbnails(pixels, missing)


def _thumbnail(path: Path) -> NDArray[np.uint8] | str:
    from PIL import Image, UnidentifiedImageError

    try:
        if path.suffix.lower() not in SIMPLE:
            return _of_slide(path)
        with Image.open(path) as image:
            image.draft("L", (2 * SIDE, 2 * SIDE))
            grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (WsitkError, UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return np.asarray(grey)


def _of_slide(path: Path) -> NDArray[np.uint8] | str:
    """Return the thumbnail of what `open_source` reads, from its coarsest level."""
    import cv2

    from wsitk.geometry import Region
    from wsitk.sources import open_source

    with open_source(path) as source:
        level = len(source.levels) - 1
        shape = source.levels[level].shape[:2]
        if source.axes != ("y", "x", "c") or shape[0] * shape[1] > LARGEST:
            return f"no level of {'x'.join(map(str, shape))} or fewer pixels with axes yxc"
        pixels = source.read(Region((0, 0), shape), level)
    grey = pixels[..., :3].mean(axis=2)
    if pixels.dtype != np.uint8:
        grey *= 255 / max(1, np.iinfo(pixels.dtype).max)
    small = cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small.round(), np.uint8)


def lookalikes(
    pixels: NDArray[np.uint8], part: NDArray[np.integer], distance: int = DISTANCE
) -> list[tuple[int, int, int]]:
    """Return (index, index, differing bits): for each image the most similar one in each earlier part.

    `pixels` are thumbnails (N, 32, 32), `part` is (N,); flat ones are left out. Up to `distance` differing bits
    of 63, in any of the eight positions, and a correlation of 0.95 or more. Sorted by the second index.
    """
    coefficients, normed, rich = _described(pixels)
    hashes = np.stack([_packed(coefficients, turn) for turn in range(8)])
    found = []
    numbers = sorted(set(part[rich].tolist()))
    for at, later in enumerate(numbers):
        for earlier in numbers[:at]:
            left, right = np.flatnonzero(rich & (part == earlier)), np.flatnonzero(rich & (part == later))
            found += _nearest(hashes, normed, left, right, distance)
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def rich(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which thumbnails show enough to be told apart."""
    return np.asarray(pixels.std(axis=(1, 2)) >= FLATTEST)


def _described(
    pixels: NDArray[np.uint8],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Return low frequencies (N, 8, 8), thumbnails of mean 0 and norm 1, and which are not flat."""
    from scipy import fft

    grey = pixels.astype(np.float32)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    low = fft.dctn(grey, axes=(1, 2), norm="ortho")[:, :KEPT, :KEPT]
    norm = np.sqrt((grey * grey).sum(axis=(1, 2), keepdims=True))
    return low, grey / np.maximum(norm, 1), rich(pixels)


def _turned(images: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """Return images (N, H, H) in one of their eight positions: transposed or not, and mirrored."""
    images = images.swapaxes(1, 2) if turn & 4 else images
    return images[:, :: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]


def _packed(low: NDArray[np.float32], turn: int) -> NDArray[np.uint64]:
    """Return the hashes (N,) of images in one position, from the frequencies of their first position."""
    low = low.swapaxes(1, 2) if turn & 4 else low
    odd = np.arange(KEPT) % 2 == 1
    # Mirroring an image changes the sign of its odd frequencies along that axis, and nothing else.
    sign = np.where(odd & bool(turn & 1), -1, 1)[:, None] * np.where(odd & bool(turn & 2), -1, 1)
    bits = (low * sign > 0).reshape(len(low), -1)
    bits[:, 0] = False  # the mean
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64).ravel()


def _nearest(
    hashes: NDArray[np.uint64],
    normed: NDArray[np.float32],
    left: NDArray[np.intp],
    right: NDArray[np.intp],
    distance: int,
) -> list[tuple[int, int, int]]:
    """Return, for each of `right` that has one, its nearest of `left`; the first among equals."""
    none = np.iinfo(np.int64).max
    best = np.full(len(right), none, np.int64)
    for turn in range(8):
        turned = _turned(normed[right], turn)
        for i, j, bits in _candidates(hashes[0, left], hashes[turn, right], distance):
            good = np.einsum("nyx,nyx->n", normed[left[i]], turned[j]) >= CORRELATION
            # One number that sorts by distance, then by position: the minimum needs no second look.
            np.minimum.at(best, j[good], bits[good].astype(np.int64) << 40 | i[good])
    return [
        (int(left[value & ((1 << 40) - 1)]), int(right[j]), int(value >> 40))
        for j, value in enumerate(best.tolist())
        if value != none
    ]


def _candidates(
    a: NDArray[np.uint64], b: NDArray[np.uint64], distance: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint8]]]:
    """Yield (index of a, index of b, differing bits) of all pairs that differ in at most `distance` bits.

    A pair may come more than once. Of ``distance + 1`` pieces one at least must be equal.
    """
    edges = np.linspace(0, BITS + 1, distance + 2).round().astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        one, two = (a >> np.uint64(low)) & mask, (b >> np.uint64(low)) & mask
        order = np.argsort(two, kind="stable")
        first = np.searchsorted(two[order], one, "left")
        count = np.searchsorted(two[order], one, "right") - first
        for start, stop in _blocks(count):
            repeat = count[start:stop]
            i = np.repeat(np.arange(start, stop), repeat)
            within = np.arange(len(i)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
            j = order[first[i] + within]
            differing = _POPCOUNT[(a[i] ^ b[j]).view(np.uint16).reshape(-1, 4)].sum(axis=1, dtype=np.uint8)
            near = np.flatnonzero(differing <= distance)
            for at in range(0, len(near), 1 << 14):
                some = near[at : at + (1 << 14)]
                yield i[some], j[some], differing[some]


def _blocks(count: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Yield ranges over `count` whose sums stay below the size of a block, or hold one entry."""
    total = np.concatenate([[0], np.cumsum(count)])
    start = 0
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + BLOCK, "right")) - 1)
        if total[stop] > total[start]:
            yield start, stop
        start = stop
