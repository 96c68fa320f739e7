"""What the name of a tile says: from which slide and patient it is, and from where on the slide."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from wsitk.errors import UsageError

__all__ = ["Origin", "Unit", "group_names", "origin_of"]

Unit = Literal["slide", "patient"]

TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?P<slide>-\d{2}[A-Z]-\d{2}-[A-Z]{2}[A-Z0-9]*)?", re.I)
"""A barcode: project, site, patient; then sample, portion and slide."""

QUPATH = re.compile(r"\s*\[(?:d=[\d.]+,)?x=(?P<x>\d+),y=(?P<y>\d+),w=(?P<w>\d+),h=(?P<h>\d+)[^\]]*\]")
"""What QuPath appends to the name of an exported tile: coordinates and sizes in level-0 pixels."""

PLACE = re.compile(
    r"[_\-. ]+\(?x=?(?P<x>\d+)[_\-, ]+y=?(?P<y>\d+)"
    r"(?:[_\-, ]+w=?(?P<w>\d+)[_\-, ]+h=?(?P<h>\d+))?\)?(?=[_\-. ]|$)",
    re.I,
)
"""``_x123_y456`` and its kin."""

LEVEL = re.compile(r"-lv\d+-")
"""MedFMC: what stands before is a slide, what follows a region of it."""

SERIAL = re.compile(r"[_\-. ](?:patch|tile|crop|roi|region)(?:[_\-. ]?\d.*|[_\-. ].+)$", re.I)
"""``_patch_12``, ``-tile7``: numbered pieces."""

CONSEP = re.compile(r"(?:train|test)_\d+(?=_\d{3}$)")
"""CoNSeP in patches: the tile's number, then the patch's, whose pixels overlap."""

RULES = (("QuPath", QUPATH), ("-lvN-", LEVEL), ("x, y", PLACE), ("numbered", SERIAL))
"""What follows a slide's name, the first that fits."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tile is from, as far as its name tells.

    `rule` is how that was found: ``TCGA``, ``QuPath``, ``-lvN-``, ``x, y``, ``numbered``, ``CoNSeP``, or
    ``whole name`` where nothing was recognised and the file stands for a slide of its own. `patient` is None
    unless the name has one. `x`, `y`, `width`, `height` are level-0 pixels.
    """

    slide: str
    patient: str | None
    rule: str
    x: int | None = None
    y: int | None = None
    width: int | None = None
    height: int | None = None


def origin_of(name: str | PurePath) -> Origin:
    """Return what a file's name says of its origin; folders are not looked at."""
    stem = os.path.splitext(os.path.basename(name))[0]
    barcode = TCGA.search(stem)
    patient = "-".join(barcode.group().upper().split("-")[:3]) if barcode else None
    slide, rule, places = stem, "whole name", dict[str, str]()
    if consep := CONSEP.match(stem):
        slide, rule = consep.group(), "CoNSeP"
    for name_of_rule, pattern in RULES:
        if match := pattern.search(stem):
            slide, rule, places = stem[: match.start()], name_of_rule, match.groupdict()
            break
    if barcode:
        # What follows the barcode may be a uuid, a stain or a tile: the barcode alone names the slide.
        slide, rule = barcode.group().upper(), "TCGA"
    x, y, width, height = (int(places[k]) if places.get(k) else None for k in "xywh")
    return Origin(slide or stem, patient, rule, x, y, width, height)


def group_names(
    names: Iterable[str], unit: Unit = "slide", pattern: str | None = None
) -> tuple[list[str], dict[str, int]]:
    """Return the group of each file, and how many groups were found by which rule.

    `pattern` is a regular expression searched in the path, with ``/`` between folders: its group ``group``, its
    first group, or all of its match. Without it `origin_of` decides; for patients, a name without one falls
    under its slide (rule ``slide for patient``), which the caller should say. Raises UsageError: WSI931 for
    a pattern that is none, WSI932 for a name that doesn't match it.
    """
    found, rules = [], Counter[str]()
    expression = _compiled(pattern) if pattern is not None else None
    for name in names:
        if expression is not None:
            group, rule = _matched(expression, name), "pattern"
        else:
            origin = origin_of(name)
            group, rule = origin.slide, origin.rule
            if unit == "patient":
                group, rule = (origin.patient, rule) if origin.patient else (group, "slide for patient")
        found.append(group)
        rules[rule] += 1
    return found, dict(sorted(rules.items()))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            "WSI931", f"--group-pattern {pattern!r} is no regular expression: {error}; mend it"
        ) from error


def _matched(pattern: re.Pattern[str], name: str) -> str:
    match = pattern.search(PurePath(name).as_posix())
    if match is None:
        raise UsageError("WSI932", f"--group-pattern {pattern.pattern!r} doesn't match {name}; widen it")
    group = match["group"] if "group" in pattern.groupindex else match[min(1, pattern.groups)]
    if not group:
        raise UsageError("WSI932", f"--group-pattern {pattern.pattern!r} finds an empty group in {name}")
    return group
