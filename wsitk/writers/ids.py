"""Names of objects: uuid5, so that importing the same result twice finds the same objects."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["id_namespace", "object_ids"]

_ROOT = uuid.uuid5(uuid.NAMESPACE_URL, "urn:wsitk:objects")


def id_namespace(source_sha256: str, model_name: str, model_version: str) -> uuid.UUID:
    """Return the namespace of all objects that one model finds in one input."""
    return uuid.uuid5(_ROOT, "\n".join((source_sha256, model_name, model_version)))


def object_ids(
    namespace: uuid.UUID,
    anchor_xy: NDArray[np.float64],
    class_id: NDArray[Any],
    size: NDArray[Any],
) -> NDArray[np.bytes_]:
    """Return the ids (dtype S36) of N objects: uuid5 of ``x,y,class,size`` in `namespace`.

    `anchor_xy` (N, 2) is in level-0 pixels and enters with two decimals; `size` is the whole number of
    working pixels. Class and size are in the name because two anchors may round to one: no state is
    needed to keep ids apart, so they depend on no order.
    """
    hundredths = np.rint(np.asarray(anchor_xy, np.float64) * 100).astype(np.int64)
    rows = zip(hundredths.tolist(), class_id.tolist(), size.tolist(), strict=True)
    # copy() of a primed state is cheaper than hashing the namespace again for each object
    primed = hashlib.sha1(namespace.bytes, usedforsecurity=False)
    digests = bytearray()
    for (x, y), kind, pixels in rows:
        state = primed.copy()
        state.update(b"%d,%d,%d,%d" % (x, y, kind, pixels))
        digests += state.digest()[:16]
    return _format(np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16))


def _format(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Return RFC 9562 version-5 text of (N, 16) digests."""
    value = digests.copy()
    value[:, 6] = (value[:, 6] & 0x0F) | 0x50
    value[:, 8] = (value[:, 8] & 0x3F) | 0x80
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    hexadecimal = digits[np.stack([value >> 4, value & 15], axis=-1).reshape(len(value), 32)]
    text = np.full((len(value), 36), ord("-"), np.uint8)
    text[:, [i for i in range(36) if i not in (8, 13, 18, 23)]] = hexadecimal
    return text.view("S36").reshape(len(value))
