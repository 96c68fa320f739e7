"""The loop of `jpeg_check`: the entropy-coded data of a scan."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsitk.compiled import compiled

__all__ = ["entropy"]


@compiled
def entropy(
    data: Any, at: int, units: int, restart: int, blocks: Any, fast: Any, last: Any, delta: Any, steps: Any
) -> tuple[int, int]:
    """Walk `units` coded units from byte `at`; return a fault and the place of the marker behind them.

    `blocks` (n,) counts the blocks of each component in a unit; rows 2c and 2c + 1 of the tables belong to
    its DC and AC codes. Faults: 1 premature end, 2 impossible code, 3 bytes left over, 4 restart marker.
    """
    size = len(data)
    # `bits` counts what is in `buffer`; the lowest `fake` of them were made up behind the end.
    buffer, bits, fake = np.uint64(0), 0, 0
    expected = 0xD0
    for unit in range(units):
        if restart and unit and unit % restart == 0:
            if bits - fake >= 8 or at + 1 >= size or data[at] != 0xFF or data[at + 1] != expected:
                return 4, at
            at += 2
            expected = 0xD0 + ((expected + 1) & 7)
            buffer, bits, fake = np.uint64(0), 0, 0
        for component in range(blocks.shape[0]):
            for _ in range(blocks[component]):
                k = step = 0
                while k < 64:
                    while bits < 32:  # a code and its value take 31 bits at most
                        byte = 0
                        if fake == 0 and at < size and data[at] != 0xFF:
                            byte = int(data[at])
                            at += 1
                        elif fake == 0 and at + 1 < size and data[at + 1] == 0:
                            byte = 0xFF
                            at += 2
                        else:
                            fake += 8
                        buffer = (buffer << np.uint64(8)) | np.uint64(byte)
                        bits += 8
                    table = 2 * component + (1 if k else 0)
                    peek = int((buffer >> np.uint64(bits - 16)) & np.uint64(0xFFFF))
                    step = fast[table, peek >> 7]
                    if step == 0:
                        length = 10
                        while length <= 16 and (peek >> (16 - length)) > last[table, length]:
                            length += 1
                        if length > 16:
                            return (1 if fake else 2), at
                        place = ((peek >> (16 - length)) + delta[table, length]) & 255
                        step = steps[table, place] + (length << 8)
                    k += step & 255
                    bits -= step >> 8
                    if bits < fake:
                        return 1, at
                if k > 64 and step & 255 < 64:  # beyond its block, and not by an end-of-block
                    return 2, at
    # Behind the last block comes the rest of its byte. Some writers add bytes of 0x00 or 0xFF; others mean
    # that the walk lost its way.
    real = bits - fake
    shift = bits - (real & 7)
    while shift > fake:
        shift -= 8
        byte = int((buffer >> np.uint64(shift)) & np.uint64(255))
        if byte != 0 and byte != 255:
            return 3, at
    while at < size and not (data[at] == 0xFF and at + 1 < size and data[at + 1] != 0):
        if data[at] != 0 and data[at] != 0xFF:
            return 3, at
        at += 1
    return 0, at
