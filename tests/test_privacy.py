"""Canaries: what a file says of people and labels never reaches the output; with --anonymize, no name does."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from typer.testing import CliRunner
from volume_data import oblique, save_nifti, save_series

import wsitk
from wsitk.anonymous import (
    Redaction,
    Veil,
    discreet,
    is_pseudonym,
    pseudonym,
    veiled_record,
    veiled_stamp,
    write_table,
)
from wsitk.errors import OutputError, SourceError, UsageError
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.settings import Settings
from wsitk.sources.base import SourceRef
from wsitk.testing import ConstantModel, OracleModel, SyntheticSlide
from wsitk.verify import verify

CANARY = "Kanarienvogel"
"""With a number behind it, so that a find says what leaked."""

LABEL = (255, 0, 254)
"""A colour that no tissue and no layer of a picture has: that of the slide's label."""

PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "workers": 1, "device": "cpu"}


def slide(path: Path) -> Path:
    """Write an Aperio slide with a canary in every place where scanners leave names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = SyntheticSlide.make((420, 460), count=60, seed=5).pixels
    said = [f"{key} = {CANARY}{k:02d}" for k, key in enumerate(_APERIO)]
    head = f"Aperio Image Library v1.0 {CANARY}90\r\n460x420 [0,0 460x420] (128x128) Raw"
    description = "|".join([head, "AppMag = 20", "MPP = 0.5", *said])
    tags = [(code, "s", 0, f"{CANARY}{30 + k:02d}", True) for k, code in enumerate(_TEXT_TAGS)]
    thumb = np.full((42, 46, 3), 200, np.uint8)
    label = np.full((40, 40, 3), LABEL, np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(
            pixels, tile=(128, 128), photometric="rgb", description=description, metadata=None, software=f"{CANARY}40",
            extratags=tags,
        )  # fmt: skip
        file.write(
            thumb, photometric="rgb", description=f"Aperio thumbnail |User = {CANARY}50", metadata=None
        )
        for k, name in enumerate(("label", "macro")):
            file.write(
                label, photometric="rgb", subfiletype=1 if name == "label" else 9, metadata=None,
                description=f"Aperio Image Library v1.0\r\n{name} 40x40 {CANARY}{60 + k}",
            )  # fmt: skip
    return path


_APERIO = (
    "Filename",
    "Title",
    "User",
    "Barcode",
    "ScanScope ID",
    "ImageID",
    "Slide",
    "Patient",
    "Date",
    "DSR ID",
)
_TEXT_TAGS = (
    269,
    271,
    272,
    285,
    315,
    316,
    33432,
    65_100,
)  # document, make, model, page, artist, host, copyright


# --- reading a tree to the last byte ---------------------------------------------------------------------


def said_in(root: Path) -> dict[str, bytes]:
    """Return everything that a tree says, unpacked: files by their place, and the places themselves."""
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root).as_posix()
        found[f"name of {place}"] = place.encode()
        if path.is_file():
            found[place] = path.read_bytes() + _unpacked(path)
        elif path.name.endswith(".zarr"):
            found[f"arrays of {place}"] = _arrays(path)
    return found


def _unpacked(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return repr((table.schema.metadata, table.to_pydict())).encode()
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return repr(picture.info).encode() + np.asarray(picture).tobytes()
    return b""


def _arrays(path: Path) -> bytes:
    group = zarr.open_group(str(path), mode="r")
    parts = [np.ascontiguousarray(array[...]).tobytes() for _, array in sorted(group.arrays())]
    return b"".join([repr(dict(group.attrs)).encode(), *parts])


def finds(root: Path, *words: str) -> list[str]:
    """Return where any of the words stands, in any case and in the usual encodings."""
    spelled = [w.encode(code).lower() for w in words for code in ("utf-8", "utf-16-le", "utf-16-be")]
    return [place for place, data in said_in(root).items() if any(w in data.lower() for w in spelled)]


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "a.gz").write_bytes(gzip.compress(f"x {CANARY}".encode()))
    pq.write_table(pa.table({"reason": [CANARY] * 2000}), tmp_path / "b.parquet", compression="zstd")
    zarr.create_array(str(tmp_path / "c.zarr/0"), data=np.frombuffer(CANARY.encode() * 400, np.uint8).copy())
    zarr.open_group(str(tmp_path / "c.zarr"), mode="a")
    (tmp_path / f"{CANARY}.txt").write_text("")
    places = finds(tmp_path, CANARY)
    assert len(places) >= 4
    assert {p.split(".")[0][-1] for p in places if "name of" not in p} >= {"a", "b", "c"}


# --- what files say of people ----------------------------------------------------------------------------


def run(source: Path, out: Path, **more: Any) -> None:
    wsitk.run(OracleModel(tile=(128, 128), halo=(32, 32)), source, out=out, **{**PLAIN, **more})


def test_a_slide_s_words_and_pictures_stay_in_it(tmp_path: Path) -> None:
    path = slide(tmp_path / "slides/a.svs")
    assert path.read_bytes().count(CANARY.encode()) >= 22
    run(path, tmp_path / "out")
    assert (tmp_path / "out/a.svs/preview.png").is_file()
    assert finds(tmp_path / "out", CANARY) == []
    with Image.open(tmp_path / "out/a.svs/preview.png") as picture:
        assert not (np.asarray(picture) == LABEL).all(axis=2).any()


def plain_png(path: Path, pixels: np.ndarray) -> None:
    from PIL.PngImagePlugin import PngInfo

    words = PngInfo()
    for k, key in enumerate(("Title", "Author", "Comment")):
        words.add_text(key, f"{CANARY}{k}")
    words.add_itxt("XML:com.adobe.xmp", f"<x>{CANARY}9</x>")
    Image.fromarray(pixels).save(path, pnginfo=words)


def plain_jpeg(path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    for tag in (270, 271, 305, 315, 33432):
        exif[tag] = f"{CANARY}{tag}"
    Image.fromarray(pixels).save(path, exif=exif, comment=f"{CANARY}1", quality=95)


def ome_tiff(path: Path, pixels: np.ndarray) -> None:
    metadata = {
        "axes": "YXS",
        "Name": f"{CANARY}1",
        "Description": f"{CANARY}2",
        "AcquisitionDate": "2020-01-01T00:00:00",
        "PhysicalSizeX": 0.5,
        "PhysicalSizeY": 0.5,
        "MapAnnotation": {"Value": {"Patient": f"{CANARY}3"}},
    }
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, tile=(128, 128), photometric="rgb", metadata=metadata)


@pytest.mark.parametrize("write", [plain_png, plain_jpeg, ome_tiff])
def test_words_of_other_images_stay_in_them(write: Any, tmp_path: Path) -> None:
    path = tmp_path / {"plain_png": "a.png", "plain_jpeg": "a.jpg"}.get(write.__name__, "a.ome.tiff")
    write(path, SyntheticSlide.make((420, 460), count=60, seed=5).pixels)
    assert CANARY.encode() in path.read_bytes()
    wsitk.run(ConstantModel(channels=("a",)), path, out=tmp_path / "out", spacing=0.5, **PLAIN)
    assert (tmp_path / f"out/{path.name}/provenance.json").is_file()
    assert finds(tmp_path / "out", CANARY) == []


def test_nobody_asks_for_associated_images() -> None:
    """OpenSlide opens them when asked only; no module of the engine, and no model, asks."""
    root = Path(wsitk.__file__).parents[1]
    for folder in ("wsitk", "models", "cli"):
        for file in (root / folder).rglob("*.py"):
            assert ".associated_images" not in file.read_text(encoding="utf-8"), file


def volume(path: Path) -> np.ndarray:
    z, y, x = np.indices((20, 24, 40)).astype(float)
    return np.rint(600 * np.sin(z / 3) * np.cos(x / 6) + 5 * y).astype(np.int16)


def run_volume(source: Path, out: Path, **more: Any) -> None:
    item = Input("scan", str(source))
    chosen = Settings(threads=1, workers=1, device="cpu", supervise=False, **more)
    (row,) = Runner(ModelRef("volume_models:organs"), out, chosen).run([item])
    assert row.status == "done", row.message


def test_a_nifti_header_s_words_stay_in_it(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    save_nifti(path, volume(path), descrip=f"{CANARY}01", aux_file=f"{CANARY}02", intent_name=f"{CANARY}3")
    assert gzip.decompress(path.read_bytes()).count(CANARY.encode()) == 3
    run_volume(path, tmp_path / "out")
    assert (tmp_path / "out/scan/labels.nii.gz").is_file()
    assert finds(tmp_path / "out", CANARY) == []


def series(folder: Path) -> Path:
    def mark(item: Dataset, z: int) -> None:
        item.PatientName, item.PatientID = f"{CANARY}01^X", f"{CANARY}02"
        item.ReferringPhysicianName, item.AccessionNumber = f"{CANARY}03^Y", CANARY
        item.InstitutionName, item.StudyDescription = f"{CANARY}05", f"{CANARY}06"
        item.PatientComments, item.OperatorsName = f"{CANARY}07", f"{CANARY}08"

    return save_series(folder, volume(folder), oblique(), mark)


def test_dicom_s_patient_is_in_the_segmentation_only(tmp_path: Path) -> None:
    """A DICOM SEG belongs to a patient and a study, as the standard wants it; nothing else names them."""
    path = series(tmp_path / "series")
    run_volume(path, tmp_path / "out")
    assert finds(tmp_path / "out", CANARY) == ["scan/labels.dcm"]


def test_anonymous_dicom_names_no_patient(tmp_path: Path) -> None:
    path = series(tmp_path / "Mustermann_Erika")
    run_volume(path, tmp_path / "out", anonymize=True)
    (folder,) = [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert is_pseudonym(folder.name)
    assert (folder / "labels.nii.gz").is_file()
    assert not (folder / "labels.dcm").exists()
    assert finds(tmp_path / "out", CANARY, "Mustermann", "Erika", "001.dcm") == []


# --- names ---------------------------------------------------------------------------------------------------

NAMES = ("Mustermann", "Erika", "B-4711")


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of slides whose names, and whose folder's, tell who they are of; one is damaged."""
    root = tmp_path_factory.mktemp("archive") / "Station Mustermann"
    slide(root / "Erika/B-4711 Mustermann.svs")
    slide(root / "Erika/B-4711 Kontrolle.svs")
    damaged = root / "B-4711_damaged Erika.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n" + b"Erika" * 40)
    return root


def test_an_anonymous_run_tells_no_name(ward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsitk.cli.main import app

    out, table = tmp_path / "out", tmp_path / "who.csv"
    arguments = ["run", "dying:oracle", str(ward), "-o", str(out), "--tissue", "none", "--workers", "1"]
    arguments += ["--threads", "1", "--device", "cpu", "--anonymize", "--anonymize-table", str(table)]
    monkeypatch.setattr("sys.argv", ["wsitk", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output  # the damaged one
    assert finds(out, *NAMES, CANARY, str(ward.parent)) == []
    for name in (*NAMES, CANARY):
        assert name.lower() not in done.output.lower()

    with open(out / "summary.csv", newline="") as file:
        rows = {r["input"]: r for r in csv.DictReader(file)}
    assert len(rows) == 3
    assert all(is_pseudonym(name) for name in rows)
    assert sorted(r["status"] for r in rows.values()) == ["done", "done", "failed"]
    with open(table, newline="") as file:
        known = {r["pseudonym"]: r for r in csv.DictReader(file)}
    assert known.keys() == rows.keys()
    assert {Path(r["path"]).name for r in known.values()} == {p.name for p in ward.rglob("*.*")}
    assert all(os.path.exists(r["path"]) for r in known.values())
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    for name, row in rows.items():
        if row["status"] == "done":
            record = json.loads((out / name / "provenance.json").read_text())
            assert record["input"]["name"] == name
    assert verify(out).ok

    before = {p: p.read_bytes() for p in out.rglob("objects.parquet")}
    again = CliRunner().invoke(app, [*arguments, "--no-supervise"])  # finished inputs are known again
    assert again.exit_code == 1
    assert {p: p.read_bytes() for p in out.rglob("objects.parquet")} == before


def test_an_interrupted_run_tells_no_name(ward: Path, tmp_path: Path) -> None:
    """What lies in `.wsitk` before the results are made: key, files seen, blocks."""
    source = ward / "Erika/B-4711 Mustermann.svs"
    chosen = Settings(**PLAIN, block=1, anonymize=True, part=(0, 2), supervise=False)
    (row,) = Runner(ModelRef("dying:oracle"), tmp_path / "out", chosen).run([Input(source.name, str(source))])
    assert row.status == "partial"
    assert (tmp_path / "out" / row.input / ".wsitk/seen.json").is_file()
    assert finds(tmp_path / "out", *NAMES, CANARY) == []


def test_results_are_the_same_but_for_names(ward: Path, tmp_path: Path) -> None:
    source = ward / "Erika/B-4711 Mustermann.svs"
    run(source, tmp_path / "plain")
    run(source, tmp_path / "hidden", anonymize=True)
    alias = pseudonym(source.name)
    assert finds(tmp_path / "plain", *NAMES)  # the search would have found them
    assert finds(tmp_path / "hidden", *NAMES) == []
    tables = [
        pq.read_table(tmp_path / p / "objects.parquet") for p in (f"plain/{source.name}", f"hidden/{alias}")
    ]
    assert tables[0].drop_columns("id").equals(tables[1].drop_columns("id"))


def test_an_anonymous_output_takes_no_open_names(ward: Path, tmp_path: Path) -> None:
    source = ward / "Erika/B-4711 Mustermann.svs"
    run(source, tmp_path / "out")
    with pytest.raises(OutputError, match="WSI095"):
        run(source, tmp_path / "out", anonymize=True)
    with wsitk.open_source(source) as opened, pytest.raises(UsageError, match="WSI093"):
        wsitk.run(OracleModel(), opened, out=tmp_path / "other", anonymize=True, **PLAIN)


# --- the pieces ----------------------------------------------------------------------------------------------


def test_pseudonyms_hang_on_name_and_key_alone() -> None:
    assert pseudonym("Erika/a.svs") == pseudonym("Erika/a.svs")
    assert len({pseudonym(n, k) for n in ("a.svs", "b.svs") for k in (b"", b"1" * 16)}) == 4
    assert pseudonym("x.ome.tiff").endswith(".ome.tiff")
    assert re.fullmatch(r"input-[0-9a-f]{16}", pseudonym("scan.Mustermann"))
    assert is_pseudonym(pseudonym("x.nii.gz"))
    assert not is_pseudonym("input-Erika")


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"0123456789abcdef\n")
    (tmp_path / "short").write_bytes(b"secret")
    keyed = Veil(Settings(anonymize=True, anonymize_key=str(tmp_path / "key")), tmp_path)
    assert keyed.name("a.svs") == pseudonym("a.svs", b"0123456789abcdef") != pseudonym("a.svs")
    for name in ("short", "absent"):
        with pytest.raises(UsageError, match="WSI091"):
            Veil(Settings(anonymize=True, anonymize_key=str(tmp_path / name)), tmp_path)
    for more in ({"anonymize_key": str(tmp_path / "key")}, {"anonymize_table": "t.csv"}):
        with pytest.raises(UsageError, match="WSI094"):
            Veil(Settings(**more), tmp_path)


def test_the_table_is_kept_apart_and_grows(tmp_path: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "t.csv"
    out.mkdir()
    write_table(table, {"input-1": ("a", "/x/a")}, out)
    write_table(table, {"input-0": ("ü,b", "/x/b")}, out)
    assert table.read_text().splitlines() == ["pseudonym,name,path", 'input-0,"ü,b",/x/b', "input-1,a,/x/a"]
    for place in (out / "t.csv", out / "deep/t.csv", out):
        with pytest.raises(UsageError, match="WSI090"):
            write_table(place, {}, out)
    (tmp_path / "other.csv").write_text("my,own,notes\n")
    with pytest.raises(OutputError, match="WSI092"):
        write_table(tmp_path / "other.csv", {}, out)
    assert (tmp_path / "other.csv").read_text() == "my,own,notes\n"


WORDS = (
    st.text("abcdefgXYZ-_ ü.", min_size=3, max_size=12)
    .map(str.strip)
    .filter(lambda w: len(w.strip(". ")) > 2)
)


@settings(max_examples=150, deadline=None)
@given(
    WORDS,
    WORDS,
    WORDS,
    st.sampled_from(["{}", "cannot open '{}'", "{}: damaged", "x ({}), y", "a {}/Data0001.dat b"]),
)
def test_no_message_keeps_a_name(folder, stem, patient, frame) -> None:
    path = f"/archive/{folder}/{patient}/{stem}.mrxs"
    hidden = Redaction.of("input-0123456789abcdef.mrxs", [path], [f"{patient}/{stem}.mrxs"])
    for said in (path, f"{stem}.mrxs", stem, f"/archive/{folder}/{patient}/{stem}", f"{patient}/{stem}.mrxs"):
        text = hidden.text(frame.format(said))
        assert f"{stem}.mrxs" not in text
        assert f"/{patient}/" not in text
        assert f"/archive/{folder}" not in text


def test_files_beside_an_input_are_not_named(tmp_path: Path) -> None:
    (tmp_path / "Erika").mkdir()
    (tmp_path / "Erika/Mustermann_raw.gz").write_bytes(b"")
    path = tmp_path / "Erika/scan.nhdr"
    hidden = Redaction.of("input-1", [str(path)])
    assert "Mustermann" not in hidden.text("Mustermann_raw.gz: No such file or directory")
    assert "Erika" not in hidden.text(f"cannot read {tmp_path}/Erika/Mustermann_raw.gz: damaged")


def test_what_goes_wrong_in_the_reader_is_discreet() -> None:
    ref = SourceRef("/archive/Erika/a b.svs", {"name": pseudonym("a b.svs")})
    with pytest.raises(SourceError, match="WSI111") as told, discreet((ref,)):
        raise SourceError("WSI111", "tile (1, 2): cannot open /archive/Erika/a b/Data.dat")
    assert "Erika" not in str(told.value)
    assert told.value.__cause__ is None
    with pytest.raises(RuntimeError) as other, discreet(("x", ref)):
        raise ValueError("/archive/Erika/a b.svs is odd")
    assert "Erika" not in str(other.value)
    assert "ValueError" in str(other.value)
    plain = SourceRef("/archive/Erika/a b.svs", {"name": "a b.svs"})
    with pytest.raises(ValueError, match="Erika"), discreet((plain,)):
        raise ValueError("Erika")


def test_stamps_and_records_tell_no_name() -> None:
    stamp = {"files": [["Erika.svs", 5, 7]]}
    hidden = veiled_stamp(stamp, b"")
    assert hidden is not None
    assert hidden["files"][0][1:] == [5, 7]
    assert is_pseudonym(hidden["files"][0][0])
    assert veiled_stamp(None, b"") is None
    told = {
        "anonymize": True,
        "roi": "/x/Erika.geojson",
        "tissue": "auto",
        "members": ("/y/Erika.pt",),
        "batch": 1,
    }
    command, kept = veiled_record(["wsitk", "run", "m", "Erika.svs"], told)
    assert "Erika" not in json.dumps([command, kept])
    assert (kept["tissue"], kept["batch"]) == ("auto", 1)
    assert veiled_record(["a", "b"], {"anonymize": False}) == (["a", "b"], {"anonymize": False})
