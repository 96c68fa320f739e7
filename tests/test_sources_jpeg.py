"""The walk through JPEG streams: no whole stream is called damaged, hardly a damaged one whole."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from wsitk.sources.jpeg_check import jpeg_fault


def streams() -> Iterator[tuple[str, bytes, int, int]]:
    """Yield JPEG files of many kinds: sizes, subsampling, quality, restart markers, own or default tables."""
    rng = np.random.default_rng(0)
    for number in range(160):
        height, width = (int(n) for n in rng.integers(9, 200, 2))
        ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 2, 3])
        image = rng.integers(0, 256, (height, width, 3)) if number % 3 == 0 else ramp
        picture = (image % 256).astype(np.uint8)
        options = {
            cv2.IMWRITE_JPEG_QUALITY: int(rng.integers(1, 101)),
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR: (0x111111, 0x211111, 0x221111)[number % 3],
            cv2.IMWRITE_JPEG_OPTIMIZE: number % 2,
            cv2.IMWRITE_JPEG_PROGRESSIVE: int(number % 7 == 0),
            cv2.IMWRITE_JPEG_RST_INTERVAL: int(rng.integers(1, 9)) if number % 5 == 0 else 0,
        }
        stored = picture[..., 0] if number % 4 == 0 else picture
        done, data = cv2.imencode(".jpg", stored, [n for pair in options.items() for n in pair])
        assert done
        yield f"{number} {stored.shape} {options}", data.tobytes(), height, width


def test_whole_streams_are_whole() -> None:
    for title, data, height, width in streams():
        assert jpeg_fault(data, None, (height, width)) == "", title
        assert jpeg_fault(data + bytes(7), None, (height, width)) == "", title  # padding behind the end


def test_frames_are_held_against_their_tile() -> None:
    for title, data, height, width in list(streams())[:20]:
        assert "larger than its tile" in jpeg_fault(data, None, (height - 1, width)), title


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_streams_cut_short(share: float) -> None:
    for title, data, height, width in streams():
        if b"\xff\xda" in data:
            start = data.rindex(b"\xff\xda") + 14
            cut = start + int((len(data) - 2 - start) * share)
            assert jpeg_fault(data[:cut], None, (height, width)), title


def test_no_bytes_at_all() -> None:
    for data in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"hello, world", bytes(500)):
        assert jpeg_fault(data, None, (64, 64)), data


def test_overwritten_streams() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    data, missed = cv2.imencode(".jpg", image)[1].tobytes(), 0
    start = data.rindex(b"\xff\xda") + 14
    for _ in range(300):
        at = int(rng.integers(start, len(data) - 250))
        missed += not jpeg_fault(data[:at] + rng.bytes(200) + data[at + 200 :], None, (128, 128))
    assert missed <= 6


def test_noise_never_crashes() -> None:
    rng = np.random.default_rng(2)
    for _, data, height, width in list(streams())[:60]:
        for _ in range(10):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = int(rng.integers(256))
            assert isinstance(jpeg_fault(bytes(damaged), None, (height, width)), str)
            jpeg_fault(rng.bytes(300), data[:200], (height, width))
