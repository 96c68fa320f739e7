"""Lists of files: folders, text files of names, and CSV tables with what is known of each file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsitk.errors import UsageError
from wsitk.splits.make import Split
from wsitk.writers.base import atomic_file

__all__ = ["Listing", "read_listing", "read_parts", "write_split"]

PATH_COLUMNS = ("path", "file", "filename", "image", "slide")
PART_COLUMNS = ("part", "split")


@dataclass(frozen=True)
class Listing:
    """Files in their order.

    `names` are as the list has them, or relative to the folder that was searched; `files` are where they lie if
    they do; `columns` holds a CSV's other columns.
    """

    source: Path
    names: tuple[str, ...]
    files: tuple[Path, ...]
    columns: Mapping[str, tuple[str, ...]]

    def column(self, name: str) -> tuple[str, ...]:
        """Return a column. Raises UsageError (WSI935) if there is none of that name, or a value is empty."""
        if name not in self.columns:
            known = ", ".join(self.columns) or "none but the paths"
            raise UsageError("WSI935", f"{self.source} has no column {name!r}; it has {known}")
        if (row := next((i for i, v in enumerate(self.columns[name]) if not v), None)) is not None:
            raise UsageError("WSI935", f"{self.source}: {name!r} of {self.names[row]} is empty; fill it in")
        return self.columns[name]

    def only(self, rows: Sequence[int]) -> Listing:
        """Return the listing of some of the files."""
        return Listing(
            self.source,
            tuple(self.names[i] for i in rows),
            tuple(self.files[i] for i in rows),
            {name: tuple(values[i] for i in rows) for name, values in self.columns.items()},
        )


def read_listing(path: str | Path) -> Listing:
    """Return the images and slides below a folder, or the files that a CSV or a text file lists.

    A CSV's paths are in the column ``path`` (or file, filename, image, slide; else the first); relative paths
    start at the list's folder. Raises UsageError (WSI935) for a list that can't be read, or has none.
    """
    path = Path(path)
    if path.is_dir():
        listing = _of_folder(path)
    else:
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise UsageError(
                "WSI935", f"{path}: {why}; wanted a folder, a CSV, or a text file of names"
            ) from error
        listing = _of_csv(path, text) if path.suffix.lower() == ".csv" else _of_text(path, text)
    if not listing.names:
        raise UsageError("WSI935", f"{path} lists no images; name a folder or a list that does")
    return listing


def _of_folder(path: Path) -> Listing:
    from wsitk.sources.discover import expand_inputs

    root = path.absolute()
    names = tuple(os.path.relpath(item.path, root) for item in expand_inputs([path]).items)
    return Listing(path, names, tuple(path / name for name in names), {})


def _of_text(path: Path, text: str) -> Listing:
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    return Listing(path, names, tuple(path.parent / name for name in names), {})


def _of_csv(path: Path, text: str) -> Listing:
    rows = list(csv.reader(io.StringIO(text)))
    header, body = (rows[0], [row for row in rows[1:] if row]) if rows else ([], [])
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise UsageError(
                "WSI935", f"{path} line {number} has {len(row)} values, wanted {len(header)}; mend it"
            )
    if len(set(header)) != len(header):
        raise UsageError("WSI935", f"{path} has two columns of one name; rename one")
    columns = {name: tuple(row[i].strip() for row in body) for i, name in enumerate(header)}
    named = next((name for name in PATH_COLUMNS if name in columns), header[0] if header else "")
    names = columns.pop(named, ())
    return Listing(path, names, tuple(path.parent / name for name in names), columns)


def read_parts(paths: Sequence[str | Path]) -> dict[str, Listing]:
    """Return the parts of one CSV with a column ``part`` (or split), or of one list or folder for each part.

    Parts of several lists are called by their file or folder, its suffix left out unless two would be called
    the same. Raises UsageError (WSI934) if there is one part only.
    """
    listings = [read_listing(path) for path in paths]
    if len(listings) > 1:
        stems = [listing.source.resolve().stem for listing in listings]
        unique = len(set(stems)) == len(stems)
        return dict(zip(stems if unique else map(str, paths), listings, strict=True))
    listing = listings[0]
    named = next((name for name in PART_COLUMNS if name in listing.columns), None)
    if named is None:
        raise UsageError(
            "WSI934", f"{listing.source} has no column 'part'; name one, or two lists to compare: TRAIN TEST"
        )
    rows: dict[str, list[int]] = {}
    for row, part in enumerate(listing.column(named)):
        rows.setdefault(part, []).append(row)
    if len(rows) < 2:
        raise UsageError(
            "WSI934", f"{listing.source} has one part, {next(iter(rows))!r}; nothing to compare it with"
        )
    return {part: listing.only(which) for part, which in rows.items()}


def write_split(
    path: str | Path, listing: Listing, groups: Sequence[str], split: Split, *, overwrite: bool = False
) -> None:
    """Write a CSV of path, group, part, and the listing's other columns; paths start at the CSV's folder.

    Raises OutputError as `atomic_file` does.
    """
    path = Path(path)
    other = [name for name in listing.columns if name not in ("group", *PART_COLUMNS)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "group", "part", *other])
    here = os.path.abspath(path.parent)
    folder = listing.source.is_dir()
    for row, file in enumerate(listing.files):
        # An absolute path in a list was meant to be one; all others move with their folder.
        absolute = not folder and os.path.isabs(listing.names[row])
        place = str(file) if absolute else Path(os.path.relpath(file, here)).as_posix()
        values = [listing.columns[name][row] for name in other]
        table.writerow([place, groups[row], split.part[row], *values])
    with atomic_file(path, overwrite=overwrite) as stream:
        stream.write(text.getvalue().encode())
