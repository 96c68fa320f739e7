"""What file sources share: opening with the system's own words for a refusal, identity, levels, alpha."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import SourceError
from wsitk.sources.base import Level, Source, SourceRef
from wsitk.sources.ifd_digest import ifd_digest

__all__ = [
    "MAX_PIXELS", "MAX_TILE_BYTES", "MAX_WHOLE_BYTES", "check_pixels", "closed", "consistent_levels",
    "downsample", "file_identity", "file_stamp", "make_levels", "over_white", "probe", "reference", "refuse_special",
    "reopen",
]  # fmt: skip

logger = logging.getLogger("wsitk.sources")

MAX_TILE_BYTES = 256 << 20
MAX_WHOLE_BYTES = 512 << 20
MAX_PIXELS = 1 << 40

_EDGE_BYTES = 1 << 20
_SAMPLE_BYTES = 64 << 10
_SAMPLES = 16


def probe(path: str, name: str) -> bytes:
    """Return the first bytes of a file; raises SourceError (WSI100) in the words of the system.

    Decoding libraries turn a stale handle or a missing permission into "unsupported file".
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise SourceError(
            "WSI100", f"{name}: {error.strerror or error}; check the path and its rights"
        ) from error
    if not head:
        raise SourceError("WSI102", f"{name}: the file is empty; copy it again")
    return head


def refuse_special(path: str | os.PathLike[str], name: str) -> None:
    """Raise SourceError (WSI100) for a pipe, a socket or a device: reading one may never end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # the reader has the system's words for it
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError("WSI100", f"{name}: a pipe, socket or device, no file; name a file")


def reference(path: str, reader: str, mpp: float | Sequence[float] | None, name: str | None) -> SourceRef:
    """Return how to open the same file with the same reader and options in another process."""
    options = {"reader": reader, "mpp": mpp, "name": name}
    return SourceRef(os.path.abspath(path), {k: v for k, v in options.items() if v is not None})


def reopen(ref: SourceRef) -> Source:
    """Open a source again; what unpickling a file source calls."""
    from wsitk.sources import open_source

    return open_source(ref)


def closed(name: str) -> SourceError:
    """Return the error for reading a source after `close`."""
    return SourceError("WSI112", f"{name}: read after close; open it again")


def check_pixels(name: str, shape: Iterable[int]) -> None:
    """Raise SourceError (WSI140) if an image claims more pixels than the limit, before decoding."""
    extents = tuple(shape)
    if any(n < 1 for n in extents):
        raise SourceError("WSI101", f"{name}: claims a shape of {extents}; the file is damaged")
    if prod(extents) > MAX_PIXELS:
        raise SourceError(
            "WSI140", f"{name}: claims {prod(extents):.3g} pixels, the limit is {MAX_PIXELS:.3g}"
        )


def downsample(full: Sequence[int], reduced: Sequence[int]) -> tuple[float, ...]:
    """Return level-0 pixels per pixel along each axis.

    A level of ``floor(n / d)`` or ``ceil(n / d)`` pixels was reduced by the whole number d, not by the
    quotient of the two lengths: pixel i covers ``[i * d, (i + 1) * d)``.
    """
    factors = []
    for n, m in zip(full, reduced, strict=True):
        whole = max(1, round(n / m))
        factors.append(float(whole) if abs(n / whole - m) < 1 else n / m)
    return tuple(factors)


def consistent_levels(name: str, found: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    """Return which of the levels (shape, chunk) are true reductions of the first; warn of others (WSI120)."""
    full = found[0][0]
    kept, last = [0], full
    for index, (shape, _) in enumerate(found[1:], start=1):
        ratio = prod(n / max(m, 1) for n, m in zip(full, shape, strict=True)) ** (1 / len(full))
        fits = all(abs(n / ratio - m) <= max(2.0, 0.02 * m) for n, m in zip(full, shape, strict=True))
        smaller = all(m <= n for n, m in zip(last, shape, strict=True)) and shape != last
        if fits and smaller and min(shape) >= 1:
            kept.append(index)
            last = shape
        else:
            logger.warning(
                "WSI120 %s: level %d is %s, not a reduction of %s; ignored", name, index, shape, full
            )
    return kept


def make_levels(found: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Level, ...]:
    """Return levels from (shape, chunk) pairs, the first of which is full resolution."""
    full = found[0][0]
    return tuple(Level(shape, downsample(full, shape), chunk) for shape, chunk in found)


def over_white(rgba: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return colour composited on white, and where alpha is zero (None if nowhere).

    `rgba` has straight (not premultiplied) alpha as its last channel, of an unsigned integer type.
    """
    alpha = rgba[..., -1:]
    top = int(np.iinfo(rgba.dtype).max)
    if alpha.min() == top:
        return np.ascontiguousarray(rgba[..., :-1]), None
    wide = alpha.astype(np.uint64 if rgba.dtype.itemsize > 2 else np.uint32)
    mixed = (rgba[..., :-1] * wide + (top - wide) * top + top // 2) // top
    absent = rgba[..., -1] == 0
    return mixed.astype(rgba.dtype), absent if absent.any() else None


def file_identity(name: str, paths: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return name, total size and sha256 hashes over samples of one or more files; no paths, no times.

    Of each file (in order of its name) its size, its first and last MiB and 16 blocks of 64 KiB spread
    evenly between them are hashed, and of TIFFs all headers with their tile tables (`sha256_headers`): a
    copy has the same identity, whatever its folder and times.
    """
    digest, headers, total = hashlib.sha256(), [], 0
    for path in sorted(paths, key=lambda p: Path(p).name):
        try:
            total += _hash_samples(digest, path)
            headers.append(ifd_digest(path))
        except OSError as error:
            raise SourceError("WSI100", f"{name}: {error.strerror or error} while hashing it") from error
    identity = {"name": name, "size": total, "files": len(paths), "sha256_sampled": digest.hexdigest()}
    if any(headers):
        identity["sha256_headers"] = hashlib.sha256(" ".join(h or "-" for h in headers).encode()).hexdigest()
    return identity


def file_stamp(name: str, paths: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """Return name, size and time of change (ns) of each file of an input, in order of their names.

    Other than the identity it differs between copies; it tells whether files changed while a run was
    under way. Raises SourceError (WSI100) if one is gone.
    """
    files = []
    for path in sorted(paths, key=lambda p: Path(p).name):
        try:
            found = os.stat(path)
        except OSError as error:
            raise SourceError("WSI100", f"{name}: {error.strerror or error}; was it moved?") from error
        files.append([Path(path).name, found.st_size, found.st_mtime_ns])
    return {"files": files}


def _hash_samples(digest: Any, path: str | os.PathLike[str]) -> int:
    """Feed one file's size and samples to `digest`; return the size."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        steps = [(0, _EDGE_BYTES)]
        steps += [(size * (i + 1) // (_SAMPLES + 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]
        steps += [(max(0, size - _EDGE_BYTES), _EDGE_BYTES)]
        for offset, length in steps if size > _EDGE_BYTES else steps[:1]:
            file.seek(offset)
            digest.update(file.read(length))
    return size
