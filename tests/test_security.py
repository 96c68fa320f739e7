"""Hostile files: nothing of them runs, nothing is written outside of the output, nobody is called.

Python's own audit events are watched while each test runs: processes started, code compiled from text, files
opened for writing elsewhere, sockets beyond loopback. Refusing with the right code is half of each test.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import platform
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import wsitk
from wsitk.artifacts import artifacts_from_geojson
from wsitk.contact_sheet import write_contact_sheet
from wsitk.errors import ModelError, OutputError, SourceError, UsageError, WsitkError
from wsitk.evaluation.label_files import LabelReader
from wsitk.pipeline import Input, Runner
from wsitk.record import InputRow
from wsitk.settings import Settings
from wsitk.sources.array import ArraySource
from wsitk.sources.discover import expand_inputs
from wsitk.testing import OracleModel, SyntheticSlide
from wsitk.tissue import from_geojson
from wsitk.torchfile import read_plain, read_tensors
from wsitk.verify import verify

PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "preview": False}
SLIDE = SyntheticSlide.make((260, 300), count=40, seed=4)
LOOPBACK = ("127.", "::1", "localhost")


class Watch:
    """What happened that must not: filled by an audit hook, of which there is one, since none can be removed."""

    def __init__(self) -> None:
        self.home: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn", "os.fork"):
            self.seen.append(f"{event} {arguments[:2]}")
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            if not str(arguments[1][0]).startswith(LOOPBACK):
                self.seen.append(f"{event} {arguments[1]}")
        elif event in ("socket.getaddrinfo", "urllib.Request", "ctypes.dlopen/evil", "webbrowser.open"):
            self.seen.append(f"{event} {arguments[:2]}")
        elif event == "open":
            self._opened(*arguments)
        elif event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.truncate",
            "os.chmod",
        ):
            self._touched(event, arguments[0])

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        if isinstance(path, str | bytes | Path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._touched("open for writing", path)

    def _touched(self, event: str, path: Any) -> None:
        place = Path(os.path.abspath(os.fsdecode(path))) if isinstance(path, str | bytes | Path) else None
        if place is None or self.home in place.parents or place == self.home:
            return
        if place.parts[1:2] not in (("dev",), ("proc",)) and "__pycache__" not in place.parts:
            self.seen.append(f"{event} {place}")


WATCH = Watch()
sys.addaudithook(WATCH)


@pytest.fixture(autouse=True)
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Fail a test during which anything ran, was called, or was written outside of its folder."""
    import torch  # noqa: F401  # imported before anyone watches: it opens what it likes

    platform.processor()  # asks `uname`, once
    WATCH.seen, WATCH.home = [], tmp_path
    yield WATCH
    WATCH.home = None
    assert WATCH.seen == []


def test_the_watch_sees(tmp_path: Path, watch: Watch) -> None:
    import socket

    (tmp_path.parent / "outside").write_text("x")
    with socket.socket() as line:
        line.settimeout(0.01)
        assert line.connect_ex(("192.0.2.1", 9)) != 0
    os.system("true")
    assert len(watch.seen) == 3
    watch.seen.clear()


# --- pickles -----------------------------------------------------------------------------------------

GLOBALS = """
posix system|posix execv|posix _exit|posix unlink|posix rename|posix kill|posix putenv|os system|os popen|os spawnl
os removedirs|os.path exists|nt system|subprocess Popen|subprocess run|subprocess check_output|builtins eval
builtins exec|builtins compile|builtins open|builtins getattr|builtins setattr|builtins __import__|builtins input
builtins breakpoint|__builtin__ eval|importlib import_module|runpy run_path|code interact|pty spawn|shutil rmtree
shutil copyfile|socket create_connection|urllib.request urlopen|http.client HTTPSConnection|smtplib SMTP|ftplib FTP
webbrowser open|ctypes CDLL|pickle loads|marshal loads|dill loads|joblib load|torch load|torch.hub load|torch.jit load
torch.utils.cpp_extension load_inline|torch.serialization load|torch._dynamo optimize|numpy load|numpy.f2py compile
numpy.testing._private.utils runstring|pandas read_pickle|operator attrgetter|operator methodcaller|functools partial
functools reduce|types FunctionType|types CodeType|timeit timeit|cProfile run|pdb run|doctest debug_script
asyncio create_subprocess_shell|multiprocessing.util spawnv_passfds|threading Thread|_thread start_new_thread
atexit register|signal alarm|zipimport zipimporter|tempfile mktemp|logging.config fileConfig|pip main|site main
wsitk.process Child|wsitk.discard discard_results|wsitk.reading.server serve|collections Counter.fromkeys
"""
CALLS = sorted(
    {tuple(entry.split(" ")) for line in GLOBALS.split("\n") for entry in line.split("|") if entry}
)


def short(text: str) -> bytes:
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data


STYLES = {
    "GLOBAL and REDUCE": lambda m, n, a: b"c%b\n%b\n(%btR." % (m.encode(), n.encode(), a),
    "STACK_GLOBAL": lambda m, n, a: b"\x80\x04" + short(m) + short(n) + b"\x93(" + a + b"tR.",
    "INST": lambda m, n, a: b"(%bi%b\n%b\n." % (a, m.encode(), n.encode()),
    "OBJ": lambda m, n, a: b"(c%b\n%b\n%bo." % (m.encode(), n.encode(), a),
    "NEWOBJ": lambda m, n, a: b"\x80\x02c%b\n%b\n(%bt\x81." % (m.encode(), n.encode(), a),
    "BUILD": lambda m, n, a: b"c%b\n%b\n(%btR}X\x01\x00\x00\x00xK\x01sb." % (m.encode(), n.encode(), a),
    "in a dict": lambda m, n, a: b"}X\x01\x00\x00\x00wc%b\n%b\n(%btRs." % (m.encode(), n.encode(), a),
}
"""How a pickle may ask for a call: module, name and the pickled argument in, bytes out."""


def payload(number: int, marker: Path) -> bytes:
    """Return the pickle of one forbidden call, whose argument would make `marker` if it were a command."""
    module, name = CALLS[number]
    command = b"X" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode()
    return list(STYLES.values())[number % len(STYLES)](module, name, command)


def test_there_are_enough_payloads() -> None:
    assert len(CALLS) >= 70
    assert len({payload(k, Path("x")) for k in range(len(CALLS))}) == len(CALLS)


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda k: " ".join(CALLS[k]))
def test_no_checkpoint_calls_anything(tmp_path: Path, number: int) -> None:
    marker, path = tmp_path / "owned", tmp_path / "m.pth"
    data = payload(number, marker)
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"WSI302.*asks to call") as plain:
        read_plain(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(
        ModelError, match=r"WSI30[123]"
    ) as whole:  # an object that is not made is data: no weights
        read_tensors(path)
    with pytest.raises(WsitkError):
        wsitk.load_model(path)
    assert ".".join(CALLS[number]).removeprefix("__builtin__.") in str(plain.value)
    assert "\n" not in str(whole.value)
    assert not marker.exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_no_array_calls_anything(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"labels{suffix}"
    array = np.array([[Evil()]], dtype=object)
    if suffix == ".npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, inst_map=array)
    with pytest.raises(SourceError, match="WSI82") as caught:
        LabelReader().read(path)
    assert "\n" not in str(caught.value)


# --- paths and links ---------------------------------------------------------------------------------


def oracle() -> OracleModel:
    return OracleModel(tile=(192, 192), halo=(32, 32))


def slide(path: Path) -> Path:
    tifffile.imwrite(
        path, SLIDE.pixels, tile=(128, 128), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def run(out: Path, name: str = "a.tiff", **more: Any) -> InputRow:
    """Run on an open source, which is read in this process, where the watch sees all."""
    source = wsitk.open_source(SLIDE.pixels, mpp=0.5, name="array")
    (row,) = Runner(oracle(), out, Settings(**PLAIN, **more)).run([Input(name, source)])
    return row


BAD_NAMES = (
    "..",
    ".",
    "../up",
    "a/../../up",
    "/absolute",
    "a\0b",
    "",
    ".wsitk",
    "summary.csv",
    "index.html",
    "run.json",
)


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_no_name_leads_out_of_the_output(tmp_path: Path, name: str) -> None:
    row = run(tmp_path / "out", name)
    assert row.status == "failed"
    assert row.code == "WSI015", row.message
    assert {p.name for p in tmp_path.iterdir()} <= {"out"}


ODD_NAMES = (
    "-rf.tiff", "a b.tiff", "é.tiff", "e\u0301.tiff", "new\nline.tiff", "..tiff", "$(touch owned).tiff", "a'b\".tiff",
    "%2e%2e%2fup.tiff", "x" * 240 + ".tiff", "\u202egnp.tiff", "con.tiff", "a\\..\\b.tiff", "<img src=x>.tiff",
    "\udcff.tiff",
)  # fmt: skip


def test_odd_names_of_files_stay_apart_and_inside(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ODD_NAMES:
        slide(folder / name)
    found = expand_inputs([folder]).items
    names = [item.name for item in found]
    assert len(set(names)) == len(names)
    assert len(names) >= len(ODD_NAMES) - 1  # "..tiff" begins with a dot: hidden
    for name in names:
        place = os.path.normpath(tmp_path / "out" / name)
        assert place.startswith(str(tmp_path / "out") + os.sep)
        assert not os.path.isabs(name)
        assert "\n" not in name
        assert "\0" not in name


LINKS = (
    "a.tiff", "a.tiff/.wsitk", "a.tiff/objects.parquet", "a.tiff/provenance.json", "a.tiff/.objects.parquet.partial",
    "a.tiff/tiles.parquet", "summary.csv", "run.json", "index.html", ".index.html.part",
)  # fmt: skip


def outcome(out: Path) -> str:
    """Return "done", or the code of the refusal, of this input or of the run."""
    try:
        row = run(out)
    except OutputError as error:
        return error.code
    return row.code or row.status


@pytest.mark.parametrize("place", LINKS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str, kind: str) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.write_text("mine")
    link = out / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert outcome(out) in ("done", "WSI502", "WSI511", "WSI512")
    if kind == "file":
        assert target.read_text() == "mine"
    else:
        assert [p.name for p in target.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "listed", ["../../victim", "/etc/hostname", "objects.parquet/../../../victim", "victim", "/dev/zero"]
)
def test_a_forged_record_neither_removes_nor_reads_what_lies_elsewhere(tmp_path: Path, listed: str) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    assert run(out).status == "done"
    victim.write_text("mine")
    (out / "a.tiff" / "victim").write_text("mine")
    record = out / "a.tiff" / "provenance.json"
    content = json.loads(record.read_text())
    content["outputs"][listed] = "0" * 64
    record.write_text(json.dumps(content))
    from wsitk.seal import results_intact, seal_of

    (out / "a.tiff" / ".wsitk" / "seal.json").write_bytes(seal_of("a.tiff", record.read_bytes()))
    assert not results_intact(out / "a.tiff", "a.tiff")
    assert not verify(out).ok
    assert run(out, overwrite=True).status == "done"
    assert victim.read_text() == (out / "a.tiff" / "victim").read_text() == "mine"


@pytest.mark.parametrize("weights", ["../secret", "/etc/passwd", "a/../../secret", "..", ""])
def test_a_card_names_no_weights_elsewhere(tmp_path: Path, weights: str) -> None:
    from test_model_folder import FEW, write_folder

    folder = write_folder(tmp_path / "m", FEW)
    card = folder / "card.toml"
    card.write_text(card.read_text().replace('"model.safetensors"', json.dumps(weights)))
    with pytest.raises(ModelError, match=r"WSI314.*weights"):
        wsitk.load_model(folder)


@pytest.mark.parametrize("name", ["../../owned/data.pkl", "/owned/data.pkl", "a/../../../data.pkl"])
def test_members_of_an_archive_are_never_unpacked(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr(name, pickle.dumps({}))
        archive.writestr("../../../owned", b"x")
    with pytest.raises(ModelError, match="WSI30"):
        read_tensors(tmp_path / "m.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


# --- XML ---------------------------------------------------------------------------------------------

LAUGHS = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(12)
) + "]>"  # fmt: skip
OUTSIDE = (
    '<!DOCTYPE x [<!ENTITY secret SYSTEM "file:///etc/passwd"><!ENTITY % p SYSTEM "http://192.0.2.1/x">%p;]>'
)
PIXELS = (
    '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0" Name="{}"><Pixels '
    'ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="300" SizeY="260" SizeC="3" SizeZ="1" '
    'SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">'
    '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
)


def opened(path: Path) -> str:
    """Return everything that a slide says of itself, or why it is refused."""
    try:
        with wsitk.open_source(path) as source:
            return repr((source.name, source.channel_names, source.warnings, source.spacing_error))
    except SourceError as error:
        return str(error)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + PIXELS.format("&m;"),
        OUTSIDE + PIXELS.format("&secret;"),
        "<OME>" * 200_000,
        PIXELS.format("x" * 10**7),
    ],
    ids=["a billion laughs", "entities from outside", "a deep nest", "ten megabytes"],
)
def test_no_xml_expands_or_fetches(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    path = tmp_path / "a.ome.tiff"
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    tifffile.imwrite(
        path, SLIDE.pixels, tile=(128, 128), photometric="rgb", metadata=None, description=(head + text).encode(),
    )  # fmt: skip
    said = opened(path)
    assert len(said) < 2000
    assert "root:" not in said


# --- what expands ------------------------------------------------------------------------------------


def bomb(length: int) -> bytes:
    """Return `length` zeros, deflated piece by piece."""
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(length >> 20)) + squeeze.flush()


def test_a_tile_gives_what_was_declared_and_no_more(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.tiff"
    tile = bomb(256 << 20)
    tifffile.imwrite(
        path, iter([tile] * 9), shape=(260, 300, 3), dtype=np.uint8, tile=(128, 128), photometric="rgb",
        compression="adobe_deflate", resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    tracemalloc.start()
    with wsitk.open_source(path) as source, pytest.raises(SourceError, match="WSI111"):
        source.read(wsitk.Region((0, 0), (260, 300)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    "content", [b"[" * 10, b" ", b'{"type":"FeatureCollection","features":[' + b"0," * 100]
)
def test_a_drawing_that_expands_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(content * (20_000_000 // len(content)), 9))
    assert path.stat().st_size < 200_000
    with pytest.raises(UsageError, match="WSI014"):
        artifacts_from_geojson(path, ArraySource(np.zeros((64, 64, 3), np.uint8), axes="yxc"))
    with pytest.raises(UsageError, match="WSI014"):
        from_geojson(str(path), (64, 64), (1.0, 1.0))


def test_arrays_that_claim_what_they_do_not_hold(tmp_path: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 8), }"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("inst_map.npy", data)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(SourceError, match="WSI8"):
            LabelReader().read(tmp_path / name)


def test_an_image_whose_text_expands(tmp_path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(SLIDE.pixels).save(buffer, "PNG")
    whole = buffer.getvalue()
    chunk = b"zTXtComment\0\0" + bomb(64 << 20)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])
    with wsitk.open_source(tmp_path / "a.png") as source:
        assert np.array_equal(source.read(wsitk.Region((0, 0), (260, 300))), SLIDE.pixels)


# --- pages -------------------------------------------------------------------------------------------

INJECTED = (
    "<img src=x onerror=alert(1)>",
    "</title><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "javascript:alert(1)",
)


class Elements(HTMLParser):
    """Collects the elements of a page, and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", INJECTED)
def test_a_page_shows_names_as_text(tmp_path: Path, text: str) -> None:
    out = tmp_path / text.replace("/", "∕")
    out.mkdir()
    (out / "in").mkdir()
    row = InputRow(
        input=text, status=text, code=text, message=text, tissue_mm2=1.0, spacing_um=0.5, objects={text: 3}
    )
    write_contact_sheet(out, [row])
    page = Elements()
    page.feed((out / "index.html").read_text("utf-8"))
    assert {tag for tag, _ in page.found} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "main", "article", "small", "b", "a", "img",
    }  # fmt: skip
    for tag, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src"):
            assert not str(attributes.get(name, "")).lower().startswith(("javascript:", "data:", "http"))
        assert tag != "img" or attributes.get("src") != "x"
    assert any("default-src 'none'" in str(a.get("content")) for _, a in page.found)
