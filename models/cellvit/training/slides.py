"""Slides with what was drawn on them in QuPath, cut into crops at the model's spacing.

Beside each slide lies its GeoJSON. Inside an area of the class Training, Region* or ROI*, everything is
labelled; outside, nothing is known. Pixels are read when a crop is, never more than the crop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.models.cellvit.training.annotations import REGIONS, Annotations, read_annotations
from wsitk.models.cellvit.training.data import IGNORE, UNLABELLED, Dataset, Example
from wsitk.models.cellvit.training.drawing import Drawing, rectangle
from wsitk.models.cellvit.training.rasterise import HUNDREDTHS, Lattice
from wsitk.models.cellvit.training.samples import Sample, read_samples
from wsitk.sources import open_source
from wsitk.sources.discover import IMAGES, SLIDES
from wsitk.sources.working import WorkingImage

__all__ = ["Slides", "slide_pairs"]

ENDINGS = (".geojson.gz", ".geojson")

LARGEST_UM = 100.0
"""No nucleus is wider: a larger drawing is an area, whatever it is called."""

_OPEN = 4  # slides held open at a time


@dataclass(frozen=True, eq=False)
class _Slide:
    """A slide, the sizes of its two files, and what is drawn on it."""

    path: Path
    size: tuple[int, int]
    sample: Sample
    spacing_um: float
    drawing: Drawing


@final
class Slides(Dataset):
    """Crops of slides, labelled by GeoJSON files beside them.

    Parameters
    ----------
    folder
        Holds ``NAME.svs`` (or any other slide) with ``NAME.geojson``, ``NAME.svs.geojson``, or these with
        ``.gz``, and perhaps a ``samples.csv``.
    spacing_um, side
        Of the crops, in micrometres per pixel and pixels.
    classes
        Names in the order of their numbers; by default all that occur, sorted.
    regions
        Patterns of the class names of completely labelled areas.
    mpp
        Pixel size of slides that state none.

    Raises
    ------
    UsageError
        WSI906 if there is no such pair, WSI907 if no crop is left.
    SourceError
        What opening a slide raises (WSI1xx, WSI2xx); WSI190, WSI191, WSI905 for a GeoJSON file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spacing_um: float = 0.25,
        side: int = 256,
        classes: Sequence[str] | None = None,
        regions: Sequence[str] = REGIONS,
        mpp: float | None = None,
    ) -> None:
        pairs = slide_pairs(folder)
        if not pairs:
            raise UsageError("WSI906", f"{folder} holds no slide with a GeoJSON of its name beside it")
        self.name, self.side, self.mpp = folder.name, side, mpp
        self.spacing_um = spacing_um
        drawn = [read_annotations(file, regions) for _, file in pairs]
        found = sorted({name for each in drawn for name in each.names})
        self.classes = tuple(classes if classes is not None else found)
        samples = read_samples(folder)
        warnings: list[str] = []
        self._slides = [
            self._slide(slide, file, each, samples.get(slide.name), warnings)
            for (slide, file), each in zip(pairs, drawn, strict=True)
        ]
        self.warnings = tuple(warnings)
        self._crops = [
            (k, corner) for k, slide in enumerate(self._slides) for corner in slide.drawing.corners(side)
        ]
        if not self._crops:
            raise UsageError("WSI907", f"{folder}: nothing is drawn on its {len(pairs)} slides; draw nuclei")
        self._reset()

    def _slide(
        self, path: Path, file: Path, drawn: Annotations, sample: Sample | None, warnings: list[str]
    ) -> _Slide:
        with open_source(path, mpp=self.mpp) as source:
            image = WorkingImage(source, (self.spacing_um,) * 2)
            bounds_xy = (float(source.bounds.start[1]), float(source.bounds.start[0]))
            um = source.spacing.mean if source.spacing else self.spacing_um
            warnings += image.warnings
        low, high = drawn.nuclei.boxes()
        rows = np.flatnonzero((high - low).max(1, initial=0) <= LARGEST_UM / um * HUNDREDTHS)
        if len(rows) < len(low):
            warnings.append(
                f"WSI908 {file.name}: {len(low) - len(rows)} drawings wider than {LARGEST_UM:.0f} µm are no nuclei "
                "and were left out; give areas that are labelled completely the class Region*"
            )
        if drawn.skipped:
            said = ", ".join(f"{n} {kind}" for kind, n in sorted(drawn.skipped.items()))
            warnings.append(f"WSI908 {file.name}: left out {said}")
        regions = drawn.regions
        if not len(regions) and len(rows):
            regions = rectangle(low[rows].min(0), high[rows].max(0))
            warnings.append(
                f"WSI909 {file.name} marks no area as labelled completely; took the box around its {len(rows)} "
                "nuclei; draw areas of the class Region* and export again"
            )
        table = np.array([self.classes.index(n) + 1 if n in self.classes else IGNORE for n in drawn.names])
        types = np.append(table, IGNORE).astype(np.uint8)[drawn.labels[rows]]
        drawing = Drawing(
            scale_xy=(image.scale[1], image.scale[0]),
            bounds_xy=bounds_xy,
            shape=image.shape,
            nuclei=drawn.nuclei.take(rows),
            types=types,
            index=Lattice(low[rows], high[rows], 1024 * HUNDREDTHS),
            regions=regions,
            ignored=drawn.ignored,
        )
        spacing_um = float(np.mean(image.spacing or (self.spacing_um,)))
        size = path.stat().st_size, file.stat().st_size
        return _Slide(path, size, sample or Sample(group=path.name), spacing_um, drawing)

    def _reset(self) -> None:
        self._lock = Lock()
        self._images: OrderedDict[int, WorkingImage] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open slides behind: another process opens its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._crops)

    @property
    def tissues(self) -> tuple[str, ...]:
        return tuple(self._slides[k].sample.tissue for k, _ in self._crops)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._slides[k].sample.group for k, _ in self._crops)

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.array([self._slides[k].sample.weight for k, _ in self._crops])

    def identity(self) -> dict[str, Any]:
        files = [[s.path.name, *s.size] for s in self._slides]
        return {"slides": files, "spacing_um": self.spacing_um, "side": self.side, "crops": len(self)}

    def read(self, index: int) -> Example:
        number, (y, x) = self._crops[index]
        slide = self._slides[number]
        reading = self._image(number).read(Region((y, x), (self.side, self.side)))
        if reading.pixels.shape[2] < 3 or reading.pixels.dtype != np.uint8:
            what = f"{reading.pixels.shape[2]} channels of {reading.pixels.dtype}"
            raise SourceError("WSI911", f"{slide.path.name} has {what}; training wants 8-bit RGB")
        inst, types = slide.drawing.labels((y, x), self.side)
        if reading.absent is not None:
            inst[reading.absent], types[reading.absent] = UNLABELLED, IGNORE
        return Example(
            image=np.ascontiguousarray(reading.pixels[..., :3]),
            inst=inst,
            types=types if self.classes else None,
            spacing_um=slide.spacing_um,
            tissue=slide.sample.tissue,
            group=slide.sample.group,
            weight=slide.sample.weight,
        )

    def count(self, index: int) -> NDArray[np.int64]:
        number, corner = self._crops[index]
        inst, types = self._slides[number].drawing.labels(corner, self.side)
        blank = np.broadcast_to(np.uint8(0), (*inst.shape, 3))
        return Example(blank, inst, types, self.spacing_um).count(len(self.classes))

    def _image(self, number: int) -> WorkingImage:
        """Return an open slide; the one not used for longest is let go, and closes with its last reader."""
        with self._lock:
            image = self._images.pop(number, None)
            if image is None:
                source = open_source(self._slides[number].path, mpp=self.mpp)
                image = WorkingImage(source, (self.spacing_um,) * 2)
            self._images[number] = image
            while len(self._images) > _OPEN:
                self._images.popitem(last=False)
            return image


def slide_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return (slide, GeoJSON) of a folder, in the order of names: ``a.svs`` with ``a.geojson`` or ``a.svs.geojson``."""
    images = {p.name: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SLIDES | IMAGES}
    stems = {p.stem: p for p in images.values()}
    pairs = {}
    for file in sorted(folder.iterdir()):
        ending = next((e for e in ENDINGS if file.name.lower().endswith(e)), None)
        base = file.name[: -len(ending)] if ending else ""
        slide = images.get(base) or stems.get(base)
        if slide is not None:
            pairs[slide] = file
    return sorted(pairs.items())
