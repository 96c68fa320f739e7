"""Which pages, and which samples of them, are the channels of a fluorescence TIFF; nothing is decoded here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsitk.errors import SourceError, WsitkError
from wsitk.geometry import Spacing
from wsitk.sources.files import MAX_TILE_BYTES, check_pixels
from wsitk.sources.ome_xml import OmeChannel, OmeImage, parse_ome
from wsitk.sources.plate import PlateImage, find_image, images_of
from wsitk.sources.tiff_pages import (
    TiledPage,
    check_chain,
    check_segments,
    page_of,
    pages_of_pyramid,
    stated_spacings,
)

__all__ = ["Found", "Plane", "find_planes"]

_STRIP_BYTES = 1 << 20  # uncompressed rows are cut into strips of about this size
_IMAGEJ_UM = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0, "nm": 1e-3, "mm": 1e3}
_RGB = ("red", "green", "blue")


@dataclass(frozen=True, slots=True)
class Plane:
    """One channel of one level: its page, the first of its tiles there, and its place within a pixel.

    `key` tells pages apart; `inverted` says that zero is white.
    """

    page: TiledPage
    key: int
    first: int
    sample: int
    inverted: bool


@dataclass(frozen=True)
class Found:
    """The planes (level, channel), the names of the channels, and what the file states of its pixel size.

    `whole_file` says that the image is all that the file holds.
    """

    levels: tuple[tuple[Plane, ...], ...]
    channel_names: tuple[str, ...]
    stated: list[Spacing] = field(default_factory=list)
    whole_file: bool = True


def find_planes(path: str, name: str, key: str, stacked: bool) -> Found:
    """Return the channels of a TIFF, or of its image `key`; see `PlanesSource` for what is raised."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            check_chain(file, name)
            found = _find(file, name, key, stacked)
            for level in found.levels:
                _ = [p.page.page.decode for p in level]  # builds the decoders while the file is open
            return found
    except WsitkError:
        raise
    except Exception as error:  # a damaged header gives any of twenty types
        raise SourceError("WSI101", f"{name}: TIFF: {type(error).__name__}: {error}") from error


def _find(file: Any, name: str, key: str, stacked: bool) -> Found:
    first = file.pages.first
    document = parse_ome(first.description, os.path.basename(file.filehandle.path))
    if document is not None and document.images:
        images = images_of(document, name)
        image = _chosen(images, document.images, key, name)
        return _of_ome(file, image, name, several=len(images) > 1 or bool(key))
    if key:
        find_image((), key, name)  # which refuses
    if file.is_imagej and int(first.photometric) in (0, 1, 3):
        return _of_imagej(file, name)
    return _of_pages(file, name, stacked)


def _chosen(images: tuple[PlateImage, ...], every: Sequence[OmeImage], key: str, name: str) -> OmeImage:
    """Return the image that was asked for, or the only one."""
    if key:
        return find_image(images, key, name)
    if len(images) < 2:
        return images[0].image if images else every[0]
    keys = [i.key for i in images]
    listed = ", ".join(keys) if len(keys) <= 12 else f"{', '.join(keys[:6])} … {', '.join(keys[-2:])}"
    raise SourceError(
        "WSI170",
        f"{name}: holds {len(keys)} images: {listed}; name one, such as {name}#{keys[0]}, or run them all",
    )


# --- what the metadata say ---------------------------------------------------------------------------


def _of_ome(file: Any, image: OmeImage, name: str, *, several: bool) -> Found:
    """Return an OME image; single grey or colour images without a name are other readers'."""
    count, depth, times = image.planes
    if depth > 1 or times > 1:
        _refuse_stack(name, math.prod(image.planes), f"z {depth}, t {times}")
    pages = [file.pages[k].aspage() for k in image.pages(name, len(file.pages))]
    colour = int(pages[0].photometric) not in (0, 1)
    named = any(c.name for c in image.channels)
    if not several and (colour or (count == 1 and int(pages[0].samplesperpixel) == 1 and not named)):
        raise SourceError("WSI101", f"{name}: an image of one grey or colour channel")
    levels = _levels(pages, name)
    stated = [image.spacing] if image.spacing else stated_spacings(pages[0], False, None)
    return Found(levels, _ome_names(image.channels, len(levels[0]), colour), stated, not several)


def _ome_names(channels: Sequence[OmeChannel], count: int, colour: bool) -> tuple[str, ...]:
    """Return a name for each channel; the samples of one colour have none of their own."""
    if colour and count == 3:
        return _RGB
    stated = [n for c in channels for n in ([c.name] if c.samples == 1 else [""] * c.samples)]
    stated = stated if len(stated) == count else [""] * count
    return tuple(n or f"c{k}" for k, n in enumerate(stated))


def _of_imagej(file: Any, name: str) -> Found:
    """Return an ImageJ hyperstack that has channels only."""
    facts = file.imagej_metadata or {}
    slices, frames = int(facts.get("slices", 1)), int(facts.get("frames", 1))
    images, channels = int(facts.get("images", 1)), int(facts.get("channels", 1))
    if slices > 1 or frames > 1 or images > channels:
        _refuse_stack(name, images, f"z {slices}, t {frames}")
    if channels < 2:
        raise SourceError("WSI101", f"{name}: ImageJ's image of one channel")
    if len(file.pages) < channels:  # beyond 4 GB ImageJ writes one header and the planes behind it
        raise SourceError(
            "WSI172",
            f"{name}: {channels} channels but {len(file.pages)} pages (ImageJ's large stack); save it as OME-TIFF",
        )
    levels = _levels([file.pages[k].aspage() for k in range(channels)], name)
    stated = _imagej_spacing(file.pages.first, facts) or stated_spacings(file.pages.first, False, None)
    return Found(levels, tuple(f"c{k}" for k in range(channels)), stated)


def _imagej_spacing(page: Any, facts: dict[str, Any]) -> list[Spacing]:
    """Return pixels per unit as micrometres per pixel; ImageJ names the unit in its text."""
    um = _IMAGEJ_UM.get(str(facts.get("unit", "")))
    ratios = [page.tags.valueof(code) for code in (283, 282)]  # y, x: numerator and denominator
    if um is None or any(r is None or not r[0] or not r[1] for r in ratios):
        return []
    return [Spacing(tuple(um * r[1] / r[0] for r in ratios), "imagej.unit")]


def _of_pages(file: Any, name: str, stacked: bool) -> Found:
    """Return pages or samples that can be nothing but channels, or are said to be."""
    first = file.pages.first
    grey = int(first.photometric) in (0, 1)
    planes = [p.aspage() for p in file.pages if p.shape == first.shape and not int(p.subfiletype) & 1]
    samples = int(first.samplesperpixel)
    clear = {int(e) for e in first.extrasamples} & {1, 2}  # alpha, which is no channel
    if not grey or clear or (samples == 1 and not (stacked and len(planes) > 1)):
        raise SourceError("WSI101", f"{name}: no page of it says that it is a channel")
    if len(planes) > 1 and not stacked:
        _refuse_stack(name, len(planes), "unexplained")
    reduced = pages_of_pyramid(list(file.pages), aperio=False)[1:] if len(planes) == 1 else []
    levels = _levels(planes, name, reduced)
    names = tuple(f"c{k}" for k in range(len(levels[0])))
    return Found(levels, names, stated_spacings(first, False, None))


def _refuse_stack(name: str, planes: int, words: str) -> None:
    raise SourceError("WSI130", f"{name}: {planes} planes of one size ({words}): a stack; extract one plane")


# --- from pages to planes ----------------------------------------------------------------------------


def _levels(pages: Sequence[Any], name: str, reduced: Sequence[Any] = ()) -> tuple[tuple[Plane, ...], ...]:
    """Return the planes of each level: SubIFDs of every page are its reductions, or `reduced` the only one's."""
    below = [[p.aspage() for p in page.pages] if page.subifds else list(reduced) for page in pages]
    shared = min(len(b) for b in below)
    stacks = [list(pages), *([b[k] for b in below] for k in range(shared))]
    size = pages[0].parent.filehandle.size
    levels = []
    for number, stack in enumerate(stacks):
        planes: list[Plane] = []
        for page in stack:
            check_segments(page, number, size, name)
            planes += _planes_of(page, name)
        levels.append(tuple(planes))
    if any(len(level) != len(levels[0]) for level in levels):
        return tuple(levels[:1])
    return tuple(levels)


def _planes_of(page: Any, name: str) -> list[Plane]:
    """Return the channels of one page, one for each sample."""
    if page.dtype is None or page.dtype.kind not in "uf" or int(page.bitspersample) not in (8, 16, 32, 64):
        raise SourceError(
            "WSI130", f"{name}: values of {page.dtype} are no intensities; save it as 8 or 16 bit"
        )
    samples = int(page.samplesperpixel)
    apart = samples > 1 and int(page.planarconfig) == 2
    whole = _segmented(page, name, samples if apart else 1)
    inverted = int(page.photometric) == 0 and page.dtype.kind == "u"
    tiles = math.prod(whole.grid)
    return [
        Plane(whole, int(page.offset), k * tiles if apart else 0, 0 if apart else k, inverted)
        for k in range(samples)
    ]


def _segmented(page: Any, name: str, parts: int) -> TiledPage:
    """Return a page of tiles or strips, `parts` planes of them one after the other."""
    one_strip = not page.is_tiled and len(page.dataoffsets) == 1
    if one_strip and int(page.compression) == 1:
        return _cut(page, name)
    return page_of(page, name, parts)


def _cut(page: Any, name: str) -> TiledPage:
    """Return a page of one uncompressed strip as if it were many: programs write stitched scans so."""
    shape = (int(page.imagelength), int(page.imagewidth))
    check_pixels(name, shape)
    row = shape[1] * int(page.samplesperpixel) * page.dtype.itemsize
    held = int(page.databytecounts[0])  # none at all is a plane that the file leaves out
    if 0 < held < shape[0] * row:
        raise SourceError(
            "WSI102",
            f"{name}: its strip holds {held:,} of {shape[0] * row:,} bytes; copy it again",
        )
    rows = min(shape[0], max(1, _STRIP_BYTES // row))
    if rows * row > MAX_TILE_BYTES:
        raise SourceError("WSI141", f"{name}: a row of {row} bytes, the limit is {MAX_TILE_BYTES}")
    starts = np.arange(0, shape[0], rows, dtype=np.int64)
    return TiledPage(
        page,
        shape,
        (rows, shape[1]),
        (len(starts), 1),
        int(page.dataoffsets[0]) + starts * row,
        np.minimum(rows, shape[0] - starts) * (row if held else 0),
        None,
        page.dtype.newbyteorder(page.parent.byteorder),
    )
