"""Damaged slides by the thousand: small files of many kinds, and seeded mutations of their bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from wsitk.testing import SyntheticSlide

APERIO = "Aperio Image Library v12\r\n640x512 [0,0 640x512] (128x128) JPEG/RGB Q=80|AppMag = 20|MPP = 0.5"
CM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}

KINDS: dict[str, dict[str, Any]] = {
    "plain.tiff": {"compression": None},
    "deflate.tiff": {"compression": "adobe_deflate", "predictor": True},
    "lzw.tiff": {"compression": "lzw"},
    "jpeg.tiff": {"compression": "jpeg"},
    "jpeg2000.tiff": {"compression": "jpeg2000"},
    "zstd.tiff": {"compression": "zstd"},
    "webp.tiff": {"compression": "webp"},
    "big.tiff": {"compression": "jpeg", "bigtiff": True},
    "slide.svs": {"compression": "jpeg", "description": APERIO},
    "scan.ome.tiff": {"compression": "jpeg", "ome": True},
}


def write_kinds(folder: Path) -> list[Path]:
    """Write one small slide of each kind: 640 x 512 pixels and two reductions of them."""
    pixels = SyntheticSlide.make((512, 640), count=120, seed=3).pixels
    return [_write(folder / name, pixels, **options) for name, options in KINDS.items()]


def _write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    tile = {"tile": (128, 128), "photometric": "rgb", "compression": options["compression"]}
    if options.get("predictor"):
        tile["predictor"] = True
    described = {"description": options["description"]} if "description" in options else {}
    with tifffile.TiffWriter(
        path, bigtiff=options.get("bigtiff", False), ome=options.get("ome", False)
    ) as tiff:
        if options.get("ome"):
            meta = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(pixels, subifds=2, metadata=meta, **tile)
            for step in (2, 4):
                tiff.write(np.ascontiguousarray(pixels[::step, ::step]), subfiletype=1, **tile)
        else:
            tiff.write(pixels, metadata=None, **tile, **described, **CM)
            for step in (2, 4):
                small = np.ascontiguousarray(pixels[::step, ::step])
                tiff.write(small, metadata=None, subfiletype=1, **tile, **described)
    return path


def headers(path: Path) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of a file that say what it is: where damage does most."""
    with tifffile.TiffFile(path) as tiff:
        pages = [p for page in tiff.pages for p in (page, *(page.pages or ()))]
        found = [(0, 16)] + [(page.offset, 12 * len(page.tags) + 24) for page in pages]
        found += [
            (t.valueoffset, min(t.count * 8, 512)) for p in pages for t in p.tags.values() if t.count > 1
        ]
    return found


def mutate(data: bytes, places: list[tuple[int, int]], seed: int) -> bytes:
    """Return `data` with a few bytes changed, mostly in its headers; the same for the same seed."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    kind = rng.random()
    if kind < 0.08:
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind < 0.14:  # a run of bytes from elsewhere
        length = rng.randrange(1, 512)
        start, source = rng.randrange(len(damaged)), rng.randrange(len(damaged))
        damaged[start : start + length] = damaged[source : source + length]
        return bytes(damaged)
    for _ in range(rng.randrange(1, 9)):
        start, length = rng.choice(places) if rng.random() < 0.75 else (0, len(damaged))
        place = min(start + rng.randrange(length), len(damaged) - 1)
        damaged[place] = rng.choice(
            (0, 1, 127, 128, 255, rng.randrange(256), damaged[place] ^ (1 << rng.randrange(8)))
        )
    return bytes(damaged)


def use(path: str) -> str:
    """Do with a slide what a run does before and while it computes; called in the reading process."""
    from wsitk.errors import SourceError
    from wsitk.geometry import Region
    from wsitk.sources import open_source
    from wsitk.sources.working import WorkingImage
    from wsitk.tissue import find_tissue, thumbnail

    with open_source(path) as source:
        source.identity()
        source.stamp()
        if len(source.channel_names) != 3 or source.dtype != np.uint8:
            return "other"
        pixels, scale = thumbnail(source)
        find_tissue(pixels, scale, None)
        image = WorkingImage(source, None)
        bad = 0
        for y in (0, 200, max(0, image.shape[0] - 100)):
            try:
                image.read(Region((y - 50, 100), (256, 256)))
            except SourceError:
                bad += 1
        return "damaged" if bad else "ok"
