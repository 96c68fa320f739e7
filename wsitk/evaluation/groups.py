"""Which slide, patient and tissue an image is of: from a table, or from a name that tells. Never guessed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from wsitk.errors import UsageError
from wsitk.evaluation.settings import Unit
from wsitk.splits.lists import read_listing
from wsitk.splits.names import origin_of

__all__ = ["facts_of", "origin", "read_table", "training_names"]

_COLUMNS = ("slide", "patient", "tissue")


def origin(name: str) -> dict[str, str]:
    """Return patient and slide as far as `name` tells them; a name that tells nothing stands for no slide."""
    found = origin_of(f"{name}.x")  # a suffix to take off: names may hold points
    told = {"patient": found.patient} if found.patient else {}
    return told | ({} if found.rule == "whole name" else {"slide": found.slide})


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Return image name -> its slide, patient and tissue, from a CSV with a column `image` and some of these.

    Raises UsageError (WSI831) for a table without them, or with an image twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError("WSI831", f"{path}: can't be read as a CSV ({error})") from error
    held = set(rows[0]) if rows else set()
    if "image" not in held or not held & set(_COLUMNS):
        raise UsageError(
            "WSI831",
            f"{path}: columns {sorted(map(str, held))}; wanted image and some of {', '.join(_COLUMNS)}",
        )
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["image"] in table:
            raise UsageError("WSI831", f"{path}: image {row['image']!r} stands there twice; keep one line")
        table[row["image"]] = {c: row[c] for c in _COLUMNS if row.get(c)}
    return table


def facts_of(
    names: Iterable[str],
    table: Mapping[str, Mapping[str, str]],
    group: Unit,
    *,
    tissues: Mapping[str, str],
    whole_slides: bool,
) -> dict[str, dict[str, str]]:
    """Return the image, slide, patient and tissue of each name, as far as they are known.

    `whole_slides` says that each image is a slide of its own. Raises UsageError (WSI831) if the unit `group` is
    unknown for an image.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        facts = {"image": name}
        if whole_slides:
            facts["slide"] = name
        facts |= origin(name)
        if tissues.get(name):
            facts["tissue"] = tissues[name]
        facts |= table.get(name) or table.get(name.rsplit("/", 1)[-1]) or {}
        if group not in facts:
            raise UsageError(
                "WSI831",
                f"the {group} of {name!r} is unknown; give --table with the columns image and {group}, or leave"
                " --group out",
            )
        found[name] = facts
    return found


def training_names(path: Path) -> list[dict[str, str]]:
    """Return what is known of each image that a model was trained on.

    `path` is a folder of images, a list of names, or a CSV such as `wsitk split make` writes; of a CSV with parts,
    only those that are called train. Raises UsageError: WSI935 for what is no list, WSI837 for one without a part
    for training.
    """
    listing = read_listing(path)
    parts = listing.columns.get("part") or listing.columns.get("split")
    found = []
    for row, name in enumerate(listing.names):
        if parts is None or parts[row].lower().startswith("train"):
            told = {c: v[row] for c, v in listing.columns.items() if c in (*_COLUMNS, "group") and v[row]}
            found.append({"image": Path(name).stem} | origin(Path(name).stem) | told)
    if not found:
        raise UsageError(
            "WSI837", f"{path}: no part is called train; name the list of what the model was trained on"
        )
    return found
