"""From what a person types to the inputs of a run: files, folders and patterns, each with a safe name.

One input is one thing that a person would name: a DICOM series of many files is one, an MRXS slide and its
folder are one.
"""

from __future__ import annotations

import configparser
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from wsitk.errors import UsageError
from wsitk.sources.dicom_header import SeriesFile, read_header
from wsitk.sources.plate import matching, named_images, split_path

__all__ = ["Discovery", "Input", "companions", "expand_inputs"]

SLIDES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide"}
IMAGES = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2"}
VOLUMES = {".nii", ".nii.gz", ".nrrd", ".nhdr"}
_UNSUPPORTED = {".czi": "CZI is not supported", ".zarr": "OME-Zarr is not supported"}
_LONGEST = 200  # bytes of one component of a name, so that what is written beside it still fits


@dataclass(frozen=True, slots=True)
class Input:
    """A file to open, and the name of its results: a relative path with ``/``, safe on disk.

    A well of a plate is ``plate.ome.tiff#A01`` as a path, and ``plate.ome.tiff/A01`` as a name.
    """

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """The inputs in the order of their names, and how many files were left out for which reason."""

    items: tuple[Input, ...]
    skipped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Found:
    """A file, and whether it was named by the person rather than met in a folder."""

    path: str
    named: bool


def expand_inputs(inputs: Sequence[str | os.PathLike[str]]) -> Discovery:
    """Return the slides, volumes and images behind files, folders (searched to the bottom) and globs.

    A file that was named is an input whatever it is; in folders and globs, what is no slide, volume or image
    is left out and counted. Names are paths below the inputs' common root, extension kept; a DICOM series is
    called by its folder if that holds nothing else, by its first file otherwise. A file of many images, such as
    a plate, is an input for each of them, or for those named behind a ``#``: ``plate.ome.tiff#A*``. Raises
    UsageError: WSI023 for a path that does not exist or a pattern that matches nothing, WSI084 for a well that
    a plate doesn't have.
    """
    skipped: dict[str, str] = {}
    found: list[_Found] = []
    roots: list[str] = []
    asked: dict[str, list[str]] = {}
    for given in inputs:
        file, key = split_path(os.fspath(given))
        for path, named in _matches(file):
            asked.setdefault(path, []).append(key)
            roots.append(path if os.path.isdir(path) else os.path.dirname(path))
            found += _walk(path, named, skipped, set())
    if not roots:
        raise UsageError("WSI023", "no inputs; name files, folders or patterns")
    chosen = _without_parts(_once(found, skipped), skipped)
    files = _named(chosen, os.path.commonpath(roots))
    items = [image for item in files for image in _images(item, asked.get(str(item.path), [""]))]
    return Discovery(tuple(items), MappingProxyType(dict(sorted(Counter(skipped.values()).items()))))


def _matches(given: str) -> Iterator[tuple[str, bool]]:
    """Yield absolute paths for one argument, and whether they were named rather than matched."""
    if os.path.lexists(given):
        yield os.path.abspath(given), True
        return
    matches = sorted(glob.glob(given, recursive=True)) if glob.has_magic(given) else []
    if not matches:
        raise UsageError("WSI023", f"no such file or folder: {given!r}; check the path")
    for match in matches:
        yield os.path.abspath(match), False


def _walk(path: str, named: bool, skipped: dict[str, str], above: set[tuple[int, int]]) -> Iterator[_Found]:
    """Yield the files at or below `path` in sorted order; folders reached twice on one way are cut."""
    if not os.path.isdir(path):
        yield _Found(path, named)
        return
    state = os.stat(path)
    key = (state.st_dev, state.st_ino)
    if key in above:
        skipped[path] = "a link that leads back to its own folder"
        return
    try:
        entries = sorted(os.listdir(path))
    except OSError as error:
        skipped[path] = f"a folder that cannot be read ({error.strerror})"
        return
    if ".wsitk" in entries:
        skipped[path] = "results of wsitk"
        return
    present = set(entries)
    for entry in entries:
        inner = os.path.join(path, entry)
        if entry.startswith("."):  # also macOS's AppleDouble files, ._a.svs
            skipped[inner] = "hidden"
        elif not os.path.isdir(inner):
            yield _Found(inner, False)
        elif os.path.splitext(entry)[1].lower() in _UNSUPPORTED:
            skipped[inner] = _UNSUPPORTED[os.path.splitext(entry)[1].lower()]
        elif f"{entry}.mrxs" not in present:
            yield from _walk(inner, False, skipped, above | {key})


def _once(found: Sequence[_Found], skipped: dict[str, str]) -> list[_Found]:
    """Return each file once, named ones first among equals; leave out what is no slide or image."""
    kept: dict[str, _Found] = {}
    for item in sorted(found, key=lambda f: (not f.named, f.path)):
        real = os.path.realpath(item.path)
        if real in kept:
            if kept[real].path != item.path:
                skipped[item.path] = "the same file under another name"
            continue
        reason = "" if item.named else _refusal(item.path)
        if reason:
            skipped[item.path] = reason
        else:
            kept[real] = item
    return sorted(kept.values(), key=lambda f: f.path)


def _refusal(path: str) -> str:
    """Return why a file met in a folder is left out; empty if it is taken."""
    suffix = _suffix(path)
    if suffix in SLIDES | IMAGES | VOLUMES:
        return "" if os.path.exists(path) else "a link to nothing"
    if suffix in _UNSUPPORTED:
        return _UNSUPPORTED[suffix]
    if _may_be_dicom(suffix) and os.path.isfile(path):
        header = _header(path)
        if header is not None:
            known = header.is_slide or header.is_stack or header.is_x_ray
            return "" if known else "DICOM, but no image that is read"
    return f"not a slide or image ({suffix})" if suffix else "not a slide or image"


def _suffix(path: str) -> str:
    """Return what a file's name ends in, in lower case; ``.nii.gz`` is one ending."""
    return ".nii.gz" if path.lower().endswith(".nii.gz") else os.path.splitext(path)[1].lower()


def _may_be_dicom(suffix: str) -> bool:
    """Tell whether a name with this ending is worth a look: archives name files by their identifiers."""
    return suffix in (".dcm", ".dicom", ".ima", "") or suffix[1:].isdecimal()


def _header(path: str) -> SeriesFile | None:
    """Return a file's DICOM header; None if it is no DICOM or cannot be read, which opening will tell."""
    try:
        return read_header(path)
    except OSError:
        return None


def _without_parts(found: Sequence[_Found], skipped: dict[str, str]) -> list[tuple[str, str]]:
    """Return (path, folder of a whole series or empty); parts of other inputs are merged into them."""
    parts = {
        os.path.realpath(p)
        for f in found
        if f.path.lower().endswith((".vms", ".vmu"))
        for p in companions(Path(f.path))[1:]
    }
    series: dict[tuple[str, str], list[str]] = {}
    chosen: list[tuple[str, str]] = []
    for item in found:
        header = _header(item.path) if _may_be_dicom(_suffix(item.path)) else None
        if os.path.realpath(item.path) in parts and not item.named:
            skipped[item.path] = "part of another slide"
        elif header is not None and (header.is_slide or header.is_stack):
            series.setdefault((os.path.dirname(item.path), header.series), []).append(item.path)
        else:
            chosen.append((item.path, ""))
    for (folder, _), files in series.items():
        volumes = [f for f in files if (h := _header(f)) is not None and h.is_volume]
        first = (volumes or files)[0]
        chosen.append((first, folder))
        skipped.update({f: "further files of a DICOM series" for f in files if f != first})
    return chosen


def _named(chosen: Sequence[tuple[str, str]], root: str) -> list[Input]:
    """Return the inputs with their names below `root`, in the order of the names."""
    inside = Counter(_ancestor for path, _ in chosen for _ancestor in _ancestors(path))
    taken: dict[str, str] = {}
    for path, folder in chosen:
        whole = folder if folder and inside[folder] == 1 else path
        relative = os.path.relpath(whole, root)
        taken[path] = _safe(os.path.basename(root) if relative == os.curdir else relative)
    return sorted((Input(Path(p), n) for p, n in taken.items()), key=lambda item: item.name)


def _images(item: Input, asked: Sequence[str]) -> Iterator[Input]:
    """Yield the images of a file that holds many, those `asked` for (an empty word asks for all), or itself."""
    tiff = _suffix(str(item.path)) in (".tif", ".tiff")
    keys = named_images(str(item.path)) if tiff else ()
    for key in asked:
        if key and not matching(keys, key):
            listed = f"it holds {keys[0]} to {keys[-1]}" if keys else "it is one image; leave the # out"
            raise UsageError("WSI084", f"{item.name} holds no image {key!r}; {listed}")
    if not keys:
        yield item
    chosen = {k for key in asked for k in (matching(keys, key) if key else keys)}
    for key in keys:
        if key in chosen:
            yield Input(Path(f"{item.path}#{key}"), f"{item.name}/{key}")


def _ancestors(path: str) -> Iterator[str]:
    """Yield every folder above a file."""
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        yield path


def _safe(relative: str) -> str:
    """Return a relative path whose parts any file system takes, different for different paths.

    Control characters, undecodable bytes, backslash and the percent sign itself become ``%XX``; a part
    longer than 200 bytes is cut and ends in a hash of the whole.
    """
    parts = []
    for part in relative.split(os.sep):
        text = "".join(_escape(c) for c in part)
        data = text.encode()
        if len(data) > _LONGEST:
            digest = hashlib.sha256(data).hexdigest()[:16]
            stem, suffix = os.path.splitext(text)
            keep = _LONGEST - len(suffix.encode()) - 17
            text = stem.encode()[:keep].decode("utf-8", "ignore") + "~" + digest + suffix
        parts.append("%2E%2E" if text == ".." else text)
    return "/".join(parts)


def _escape(character: str) -> str:
    """Return a character, or ``%XX`` for each of its bytes."""
    if character.isprintable() and character not in "%\\":
        return character
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))


def companions(path: Path) -> list[Path]:
    """Return every file that a slide consists of, itself first.

    An MRXS slide has a folder of its name, a VMS or VMU file lists its parts, a detached NRRD header names its
    voxels, a DICOM series is every file of the folder with the same series identifier.
    """
    suffix = _suffix(str(path))
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        return [path, *sorted(p for p in folder.rglob("*") if p.is_file())]
    if suffix in (".vms", ".vmu"):
        return [path, *_listed(path)]
    if suffix in (".nrrd", ".nhdr"):
        from wsitk.sources.nrrd import data_file

        voxels = data_file(path)
        return [path, Path(voxels)] if voxels else [path]
    header = _header(str(path)) if _may_be_dicom(suffix) else None
    if header is None or not (header.is_slide or header.is_stack):
        return [path]
    others = sorted(p for p in path.parent.iterdir() if p != path and p.is_file())
    return [path, *(p for p in others if (h := _header(str(p))) is not None and h.series == header.series)]


def _listed(path: Path) -> list[Path]:
    """Return the existing files beside a VMS or VMU file that it names."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(path, encoding="latin-1")
    except configparser.Error:
        return []
    values = sorted({v for section in parser.sections() for v in parser[section].values()})
    beside = (path.parent / v for v in values if v and "/" not in v and "\\" not in v)
    return [p for p in beside if p.is_file()]
