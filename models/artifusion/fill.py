"""A smooth first guess of what is masked: the surface that a soap film would take, colour by colour.

It is what a chain may start from instead of pure noise (Chung et al. 2022, "Come-closer-diffuse-faster", CVPR), and
the least that a restoration has to be better than.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["membrane"]

Pixels = NDArray[np.float32]
Bits = NDArray[np.bool_]

_SWEEPS = 40
_SMALLEST = 4


def membrane(image: Pixels, keep: Bits) -> Pixels:
    """Return `image` float32 (H, W, C) with what is not kept filled so that its Laplacian is about zero.

    From coarse to fine: each resolution starts from the one below and is relaxed by a fixed number of sweeps, so
    that time grows with the area alone. An image of which nothing is kept comes back as it is.
    """
    if keep.all() or not keep.any():
        return image
    known = image * keep[..., None]
    height, width = keep.shape
    if min(height, width) <= _SMALLEST:
        guess = np.broadcast_to(known.sum(axis=(0, 1)) / keep.sum(), image.shape).astype(np.float32)
    else:
        guess = _enlarged(membrane(*_halved(known, keep)), (height, width))
    return _relaxed(np.where(keep[..., None], image, guess), keep)


def _halved(known: Pixels, keep: Bits) -> tuple[Pixels, Bits]:
    """Return means of the kept pixels of each 2 x 2, and where there is one; odd borders are halves of their own."""
    rows, columns = (-(-n // 2) for n in keep.shape)
    pads = ((0, 2 * rows - keep.shape[0]), (0, 2 * columns - keep.shape[1]))
    count = np.pad(keep, pads).reshape(rows, 2, columns, 2).sum(axis=(1, 3), dtype=np.float32)
    total = np.pad(known, (*pads, (0, 0))).reshape(rows, 2, columns, 2, -1).sum(axis=(1, 3))
    return (total / np.maximum(count, 1)[..., None]).astype(np.float32), count > 0


def _enlarged(coarse: Pixels, shape: tuple[int, int]) -> Pixels:
    return coarse.repeat(2, axis=0).repeat(2, axis=1)[: shape[0], : shape[1]]


def _relaxed(image: Pixels, keep: Bits) -> Pixels:
    """Return the image after sweeps in which every pixel that is not kept becomes its four neighbours' mean."""
    rows, columns = (slice(max(0, int(n.min()) - 1), int(n.max()) + 2) for n in np.nonzero(~keep))
    part, held = image[rows, columns], keep[rows, columns][..., None]
    for _ in range(_SWEEPS):
        # beyond the border lies the border pixel again
        around = np.pad(part, ((1, 1), (1, 1), (0, 0)), mode="edge")
        mean = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) * np.float32(
            0.25
        )
        part = np.where(held, part, mean)
    found = image.copy()
    found[rows, columns] = part
    return found
