"""Bringing the sources of the shipped model into folders for the training, and labelling slides with a teacher.

Only permissively licensed sources take part. Nuclei of the slides come from InstanSeg's published brightfield
model (Apache-2.0); windows of empty glass are labelled empty without asking it. Each source becomes a folder that
`Patches` reads, so that a training can say how often it is drawn.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from wsitk.models.cellvit.training.data import Example, Image, Labels, Types
from wsitk.models.cellvit.training.masks import read_mask
from wsitk.models.cellvit.training.patches import PatchWriter, read_picture

__all__ = ["CONSEP_CLASSES", "SPACING", "assemble", "instanseg", "main"]

SPACING = 0.5
"""Micrometres per pixel at which the teacher labels."""

CONSEP_CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle")

MIDDLE_DIAMETER = 10.0
"""Median nucleus diameter in pixels at SPACING, for sources that do not say their magnification."""

WINDOW_PX = 512
TISSUE_SATURATION = 25
TISSUE_WINDOWS, GLASS_WINDOWS = 90, 14

Teacher = Callable[[Image], NDArray[np.uint16]]


def main(arguments: list[str] | None = None) -> None:
    """Write a folder for each source that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--consep", type=Path, help="folder of 256 px CoNSeP patches, train_<tile>_<k>")
    parser.add_argument("--dsb", type=Path, help="folder of the H&E part of DSB 2018")
    parser.add_argument("--slide", type=str, nargs="*", default=[], help="slides as <source>=<path>")
    parser.add_argument("--teacher", type=Path, help="InstanSeg TorchScript")
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each source")
    options = parser.parse_args(arguments)
    if options.consep:
        prepare_consep(options.consep, options.out / "consep")
    if options.dsb:
        prepare_dsb(options.dsb, options.out / "dsb")
    slides = [entry.partition("=")[::2] for entry in options.slide]
    if slides and options.teacher is None:
        parser.error("--slide needs --teacher: slides have no labels of their own")
    if slides:
        prepare_slides([(name, Path(path)) for name, path in slides], instanseg(options.teacher), options.out)


def prepare_consep(consep: Path, out: Path) -> None:
    """One image per 1000 px tile, at 0.25 µm/px; the tile is the group that a split keeps together."""
    writer = PatchWriter(out, CONSEP_CLASSES)
    for tile in sorted({int(re.findall(r"train_(\d+)_", p.name)[0]) for p in consep.glob("train_*.npz")}):
        name = f"consep_{tile:02d}"
        image, inst, types = assemble(consep, tile)
        writer.add(name, Example(image, inst, types, 0.25, "Colon", name))
    writer.close()


def prepare_dsb(dsb: Path, out: Path) -> None:
    """One image per image, with a guess at the spacing."""
    writer = PatchWriter(out)
    for path in sorted(dsb.glob("*.npz")):
        inst, _ = read_mask(path)
        image = read_picture(path.with_suffix(".png"))
        writer.add(path.stem, Example(image, inst, None, guess_spacing(inst), "", f"dsb_{path.stem}"))
    writer.close()


def prepare_slides(slides: list[tuple[str, Path]], teacher: Teacher, out: Path) -> None:
    """Random windows of slides at SPACING: tissue as the teacher labels it, and glass, labelled empty, apart."""
    glass = PatchWriter(out / "glass")
    for source, path in slides:
        tissue = PatchWriter(out / source)
        rng = np.random.default_rng(0)
        slide = openslide.OpenSlide(path)
        spacing = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
        side = round(WINDOW_PX * SPACING / spacing)
        found = list(windows(slide, side))
        dense = [(x, y) for x, y, share in found if share > 0.35]
        empty = [(x, y) for x, y, share in found if share < 0.004]
        for writer, corners, count in ((tissue, dense, TISSUE_WINDOWS), (glass, empty, GLASS_WINDOWS)):
            for index in rng.permutation(len(corners))[:count]:
                x, y = corners[index]
                image = read_window(slide, x, y, side)
                blank = writer is glass
                inst = np.zeros(image.shape[:2], np.int32) if blank else teacher(image).astype(np.int32)
                writer.add(f"{path.stem}_{x}_{y}", Example(image, inst, None, SPACING, "", path.stem))
        tissue.close()
    glass.close()


def read_window(slide: openslide.OpenSlide, x: int, y: int, side: int) -> Image:
    """A square of level 0 at SPACING, WINDOW_PX wide."""
    window = np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"), np.uint8)
    size = (WINDOW_PX, WINDOW_PX)
    return np.asarray(cv2.resize(window, size, interpolation=cv2.INTER_AREA), np.uint8)


def windows(slide: openslide.OpenSlide, side: int) -> Iterator[tuple[int, int, float]]:
    """Half-overlapping windows as (x, y, share of coloured pixels on a thumbnail)."""
    width, height = slide.dimensions
    thumbnail = np.asarray(slide.get_thumbnail((width // 16, height // 16)).convert("RGB"), np.int16)
    coloured = np.ptp(thumbnail, axis=2) > TISSUE_SATURATION
    scale = width / coloured.shape[1]
    for y in range(0, height - side + 1, side // 2):
        for x in range(0, width - side + 1, side // 2):
            rows = slice(int(y / scale), int((y + side) / scale))
            columns = slice(int(x / scale), int((x + side) / scale))
            yield x, y, float(coloured[rows, columns].mean())


def instanseg(path: Path) -> Teacher:
    """InstanSeg at SPACING; its input is stretched from the 0.1st to the 99.9th percentile."""
    import torch

    network = torch.jit.load(path)  # type: ignore[no-untyped-call]

    def label(image: Image) -> NDArray[np.uint16]:
        pixels = image.astype(np.float32)
        low, high = np.percentile(pixels, (0.1, 99.9), axis=(0, 1)).astype(np.float32)
        stretched = torch.from_numpy((pixels - low) / (high - low + 1e-6))
        with torch.inference_mode():
            found = network(stretched.permute(2, 0, 1)[None])[0, 0]
        return np.asarray(found.numpy(), np.uint16)

    return label


def guess_spacing(inst: Labels) -> float:
    """Spacing of an image that does not state it, such that its median nucleus is of the usual size.

    At least 0.4 of SPACING: a field of large nuclei may well be a field of large nuclei.
    """
    area = np.bincount(inst.ravel())[1:]
    diameter = float(np.sqrt(np.median(area[area > 0]) * 4 / np.pi))
    return float(SPACING * np.clip(MIDDLE_DIAMETER / diameter, 0.4, 1.2))


def assemble(folder: Path, tile: int) -> tuple[Image, Labels, Types]:
    """The 1000 px CoNSeP tile from its 16 patches: image, instances, types.

    Patches 0-8 and 9-11 are the first three columns, row by row; 12-15 are the last column. The last row and
    column end at the border and so overlap the ones before by 24 px; the others only touch.
    """
    edge, offsets = 1000, (0, 256, 512, 744)
    image = np.zeros((edge, edge, 3), np.uint8)
    inst = np.zeros((edge, edge), np.int32)
    types = np.zeros((edge, edge), np.uint8)
    for index in range(16):
        row, column = (index // 3, index % 3) if index < 12 else (index - 12, 3)
        stem = folder / f"train_{tile}_{index:03d}"
        y, x = offsets[row], offsets[column]
        here = (slice(y, y + 256), slice(x, x + 256))
        labels, kinds = read_mask(stem.with_suffix(".npz"))
        image[here] = read_picture(stem.with_suffix(".jpg"))
        labels = np.where(labels > 0, labels + int(inst.max()), 0).astype(np.int32)
        inst[here] = adopt(labels, inst[here])
        types[here] = 0 if kinds is None else kinds
    for at in (256, 512):
        join_seam(inst, inst[at - 1], inst[at])
        join_seam(inst, inst[:, at - 1], inst[:, at])
    return image, inst, types


def adopt(labels: Labels, placed: Labels) -> Labels:
    """Give labels of a new patch the number of the instance placed earlier that they overlap most."""
    both = (labels > 0) & (placed > 0)
    table = np.arange(int(labels.max()) + 1, dtype=np.int32)
    for label in np.unique(labels[both]):
        table[label] = np.bincount(placed[both & (labels == label)]).argmax()
    return table[labels]


def join_seam(inst: Labels, before: Labels, after: Labels) -> None:
    """Merge, in place, instances that a seam cut in two: those that share most of their border on it."""
    before, after = before.copy(), after.copy()
    pairs, counts = np.unique(np.stack([before, after]), axis=1, return_counts=True)
    for (a, b), count in zip(pairs.T, counts, strict=True):
        longest = max((before == a).sum(), (after == b).sum())
        if a and b and a != b and count >= 0.6 * longest:
            inst[inst == b] = a
            after[after == b] = a
            before[before == b] = a


if __name__ == "__main__":
    main()
