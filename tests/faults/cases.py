"""The corpus: what is damaged how, and what must come of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from faults.bases import SQUARE
from faults.mutations import (
    Mutation,
    append,
    cut,
    directory,
    drop,
    link,
    loop_of_ifds,
    nothing,
    overwrite,
    pipe,
    replace,
    spoil_tile,
    tag,
    tags,
    tile,
    vanish,
    write,
)  # fmt: skip

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A base file, what is done to it, and the code and words that must come of using it.

    `code` is a regular expression of what may come: "ok", "absent" (pixels that the file does not hold), "other"
    (no brightfield image), or a code; `words` one that the message must match. `row` is the row of the catalogue
    in the reliability dossier.
    """

    name: str
    base: str
    mutate: Mutation
    code: str
    words: str = ""
    row: int = 0
    use: str = "slide"
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


TIFFS = ("plain.tiff", "deflate.tiff", "lzw.tiff", "jpeg.tiff", "jpeg2000.tiff", "zstd.tiff", "webp.tiff", "big.tiff",
         "slide.svs", "scan.ome.tiff")  # fmt: skip


GIVE_MPP = "give it, e.g. --mpp 0.25"
GIVE_TRUE = "give the true size, e.g. --mpp 0.25"
NO_READER = "no reader takes it"
COPY = "copy it again"


def _sound() -> Iterator[Case]:
    for base in TIFFS:
        yield Case(f"{base} as it is", base, nothing, "ok")


def _cut() -> Iterator[Case]:
    """Row 1: what is cut short is said to be so, never to lack a pixel size."""
    for base in TIFFS:
        yield Case(f"{base} cut to nothing", base, cut(0), "WSI102", "is empty", 1)
        yield Case(f"{base} cut within its first bytes", base, cut(4), "WSI101", "no reader takes it", 1)
        yield Case(
            f"{base} cut to a third", base, cut(0.3), "WSI102", "file ends at [0-9,]+ bytes.*copy it again", 1
        )
        if base != "scan.ome.tiff":
            yield Case(f"{base} cut by a tenth", base, cut(0.9), "WSI102", "file ends at [0-9,]+ bytes", 1)


def _tiles() -> Iterator[Case]:
    """Rows 2 to 4, 11: what the file does not hold is absent, what can't be decoded says where it lies."""
    for base in ("plain.tiff", "jpeg.tiff", "slide.svs", "scan.ome.tiff", "big.tiff"):
        yield Case(f"{base} tile not in the file", base, tile(7, offset=0, length=0), "absent", row=2)
        yield Case(f"{base} tile of no length", base, tile(7, length=0), "absent", row=3)
        yield Case(
            f"{base} tile beyond the end",
            base,
            tile(7, offset=2**31 - 5),
            "WSI102",
            r"tile \(1,2\) of level 0",
            1,
        )
    for base in ("jpeg.tiff", "slide.svs", "big.tiff"):
        yield Case(f"{base} tile of 2 GB", base, tile(7, length=2**31 - 5), "WSI102", r"tile \(1,2\)", 11)
    for base in ("deflate.tiff", "lzw.tiff", "jpeg.tiff", "big.tiff", "slide.svs", "scan.ome.tiff"):
        yield Case(f"{base} tile spoiled", base, spoil_tile(), "WSI111", r"level 0 tile \(1,2\)", 4)
    for base in TIFFS[1:]:
        spoil = spoil_tile(at=0, count=10**6, value=0)
        yield Case(f"{base} tile of zeros", base, spoil, "WSI111", r"level 0 tile \(1,2\)", 4)


def _spacing() -> Iterator[Case]:
    """Rows 5 and 6: a pixel size that is missing or can't be true is refused, with the way to give it."""
    yield Case("no resolution at all", "bare.tiff", nothing, "WSI201", GIVE_MPP, 5)
    yield Case("no resolution, given by hand", "bare.tiff", nothing, "ok", "", 5, options={"mpp": 0.5})
    for value in (-1.0, 0.0, 1e6, float("nan"), float("inf")):
        yield Case(
            f"--mpp {value}",
            "plain.tiff",
            nothing,
            "WSI202",
            f"--mpp says.*{GIVE_TRUE}",
            6,
            options={"mpp": value},
        )
    for name, value, code in (
        ("zero over zero", (0, 0), "WSI201"), ("zero", (0, 1), "WSI201"), ("one over zero", (1, 0), "WSI201"),
        ("huge", (2**32 - 1, 1), "WSI202"), ("tiny", (1, 2**32 - 1), "WSI202"),
    ):  # fmt: skip
        yield Case(
            f"resolution {name}",
            "plain.tiff",
            tags(tag(282, value), tag(283, value)),
            code,
            "XResolution.*--mpp",
            6,
        )
    yield Case(
        "resolution differs in x and y",
        "plain.tiff",
        tag(282, (40000, 1)),
        "WSI202",
        r"axes differ by 100\.0%",
        6,
    )
    yield Case(
        "resolution in inches that are centimetres",
        "plain.tiff",
        tag(296, 2),
        "WSI203",
        "enlarging 2.54 times",
        6,
    )
    yield Case("resolution without unit", "plain.tiff", tag(296, 1), "WSI201", GIVE_MPP, 5)
    yield Case("resolution of an unknown unit", "plain.tiff", tag(296, 9), "WSI201", GIVE_MPP, 5)
    for said, code in (
        ("MPP = 0.0", "WSI202"), ("MPP = 250", "WSI202"), ("MPP = nan", "WSI202"), ("MPP = inf", "WSI202"),
        ("MPP = -.5", "WSI202"), ("MPP = abc", "WSI202"), ("MPP = 0,5", "ok"), ("MPQ = 0.5", "ok"),
    ):  # fmt: skip
        words = GIVE_TRUE if code == "WSI202" else ""
        yield Case(f"Aperio says {said}", "slide.svs", replace(b"MPP = 0.5", said.encode()), code, words, 6)
    for size in ("0.0", "-.5", "nan", "1e9", "9.5", "x.5"):
        change = replace(b'PhysicalSizeX="0.5"', f'PhysicalSizeX="{size}"'.encode())
        yield Case(
            f"OME says {size}", "scan.ome.tiff", change, "WSI202", f"PhysicalSizeX says.*{GIVE_TRUE}", 6
        )


def _headers() -> Iterator[Case]:
    """Rows 7 to 11: sizes that can't be, kinds that aren't read."""
    ocean = tags(tag(256, 2**31 - 1, dtype=4), tag(257, 2**31 - 1, dtype=4))
    large = tags(tag(322, 32768), tag(323, 32768))
    bomb = tags(tag(322, 131072, dtype=4), tag(323, 131072, dtype=4))
    first = "level 0 tile"
    for name, base, change, code, words, row in (
        ("pages in a circle", "plain.tiff", loop_of_ifds, "WSI115", "lead back", 10),
        ("width of 2^31", "plain.tiff", tag(256, 2**31 - 1, dtype=4), "WSI141", "limit 512", 10),
        ("2^31 squared", "plain.tiff", ocean, "WSI140", r"4\.61e\+18 pixels", 10),
        ("width of nothing", "plain.tiff", tag(256, 0), "WSI1(01|30)", "", 10),
        ("no width", "plain.tiff", drop(256), "WSI1(01|30)", "", 10),
        ("wider than its tiles", "plain.tiff", tag(256, 6400), "absent", "", 10),
        ("a tile of 32768 pixels", "deflate.tiff", large, "WSI141", "limit is 268435456", 11),
        ("a tile of 16 Gpx", "jpeg.tiff", bomb, "WSI141", "limit is 268435456", 11),
        ("a tile of no width", "plain.tiff", tag(322, 0), "WSI101", NO_READER, 10),
        ("a tile larger than its bytes", "plain.tiff", tag(322, 256), "WSI1(01|11)", "", 10),
        ("tiles without places", "plain.tiff", drop(324), "WSI101", NO_READER, 10),
        ("tiles without lengths", "plain.tiff", drop(325), "WSI10[12]", "", 10),
        ("compression 2", "plain.tiff", tag(259, 2), "WSI1(01|11)", "", 9),
        ("compression 9999", "plain.tiff", tag(259, 9999), "WSI101", "compression 9999 has no decoder here", 9),
        ("compression 0", "plain.tiff", tag(259, 0), "WSI101", "compression 0 has no decoder here", 9),
        ("compression 50002, JPEG XL", "plain.tiff", tag(259, 50002), "WSI101", "compression 50002 has no decoder", 9),
        ("compression 50001, WebP that isn't", "plain.tiff", tag(259, 50001), "WSI111", f"{first}.*not a WebP", 9),
        ("compression 34925, LZMA that isn't", "plain.tiff", tag(259, 34925), "WSI111", first, 9),
        ("JPEG said to be deflate", "jpeg.tiff", tag(259, 8), "WSI111", first, 9),
        ("deflate said to be JPEG", "deflate.tiff", tag(259, 7), "WSI111", first, 9),
        ("predictor 77", "deflate.tiff", tag(317, 77), "WSI111", first, 9),
        ("16 bits that are 8", "plain.tiff", tag(258, (16, 16, 16)), "WSI111", first, 8),
        ("bits of 0", "plain.tiff", tag(258, (0, 0, 0)), "WSI101", NO_READER, 8),
        ("bits of 64", "plain.tiff", tag(258, (64, 64, 64)), "WSI111", first, 8),
        ("4 samples that are 3", "plain.tiff", tag(277, 4), "WSI1(01|11)", "", 8),
        ("65535 samples", "plain.tiff", tag(277, 65535), "WSI1(01|41)", "", 8),
        ("no samples", "plain.tiff", tag(277, 0), "WSI101", NO_READER, 8),
        ("first page beyond the end", "plain.tiff", overwrite(4, struct.pack("<I", 2**31)), "WSI102", COPY, 1),
        ("first page is the header", "plain.tiff", overwrite(4, struct.pack("<I", 0)), "WSI101", NO_READER, 1),
        ("version 44", "plain.tiff", overwrite(2, struct.pack("<H", 44)), "WSI101", "not a TIFF", 1),
        ("level 1 of another shape", "plain.tiff", tag(257, 100, page=1), "ok|WSI120", "", 7),
        ("level 1 of nothing", "plain.tiff", tag(256, 0, page=1), "ok|WSI120", "", 7),
        ("text behind the end", "plain.tiff", append(b"hello" * 99), "ok", "", 1),
    ):  # fmt: skip
        yield Case(name, base, change, code, words, row)
    for base in ("planar", "alpha", "palette", "white", "cmyk", "strips"):
        yield Case(f"a slide that is {base}", f"{base}.tiff", nothing, "ok", "", 8)
    for base in ("grey", "deep", "float", "bits"):
        yield Case(f"a slide that is {base}", f"{base}.tiff", nothing, "other", "", 8)


def _others() -> Iterator[Case]:
    """Rows 26, 28 to 30: what is no slide at all, and what lies in the place of one."""
    texts: dict[str, bytes] = {
        "a web page": b"<!doctype html><html><body>404 Not Found</body></html>",
        "text": b"slide, please\n" * 50,
        "a ZIP": b"PK\3\4" + bytes(100),
        "a program": b"\x7fELF" + bytes(100),
        "a pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "zeros": bytes(5000),
        "a PDF": b"%PDF-1.7\n" + bytes(200),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(200),
    }
    for name, data in texts.items():
        yield Case(f"{name} by the name of a slide", "slide.svs", write(data), "WSI101", NO_READER, 26)
    for name, change, words in (
        ("no file", vanish, "No such file"),
        ("a folder", directory, "Is a directory"),
        ("a link to nowhere", link("gone.svs"), "No such file"),
        ("a link to itself", link("slide.svs"), "Too many levels of symbolic links"),
        ("a link to zeros without end", link("/dev/zero"), "device"),
        ("a link to nothing", link("/dev/null"), "device"),
        ("a pipe", pipe, "pipe"),
    ):
        yield Case(name, "slide.svs", change, "WSI100", words, 29)
    yield Case("an unknown reader", "slide.svs", nothing, "WSI022", "no reader", options={"reader": "magic"})
    yield Case("another reader", "slide.svs", nothing, "WSI101", "not a NIfTI", options={"reader": "nifti"})


def _images() -> Iterator[Case]:
    """Plain images: cut, spoiled, and bombs."""
    given = {"mpp": 0.5}
    for base, half, spoiled in (
        ("image.png", "WSI101", "WSI101"), ("image.jpg", "WSI102", "WSI102"), ("image.jp2", "WSI102", "ok"),
    ):  # fmt: skip
        yield Case(f"{base} without pixel size", base, nothing, "WSI201", GIVE_MPP, 5)
        yield Case(f"{base} with one", base, nothing, "ok", "", options=given)
        yield Case(f"{base} cut in half", base, cut(0.5), half, "", 1, options=given)
        yield Case(f"{base} cut to 20 bytes", base, cut(20), "WSI101", NO_READER, 1, options=given)
        yield Case(f"{base} spoiled", base, overwrite(400, b"\x5a" * 300), spoiled, "", 4, options=given)
    size = struct.pack(">II", 128, 96)
    for wide, high, code in ((2**31 - 1, 96, "WSI141"), (60000, 60000, "WSI141"), (0, 96, "WSI101")):
        change = replace(size, struct.pack(">II", wide, high))
        yield Case(f"a PNG of {wide} x {high}", "image.png", change, code, "", 11, options=given)
    grown = replace(b"\x00\x60\x00\x80\x03", b"\xff\xff\xff\xff\x03")
    yield Case("a JPEG of 65535 squared", "image.jpg", grown, "WSI141", "limit 512", 11, options=given)


def _volumes() -> Iterator[Case]:
    """Volumes: headers that lie, voxels that are missing or lie elsewhere."""
    for base in ("volume.nii", "volume.nii.gz", "volume.nrrd"):
        yield Case(f"{base} as it is", base, nothing, "ok", use="volume")
        yield Case(f"{base} cut in half", base, cut(0.5), "WSI102", COPY, 1, "volume")
    yield Case("volume.nii cut to 100 bytes", "volume.nii", cut(100), "WSI101", NO_READER, 1, "volume")
    yield Case("volume.nii.gz cut to 100 bytes", "volume.nii.gz", cut(100), "WSI101", NO_READER, 1, "volume")
    yield Case(
        "volume.nrrd cut to 100 bytes", "volume.nrrd", cut(100), "WSI115", "damaged NRRD header", 1, "volume"
    )
    for name, offset, data, code, words in (
        ("dimensions of 0", 40, struct.pack("<8h", *[0] * 8), "WSI115", "dimensions"),
        ("9 dimensions", 40, struct.pack("<h", 9), "WSI115", "dimensions"),
        ("negative sizes", 42, struct.pack("<3h", -8, -9, -10), "WSI115", "dimensions"),
        ("sizes of 32767", 42, struct.pack("<3h", *[32767] * 3), "WSI140", "claims"),
        ("a type that isn't", 70, struct.pack("<h", 7777), "WSI115", "damaged NIfTI header"),
        ("complex numbers", 70, struct.pack("<2h", 32, 64), "WSI118", "save real numbers"),
        ("colour", 70, struct.pack("<2h", 128, 24), "WSI118", "save real numbers"),
        ("pixdim of no size, under an sform", 80, struct.pack("<3f", 0, 0, 0), "ok", ""),
        ("voxels before the header", 108, struct.pack("<f", -4.0), "WSI115", "damaged"),
        ("voxels beyond the end", 108, struct.pack("<f", 1e9), "WSI102", COPY),
        ("another magic", 344, b"ni1\0", "WSI118", "save it as one .nii file"),
    ):
        yield Case(f"NIfTI of {name}", "volume.nii", overwrite(offset, data), code, words, 8, "volume")
    spoiled = overwrite(300, b"\x5a" * 60)
    yield Case("NIfTI with spoiled gzip", "volume.nii.gz", spoiled, "WSI116", COPY, 4, "volume")
    axes = b"(1,0,0) (0,1,0) (0,0,2)"
    for name, old, new, code, words in (
        ("sizes of 0", b"sizes: 6 5 4", b"sizes: 0 0 0", "WSI101", "the file is damaged"),
        ("sizes that are words", b"sizes: 6 5 4", b"sizes: a b c", "WSI115", "damaged NRRD header"),
        ("negative sizes", b"sizes: 6 5 4", b"sizes: -6 5 ", "WSI115", "2 sizes for 3 dimensions"),
        ("too few sizes", b"sizes: 6 5 4", b"sizes:9999 9", "WSI115", "2 sizes for 3 dimensions"),
        ("an unknown type", b"type: short\n", b"type: banan\n", "WSI118", "save real numbers"),
        ("blocks", b"type: short\n", b"type: block\n", "WSI118", "save real numbers"),
        ("an unknown encoding", b"encoding: raw", b"encoding: rot", "WSI118", "save it as raw or gzip"),
        ("gzip that isn't", b"encoding: raw", b"encoding: gz ", "WSI116", COPY),
        ("no directions", axes, b"(0,0,0) (0,0,0) (0,0,0)", "WSI115", "one plane"),
        ("directions of no number", axes, b"(nan,0,0) (0,1,0)(0,0,2", "WSI115", "damaged NRRD header"),
    ):
        yield Case(f"NRRD of {name}", "volume.nrrd", replace(old, new), code, words, 8, "volume")
    for name, other, code in (
        ("voxels elsewhere", "/etc/passwd", "WSI121"), ("voxels above", "../../secret.raw", "WSI121"),
        ("a list of files", "LIST\n/etc/passwd", "WSI11[58]"),
    ):  # fmt: skip
        yield Case(f"NRRD of {name}", "volume.nrrd", _elsewhere(other), code, "", 28, "volume")


def _elsewhere(name: str) -> Mutation:
    """Let an NRRD name another file for its voxels."""

    def mutate(path: Path) -> None:
        header = path.read_bytes().split(b"\n\n")[0]
        path.write_bytes(header + f"\ndata file: {name}\n\n".encode())

    return mutate


def _drawings() -> Iterator[Case]:
    """Row 36: drawings from anyone."""
    yield Case("drawing as it is", "regions.geojson", nothing, "ok", use="drawing")
    good = {"type": "Polygon", "coordinates": [SQUARE]}
    for name, value in {
        "nothing": "", "half a file": '{"type":"FeatureCollection","features":[', "a number": "5", "null": "null",
        "points": {"type": "Point", "coordinates": [1, 2]},
        "an empty collection": {"type": "FeatureCollection", "features": []},
        "a deep nest": "[" * 100_000, "a deep nest of collections": '{"geometries":[' * 50_000,
        "words for numbers": {"type": "Polygon", "coordinates": [[["a", "b"], ["c", "d"], ["e", "f"]]]},
        "coordinates of no number": '{"type":"Polygon","coordinates":[[[0,0],[NaN,5],[5,5]]]}',
        "coordinates of endless size": '{"type":"Polygon","coordinates":[[[0,0],[1e999,5],[5,5]]]}',
        "a polygon without coordinates": {"type": "Polygon"},
        "a ring of one corner": {"type": "Polygon", "coordinates": [[[1, 2]]]},
        "a ring that is no list": {"type": "Polygon", "coordinates": [7]},
        "not UTF-8": b"\xff\xfe\x00{",
    }.items():  # fmt: skip
        data = value if isinstance(value, str | bytes) else json.dumps(value)
        yield Case(
            f"a drawing of {name}", "regions.geojson", write(data), "WSI014", "regions|export", 36, "drawing"
        )
    yield Case("a bare polygon", "regions.geojson", write(json.dumps(good)), "ok", "", 36, "drawing")
    yield Case("no drawing", "regions.geojson", vanish, "WSI014", "No such file", 36, "drawing")


def _checkpoints() -> Iterator[Case]:
    """Rows 23 to 25: checkpoints cut, spoiled, or something else."""
    for base in ("weights.pth", "weights.safetensors"):
        yield Case(f"{base} as it is", base, nothing, "ok", use="checkpoint")
        yield Case(f"{base} cut to nothing", base, cut(0), "WSI303", "it is empty", 25, "checkpoint")
        yield Case(f"{base} cut in half", base, cut(0.5), "WSI303", "download it again", 25, "checkpoint")
        yield Case(f"{base} cut by a byte", base, cut(-1), "WSI303", "download it again", 25, "checkpoint")
        yield Case(
            f"{base} is a web page",
            base,
            write("<html>rate limited</html>"),
            "WSI303",
            "download it again",
            25,
            "checkpoint",
        )
        yield Case(f"{base} is gone", base, vanish, "WSI303", "No such file", 25, "checkpoint")
        yield Case(f"{base} is a folder", base, directory, "WSI303", "Is a directory", 25, "checkpoint")
    yield Case(
        "a header of 2^60 bytes",
        "weights.safetensors",
        overwrite(0, struct.pack("<Q", 2**60)),
        "WSI303",
        "download it again",
        25,
        "checkpoint",
    )
    yield Case(
        "a header that is no JSON",
        "weights.safetensors",
        overwrite(8, b"\xff\xff"),
        "WSI303",
        "download it again",
        25,
        "checkpoint",
    )
    yield Case(
        "a tensor larger than the file",
        "weights.safetensors",
        replace(b"[3,4]", b"[9,9]"),
        "WSI303",
        "download it again",
        25,
        "checkpoint",
    )
    yield Case(
        "a pickle that calls",
        "weights.pth",
        write(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."),
        "WSI302",
        "posix.system.*nothing of it was run",
        24,
        "checkpoint",
    )


CASES: tuple[Case, ...] = (
    *_sound(), *_cut(), *_tiles(), *_spacing(), *_headers(), *_others(), *_images(), *_volumes(),
    *_drawings(), *_checkpoints(),
)  # fmt: skip
"""Every case, in the order of the families above."""
