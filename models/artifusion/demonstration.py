"""How the demonstration model was made: which tissue it saw, which it did not, and the call that trained it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.models.artifusion.data import Crops, Place, clean_crops, read_crops, write_crops
from wsitk.models.artifusion.training import DEMONSTRATION, DEMONSTRATION_FIT, Event, train
from wsitk.training.fit import Outcome

__all__ = ["CROP", "SPACING_UM", "collect", "demonstrate", "part_of"]

SPACING_UM = 0.5

CROP = 128

TCGA, CMU = "TCGA-DU-6399-01A-01-TS1.svs", "cmu-1-small-region.svs"

APART = {TCGA: ("x", 12600), CMU: ("y", 2300)}
"""From here on, in pixels at `SPACING_UM`, a slide was kept apart; so was every fifth tile of CoNSeP."""


def part_of(place: Place) -> Literal["training", "held_out", "neither"]:
    """Return what a crop at `place` was for; one that reaches across the line was for neither."""
    if place.image not in APART:
        return "held_out" if int(place.image.split("_")[1]) % 5 == 0 else "training"
    axis, line = APART[place.image]
    first = getattr(place, axis)
    if first >= line:
        return "held_out"
    return "training" if first + CROP <= line else "neither"


def collect(data: Path) -> Iterator[tuple[Place, NDArray[np.uint8]]]:
    """Yield the clean crops below `data`: a TCGA slide, CMU-1's small region, and CoNSeP in patches of 256 px."""
    for name in (TCGA, CMU):
        yield from clean_crops(data / "wsi" / name, CROP, SPACING_UM, step=96)
    for path in sorted((data / "nuclei" / "consep256" / "train").glob("*.jpg")):
        yield from clean_crops(path, CROP, SPACING_UM, own_um=0.25)


def demonstrate(data: Path, out: Path, *, on_event: Event = lambda kind, facts: None) -> Outcome:
    """Train the demonstration model in `out`, from where it was left; `data` is looked at the first time only.

    It does not end by itself in any useful time: stop it (SIGINT) and take ``artifusion.safetensors``.
    """
    folder = out / "crops"
    if not folder.is_dir():
        write_crops(collect(data), folder)
    crops = read_crops(folder)
    held_out = crops.where(lambda place: part_of(place) == "held_out")
    some = np.random.default_rng(1).permutation(len(held_out))[:64]
    judged = Crops(held_out.pixels[some], tuple(held_out.places[k] for k in some))
    training = crops.where(lambda place: part_of(place) == "training")
    return train(training, judged, out, DEMONSTRATION, DEMONSTRATION_FIT, on_event=on_event)
