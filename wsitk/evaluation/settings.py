"""What to compare and by whose rules; lengths carry their unit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from wsitk.errors import UsageError

__all__ = ["Length", "Options", "Protocol", "Task", "Unit"]

Task = Literal["nuclei", "segmentation", "detection"]
Protocol = Literal["pannuke", "pooled", "hovernet"]
Unit = Literal["image", "slide", "patient"]

_LENGTH = re.compile(r"\s*([0-9.]+)\s*(um|µm|μm|mm|px)\s*")


@final
@dataclass(frozen=True)
class Length:
    """A length in ``um``, ``mm`` or ``px``."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str, option: str) -> Length:
        """Return ``2um`` and the like. Raises UsageError (WSI829)."""
        found = _LENGTH.fullmatch(text)
        try:
            value = float(found[1]) if found else 0.0
        except ValueError:
            value = 0.0
        if found is None or not value > 0:
            raise UsageError(
                "WSI829", f"{option} wants a length with its unit such as 2um, 1.5mm or 3px, got {text!r}"
            )
        return cls(value, {"µm": "um", "μm": "um"}.get(found[2], found[2]))

    def to(self, unit: str, pixel: float) -> float:
        """Return the length in `unit`, for pixels of `pixel` such units (``px``: of size 1).

        Raises UsageError (WSI829) for a length in µm or mm where the size of a pixel is unknown.
        """
        if self.unit == unit:
            return self.value
        if self.unit == "px":
            return self.value * pixel
        if unit == "px":
            raise UsageError("WSI829", f"{self} needs the size of a pixel; give --mpp, or the length in px")
        return self.value / 1000 if unit == "mm" else self.value * 1000

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit.replace('um', 'µm')}"


@final
@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes
    ----------
    task : str
    protocol : str
        Whose averages are the headline; the others stand beside it. Of `nuclei` only: ``hovernet`` also pairs
        centroids as HoVer-Net did.
    mpp : float or None
        Pixel size in µm, of images that don't state it.
    group : str
        What is drawn in the bootstrap: images, slides or patients.
    radius : Length
        How far apart the centroids of a pair may lie.
    tolerance : Length or None
        Of NSD; None for one pixel, with a warning.
    table : path or None
        CSV with the columns image, slide, patient, tissue, as far as they are known.
    classes : number -> name
    truth_names, predicted_names : name -> name or None
        How the classes of each side are called in this comparison; None takes an object's class away.
    train : path or None
        What the model was trained on: a list of names, a CSV or a folder.
    images : path or None
        Folder with the images or slides themselves, for the picture of cases.
    resamples, seed : int
        Of the bootstrap.
    allow_extra : bool
        Whether predictions without truth are left aside instead of being refused.
    uncertainty : bool
        Whether what a run says of its own certainty is held against the truth; of `nuclei` only.
    interval_level : float
        The share of true areas that the run's intervals of area mean to hold.
    """

    task: Task = "nuclei"
    protocol: Protocol = "pannuke"
    mpp: float | None = None
    group: Unit = "image"
    radius: Length = Length(3.0, "um")
    tolerance: Length | None = None
    table: Path | None = None
    classes: dict[int, str] = field(default_factory=dict)
    truth_names: dict[str, str | None] = field(default_factory=dict)
    predicted_names: dict[str, str | None] = field(default_factory=dict)
    train: Path | None = None
    images: Path | None = None
    resamples: int = 1000
    seed: int = 0
    allow_extra: bool = False
    uncertainty: bool = False
    interval_level: float = 0.9
