"""What is done with a damaged file: what a run does with it, as far as it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["checkpoint", "drawing", "slide", "volume"]


def slide(path: str, options: dict[str, Any]) -> str:
    """Open a slide, look for tissue, read every tile at 0.5 µm; return "ok", "absent", "other", or codes."""
    import numpy as np

    from wsitk.geometry import Region
    from wsitk.sources import open_source
    from wsitk.sources.working import WorkingImage
    from wsitk.tissue import find_tissue, thumbnail

    with open_source(path, **options) as source:
        source.identity()
        image = WorkingImage(source, (0.5, 0.5))
        absent = False
        for y in range(0, image.shape[0], 256):
            for x in range(0, image.shape[1], 256):
                absent |= image.read(Region((y, x), (256, 256))).absent is not None
        if len(source.channel_names) != 3 or source.dtype != np.uint8:
            return "other"  # a slide model refuses it; there is no tissue to look for
        find_tissue(*thumbnail(source), None)
        said = [w.split()[0] for w in (*source.warnings, *image.warnings)]
    return " ".join(said) or ("absent" if absent else "ok")


def volume(path: str, options: dict[str, Any]) -> str:
    """Open a volume and read it whole; return "ok" or the codes of its warnings."""
    from wsitk.geometry import Region
    from wsitk.sources import open_source, require_spacing

    with open_source(path, **options) as source:
        require_spacing(source)
        source.identity()
        source.read(Region((0,) * source.ndim, source.shape))
        return " ".join(w.split()[0] for w in source.warnings) or "ok"


def drawing(path: str, options: dict[str, Any]) -> str:
    """Read regions and artifacts from a drawing."""
    import numpy as np

    from wsitk.artifacts import artifacts_from_geojson
    from wsitk.sources.array import ArraySource
    from wsitk.tissue import from_geojson

    from_geojson(path, (256, 256), (1.0, 1.0))
    artifacts_from_geojson(path, ArraySource(np.zeros((256, 256, 3), np.uint8), axes="yxc"))
    return "ok"


def checkpoint(path: str, options: dict[str, Any]) -> str:
    """Read the tensors of a checkpoint."""
    from wsitk.torchfile import read_tensors

    read_tensors(Path(path))
    return "ok"
