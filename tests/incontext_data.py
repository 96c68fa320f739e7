"""What the tests of UniverSeg and Tyche share: recorded inputs, small official files, folders of examples."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from radiology_fill import load_filled, uniform
from torch import nn

from wsitk.models.universeg.planes import Planes

GOLDEN = Path(__file__).parent / "golden" / "radiology"

Floats = NDArray[np.float32]


def signal(name: str, shape: Sequence[int], smooth: int = 6) -> Floats:
    """Return the smooth input in 0..1 that a golden vector was recorded with."""
    v = uniform(f"input:{name}", prod(shape)).reshape(shape)
    for _ in range(smooth):
        for axis, n in enumerate(shape):
            if n > 4:
                p = np.concatenate([v.take([0], axis), v, v.take([-1], axis)], axis)
                v = (
                    p.take(range(n), axis) + p.take(range(1, n + 1), axis) + p.take(range(2, n + 2), axis)
                ) / 3
    return ((v - v.min()) / (v.max() - v.min())).astype(np.float32)


def keyed_file(path: Path, network: nn.Module, wrapper: str = "") -> Path:
    """Write the network with keyed weights as upstream does; return the path."""
    load_filled(network, 2**0.5)
    state = network.state_dict()
    torch.save({wrapper: state} if wrapper else state, path)
    return path


def keys(name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, type and shape of each entry of the original's state dict."""
    lines = (GOLDEN / name / "keys.txt").read_text().splitlines()
    parts = [line.split() for line in lines]
    return [(n, kind, tuple(int(s) for s in shape.split("x"))) for n, kind, shape in parts]


def keys_of(network: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in network.state_dict().items()
    ]


def blobs(seed: int, shape: tuple[int, int] = (48, 64)) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a grey image of a bright disk on noise, and its mask of 0 and 255."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = (y - rng.integers(15, 33)) ** 2 + (x - rng.integers(15, 49)) ** 2 < 100
    image = rng.integers(20, 90, shape) + 120 * mask
    return image.astype(np.uint8), (255 * mask).astype(np.uint8)


def example_folder(folder: Path, count: int = 3, *, colour: bool = False) -> Path:
    """Write images and masks, and return the folder."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for k in range(count):
        image, mask = blobs(k)
        Image.fromarray(np.stack([image] * 3, -1) if colour else image).save(folder / "images" / f"{k}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{k}.png")
    return folder


def read_all(planes: Planes) -> NDArray[np.generic]:
    with planes:
        return np.stack([planes.read(z) for z in range(planes.shape[0])])
