"""Plates: one file with the images of many wells, and how a person names one of them, ``plate.ome.tiff#A01``."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from wsitk.errors import SourceError, UsageError
from wsitk.sources.ome_xml import OmeDocument, OmeImage, first_description, parse_ome

__all__ = [
    "PlateImage", "Well", "find_image", "images_of", "key_place", "matching", "named_images", "split_path",
    "well_in_name",
]  # fmt: skip

ROWS, COLUMNS = 32, 48  # the largest plates have 1,536 wells
_KEY = re.compile(r"([A-Za-z]{1,2})(\d{1,2})(?:_[Ff](\d+))?")
# In names of files and images rows end at P: ``s2`` is a site, ``t1`` a time.
_IN_NAME = re.compile(r"(?<![A-Za-z0-9])([A-Pa-p])(\d{1,2})(?![A-Za-z0-9])")
_FIELD = re.compile(r"(?<![A-Za-z0-9])(?:field|fov|site|pos|f|s)[ _#-]*(\d+)(?![0-9])", re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class Well:
    """A place on a plate: row and column, from 0. Its text is ``A01``."""

    row: int
    column: int

    def __str__(self) -> str:
        return f"{self.letters}{self.column + 1:02d}"

    @property
    def letters(self) -> str:
        """Return the row's name: A to Z, then AA to AF."""
        return "A" * (self.row // 26) + chr(ord("A") + self.row % 26)

    @classmethod
    def of(cls, letters: str, digits: str) -> Self | None:
        """Return the well of a row's letters and a column from 1, in any case and with any zeros."""
        letters = letters.upper()
        row = ord(letters[-1]) - ord("A") + (26 if len(letters) == 2 else 0)
        column = int(digits) - 1
        fits = row < ROWS and 0 <= column < COLUMNS and (len(letters) == 1 or letters[0] == "A")
        return cls(row, column) if fits else None


@dataclass(frozen=True, slots=True)
class PlateImage:
    """One image of a file that holds many: what it is called after ``#``, and the image itself."""

    key: str
    image: OmeImage


def split_path(path: str) -> tuple[str, str]:
    """Return the file and what follows ``#``; a file whose own name has a ``#`` is taken as it is."""
    file, mark, key = path.rpartition("#")
    if not mark or os.path.lexists(path) or not os.path.isfile(file):
        return path, ""
    return file, key


def images_of(document: OmeDocument, name: str) -> tuple[PlateImage, ...]:
    """Return the images that are inputs of their own; none if the file is one image, as slides are.

    Wells are those of the document's Plate, or what every image is called; ``A01_f2`` is the second field of
    a well with several. Images of one size that are no wells are called by their number, from 0. Raises
    SourceError (WSI173) for a plate that makes no sense.
    """
    if document.wells:
        by_id = {image.id: image for image in document.images}
        of_plate = [w for w in document.wells if w.image in by_id]
        if len({w.plate for w in of_plate}) > 1:
            raise SourceError("WSI173", f"{name}: holds several plates; save each as a file of its own")
        if any(not (0 <= w.row < ROWS and 0 <= w.column < COLUMNS) for w in of_plate):
            raise SourceError("WSI173", f"{name}: a well lies outside of {ROWS} rows and {COLUMNS} columns")
        return _keyed([(Well(w.row, w.column), w.number, by_id[w.image]) for w in of_plate], name)
    named = [(well_in_name(image.name), image) for image in document.images]
    places = [(found[1], found[2], image) for found, image in named if found is not None]
    if len(places) < len(named) or len(places) < 2:
        return _numbered(document)
    return _keyed(places, name)


def _keyed(places: Sequence[tuple[Well, int | None, OmeImage]], name: str) -> tuple[PlateImage, ...]:
    """Return the images with their names, in the order of wells and fields."""
    fields = Counter(well for well, _, _ in places)
    nth: Counter[Well] = Counter()
    placed: dict[tuple[Well, int], OmeImage] = {}
    for well, number, image in places:
        nth[well] += 1
        field = nth[well] if number is None else number
        if (well, field) in placed:
            raise SourceError(
                "WSI173", f"{name}: two images are field {field} of {well}; write the plate again"
            )
        placed[well, field] = image
    return tuple(
        PlateImage(f"{well}_f{field}" if fields[well] > 1 else str(well), placed[well, field])
        for well, field in sorted(placed)
    )


def _numbered(document: OmeDocument) -> tuple[PlateImage, ...]:
    """Return images of one size by their numbers; a slide's label and overview make it one image still."""
    images = document.images
    if sum(image.shape == images[0].shape for image in images) < 2:
        return ()
    return tuple(PlateImage(str(k), image) for k, image in enumerate(images))


def named_images(path: str) -> tuple[str, ...]:
    """Return what the images of a file are called after ``#``; nothing for a file that is one input.

    Only the header of a TIFF is read. A file that cannot be read, or makes no sense, is one input: opening
    it will tell.
    """
    try:
        document = parse_ome(first_description(path), os.path.basename(path))
        return tuple(i.key for i in images_of(document, path)) if document else ()
    except (OSError, SourceError):
        return ()


def find_image(images: Sequence[PlateImage], key: str, name: str) -> OmeImage:
    """Return the image of a key; raises UsageError (WSI084) if none or several are called so."""
    found = matching([i.key for i in images], key)
    if len(found) != 1:
        several = f"has {len(found)} images called {key!r}" if found else f"holds no image {key!r}"
        keys = found or tuple(i.key for i in images)
        raise UsageError("WSI084", f"{name} {several}; there {_there_are(keys)}")
    return next(i.image for i in images if i.key == found[0])


def _there_are(keys: Sequence[str]) -> str:
    """Return the names of images, shortened in their middle."""
    if not keys:
        return "is one image; leave the # out"
    if len(keys) <= 12:
        return f"are {', '.join(keys)}"
    return f"are {len(keys)}: {', '.join(keys[:6])} … {', '.join(keys[-2:])}"


def matching(keys: Sequence[str], asked: str) -> tuple[str, ...]:
    """Return the keys that a person means: ``a1`` is A01 and all its fields, ``A*`` a row."""
    match = _KEY.fullmatch(asked)
    well = Well.of(match[1], match[2]) if match else None
    if match is not None and well is not None:
        exact = f"{well}_f{int(match[3])}" if match[3] else str(well)
        return tuple(k for k in keys if k == exact or (not match[3] and k.startswith(f"{exact}_f")))
    pattern = asked.upper()
    return tuple(k for k in keys if fnmatchcase(k.upper(), pattern))


def key_place(key: str) -> tuple[Well, int | None] | None:
    """Return the well and the field of a key as `images_of` gives it; None if it is none."""
    match = _KEY.fullmatch(key)
    well = Well.of(match[1], match[2]) if match else None
    if match is None or well is None:
        return None
    number = int(match[3]) if match[3] else None
    return (well, number) if key == str(well) + (f"_f{number}" if match[3] else "") else None


def well_in_name(name: str) -> tuple[str, Well, int | None] | None:
    """Return what comes before a well's name, the well, and the number of the field; None without a well.

    Columns of two digits are preferred, so that ``f1_A01`` is A01 and not F1.
    """
    matches = sorted(_IN_NAME.finditer(name), key=lambda m: (len(m[2]) < 2, m.start()))
    for match in matches:
        well = Well.of(match[1], match[2])
        if well is not None:
            rest = name[: match.start()] + " " + name[match.end() :]
            field = _FIELD.search(rest)
            return name[: match.start()], well, int(field[1]) if field else None
    return None
