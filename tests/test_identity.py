"""What makes two files the same input: their bytes, tile tables included; never their folder or times."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.errors import SourceError
from wsitk.sources import ifd_digest as module
from wsitk.sources.files import file_identity, file_stamp
from wsitk.sources.ifd_digest import ifd_digest

TABLES = {324, 325}  # TileOffsets, TileByteCounts


def write_slide(path: Path, *, big: bool = False, order: str = "<", subifds: bool = False) -> None:
    """Write a pyramid of noise whose tables lie apart from its headers."""
    pixels = np.random.default_rng(1).integers(0, 255, (512, 640, 3), np.uint8)
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tiff:
        tiff.write(pixels, tile=(64, 64), photometric="rgb", description="a slide", subifds=int(subifds))
        tiff.write(pixels[::2, ::2], tile=(64, 64), photometric="rgb", subfiletype=1)


def value_spans(path: Path) -> list[tuple[int, int, int]]:
    """Return (tag, first byte, length) of each value of each header, as tifffile sees them."""
    with tifffile.TiffFile(path) as tiff:
        pages = [*tiff.pages, *(sub for page in tiff.pages for sub in (page.pages or ()))]
        return [(t.code, t.valueoffset, t.valuebytecount) for page in pages for t in page.tags]


@pytest.mark.parametrize("subifds", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_any_changed_byte_of_any_header_changes_it(
    tmp_path: Path, big: bool, order: str, subifds: bool
) -> None:
    path = tmp_path / "a.tiff"
    write_slide(path, big=big, order=order, subifds=subifds)
    whole = path.read_bytes()
    before = ifd_digest(path)
    spans = value_spans(path)
    assert {tag for tag, _, _ in spans} >= TABLES
    random_ = random.Random(0)
    for tag, start, length in spans:
        changed = bytearray(whole)
        changed[start + random_.randrange(length)] ^= 1
        path.write_bytes(changed)
        assert ifd_digest(path) != before, f"tag {tag} at {start}"
    path.write_bytes(whole)
    assert ifd_digest(path) == before


def test_pixels_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    write_slide(path)
    before = ifd_digest(path)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[3]
    changed = bytearray(path.read_bytes())
    changed[offset + 5] ^= 1
    path.write_bytes(changed)
    assert ifd_digest(path) == before
    assert file_identity("a", [path])["sha256_headers"]


def test_a_retiled_middle_that_samples_miss_is_another_input(tmp_path: Path) -> None:
    """A table between the samples: 40 MiB of holes around one slide's headers."""
    path = tmp_path / "a.tiff"
    write_slide(path)
    inner = path.read_bytes()
    hole = 20 << 20
    first = struct.unpack("<I", inner[4:8])[0]
    with open(path, "wb") as file:  # the header points far into the file; there everything is moved by `hole`
        file.write(inner[:4] + struct.pack("<I", hole + 12345))
        file.seek(hole + 12345)
        file.write(inner[first:])
        file.truncate(2 * hole)
    one = file_identity("a.tiff", [path])
    with open(path, "r+b") as file:
        file.seek(hole + 12345 + 30)  # an entry of the first IFD
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    two = file_identity("a.tiff", [path])
    assert one["sha256_sampled"] == two["sha256_sampled"]
    assert one["sha256_headers"] != two["sha256_headers"]


def test_a_copy_is_the_same_input_with_another_stamp(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "a.tiff", tmp_path / "copy" / "a.tiff")
    os.utime(tmp_path / "copy" / "a.tiff", ns=(1, 1))
    paths = [tmp_path / "a.tiff", tmp_path / "copy" / "a.tiff"]
    one, two = (file_identity("a.tiff", [path]) for path in paths)
    assert one == two
    one, two = (file_stamp("a.tiff", [path]) for path in paths)
    assert one != two
    assert two == {"files": [["a.tiff", paths[1].stat().st_size, 1]]}
    with pytest.raises(SourceError, match="WSI100"):
        file_stamp("a.tiff", [tmp_path / "gone.tiff"])


def test_what_is_no_tiff_has_no_headers(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + bytes(100))
    assert ifd_digest(tmp_path / "a.jpg") is None
    assert "sha256_headers" not in file_identity("a", [tmp_path / "a.jpg"])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), big=st.booleans(), order=st.sampled_from("<>"))
def test_no_bytes_make_it_fail(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, big: bool, order: str
) -> None:
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    path = tmp_path_factory.getbasetemp() / "any.tiff"
    path.write_bytes(head + data.draw(st.binary(max_size=300)))
    assert len(ifd_digest(path) or "") == 64


@pytest.mark.parametrize("big", [False, True])
def test_hostile_headers_cost_no_more_than_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, big: bool
) -> None:
    """Every entry is a list of SubIFDs, or a value that claims the whole file; every IFD leads on."""
    monkeypatch.setattr(module, "BUDGET_BYTES", 4 << 20)
    entries, words = 500, "<HHQQ" if big else "<HHII"
    table = b""
    for i in range(entries):
        tag, kind = (330, 4) if i % 2 else (324, 16 if big else 4)
        table += struct.pack(words, tag, kind, 2**31 - 1, 16)
    head = b"II" + (struct.pack("<HHHQ", 43, 8, 0, 16) if big else struct.pack("<HI8x", 42, 16))
    count = struct.pack("<Q" if big else "<H", entries)
    path = tmp_path / "bomb.tiff"
    path.write_bytes(head + count + table + bytes(range(256)) * 400)
    read = 0
    real = module._Walk._read

    def counted(self: module._Walk, offset: int, length: int) -> bytes:
        nonlocal read
        data = real(self, offset, length)
        read += len(data)
        return data

    monkeypatch.setattr(module._Walk, "_read", counted)
    assert ifd_digest(path) == ifd_digest(path)
    assert read <= 2 * module.BUDGET_BYTES
