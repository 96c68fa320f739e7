"""What vouches for finished results: the key they belong to, and the seal on their record."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from wsitk.discard import RESULTS
from wsitk.durable import open_own, read_own
from wsitk.errors import OutputError

__all__ = ["key_bytes", "results_intact", "seal_of"]


def seal_of(name: str, provenance: bytes) -> bytes:
    """Return what `seal.json` says of the finished results of the input `name`."""
    return json.dumps({"input": name, "provenance_sha256": hashlib.sha256(provenance).hexdigest()}).encode()


def key_bytes(key: Mapping[str, Any]) -> bytes:
    """Return what `key.json` says."""
    return json.dumps(key, indent=1, sort_keys=True).encode()


def results_intact(folder: Path, name: str) -> bool:
    """Tell whether the finished results of the input `name` are the bytes that were written.

    Reads all of them. `wsitk.verify` says what differs; this is for who would make them anew.
    """
    try:
        data = read_own(folder / "provenance.json")
        if read_own(folder / ".wsitk" / "seal.json") != seal_of(name, data):
            return False
        outputs: dict[str, str] = json.loads(data)["outputs"]
        return all(_is_result(name) and _sha256(folder / name) == sha for name, sha in outputs.items())
    except (OSError, OutputError, ValueError, KeyError, TypeError, AttributeError):
        return False  # gone, a link, or nothing that we wrote


def _is_result(name: str) -> bool:
    """Tell whether a record may list this: who forged it must not have us read what lies elsewhere."""
    parts = PurePosixPath(name).parts
    return parts[:1] in {(n,) for n in RESULTS} and ".." not in parts


def _sha256(path: Path) -> str:
    if not path.is_file():  # opening a pipe would wait for ever
        return ""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
