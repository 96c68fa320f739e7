"""What is learned from: made fields, some with photographs of real nuclei in them, as crops with targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from wsitk.errors import UsageError
from wsitk.models.liverstage.fields import DNA, Field, FieldRecipe, make_field
from wsitk.models.liverstage.network import NORMALISE
from wsitk.volumes.nnunet_rules import QUANTILES, Moments
from wsitk.volumes.quantiles import Histogram

__all__ = [
    "CORE",
    "Crops",
    "Photograph",
    "Sample",
    "depths",
    "normalised",
    "read_photographs",
    "sample",
    "targets",
]

Floats = NDArray[np.float32]

CORE = 0.4
"""Depth from which pixels are in an object's core: of a disc, the inner 60 % of the radius."""


@dataclass(frozen=True)
class Photograph:
    """Real nuclei: ``image`` float32 (H, W), 0 to about 1, and instance masks int32 (H, W)."""

    name: str
    image: Floats
    nuclei: NDArray[np.int32]

    @property
    def diameter(self) -> float:
        """Return the median diameter of its nuclei in pixels."""
        sizes = np.bincount(self.nuclei.ravel())[1:]
        return float(np.sqrt(np.median(sizes[sizes > 0]) * 4 / np.pi))


@dataclass(frozen=True)
class Crops:
    """How fields become samples.

    Attributes
    ----------
    side, crop, each
        Sides of the fields and of the crops from them in pixels; crops that are taken of each field.
    photographed
        Share of fields with real nuclei, where there are photographs.
    blind
        Share of crops whose channel of DNA is empty: the model must find parasites without it.
    gain
        Deviation of the logarithm of a factor on each channel: backgrounds are never measured exactly.
    """

    side: int = 320
    crop: int = 160
    each: int = 4
    photographed: float = 0.3
    blind: float = 0.2
    gain: float = 0.25
    recipe: FieldRecipe = field(default_factory=FieldRecipe)


@dataclass(frozen=True)
class Sample:
    """``image`` float32 (2, H, W) as the network reads it; ``target`` float32 (2, H, W), see `network.HEADS`;
    ``labels`` int32 (H, W)."""

    image: Floats
    target: Floats
    labels: NDArray[np.int32]


def read_photographs(folder: str | Path) -> list[Photograph]:
    """Return the pictures ``NAME.png`` in `folder` that have masks ``NAME.npz`` (``inst``) beside them, by name.

    Raises UsageError WSI621 if there are none, or one that is not grey or has masks of another shape.
    """
    found = []
    for path in sorted(Path(folder).glob("*.png")):
        if not path.with_suffix(".npz").is_file():
            continue
        image = np.asarray(Image.open(path))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            nuclei = stored["inst"].astype(np.int32) if "inst" in stored else np.zeros((0, 0), np.int32)
        if image.ndim != 2 or nuclei.shape != image.shape:
            raise UsageError(
                "WSI621", f"{path.name} has pixels {image.shape} and masks {nuclei.shape}; wanted both (H, W)"
            )
        dark, bright = np.percentile(image, (5, 99.9))
        scaled = np.clip((image - dark) / max(bright - dark, 1), 0, 1.2).astype(np.float32)
        found.append(Photograph(path.stem, scaled, nuclei))
    if not found:
        raise UsageError("WSI621", f"no pictures NAME.png with masks NAME.npz in {folder}")
    return found


def normalised(image: NDArray[np.generic]) -> Floats:
    """Return a whole field (C, H, W) as the engine normalises it for the network."""
    planes = []
    for channel in image:
        moments = Moments.of(channel)
        counted = Histogram(moments.low, moments.high, channel.dtype)
        counted.add(channel)
        known = Moments(
            low=moments.low, high=moments.high, count=1, quantiles=tuple(map(counted.quantile, QUANTILES))
        )
        planes.append(NORMALISE.numbers(known)(channel))
    return np.stack(planes)


def depths(labels: NDArray[np.int32]) -> Floats:
    """Return how deep inside its object each pixel lies, as a share of the object's deepest; 0 outside."""
    found = np.zeros(labels.shape, np.float32)
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        # beyond the image an object goes on: its cut is no outline
        grown = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        inside = labels[grown] == label
        far = ndimage.distance_transform_edt(inside)
        found[grown][inside] = (far[inside] - 0.5) / max(float(far.max()) - 0.5, 0.5)
    return found


def targets(labels: NDArray[np.int32]) -> Floats:
    """Return what the network shall say of objects (H, W): float32 (2, H, W), see `network.HEADS`."""
    return np.stack([labels > 0, depths(labels) >= CORE]).astype(np.float32)


def sample(
    rng: np.random.Generator, crops: Crops, photographs: Sequence[Photograph] = ()
) -> tuple[Field, list[Sample]]:
    """Return a field and crops of it: a pure function of the arguments and the state of `rng`."""
    nuclei = None
    if photographs and rng.random() < crops.photographed:
        nuclei = _piece(photographs[int(rng.integers(len(photographs)))], crops.side, rng)
    made = make_field((crops.side, crops.side), rng, crops.recipe, nuclei)
    image = normalised(made.image)
    target = targets(made.parasites)
    found = []
    for turn in range(crops.each):
        y, x = _corner(made, crops, rng, near=turn % 2 == 0)
        place = (slice(y, y + crops.crop), slice(x, x + crops.crop))
        part = image[:, *place] * np.exp(rng.normal(0, crops.gain, (2, 1, 1))).astype(np.float32)
        if rng.random() < crops.blind:
            part[DNA] = 0
        found.append(Sample(part.astype(np.float32), target[:, *place], made.parasites[place]))
    return made, found


def _corner(made: Field, crops: Crops, rng: np.random.Generator, *, near: bool) -> tuple[int, int]:
    """Return where a crop begins: anywhere, or so that it shows a parasite, if there is one."""
    room = crops.side - crops.crop
    places = np.flatnonzero(made.parasites)
    if near and places.size:
        at = np.array(divmod(int(rng.choice(places)), crops.side))
        y, x = np.clip(at - rng.integers(0, crops.crop, 2), 0, room).tolist()
        return y, x
    y, x = rng.integers(0, room + 1, 2).tolist()
    return y, x


def _piece(photograph: Photograph, side: int, rng: np.random.Generator) -> Floats:
    """Return a square of a photograph, mirrored beyond its border, its nuclei scaled to 8 to 22 pixels."""
    times = float(np.exp(rng.uniform(np.log(8), np.log(22)))) / photograph.diameter
    scaled = ndimage.zoom(photograph.image, min(times, 3.0), order=1)
    while min(scaled.shape) < side:
        scaled = np.pad(scaled, [(0, n - 1) for n in scaled.shape], mode="reflect")
    y, x = (int(rng.integers(0, n - side + 1)) for n in scaled.shape)
    piece: Floats = np.rot90(scaled[y : y + side, x : x + side], int(rng.integers(4))).astype(np.float32)
    return piece
