"""Slides, masks and runs for the tests of restoration; the targets of fresh processes among them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from wsitk.testing.painters import PlacePainter, TruthPainter

SETTINGS: dict[str, Any] = {"workers": 2, "threads": 1, "device": "cpu", "restore_samples": 2}
PAINTER: dict[str, Any] = {"tile": 128, "halo": 16}


def write_mask(path: Path, boxes: Sequence[tuple[str, int, int, int, int]]) -> str:
    """Write rectangles (kind, x, y, width, height) as GeoJSON, as QuPath does."""
    features = []
    for kind, x, y, width, height in boxes:
        # a hair inside: an outline on a pixel's border would mark the next one, too
        a, b, c, d = x + 0.1, y + 0.1, x + width - 0.1, y + height - 0.1
        ring = [[a, b], [c, b], [c, d], [a, d], [a, b]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", "classification": {"name": kind}},
            }
        )
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def masked(shape: tuple[int, int], boxes: Sequence[tuple[str, int, int, int, int]]) -> np.ndarray:
    """Return the same as a boolean array."""
    mask = np.zeros(shape, bool)
    for _, x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


def write_slide(path: Path, pixels: np.ndarray, um: float = 0.5) -> str:
    """Write pixels as a tiled TIFF without loss, with a second level."""
    options: dict[str, Any] = {
        "tile": (64, 64), "photometric": "rgb", "compression": "adobe_deflate", "resolutionunit": "CENTIMETER"
    }  # fmt: skip
    with tifffile.TiffWriter(path) as writer:
        for step in (1, 2, 4):
            per_cm = 1e4 / (um * step)
            level = pixels[::step, ::step]
            writer.write(level, resolution=(per_cm, per_cm), subfiletype=int(step > 1), **options)
    return str(path)


def paint(slide: str, mask: str, out: str) -> None:
    """Run the painter over a slide file."""
    import wsitk

    wsitk.run(PlacePainter(**PAINTER), slide, out=out, mask=mask, **SETTINGS)


def die_at(step: int, slide: str, mask: str, out: str) -> None:
    """Run, and be killed just before the `step`-th call that makes something durable."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    paint(slide, mask, out)
    os._exit(0 if count < step else 1)


def painter() -> PlacePainter:
    """Return a model, for runs by name."""
    return PlacePainter(**PAINTER)


def killed_once() -> PlacePainter:
    """Return a model whose process is killed in the middle of its second region, once; a file remembers."""
    model = PlacePainter(**PAINTER)
    mark = Path(os.environ["WSITK_TEST_MARK"])
    real, calls = model.process_region, 0

    def process(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    model.process_region = process  # type: ignore[method-assign]
    return model


def poisoned() -> PlacePainter:
    """Return a model that kills its process wherever a region begins in the upper left."""
    model = PlacePainter(**PAINTER)
    real = model.process_region

    def process(image: Any, mask: Any, region: Any, **kwargs: Any) -> Any:
        if max(region.start) < 64:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(image, mask, region, **kwargs)

    model.process_region = process  # type: ignore[method-assign]
    return model


def truth() -> TruthPainter:
    """Return a model that knows the clean image: the array in the file ``WSITK_TEST_TRUTH``."""
    return TruthPainter(np.load(os.environ["WSITK_TEST_TRUTH"], allow_pickle=False), **PAINTER)
