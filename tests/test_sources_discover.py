"""Inputs from files, folders and patterns: which, in what order, and under which names."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from wsitk.errors import UsageError
from wsitk.sources.dicom_header import WSI_STORAGE, read_header
from wsitk.sources.discover import companions, expand_inputs

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def touch(root: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(*inputs: Path | str) -> list[str]:
    return [item.name for item in expand_inputs([str(i) for i in inputs]).items]


def dicom(
    series: str, sop: str = WSI_STORAGE, image_type: str = "ORIGINAL\\PRIMARY\\VOLUME\\NONE", *,
    implicit: bool = False, order: str = "<", nested: bool = True,
) -> bytes:  # fmt: skip
    """Return the head of a DICOM file, with a sequence of undefined length before what matters."""

    def element(group: int, number: int, vr: str, value: bytes, meta: bool = False) -> bytes:
        value += b" " * (len(value) % 2)
        way = "<" if meta else order
        head = struct.pack(way + "HH", group, number)
        if implicit and not meta:
            return head + struct.pack(way + "I", len(value)) + value
        return head + vr.encode() + struct.pack(way + "H", len(value)) + value

    def bare(number: int, length: int) -> bytes:
        return struct.pack(order + "HHI", 0xFFFE, number, length)

    syntax = {True: "1.2.840.10008.1.2", False: "1.2.840.10008.1.2.1"}[implicit]
    syntax = "1.2.840.10008.1.2.2" if order == ">" else syntax
    inner = element(0x0008, 0x0100, "SH", b"code")
    undefined = 0xFFFFFFFF
    sequence = struct.pack(order + "HH", 0x0008, 0x1140)
    sequence += (
        struct.pack("<I" if order == "<" else ">I", undefined)
        if implicit
        else b"SQ\0\0" + struct.pack(order + "I", undefined)
    )
    sequence += (
        bare(0xE000, undefined) + inner + bare(0xE00D, 0) + bare(0xE000, len(inner)) + inner + bare(0xE0DD, 0)
    )
    return (
        bytes(128) + b"DICM" + element(2, 0x10, "UI", syntax.encode(), meta=True)
        + element(8, 8, "CS", image_type.encode()) + element(8, 0x16, "UI", sop.encode())
        + (sequence if nested else b"") + element(0x10, 0x10, "PN", b"SECRET^NAME")
        + element(0x20, 0xE, "UI", series.encode()) + element(0x28, 0x10, "US", b"\x10\x00")
    )  # fmt: skip


def test_folders_are_searched_in_a_fixed_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.svs", "a.tiff", "case1/b.tiff", "case1/a.svs", "case1/deep/x.ome.tiff", "Z.PNG", "q.jp2"
    )
    touch(tmp_path, "notes.txt", "Thumbs.db", "case1/readme", ".hidden.svs", "._a.svs", ".git/x.svs", "c.czi")
    touch(tmp_path, "store.zarr/0.png")
    found = expand_inputs([tmp_path])
    assert [i.name for i in found.items] == [
        "Z.PNG", "a.tiff", "b.svs", "case1/a.svs", "case1/b.tiff", "case1/deep/x.ome.tiff", "q.jp2",
    ]  # fmt: skip
    assert dict(found.skipped) == {
        "CZI is not supported": 1,
        "OME-Zarr is not supported": 1,
        "hidden": 3,
        "not a slide or image": 1,
        "not a slide or image (.db)": 1,
        "not a slide or image (.txt)": 1,
    }
    assert found == expand_inputs([str(tmp_path) + "/", tmp_path / "case1"])


def test_names_are_below_the_common_root(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.svs", "x/a.tiff", "y/a.svs", "y/z/b.svs")
    assert names(tmp_path / "x" / "a.svs") == ["a.svs"]
    assert names(tmp_path / "x") == ["a.svs", "a.tiff"]
    assert names(tmp_path / "x" / "a.svs", tmp_path / "y" / "a.svs") == ["x/a.svs", "y/a.svs"]
    assert names(tmp_path / "x", tmp_path / "y") == ["x/a.svs", "x/a.tiff", "y/a.svs", "y/z/b.svs"]
    assert names(tmp_path / "*" / "*.svs") == ["x/a.svs", "y/a.svs"]
    assert names(tmp_path / "**" / "b.svs") == ["b.svs"]
    assert names(tmp_path / "y" / "z" / ".." / "a.svs") == ["a.svs"]


def test_what_is_named_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "[1].svs")
    assert names(tmp_path / "notes.txt") == ["notes.txt"]
    assert names(tmp_path / "[1].svs") == ["[1].svs"]
    assert names(tmp_path / "*.t?t", tmp_path / "[[]1].svs") == ["[1].svs"]
    for missing in ("none.svs", "*.ndpi"):
        with pytest.raises(UsageError, match="WSI023"):
            names(tmp_path / missing)
    with pytest.raises(UsageError, match="WSI023"):
        names()


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/a.svs", "b.svs")
    monkeypatch.chdir(tmp_path / "x")
    found = expand_inputs(["a.svs", "../b.svs"])
    assert [(i.path, i.name) for i in found.items] == [
        (tmp_path / "b.svs", "b.svs"),
        (tmp_path / "x/a.svs", "x/a.svs"),
    ]


def test_links(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.svs")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "z.svs").symlink_to(tmp_path / "real" / "a.svs")
    (tmp_path / "real" / "gone.svs").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    found = expand_inputs([tmp_path / "real"])
    assert [i.name for i in found.items] == ["a.svs"]
    assert dict(found.skipped) == {
        "a link that leads back to its own folder": 1,
        "a link to nothing": 1,
        "the same file under another name": 1,
    }
    assert names(tmp_path / "linked") == ["a.svs"]
    assert names(tmp_path / "real" / "gone.svs") == ["gone.svs"]


def test_names_are_safe_and_different(tmp_path: Path) -> None:
    odd = [
        "a\nb.svs",
        "a%0Ab.svs",
        "tab\t.svs",
        "back\\slash.svs",
        "-leading.svs",
        "spaces in it.svs",
        "ü😐.svs",
        "..svs",
    ]
    long = ["x" * 240 + ".svs", "x" * 239 + "y.svs"]
    touch(tmp_path, *(f"d/{n}" for n in [*odd, *long]))
    raw = os.fsencode(tmp_path) + b"/d/\xff\xfe.svs"
    with open(raw, "wb") as file:
        file.write(b"x")
    found = names(tmp_path / "d", *(tmp_path / "d" / n for n in odd))
    assert len(found) == len(set(found)) == len(odd) + len(long) + 1
    for name in found:
        assert name.isprintable()
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts
        assert all(len(part.encode()) <= 200 for part in name.split("/"))
        name.encode()
    assert {"a%0Ab.svs", "a%250Ab.svs", "ü😐.svs", "-leading.svs", "%FF%FE.svs"} <= set(found)


def test_mrxs_folders_and_vms_parts_are_parts(tmp_path: Path) -> None:
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/thumb.png", "b.svs", "b/c.png")
    touch(tmp_path, "v_1.jpg", "v_macro.jpg", "other.jpg")
    (tmp_path / "v.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=v_1.jpg\nMacroImage=v_macro.jpg\nNo=../x\n"
    )
    assert names(tmp_path) == ["a.mrxs", "b.svs", "b/c.png", "other.jpg", "v.vms"]
    assert [p.name for p in companions(tmp_path / "a.mrxs")] == [
        "a.mrxs",
        "Data0000.dat",
        "Slidedat.ini",
        "thumb.png",
    ]
    assert [p.name for p in companions(tmp_path / "v.vms")] == ["v.vms", "v_1.jpg", "v_macro.jpg"]
    assert companions(tmp_path / "b.svs") == [tmp_path / "b.svs"]


@pytest.mark.parametrize("options", [{}, {"implicit": True}, {"order": ">"}, {"nested": False}], ids=str)
def test_dicom_headers(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom("1.2.3", **options))  # type: ignore[arg-type]  # a dict of mixed values
    header = read_header(path)
    assert header is not None
    assert (header.sop_class, header.series, header.is_slide, header.is_volume) == (
        WSI_STORAGE,
        "1.2.3",
        True,
        True,
    )
    assert "SECRET" not in str(header)


def test_damaged_dicom_headers_are_none(tmp_path: Path) -> None:
    data = dicom("1.2.3")
    path = tmp_path / "a.dcm"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        header = read_header(path)
        assert header is None or header.series in ("", "1.2.3", "1.2.", "1.2", "1.", "1")


def test_a_dicom_series_is_one_input(tmp_path: Path) -> None:
    label = "ORIGINAL\\PRIMARY\\LABEL\\NONE"
    for name, data in {
        "s/0.dcm": dicom("1.1", image_type=label), "s/1.dcm": dicom("1.1"), "s/2.dcm": dicom("1.1"),
        "t/b.dcm": dicom("1.2"), "t/a.dcm": dicom("1.2"), "t/c": dicom("1.3"),
        "t/ct.dcm": dicom("1.4", sop=CT_STORAGE),
        "t/sr.dcm": dicom("1.6", sop=CT_STORAGE[:-1] + "88.22"),
        "u/x.dcm": dicom("1.5"), "u/sub/y.svs": b"x",
    }.items():  # fmt: skip
        touch(tmp_path, name, content=data)
    found = expand_inputs([tmp_path])
    assert [(i.name, i.path.name) for i in found.items] == [
        ("s", "1.dcm"), ("t/a.dcm", "a.dcm"), ("t/c", "c"), ("t/ct.dcm", "ct.dcm"),
        ("u/sub/y.svs", "y.svs"), ("u/x.dcm", "x.dcm"),
    ]  # fmt: skip
    assert dict(found.skipped) == {
        "DICOM, but no image that is read": 1,
        "further files of a DICOM series": 3,
    }
    assert names(tmp_path / "s") == ["s"]
    assert names(tmp_path / "t" / "ct.dcm") == ["t"]
    assert sorted(p.name for p in companions(tmp_path / "s" / "1.dcm")) == ["0.dcm", "1.dcm", "2.dcm"]
    assert companions(tmp_path / "s" / "1.dcm")[0].name == "1.dcm"
