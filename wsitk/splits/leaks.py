"""What training and test sets have in common and shouldn't: slides or patients, files, pictures, places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsitk.errors import UsageError
from wsitk.splits.alike import DISTANCE, lookalikes, read_thumbnails, rich
from wsitk.splits.names import Origin, Unit, group_names, origin_of
from wsitk.writers.base import sha256_file

__all__ = ["Leak", "SplitReport", "check_split", "examine_split", "shared_groups"]

Names = Mapping[str, Sequence[str | Path]]


@dataclass(frozen=True)
class Leak:
    """Something that two or more parts share.

    Attributes
    ----------
    code
        WSI920 a group, WSI921 a file's bytes, WSI922 a picture, WSI923 pixels of one slide.
    what
        The group or the slide; the file's sha256; empty for a picture.
    members
        The files concerned, by part.
    distance
        Of a picture: differing bits of 63.
    """

    code: str
    unit: str
    what: str
    members: Mapping[str, tuple[str, ...]]
    distance: int | None = None

    def line(self) -> str:
        """Return the finding as one line, with an example from each part."""
        parts = " and ".join(f"{part} ({len(names)})" for part, names in self.members.items())
        example = " | ".join(names[0] for names in self.members.values())
        if self.code == "WSI920":
            return f"{self.code} {self.unit} {self.what!r} is in {parts}: {example}"
        if self.code == "WSI921":
            return f"{self.code} the same bytes in {parts}: {example}"
        if self.code == "WSI922":
            return f"{self.code} the same picture, {self.distance} of 63 bits apart, in {parts}: {example}"
        return f"{self.code} tiles of slide {self.what!r} overlap, in {parts}: {example}"

    def facts(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        found = {"code": self.code, "unit": self.unit, "what": self.what}
        return found | {"distance": self.distance, "members": {k: list(v) for k, v in self.members.items()}}


@dataclass(frozen=True)
class SplitReport:
    """All findings, sorted; what could not be looked at and why; and by which rule groups were found."""

    leaks: tuple[Leak, ...]
    notes: tuple[str, ...]
    rules: Mapping[str, int]


@dataclass(frozen=True)
class _Item:
    part: str
    name: str
    file: Path
    group: str
    origin: Origin


def check_split(
    parts: Names,
    *,
    group: Unit = "slide",
    groups: Mapping[str, Sequence[str]] | None = None,
    pattern: str | None = None,
    contents: bool = True,
) -> tuple[Leak, ...]:
    """Return what the parts of a split share; empty if they are apart.

    `parts` holds the file names of each part; files that are there are compared by their bytes and looks too,
    unless `contents` is False. The group of each file comes from `groups` (lists as long as `parts`'), from the
    regular expression `pattern`, or from its name (`origin_of`). Raises UsageError: WSI931, WSI932 (pattern),
    WSI934 (fewer than two parts, or lists of different lengths).
    """
    return examine_split(parts, group=group, groups=groups, pattern=pattern, contents=contents).leaks


def examine_split(
    parts: Names,
    *,
    group: Unit = "slide",
    groups: Mapping[str, Sequence[str]] | None = None,
    pattern: str | None = None,
    boxes: Mapping[str, Sequence[tuple[int, int, int, int] | None]] | None = None,
    contents: bool = True,
    distance: int = DISTANCE,
) -> SplitReport:
    """Return what `check_split` does, with notes on what could not be compared.

    `boxes` are the tiles' places on their slide (x, y, width, height in level-0 pixels), where names don't tell.
    `distance` is the number of differing bits, of 63, up to which pictures may be one.
    """
    items, rules = _items(parts, group, groups, pattern)
    known = [box for part in parts for box in (boxes or {}).get(part, (None,) * len(parts[part]))]
    if len(known) != len(items):
        raise UsageError("WSI934", f"{len(items)} files but {len(known)} boxes; give one for each")
    leaks = [*shared_groups(((i.part, i.name, i.group) for i in items), group)]
    leaks += _overlaps(items, known)
    notes = _notes_on_names(items, rules, group)
    if contents:
        there = [item for item in items if item.file.is_file()]
        if len(there) < len(items):
            away = f"{len(items) - len(there)} of {len(items)} files are not there"
            notes.append(f"{away}: their names were compared, not their contents")
        copies = _copies(there)
        alike, more = _alike(there, distance, {name: leak.what for leak in copies for name in _names(leak)})
        leaks += [*copies, *alike]
        notes += more
    return SplitReport(tuple(sorted(leaks, key=lambda k: (k.code, k.what, _names(k)))), tuple(notes), rules)


def _items(
    parts: Names, unit: Unit, groups: Mapping[str, Sequence[str]] | None, pattern: str | None
) -> tuple[list[_Item], dict[str, int]]:
    if len(parts) < 2:
        raise UsageError("WSI934", f"{len(parts)} part to compare, wanted two or more")
    told = [(part, str(name)) for part, names in parts.items() for name in names]
    if groups is None:
        found, rules = group_names([name for _, name in told], unit, pattern)
    else:
        found = [each for part in parts for each in groups.get(part, ())]
        rules = {"given": len(found)}
        if len(found) != len(told):
            raise UsageError("WSI934", f"{len(told)} files but {len(found)} groups; give one for each")
    each = zip(told, found, strict=True)
    return [_Item(part, name, Path(name), one, origin_of(name)) for (part, name), one in each], rules


def _notes_on_names(items: Sequence[_Item], rules: Mapping[str, int], unit: str) -> list[str]:
    notes = []
    if alone := rules.get("whole name", 0):
        notes.append(
            f"{alone} of {len(items)} names tell no slide: each stands for a slide of its own; if they are tiles, "
            "say how to group them (--group-column or --group-pattern)"
        )
    if guessed := rules.get("slide for patient", 0):
        notes.append(
            f"{guessed} of {len(items)} names tell no patient: their slide stands for it, and two slides of "
            "one patient would not be noticed; say how to group them (--group-column or --group-pattern)"
        )
    return notes


def shared_groups(told: Iterable[tuple[str, str, str]], unit: str) -> Iterator[Leak]:
    """Yield the groups that lie in two or more parts; `told` is (part, name, group) of each file."""
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for part, name, group in told:
        members[group][part].append(name)
    for group, parts in sorted(members.items()):
        if len(parts) > 1:
            yield Leak("WSI920", unit, group, {part: tuple(names) for part, names in parts.items()})


def _names(leak: Leak) -> tuple[str, ...]:
    return tuple(name for names in leak.members.values() for name in names)


def _copies(items: Sequence[_Item]) -> list[Leak]:
    """Return files of the same bytes; only those of the same size in another part are read."""
    sizes: dict[int, list[_Item]] = defaultdict(list)
    for item in items:
        sizes[item.file.stat().st_size].append(item)
    hashes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for same in sizes.values():
        if len({item.part for item in same}) > 1:
            for item in same:
                hashes[sha256_file(item.file)][item.part].append(item.name)
    return [
        Leak("WSI921", "file", digest, {part: tuple(names) for part, names in parts.items()})
        for digest, parts in hashes.items()
        if len(parts) > 1
    ]


def _alike(items: Sequence[_Item], distance: int, copied: Mapping[str, str]) -> tuple[list[Leak], list[str]]:
    """Return pictures that show the same, for each file its nearest in each earlier part; copies are known."""
    if not items:
        return [], []
    numbers = {part: n for n, part in enumerate(dict.fromkeys(item.part for item in items))}
    thumbnails = read_thumbnails([item.file for item in items])
    part = np.array([numbers[item.part] for item in items], np.int32)
    leaks = [
        Leak(
            "WSI922", "picture", "", {items[i].part: (items[i].name,), items[j].part: (items[j].name,)}, bits
        )
        for i, j, bits in lookalikes(thumbnails.pixels, part, distance)
        if copied.get(items[i].name, "neither") != copied.get(items[j].name)
    ]
    notes = []
    if missing := thumbnails.missing:
        first = min(missing)
        notes.append(
            f"{len(missing)} files can't be compared by their looks, {items[first].name} for one: {missing[first]}"
        )
    if flat := len(items) - len(missing) - int(rich(thumbnails.pixels).sum()):
        notes.append(f"{flat} pictures are flat, as glass is: they were not compared by their looks")
    return leaks, notes


def _overlaps(items: Sequence[_Item], known: Sequence[tuple[int, int, int, int] | None]) -> list[Leak]:
    """Return slides of which tiles in different parts share pixels, as far as their places are known."""
    slides: dict[str, list[tuple[_Item, tuple[int, int, int, int]]]] = defaultdict(list)
    for item, given in zip(items, known, strict=True):
        if box := given or _box(item):
            slides[item.origin.slide].append((item, box))
    leaks = []
    for slide, tiles in sorted(slides.items()):
        if len({item.part for item, _ in tiles}) > 1 and (
            touched := _overlapping([b for _, b in tiles], tiles)
        ):
            members: dict[str, list[str]] = defaultdict(list)
            for index in touched:
                members[tiles[index][0].part].append(tiles[index][0].name)
            leaks.append(Leak("WSI923", "slide", slide, {p: tuple(names) for p, names in members.items()}))
    return leaks


def _overlapping(boxes: Sequence[tuple[int, int, int, int]], tiles: Sequence[tuple[_Item, Any]]) -> list[int]:
    """Return the tiles that share area with one of another part, in order."""
    import shapely

    x, y, width, height = np.array(boxes, float).T
    shapes = shapely.box(x, y, x + width, y + height)
    one, two = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    part = np.array([item.part for item, _ in tiles])
    apart = part[one] != part[two]
    # Neighbours share an edge, which is no pixel.
    area = np.zeros(len(one))
    area[apart] = shapely.area(shapely.intersection(shapes[one[apart]], shapes[two[apart]]))
    return sorted(set(one[area > 0].tolist()))


def _box(item: _Item) -> tuple[int, int, int, int] | None:
    """Return a tile's place from its name; its size from the image, where the name has none."""
    origin = item.origin
    if origin.x is None or origin.y is None:
        return None
    if origin.width is not None and origin.height is not None:
        return origin.x, origin.y, origin.width, origin.height
    if not item.file.is_file():
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(item.file) as image:
            return origin.x, origin.y, *image.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        return None  # said by the comparison of looks, which reads all of it
