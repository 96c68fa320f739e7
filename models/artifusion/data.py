"""Clean tissue to learn from: crops of slides and images that show no artifact, kept in one file.

A model of artifacts would paint artifacts. What is blurred, black, drawn upon or bare glass is left out by plain
measures that err on the side of leaving out; give an `inspect` of your own where you have a better judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.sources import open_source
from wsitk.sources.working import WorkingImage

__all__ = ["Crops", "Place", "clean_crops", "is_clean", "read_crops", "write_crops"]

Inspect = Callable[[NDArray[np.uint8]], bool]

PIXELS, PLACES = "crops.npy", "crops.json"


@dataclass(frozen=True)
class Place:
    """Where a crop comes from: the image's name, and its first pixel (y, x) at the spacing that was read."""

    image: str
    y: int
    x: int


@dataclass(frozen=True)
class Crops:
    """Crops uint8 (N, S, S, 3), read from the disk as they are asked for, and where each comes from."""

    pixels: NDArray[np.uint8]
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places)

    def where(self, keep: Callable[[Place], bool]) -> Crops:
        """Return the crops whose place is wanted."""
        chosen = [k for k, place in enumerate(self.places) if keep(place)]
        return Crops(self.pixels[chosen], tuple(self.places[k] for k in chosen))


def is_clean(crop: NDArray[np.uint8]) -> bool:
    """Tell whether a crop (H, W, 3) is sharp H&E tissue, and nothing else, as far as colours and edges tell.

    Tissue (optical density above 0.08) covers 60 % or more; green, and ink bluer than any nucleus, 0.5 % at most;
    no patch of a quarter of its side is nearly black (single nuclei may be); the Laplacian of its grey values has
    a standard deviation of at least 5: a blurred crop's has less.
    """
    import cv2

    density = -np.log10(np.maximum(crop, 1) / 255.0).mean(axis=-1)
    # ink is a colour of many pixels in a row; grain and the camera's own noise are not
    red, green, blue = (cv2.blur(crop, (9, 9))[..., k].astype(np.int16) for k in range(3))
    ink = (green > red + 10) | (blue > red + 90)
    side = max(1, len(crop) // 4)
    patches = cv2.boxFilter(crop.max(axis=-1), cv2.CV_32F, (side, side))
    edges = cv2.Laplacian(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.CV_32F)
    tissue = (density > 0.08).mean() >= 0.6
    return bool(tissue and ink.mean() <= 0.005 and patches.min() >= 70 and edges.std() >= 5)


def clean_crops(
    path: str | Path,
    size: int,
    spacing_um: float,
    *,
    step: int | None = None,
    own_um: float | None = None,
    area: Region | None = None,
    inspect: Inspect = is_clean,
) -> Iterator[tuple[Place, NDArray[np.uint8]]]:
    """Yield the clean crops of one slide or image, row by row, `step` pixels apart (by default a crop's side).

    `own_um` is the pixel size of an image that doesn't know its own, `area` the part to look at (in pixels at
    `spacing_um`; it may reach beyond the image). Raises SourceError and SpacingError.
    """
    step = step or size
    with open_source(path, mpp=own_um) as source:
        image = WorkingImage(source, (spacing_um,) * 2)
        whole = Region((0, 0), image.shape)
        inside = whole if area is None else whole.intersect(area)
        (top, left), (bottom, right) = inside.start, inside.stop
        for y in range(top, bottom - size + 1, step):
            row = np.asarray(image.read(Region((y, left), (size, right - left))).pixels, np.uint8)
            for x in range(left, right - size + 1, step):
                crop = np.ascontiguousarray(row[:, x - left : x - left + size])
                if inspect(crop):
                    yield Place(Path(path).name, y, x), crop


def write_crops(found: Iterator[tuple[Place, NDArray[np.uint8]]], folder: Path) -> int:
    """Put crops into `folder`, to be read by `read_crops`; return how many there are.

    Raises UsageError WSI641 where there is none.
    """
    every = list(found)
    if not every:
        raise UsageError("WSI641", "no clean tissue in what you named; give slides at 0.5 µm/px or finer")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / PIXELS, np.stack([pixels for _, pixels in every]), allow_pickle=False)
    rows = [[place.image, place.y, place.x] for place, _ in every]
    (folder / PLACES).write_text(json.dumps(rows), "utf-8")
    return len(every)


def read_crops(folder: Path) -> Crops:
    """Return what `write_crops` wrote. Raises UsageError WSI642 if it is not there, or damaged."""
    try:
        pixels = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
        rows: Sequence[Any] = json.loads((folder / PLACES).read_text("utf-8"))
        places = tuple(Place(str(name), int(y), int(x)) for name, y, x in rows)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(places):
            raise ValueError(f"{pixels.shape} of {pixels.dtype} for {len(places)} places")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            "WSI642", f"{folder} holds no crops ({error}); write them with artifusion.data.write_crops"
        ) from error
    return Crops(pixels, places)
