"""Is a JPEG stream whole? The codec does not tell: it fills what is missing and reports success.

libjpeg notes damage as a warning, which imagecodecs does not pass on: half a tile decodes to grey without
an error. So the entropy-coded data are walked once more (ITU-T T.81, F.2.2), without computing a
coefficient: all blocks must be there, every code must exist, and nothing may be left over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["jpeg_fault"]

_SOI, _EOI, _SOS, _DHT, _DRI = 0xD8, 0xD9, 0xDA, 0xC4, 0xDD
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_FAULTS = (
    "",
    "premature end of the data segment",
    "impossible Huffman code",
    "bytes left over before a marker",
    "a restart marker is out of place",
)


class _FaultError(Exception):
    """Ends the walk; its text is the fault."""


@dataclass
class _State:
    """What the segments before a scan have said."""

    tile: tuple[int, int]
    huffman: dict[int, bytes] = field(default_factory=dict)  # class * 16 + place -> 16 counts and the symbols
    restart: int = 0
    size: tuple[int, int] = (0, 0)
    components: dict[int, tuple[int, int]] = field(default_factory=dict)  # identifier -> sampling (v, h)
    sequential: bool = True
    scanned: int = 0


def jpeg_fault(data: bytes, tables: bytes | None, tile: tuple[int, int]) -> str:
    """Return what is wrong with a stream, empty if nothing is found.

    `tables` is TIFF's JPEGTables, `tile` the size (height, width) that the frame must not exceed. Sequential
    Huffman streams are walked; of others (progressive, arithmetic) only the headers and the end are looked
    at.
    """
    state = _State(tile)
    try:
        if tables:
            _walk(tables, state)
        _walk(data, state)
        if not state.scanned or state.scanned < len(state.components):
            raise _FaultError(_FAULTS[1])
    except _FaultError as fault:
        return f"Corrupt JPEG data: {fault}"
    except (IndexError, ValueError):
        return "Corrupt JPEG data: damaged header"
    return ""


def _walk(data: bytes, state: _State) -> None:
    """Read the segments of one stream up to its end."""
    if data[:2] != bytes((0xFF, _SOI)):
        raise _FaultError("no start of image")
    at = 2
    while at + 1 < len(data):
        if data[at] != 0xFF:
            if state.scanned:  # padding behind a stream without its end marker
                return
            raise _FaultError("damaged header")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == _EOI:
            return
        elif marker == 0x01 or 0xD0 <= marker <= _SOI:
            at += 2
        else:
            stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if stop > len(data) or stop < at + 4:
                raise _FaultError(_FAULTS[1])
            at = _segment(marker, data, at + 4, stop, state)


def _segment(marker: int, data: bytes, start: int, stop: int, state: _State) -> int:
    """Take in one segment, and the scan behind it; return where the next marker is looked for."""
    if marker == _DHT:
        _take_tables(data[start:stop], state)
    elif marker == _DRI:
        state.restart = int.from_bytes(data[start : start + 2], "big")
    elif marker in _FRAMES:
        _take_frame(marker, data[start:stop], state)
    elif marker == _SOS:
        if state.sequential:
            return _scan(data, start, stop, state)
        if data.rstrip(b"\0")[-2:] != bytes((0xFF, _EOI)):
            raise _FaultError(_FAULTS[1])
        state.scanned = len(state.components)
        return len(data)
    return stop


def _take_tables(body: bytes, state: _State) -> None:
    """Note the Huffman tables of a DHT segment (T.81, B.2.4.2)."""
    at = 0
    while at < len(body):
        count = sum(body[at + 1 : at + 17])
        spec = body[at + 1 : at + 17 + count]
        if len(spec) != 16 + count or count > 256:
            raise _FaultError("damaged header")
        state.huffman[body[at]] = spec
        at += 17 + count


def _take_frame(marker: int, body: bytes, state: _State) -> None:
    """Note size and components of a frame (T.81, B.2.2)."""
    height, width, count = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), body[5]
    if height > state.tile[0] or width > state.tile[1]:
        raise _FaultError(f"a frame of {width}x{height} pixels, larger than its tile")
    sampling = {body[6 + 3 * c]: (body[7 + 3 * c] & 15, body[7 + 3 * c] >> 4) for c in range(count)}
    steps = {n for pair in sampling.values() for n in pair}
    if not height or not width or not 1 <= len(sampling) <= 4 or not steps <= {1, 2, 3, 4}:
        raise _FaultError("damaged header")
    state.size, state.components = (height, width), sampling
    state.sequential = marker in (0xC0, 0xC1) and body[0] == 8


def _scan(data: bytes, start: int, stop: int, state: _State) -> int:
    """Walk the entropy-coded data of one scan; return the place of the marker behind them."""
    from wsitk.sources.jpeg_walk import entropy  # numba takes half a second to import

    count = data[start]
    chosen = [(data[start + 1 + 2 * i], data[start + 2 + 2 * i]) for i in range(count)]
    if not chosen or any(c not in state.components for c, _ in chosen):
        raise _FaultError("damaged header")
    sampling = [state.components[c] for c, _ in chosen]
    slots = [slot for _, choice in chosen for slot in (choice >> 4, 16 + (choice & 15))]
    if any(slot not in state.huffman for slot in slots):
        raise _FaultError("a Huffman table is missing")
    tables = _prepared(tuple(state.huffman[slot] for slot in slots))
    blocks = np.array([v * h if count > 1 else 1 for v, h in sampling], np.int64)
    bits = np.frombuffer(data, np.uint8)
    fault, at = entropy(bits, stop, _units(state, sampling), state.restart, blocks, *tables)
    if fault:
        raise _FaultError(_FAULTS[int(fault)])
    state.scanned += count
    return int(at)


def _units(state: _State, sampling: list[tuple[int, int]]) -> int:
    """Return the number of coded units of a scan (T.81, A.2)."""
    top = [max(s[a] for s in state.components.values()) for a in (0, 1)]
    if len(sampling) > 1:
        return int(np.prod([ceil(n / (8 * t)) for n, t in zip(state.size, top, strict=True)]))
    return int(
        np.prod([ceil(ceil(n * s / t) / 8) for n, s, t in zip(state.size, sampling[0], top, strict=True)])
    )


@lru_cache(maxsize=64)
def _prepared(specs: tuple[bytes, ...]) -> tuple[NDArray[Any], ...]:
    """Return look-up tables of all Huffman tables of a scan (T.81, C and F.2.2.3), one row each.

    A step is ``bits << 8 | coefficients``: what a symbol takes from the stream and how far it goes on in its
    block. `fast` (n, 512) is the step, code included, for the next 9 bits, 0 where the code is longer; `last`
    (n, 17) the last code of each length, -1 for none; `delta` (n, 17) what to add to a code for its place in
    `steps` (n, 256), which are without the code.
    """
    fast, steps = np.zeros((len(specs), 512), np.int32), np.zeros((len(specs), 256), np.int32)
    last, delta = np.full((len(specs), 17), -1, np.int32), np.zeros((len(specs), 17), np.int32)
    for row, spec in enumerate(specs):
        known = [_step(symbol, bool(row % 2)) for symbol in spec[16:]]
        steps[row, : len(known)] = known
        code = place = 0
        for length in range(1, 17):
            delta[row, length] = place - code
            for _ in range(spec[length - 1]):
                if length <= 9:
                    fast[row, code << (9 - length) : (code + 1) << (9 - length)] = (length << 8) + known[
                        place
                    ]
                last[row, length] = code
                code += 1
                place += 1
            code <<= 1
    return fast, last, delta, steps


def _step(symbol: int, is_ac: bool) -> int:
    """Return bits and coefficients of a symbol without its code (T.81, F.1.2)."""
    size, run = symbol & 15, symbol >> 4
    if not is_ac:
        return size << 8 | 1
    if size:
        return size << 8 | run + 1
    return 16 if run == 15 else 64  # sixteen zeros, or the end of the block
