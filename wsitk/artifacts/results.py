"""What `wsitk artifacts` leaves for a slide: outlines for QuPath, the mask, and a picture to look at."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wsitk.artifacts.mask import KINDS, OTHER, ArtifactMask
from wsitk.artifacts.planes import Planes
from wsitk.writers.base import atomic_file

__all__ = ["COLORS", "write_mask", "write_outlines", "write_picture"]

COLORS: dict[str, tuple[int, int, int]] = {
    "fold": (230, 126, 0),
    "bubble": (0, 120, 255),
    "blur": (140, 80, 200),
    "pen": (0, 160, 60),
    "dust": (0, 190, 200),
    "coverslip": (215, 0, 160),
    OTHER: (120, 120, 120),
}
"""The colour of each kind, in QuPath and in pictures."""

_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:wsitk:artifacts")
_LONGEST = 2000  # pixels of a picture's longer side

Array = NDArray[Any]


def write_outlines(
    path: str | Path,
    mask: ArtifactMask,
    *,
    name: str = "",
    bounds_yx: tuple[int, int] = (0, 0),
    overwrite: bool = False,
) -> int:
    """Write the pieces of a mask as annotations of a GeoJSON file that QuPath imports; return how many.

    A piece's class is its kind, with a colour. Outlines follow the mask's pixels exactly, in level-0 pixels from
    `bounds_yx`, the corner of the scanned area, which is QuPath's origin. `name` is the slide's: ids come from
    it, the kind and the outline. Raises OutputError (WSI510 to WSI512).
    """
    count = 0
    with atomic_file(path, overwrite=overwrite) as stream:
        stream.write(b'{"type":"FeatureCollection","features":[')
        for feature in _features(mask, name, bounds_yx):
            stream.write((b",\n" if count else b"\n") + orjson.dumps(feature))
            count += 1
        stream.write(b"\n]}\n")
    return count


def _features(mask: ArtifactMask, name: str, bounds_yx: tuple[int, int]) -> Iterator[dict[str, Any]]:
    import shapely

    from wsitk.writers.geojson import fit_to_grid

    for kind in mask.kinds:
        outlines = np.array(list(_pieces(mask.of(kind), mask)), object)
        if not len(outlines):
            continue
        fitted, _ = fit_to_grid(outlines, (float(bounds_yx[1]), float(bounds_yx[0])))
        for outline in fitted[~shapely.is_missing(fitted)]:
            yield {
                "type": "Feature",
                "id": str(uuid.uuid5(_IDS, f"{name}\n{kind}\n{outline.wkt}")),
                "geometry": shapely.geometry.mapping(outline),
                "properties": {
                    "objectType": "annotation",
                    "name": kind.capitalize(),
                    "classification": {"name": kind.capitalize(), "color": list(COLORS[kind])},
                },
            }


def _pieces(marked: NDArray[np.bool_], mask: ArtifactMask) -> Iterator[Any]:
    """Yield the polygon (level-0 x, y) of each piece: the union of its runs of pixels."""
    import cv2
    import shapely

    # four neighbours: pieces that touch at a corner only would make no valid polygon together
    count, labels = cv2.connectedComponents(marked.astype(np.uint8), connectivity=4)
    steps = np.diff(np.pad(labels, ((0, 0), (1, 1))), axis=1) != 0
    y, x = np.nonzero(steps)
    # between two changes in a row the label is constant
    follows = np.append(y[1:] == y[:-1], False) if len(y) else np.zeros(0, np.bool_)
    first, last = np.flatnonzero(follows), np.flatnonzero(follows) + 1
    owner = labels[y[first], np.minimum(x[first], labels.shape[1] - 1)]
    inside = owner > 0
    top, left, right, owner = y[first][inside], x[first][inside], x[last][inside], owner[inside]
    (sy, sx), (cy, cx) = mask.scale, mask.corner
    runs = shapely.box(left * sx + cx, top * sy + cy, right * sx + cx, (top + 1) * sy + cy)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, count + 1))
    for low, high in pairwise(bounds):
        yield shapely.union_all(runs[order[low:high]])


def write_mask(path: str | Path, mask: ArtifactMask, *, overwrite: bool = False) -> None:
    """Write a mask as a grey PNG: a pixel's value is the sum of its kinds' bits, `kinds[k]` being 2**k.

    Its text fields say the kinds, and scale and corner in level-0 pixels (y, x). Raises OutputError.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_text("wsitk:kinds", ",".join(mask.kinds))
    notes.add_text("wsitk:scale_yx", ",".join(map(repr, mask.scale)))
    notes.add_text("wsitk:corner_yx", ",".join(map(repr, mask.corner)))
    with atomic_file(path, overwrite=overwrite) as stream:
        Image.fromarray(mask.codes).save(stream, "PNG", pnginfo=notes)


def write_picture(path: str | Path, planes: Planes, mask: ArtifactMask, *, overwrite: bool = False) -> None:
    """Write the slide with its artifacts in colour, as a PNG of at most 2,000 pixels; raises OutputError."""
    import cv2
    from PIL import Image, ImageDraw

    from wsitk.writers.lettering import write

    shrink = max(1, -(-max(planes.shape) // _LONGEST))
    size = -(-planes.shape[1] // shrink), -(-planes.shape[0] // shrink)
    picture = cv2.resize(planes.rgb, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    shown = [kind for kind in (*KINDS, OTHER) if kind in mask.kinds and mask.of(kind).any()]
    for kind in shown:
        share = cv2.resize(mask.of(kind).astype(np.float32), size, interpolation=cv2.INTER_AREA)
        picture += 0.6 * share[..., None] * (np.array(COLORS[kind], np.float32) - picture)
    image = Image.fromarray(np.rint(picture).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for row, kind in enumerate(shown):
        write(draw, (8, 6 + 20 * row), kind, 16, COLORS[kind], halo=(255, 255, 255))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    with atomic_file(path, overwrite=overwrite) as stream:
        stream.write(buffer.getvalue())
