"""Which model works on which input of a mixed folder: a TOML file with a section for each kind of image.

    [slide]
    model = "cellvit"

    [xray]
    model = "weights/UNet_ResNet50_default.pth"
    options = { intensity = "range" }

    [ct]
    model = "stunet-base"

    [volume]            # what no section above speaks of: further volumes, NIfTI without a modality
    model = "hippocampus"
    files = ["hippocampus_*"]

An input goes to the first section that is meant for its kind, and, where the section names `files`, for its name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from wsitk.errors import UsageError
from wsitk.sources import Origin, borrowed
from wsitk.sources.base import Source
from wsitk.sources.dicom_header import read_header

__all__ = ["KINDS", "Choice", "choose", "kinds_of", "read_map"]

MODALITIES = {"CT": "ct", "MR": "mr", "PT": "pet"}

KINDS = {
    "slide": "a flat image in colour",
    "xray": "a flat image with one channel",
    "fluorescence": "a flat image with other channels",
    "ct": "CT in DICOM",
    "mr": "MR in DICOM",
    "pet": "PET in DICOM",
    "volume": "any volume",
}
"""The sections that a map may have."""


@dataclass(frozen=True)
class Choice:
    """A section: the `model` and its `options`, for inputs of `kind`; `files` are patterns of names, if any."""

    kind: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def takes(self, name: str, kinds: Sequence[str]) -> bool:
        """Tell whether an input of these kinds, and of this name, is meant."""
        if self.kind not in kinds:
            return False
        return not self.files or any(
            fnmatchcase(name, f) or fnmatchcase(PurePosixPath(name).name, f) for f in self.files
        )


def read_map(path: str | Path) -> tuple[Choice, ...]:
    """Return the sections of a map, in the file's order.

    Models that are files or folders are named relative to the map. Raises UsageError (WSI017) for a file that is
    missing or no TOML, and for whatever a section can't say.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("WSI017", f"--models {path}: {error}; name a TOML file with sections") from error
    if not content:
        raise UsageError("WSI017", f"--models {path} is empty; give it sections: {', '.join(KINDS)}")
    return tuple(
        _choice(path, kind, section)
        for kind, said in content.items()
        for section in (said if isinstance(said, list) else [said])
    )


def _choice(path: Path, kind: str, section: Any) -> Choice:
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean [{near[0]}]?" if near else ""
        raise _odd(path, f"there is no kind [{kind}]; there are {', '.join(KINDS)}{hint}")
    if not isinstance(section, dict) or not isinstance(section.get("model"), str):
        raise _odd(path, f'[{kind}] names no model; write model = "NAME"')
    odd = sorted(set(section) - {"model", "options", "files"})
    files, options = section.get("files", []), section.get("options", {})
    files = [files] if isinstance(files, str) else files
    if odd:
        raise _odd(path, f"[{kind}] says {', '.join(odd)}; it takes model, options and files")
    if not isinstance(options, dict) or not all(isinstance(f, str) for f in files):
        raise _odd(path, f"[{kind}]: options is a table, files a list of patterns")
    beside = path.parent / section["model"]
    model = str(beside) if beside.exists() else section["model"]
    return Choice(kind, model, options, tuple(files))


def _odd(path: Path, what: str) -> UsageError:
    return UsageError("WSI017", f"--models {path}: {what}")


def choose(choices: Sequence[Choice], name: str, kinds: Sequence[str]) -> Choice:
    """Return the section for an input. Raises UsageError (WSI018) if there is none."""
    for choice in choices:
        if choice.takes(name, kinds):
            return choice
    raise UsageError(
        "WSI018",
        f"{name} is {KINDS[kinds[0]]}, for which the map names no model; add a section [{kinds[0]}]",
    )


def kinds_of(origin: Origin) -> tuple[str, ...]:
    """Return the kinds of section that an input may go to, the nearest first. Raises SourceError as opening does."""
    with borrowed(origin) as source:
        if source.ndim == 3:
            special = _modality(source)
            return (special, "volume") if special else ("volume",)
        count = len(source.channel_names) if "c" in source.axes else 1
        return ("slide",) if count == 3 else ("xray",) if count == 1 else ("fluorescence",)


def _modality(source: Source) -> str:
    """Return what a DICOM series says it is; empty for other files."""
    path = Path(source.ref.path) if source.ref else None
    if path is not None and path.is_dir():
        path = next((p for p in sorted(path.iterdir()) if p.is_file()), None)
    header = read_header(path) if path is not None and path.is_file() else None
    return MODALITIES.get(header.modality, "") if header else ""
