"""Class names: of numbers, and of one side in the words of the other. By name, and nothing is mapped unsaid."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsitk.errors import UsageError

__all__ = ["NameMap", "parse_classes", "read_map", "names_of", "read_toml"]

NameMap = dict[str, str | None]


def parse_classes(text: str) -> dict[int, str]:
    """Return ``1=Tumor,2=Stroma`` as number -> name. Raises UsageError (WSI839)."""
    found: dict[int, str] = {}
    for part in filter(None, text.split(",")):
        number, _, name = part.partition("=")
        if not (number.strip().isdecimal() and int(number) > 0 and name.strip()) or int(number) in found:
            raise UsageError("WSI839", f"--classes wants 1=NAME,2=NAME with each number once, got {text!r}")
        found[int(number)] = name.strip()
    return found


def read_map(path: Path) -> tuple[NameMap, NameMap]:
    """Return the new names of the truth's and of the prediction's classes.

    The file has tables `truth` and `prediction`, each with lines ``"name in the file" = "common name"``, and for
    classes that have no counterpart ``unmapped = ["name", ...]``. Raises UsageError (WSI832).
    """
    content = read_toml(path, "WSI832")
    unknown = set(content) - {"truth", "prediction"}
    if unknown:
        raise UsageError(
            "WSI832",
            f'{path}: tables {sorted(unknown)}; wanted [truth] and [prediction] with "name" = "name"',
        )
    return names_of(content.get("truth", {}), path), names_of(content.get("prediction", {}), path)


def names_of(table: Any, path: Path) -> NameMap:
    """Return one table of names; those under `unmapped` lose their class. Raises UsageError (WSI832)."""
    if not isinstance(table, Mapping):
        raise UsageError("WSI832", f"{path}: {table!r} is no table of class names")
    lost = table.get("unmapped", [])
    names = {k: v for k, v in table.items() if k != "unmapped"}
    if not all(isinstance(v, str) for v in (*names.values(), *lost)) or set(names) & set(lost):
        raise UsageError(
            "WSI832", f'{path}: wanted "name" = "common name" and unmapped = ["name"], each name once'
        )
    return names | dict.fromkeys(lost)


def read_toml(path: Path, code: str) -> dict[str, Any]:
    """Return a TOML file. Raises UsageError with `code`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(code, f"{path}: can't be read as TOML ({error})") from error
