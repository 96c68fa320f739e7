"""Training images: drawing crops of one size at one spacing from sources of several.

A folder holds `<source>_<name>.npz` files with `image` (H, W, 3) uint8, `inst` (H, W) uint16, 0 for
background, and `spacing` in µm/px; `prepare` writes it. Sources differ in magnification, so crops are
cut at the file's own spacing and resampled once, to the network's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsitk.models.cellvit.training.augment import Image, Labels, flip, scale_factor, stain_jitter

SPACING = 0.5
CONSEP_HELD_OUT = (3, 10, 17, 24)
"""Tiles that nothing trains on: every choice is made on them."""

SHARES = {"consep": 0.52, "tcga": 0.16, "cmu": 0.13, "dsb": 0.25, "bg": 0.06}
"""How often each source is drawn, whatever its number of files."""

MOSAIC_SHARE = 0.35


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    name: str
    image: Image
    inst: Labels
    spacing: float

    @property
    def source(self) -> str:
        return self.name.split("_")[0]


def load(folder: Path) -> list[Item]:
    """Every prepared image of a folder, in the order of the names."""
    items = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as data:
            items.append(Item(path.stem, data["image"], data["inst"], float(data["spacing"])))
    return items


def split(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """(training, held out)."""
    held_out = {f"consep_{tile:02d}" for tile in CONSEP_HELD_OUT}
    return [i for i in items if i.name not in held_out], [i for i in items if i.name in held_out]


class CropSampler:
    """Draws augmented crops of `size` pixels at SPACING; the same seed draws the same crops."""

    def __init__(self, items: list[Item], size: int, seed: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(seed)
        self.groups = {s: [i for i in items if i.source == s] for s in SHARES}
        self.groups = {s: group for s, group in self.groups.items() if group}
        shares = np.array([SHARES[s] for s in self.groups])
        self.shares = shares / shares.sum()

    def draw(self) -> tuple[Image, Labels]:
        """One crop, (size, size, 3) and (size, size)."""
        if self.rng.random() >= MOSAIC_SHARE:
            for _ in range(20):
                item = self.item()
                if covers(item, self.size):
                    return self.crop(item, self.size)
        half = self.size // 2
        parts = [self.crop(self.item(), half) for _ in range(4)]
        # Instances of the four parts must not share numbers.
        labels = [np.where(m > 0, m + 4096 * k, 0).astype(np.uint16) for k, (_, m) in enumerate(parts)]
        images = [image for image, _ in parts]
        image = np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])
        return image, np.vstack([np.hstack(labels[:2]), np.hstack(labels[2:])])

    def item(self) -> Item:
        group = list(self.groups.values())[self.rng.choice(len(self.groups), p=self.shares)]
        return group[self.rng.integers(len(group))]

    def crop(self, item: Item, size: int) -> tuple[Image, Labels]:
        """A random window of an item, resampled to `size`, flipped, and with its stain changed."""
        height, width = item.inst.shape
        side = round(size * SPACING / item.spacing * scale_factor(self.rng))
        side = min(side, height, width)
        y, x = self.rng.integers(height - side + 1), self.rng.integers(width - side + 1)
        image, inst = resample(
            item.image[y : y + side, x : x + side], item.inst[y : y + side, x : x + side], (size, size)
        )
        image, inst = flip(image, inst, self.rng)
        return stain_jitter(image, self.rng), inst


def covers(item: Item, size: int) -> bool:
    """Whether an image is large enough for a crop of `size` without being enlarged."""
    return bool(min(item.inst.shape) * item.spacing >= 0.95 * size * SPACING)


def resample(image: Image, inst: Labels, size: tuple[int, int]) -> tuple[Image, Labels]:
    """To `size` (height, width): area average when shrinking; labels by nearest pixel centre."""
    target = size[::-1]
    how = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_LINEAR
    shrunk = cv2.resize(np.ascontiguousarray(image), target, interpolation=how)
    labels = cv2.resize(np.ascontiguousarray(inst), target, interpolation=cv2.INTER_NEAREST_EXACT)
    return shrunk.astype(np.uint8), labels.astype(np.uint16)
