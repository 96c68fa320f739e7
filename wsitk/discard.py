"""Taking away the results of a run: what we wrote and nothing else.

A folder of results may hold files of others: notes, a viewer's settings, an array beside ours in
`maps.ome.zarr`. So no folder of results is ever deleted whole. Of complete results the files are those that
`provenance.json` lists; of a run that did not finish, those that bear a name which only our writers give.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from wsitk.durable import read_own, sync_folder

__all__ = ["RESULTS", "TEMPORARY", "discard_results", "result_files", "settle", "zarr_file"]

RESULTS = (
    "objects.parquet",
    "objects.geojson.gz",
    "maps.ome.zarr",
    "labels.ome.zarr",
    "labels.nii.gz",
    "labels.dcm",
    "measurements.csv",
    "restored.ome.zarr",
    "restored.ome.tiff",
    "restored_mask.ome.zarr",
    "restoration.ome.zarr",
    "restored_regions.parquet",
    "restored_regions.geojson.gz",
    "before_after.png",
    "tiles.parquet",
    "preview.png",
    "provenance.json",
)
"""Everything that a run writes into an input's folder; the last one says that it is complete."""

_ZARR = re.compile(r"zarr\.json|\d+/zarr\.json|\d+/c(/\d+)+")
TEMPORARY = tuple(f".{name}.{word}" for name in RESULTS for word in ("part", "partial"))
"""What a kill may leave of a result that was being written."""


def zarr_file(name: str) -> bool:
    """Tell whether a relative path is one that our writer gives to a file of a multiscale zarr group."""
    return _ZARR.fullmatch(name) is not None


def result_files(folder: Path) -> list[str]:
    """Return the files of results below an input's folder, by the names our writers give; sorted.

    Relative, with forward slashes; links are not among them, `provenance.json` is.
    """
    found = []
    for name in RESULTS:
        path = folder / name
        if path.is_symlink():
            continue
        if path.is_file():
            found.append(name)
        elif path.is_dir():
            found += [f"{name}/{inner}" for inner in _files(path) if zarr_file(inner)]
    return sorted(found)


def _files(root: Path) -> Iterator[str]:
    """Yield the files below `root`, links left out and not followed."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink():
                yield path.relative_to(root).as_posix()


def discard_results(folder: Path) -> None:
    """Remove what a run left in an input's folder; whatever else lies there stays, and so do links.

    The record of complete results is first moved to `.wsitk/discarding.json`: from then on they are no
    longer complete, and a kill leaves the list of what remains to be removed.
    """
    record, doomed = folder / "provenance.json", folder / ".wsitk" / "discarding.json"
    if record.is_file() and not record.is_symlink():
        os.replace(record, doomed)
        sync_folder(folder)  # before anything goes: no record may outlast what it lists
        sync_folder(doomed.parent)
    for name in RESULTS:  # left by a kill while a folder was being replaced
        settle(folder / f".{name}.old", folder / name, zarr_file)
    listed = _listed(doomed)
    for name in result_files(folder) if listed is None else listed:
        _remove(folder, name)
    for name in TEMPORARY:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # ours alone: made, filled and renamed within one call
        else:
            path.unlink(missing_ok=True)
    doomed.unlink(missing_ok=True)


def settle(old: Path, target: Path, ours: Callable[[str], bool]) -> None:
    """Let a replaced folder go, now or after a kill between its renames; what is not `ours` moves to `target`.

    `ours` tells by the path within the folder.
    """
    if not old.is_dir() or old.is_symlink():
        old.unlink(missing_ok=True)
        return
    if not target.exists():
        os.rename(old, target)
        return
    for folder, folders, files in os.walk(old, topdown=False):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in files + links:
            path = Path(folder) / name
            relative = path.relative_to(old)
            if ours(relative.as_posix()):
                path.unlink()
            elif not os.path.lexists(target / relative):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, target / relative)
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)


def _listed(path: Path) -> list[str] | None:
    """Return the outputs that a record lists; None if there is no record that could be read."""
    try:
        return sorted(json.loads(read_own(path))["outputs"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path, name: str) -> None:
    """Remove one file of ours and the folders that it leaves empty; never through a link."""
    parts = PurePosixPath(name).parts
    # A record is a file that anyone may have edited: only the names of results are believed.
    if parts[:1] not in {(n,) for n in RESULTS} or ".." in parts:
        return
    parents = [folder.joinpath(*parts[:i]) for i in range(1, len(parts))]
    if any(p.is_symlink() for p in parents) or folder.joinpath(*parts).is_symlink():
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        folder.joinpath(*parts).unlink()
    for parent in reversed(parents):
        with contextlib.suppress(OSError):  # not empty
            parent.rmdir()
