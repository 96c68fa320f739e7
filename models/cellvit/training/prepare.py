"""Bringing the sources into one folder for the training, and labelling slides with a teacher.

Only permissively licensed sources take part. Nuclei of the two slides come from InstanSeg's published
brightfield model (Apache-2.0); windows of empty glass are labelled empty without asking it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import openslide
import torch

from wsitk.models.cellvit.training.augment import Image, Labels
from wsitk.models.cellvit.training.data import SPACING

MIDDLE_DIAMETER = 10.0
"""Median nucleus diameter in pixels at SPACING, for sources that do not say their magnification."""

WINDOW_PX = 512
TISSUE_SATURATION = 25
TISSUE_WINDOWS, GLASS_WINDOWS = 90, 14

Teacher = Callable[[Image], Labels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--consep", type=Path, help="folder of 256 px CoNSeP patches, train_<tile>_<k>")
    parser.add_argument("--dsb", type=Path, help="folder of the H&E part of DSB 2018")
    parser.add_argument("--slide", type=str, nargs="*", default=[], help="slides as <source>=<path>")
    parser.add_argument("--teacher", type=Path, help="InstanSeg TorchScript")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.consep:
        prepare_consep(options.consep, options.out)
    if options.dsb:
        prepare_dsb(options.dsb, options.out)
    for entry in options.slide:
        source, _, path = entry.partition("=")
        prepare_slide(source, Path(path), instanseg(options.teacher), options.out)


def save(out: Path, name: str, image: Image, inst: Labels, spacing: float) -> None:
    np.savez(out / f"{name}.npz", image=image, inst=inst, spacing=np.float32(spacing))


def prepare_consep(consep: Path, out: Path) -> None:
    """One file per 1000 px tile, at 0.25 µm/px."""
    for tile in sorted({int(re.findall(r"train_(\d+)_", p.name)[0]) for p in consep.glob("train_*.npz")}):
        save(out, f"consep_{tile:02d}", *assemble(consep, tile), 0.25)


def prepare_dsb(dsb: Path, out: Path) -> None:
    """One file per image, with a guess at the spacing."""
    for path in sorted(dsb.glob("*.npz")):
        inst = np.load(path)["inst"]
        save(out, f"dsb_{path.stem}", read_rgb(path.with_suffix(".png")), inst, guess_spacing(inst))


def prepare_slide(source: str, path: Path, teacher: Teacher, out: Path) -> None:
    """Random windows of a slide at SPACING: tissue as the teacher labels it, glass as empty (`bg_...`)."""
    rng = np.random.default_rng(0)
    slide = openslide.OpenSlide(path)
    spacing = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
    side = round(WINDOW_PX * SPACING / spacing)
    tissue, glass = [], []
    for x, y, share in windows(slide, side):
        if share > 0.35:
            tissue.append((x, y))
        elif share < 0.004:
            glass.append((x, y))
    for kind, positions, count in ((source, tissue, TISSUE_WINDOWS), ("bg", glass, GLASS_WINDOWS)):
        for index in rng.permutation(len(positions))[:count]:
            x, y = positions[index]
            window = np.asarray(slide.read_region((x, y), 0, (side, side)).convert("RGB"), np.uint8)
            image = np.asarray(
                cv2.resize(window, (WINDOW_PX, WINDOW_PX), interpolation=cv2.INTER_AREA), np.uint8
            )
            inst = np.zeros(image.shape[:2], np.uint16) if kind == "bg" else teacher(image)
            save(out, f"{kind}_{path.stem}_{x}_{y}", image, inst, SPACING)


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
    network = torch.jit.load(path)  # type: ignore[no-untyped-call]

    def label(image: Image) -> Labels:
        pixels = image.astype(np.float32)
        low, high = np.percentile(pixels, (0.1, 99.9), axis=(0, 1)).astype(np.float32)
        stretched = torch.from_numpy((pixels - low) / (high - low + 1e-6))
        with torch.inference_mode():
            found = network(stretched.permute(2, 0, 1)[None])[0, 0]
        return np.asarray(found.numpy(), np.uint16)

    return label


def read_rgb(path: Path) -> Image:
    """An image file as (H, W, 3)."""
    read = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if read is None:
        raise FileNotFoundError(path)
    return np.ascontiguousarray(read[..., ::-1], np.uint8)


def guess_spacing(inst: Labels) -> float:
    """Spacing of an image that does not state it, such that its median nucleus is of the usual size.

    At least 0.4 of SPACING: a field of large nuclei may well be a field of large nuclei.
    """
    area = np.bincount(inst.ravel())[1:]
    diameter = float(np.sqrt(np.median(area[area > 0]) * 4 / np.pi))
    return SPACING * float(np.clip(MIDDLE_DIAMETER / diameter, 0.4, 1.2))


def assemble(folder: Path, tile: int) -> tuple[Image, Labels]:
    """The 1000 px CoNSeP tile from its 16 patches.

    Patches 0-8 and 9-11 are the first three columns, row by row; 12-15 are the last column. The last row and
    column end at the border and so overlap the ones before by 24 px; the others only touch.
    """
    edge, offsets = 1000, (0, 256, 512, 744)
    image = np.zeros((edge, edge, 3), np.uint8)
    inst = np.zeros((edge, edge), np.uint16)
    for index in range(16):
        row, column = (index // 3, index % 3) if index < 12 else (index - 12, 3)
        stem = folder / f"train_{tile}_{index:03d}"
        y, x = offsets[row], offsets[column]
        here = (slice(y, y + 256), slice(x, x + 256))
        labels = np.load(stem.with_suffix(".npz"))["inst"].astype(np.int64)
        image[here] = read_rgb(stem.with_suffix(".jpg"))
        labels = np.where(labels > 0, labels + int(inst.max()), 0).astype(np.uint16)
        inst[here] = adopt(labels, inst[here])
    for at in (256, 512):
        join_seam(inst, inst[at - 1], inst[at])
        join_seam(inst, inst[:, at - 1], inst[:, at])
    return image, inst


def adopt(labels: Labels, placed: Labels) -> Labels:
    """Give labels of a new patch the number of the instance placed earlier that they overlap most."""
    both = (labels > 0) & (placed > 0)
    table = np.arange(int(labels.max()) + 1, dtype=np.uint16)
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
