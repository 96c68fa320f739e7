"""The loops of `jpeg_check`: markers, tables and entropy-coded data of a JPEG stream (ITU-T T.81).

Faults are numbers: 0 none, 1 premature end, 2 no such code, 3 bytes left over, 4 restart marker out of
place, 5 damaged header, 6 frame larger than the tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wsitk.compiled import compiled

__all__ = ["walk"]


@compiled
def define(data: Any, at: int, end: int, fast: Any, last: Any, delta: Any, symbols: Any) -> int:
    """Read one DHT segment: 9-bit look-up, then per length the last code and its symbol's place."""
    while at + 17 <= end:
        place = (data[at] >> 4) * 4 + (data[at] & 15)
        if place >= 8:
            return 5
        fast[place, :] = 0
        code, k, values = 0, 0, at + 17
        for length in range(1, 17):
            count = data[at + length]
            delta[place, length] = k - code
            for _ in range(count):
                if values + k >= end or k >= 256:
                    return 5
                symbols[place, k] = data[values + k]
                if length <= 9:
                    low = code << (9 - length)
                    high = min(512, (code + 1) << (9 - length))
                    for i in range(low, high):
                        fast[place, i] = (length << 8) | data[values + k]
                code += 1
                k += 1
            last[place, length] = code - 1 if count else -1
            code <<= 1
        at = values + k
    return 0


@compiled
def leftover(data: Any, at: int, buffer: Any, bits: int, real: int) -> int:
    """Judge what follows the last block; writers pad with bytes of 0x00 or 0xFF, nothing else."""
    shift = bits - (real & 7)
    for _ in range(real >> 3):
        shift -= 8
        byte = (buffer >> np.uint64(shift)) & np.uint64(255)
        if byte != 0 and byte != 255:
            return 3
    while at < len(data) and not (data[at] == 0xFF and at + 1 < len(data) and data[at + 1] != 0):
        if data[at] != 0 and data[at] != 0xFF:
            return 3
        at += 1
    return 0


@compiled
def entropy(
    data: Any,
    at: int,
    units: int,
    restart: int,
    parts: Any,
    fast: Any,
    last: Any,
    delta: Any,
    symbols: Any,
) -> tuple[int, int]:
    """Walk one scan; return a fault and where its data end.

    `parts` (n, 3) lists blocks per unit, DC and AC table of each component. `bits` counts what is in
    `buffer`, of which the lowest `fake` were made up behind the end.
    """
    size = len(data)
    buffer, bits, fake = np.uint64(0), 0, 0
    expected = 0xD0
    for unit in range(units):
        if restart and unit and unit % restart == 0:
            if bits - fake >= 8 or at + 1 >= size or data[at] != 0xFF or data[at + 1] != expected:
                return 4, at
            at += 2
            expected = 0xD0 + ((expected + 1) & 7)
            buffer, bits, fake = np.uint64(0), 0, 0
        for part in range(parts.shape[0]):
            for _ in range(parts[part, 0]):
                k = 0
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
                    table = parts[part, 1] if k == 0 else parts[part, 2]
                    peek = int((buffer >> np.uint64(bits - 16)) & np.uint64(0xFFFF))
                    entry = fast[table, peek >> 7]
                    length, symbol = entry >> 8, entry & 255
                    if entry == 0:
                        length = 10
                        while length <= 16 and (peek >> (16 - length)) > last[table, length]:
                            length += 1
                        if length > 16:
                            return (1 if fake else 2), at
                        symbol = symbols[table, ((peek >> (16 - length)) + delta[table, length]) & 255]
                    value_bits = symbol & 15
                    if k == 0:
                        k = 1
                    elif value_bits == 0:
                        k = k + 16 if symbol == 0xF0 else 64
                    else:
                        k += (symbol >> 4) + 1
                    bits -= length + value_bits
                    if bits < fake:
                        return 1, at
    return leftover(data, at, buffer, bits, bits - fake), at


@compiled
def scan_parts(data: Any, at: int, frame: Any, parts: Any) -> int:
    """Fill `parts` from an SOS segment; return the number of components, 0 if it makes no sense."""
    count = int(data[at])
    if count < 1 or count > 4:
        return 0
    for i in range(count):
        found = False
        for c in range(frame.shape[0]):
            if frame[c, 0] == data[at + 1 + 2 * i]:
                choice = data[at + 2 + 2 * i]
                parts[i, 0] = frame[c, 1] * frame[c, 2] if count > 1 else 1
                parts[i, 1] = (choice >> 4) & 3
                parts[i, 2] = 4 + (choice & 3)
                parts[i, 3] = c
                found = True
        if not found:
            return 0
    return count


@compiled
def units_of(height: int, width: int, frame: Any, count: int, component: int) -> int:
    """Return the number of coded units of a scan (T.81, A.2)."""
    high, wide = frame[:, 2].max(), frame[:, 1].max()
    if count > 1:
        return int(-(-height // (8 * high)) * -(-width // (8 * wide)))
    rows = -(-height * frame[component, 2] // high)
    columns = -(-width * frame[component, 1] // wide)
    return int(-(-rows // 8) * -(-columns // 8))


@compiled
def stream(data: Any, tile: Any, fast: Any, last: Any, delta: Any, symbols: Any) -> int:
    """Walk the markers of one stream; return a fault, or -1 where only the end can be judged."""
    size, at, restart, seen = len(data), 2, 0, 0
    frame = np.zeros((0, 3), np.int64)
    height = width = 0
    sequential = True
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return 5
    while at + 1 < size:
        marker = data[at + 1]
        if data[at] != 0xFF:
            return 5 if seen == 0 else 0
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            return 0 if seen and seen >= frame.shape[0] else 1
        if at + 4 > size:
            break
        length = int(data[at + 2]) * 256 + int(data[at + 3])
        stop = at + 2 + length
        if length < 2 or stop > size:
            return 1
        if marker == 0xC4:
            if define(data, at + 4, stop, fast, last, delta, symbols):
                return 5
        elif marker == 0xDD and length >= 4:
            restart = int(data[at + 4]) * 256 + int(data[at + 5])
        elif 0xC0 <= marker <= 0xCF and marker != 0xC8 and marker != 0xCC:
            sequential = marker <= 0xC1 and data[at + 4] == 8
            height, width = int(data[at + 5]) * 256 + data[at + 6], int(data[at + 7]) * 256 + data[at + 8]
            if height > tile[0] or width > tile[1]:
                return 6
            count = int(data[at + 9])
            if count < 1 or count > 4 or length < 8 + 3 * count or height == 0 or width == 0:
                return 5
            frame = np.zeros((count, 3), np.int64)
            for c in range(count):
                frame[c, 0] = data[at + 10 + 3 * c]
                frame[c, 1] = data[at + 11 + 3 * c] >> 4
                frame[c, 2] = data[at + 11 + 3 * c] & 15
            if frame[:, 1:].min() < 1 or frame[:, 1:].max() > 4:
                return 5
        elif marker == 0xDA:
            if not sequential:
                return -1
            parts = np.zeros((4, 4), np.int64)
            count = scan_parts(data, at + 4, frame, parts)
            if count == 0:
                return 5
            units = units_of(height, width, frame, count, parts[0, 3])
            fault, stop = entropy(data, stop, units, restart, parts[:count], fast, last, delta, symbols)
            if fault:
                return fault
            seen += count
            while stop < size and not (data[stop] == 0xFF and stop + 1 < size and data[stop + 1] != 0):
                stop += 1
        at = stop
    return 0 if seen and seen >= frame.shape[0] else 1


@compiled
def walk(tables: Any, data: Any, height: int, width: int) -> int:
    """Walk the shared tables, then the stream."""
    fast = np.zeros((8, 512), np.int32)
    last = np.full((8, 17), -1, np.int32)
    delta = np.zeros((8, 17), np.int32)
    symbols = np.zeros((8, 256), np.int32)
    tile = np.array([height, width])
    if len(tables) > 4:
        stream(tables, tile, fast, last, delta, symbols)
    fault = stream(data, tile, fast, last, delta, symbols)
    if fault >= 0:
        return fault
    end = len(data) - 1
    while end > 1 and data[end] == 0:
        end -= 1
    return 0 if data[end] == 0xD9 and data[end - 1] == 0xFF else 1
