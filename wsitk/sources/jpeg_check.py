"""Is a JPEG stream whole? The codec does not tell: it fills what is missing and reports success.

libjpeg notes damage as a warning, which imagecodecs does not pass on: half a tile decodes to grey without
an error. So the entropy-coded data are walked once more (ITU-T T.81, annex F.2.2), without computing a
coefficient: all blocks must be there, every code must exist, and nothing may be left over.
"""

from __future__ import annotations

import numpy as np

__all__ = ["jpeg_fault"]

_FAULTS = (
    "",
    "Corrupt JPEG data: premature end of the data segment",
    "Corrupt JPEG data: bad Huffman code",
    "Corrupt JPEG data: bytes left over before a marker",
    "Corrupt JPEG data: a restart marker is out of place",
    "Corrupt JPEG data: damaged header",
    "JPEG frame larger than its tile",
)


def jpeg_fault(data: bytes, tables: bytes | None, tile: tuple[int, int]) -> str:
    """Return what is wrong with a stream, empty if nothing is found.

    `tables` is TIFF's JPEGTables, `tile` the size (height, width) that the frame must not exceed. Sequential
    Huffman streams of 8 bits are walked; of others (progressive, arithmetic) only the headers and the end
    are looked at. Holds no GIL.
    """
    from wsitk.sources.jpeg_walk import walk  # numba takes half a second to import

    shared = np.frombuffer(tables or b"", np.uint8)
    return _FAULTS[int(walk(shared, np.frombuffer(data, np.uint8), tile[0], tile[1]))]
