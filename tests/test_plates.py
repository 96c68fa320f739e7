"""Plates: wells as inputs, one command over all of them, and the table that comes of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from plate_data import (
    CHANNELS,
    EDGE,
    HIGH,
    SPACING_UM,
    DiscModel,
    area_um2,
    field,
    plate_xml,
    wanting,
    well_name,
    write_plate,
)  # fmt: skip
from typer.testing import CliRunner

import wsitk
from wsitk.cli.main import app
from wsitk.errors import SourceError, UsageError
from wsitk.geometry import Region
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.plate_table import plates_of, write_plates
from wsitk.record import InputRow
from wsitk.settings import Settings
from wsitk.sources import open_source
from wsitk.sources.discover import expand_inputs
from wsitk.sources.plate import Well, key_place, matching, named_images, well_in_name

PLAIN: dict[str, Any] = {"supervise": False, "maps": False, "geojson": False, "preview": False, "workers": 2}


def inputs_of(*given: object) -> list[str]:
    return [item.name for item in expand_inputs([str(g) for g in given]).items]


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "plate.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- names -------------------------------------------------------------------------------------------


@given(st.integers(0, 31), st.integers(0, 47), st.booleans(), st.booleans(), st.integers(0, 20))
def test_a_well_is_found_however_it_is_written(
    row: int, column: int, lower: bool, bare: bool, fields: int
) -> None:
    well = Well(row, column)
    key = str(well) if not fields else f"{well}_f{fields}"
    assert key_place(key) == (well, fields or None)
    letters, digits = well.letters, str(column + 1) if bare else f"{column + 1:02d}"
    asked = (letters.lower() if lower else letters) + digits
    assert matching([key, "Z99"], asked) == (key,)
    if fields:
        assert matching([key], f"{asked}_F{fields:03d}") == (key,)
    others = [str(Well(r, c)) for r in range(32) for c in range(0, 48, 5) if (r, c) != (row, column)]
    assert matching(others, asked) == ()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("A01", ("", "A01", None)),
        ("Well B7, Field #2", ("Well ", "B07", 2)),
        ("dose3_P24_f09", ("dose3_", "P24", 9)),
        ("f1_C03", ("f1_", "C03", 1)),
        ("scan_s2_D10", ("scan_s2_", "D10", 2)),
        ("E5-site3", ("", "E05", 3)),
        ("2024-A02", ("2024-", "A02", None)),
        ("slide", None),
        ("T24", None),
        ("A00", None),
        ("AB1234", None),
        ("TCGAA1", None),
    ],
)
def test_wells_in_names(name: str, want: tuple[str, str, int | None] | None) -> None:
    found = well_in_name(name)
    assert (found and (found[0], str(found[1]), found[2])) == want


def test_which_inputs_are_wells_of_one_plate() -> None:
    def plain(*names: str) -> dict[str, dict[str, list[str]]]:
        return {p: {str(w): n for w, n in wells.items()} for p, wells in plates_of(names).items()}

    assert plain("p.ome.tiff/A02", "p.ome.tiff/A01_f2", "p.ome.tiff/A01_f1") == {
        "p.ome.tiff": {"A01": ["p.ome.tiff/A01_f1", "p.ome.tiff/A01_f2"], "A02": ["p.ome.tiff/A02"]}
    }
    assert plain("exp/d_A01_f1.tif", "exp/d_B01_f1.tif") == {
        "exp": {"A01": ["exp/d_A01_f1.tif"], "B01": ["exp/d_B01_f1.tif"]}
    }
    assert list(plain("x_A01.tif", "x_A02.ome.tif")) == ["plate"]
    assert list(plain("r/one_A01.tif", "r/two_A01.tif")) == ["r/one", "r/two"]
    assert plain("a/x_A01.tif", "a/readme.tif") == {}
    assert plain("a/x_A01.tif") == {}
    assert plain("TCGA-A1-0001.svs", "TCGA-A2-0002.svs", "slide.ndpi") == {}
    assert plain("p.zarr/A01", "A02", "p.ome.tiff/0") == {}


# --- files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six wells, of which two have several fields; stored in another order than that of their names."""
    wells = {"B03": 1, "A10": 2, "A02": 1, "H12": 3, "A01": 1, "C01": 1}
    counts = range(sum(wells.values()))
    path = tmp_path_factory.mktemp("small") / "plate.ome.tiff"
    return write_plate(path, [field(k) for k in counts], plate_xml(wells))


KEYS = ("A01", "A02", "A10_f1", "A10_f2", "B03", "C01", "H12_f1", "H12_f2", "H12_f3")


def test_a_plate_is_many_inputs(small: Path) -> None:
    assert named_images(str(small)) == KEYS
    assert inputs_of(small) == [f"plate.ome.tiff/{key}" for key in KEYS]
    assert inputs_of(small.parent) == inputs_of(small)
    assert inputs_of(f"{small}#a10") == ["plate.ome.tiff/A10_f1", "plate.ome.tiff/A10_f2"]
    assert inputs_of(f"{small}#A1", f"{small}#h12_f2") == ["plate.ome.tiff/A01", "plate.ome.tiff/H12_f2"]
    assert inputs_of(f"{small}#A*") == [f"plate.ome.tiff/{key}" for key in KEYS if key.startswith("A")]
    with pytest.raises(
        UsageError, match=r"WSI084 plate.ome.tiff holds no image 'G07'; it holds A01 to H12_f3"
    ):
        inputs_of(f"{small}#G07")


def test_each_well_opens_to_its_own_image(small: Path) -> None:
    for key, count in (("B03", 0), ("A10_f2", 2), ("a2", 3), ("H12_f3", 6), ("A01", 7)):
        with open_source(f"{small}#{key}") as source:
            assert source.channel_names == CHANNELS
            want = np.moveaxis(field(count), 0, -1)
            np.testing.assert_array_equal(source.read(Region((0, 0), (EDGE, EDGE))), want)
            assert source.name == f"plate.ome.tiff/{key}"
            again = open_source(source.ref)
            assert again.identity() == source.identity()
            again.close()
    with pytest.raises(
        SourceError, match=r"WSI170 plate.ome.tiff: holds 9 images: A01, A02, .* name one, such as"
    ):
        open_source(small)
    with pytest.raises(UsageError, match=r"WSI084 .* has 2 images called 'A10'; there are A10_f1, A10_f2"):
        open_source(f"{small}#A10")
    with pytest.raises(UsageError, match="WSI084"):
        open_source(f"{small}#A99")


def test_wells_have_identities_of_their_own(small: Path, tmp_path: Path) -> None:
    def identity(path: Path, key: str) -> dict[str, Any]:
        with open_source(f"{path}#{key}", name="same") as source:
            return source.identity()

    each = [identity(small, key) for key in KEYS]
    assert len({json.dumps(i) for i in each}) == len(KEYS)
    copy = tmp_path / "other.ome.tiff"
    copy.write_bytes(small.read_bytes())
    assert [identity(copy, key) for key in KEYS] == each
    with tifffile.TiffFile(copy) as file:
        place = int(file.pages[0].dataoffsets[0])  # B03's first channel
    with open(copy, "r+b") as raw:
        raw.seek(place + 1000)
        raw.write(b"\xaa\x55")
    changed = [key for key, before in zip(KEYS, each, strict=True) if identity(copy, key) != before]
    assert changed == ["B03"]


def test_wells_named_by_their_images(tmp_path: Path) -> None:
    path = tmp_path / "p.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        for name in ("Well A02, Field #1", "Well A01, Field #2", "Well A01, Field #1"):
            image = np.full((2, 40, 50), int(name[6:8]) * 10 + int(name[-1]), np.uint16)
            writer.write(image, metadata={"axes": "CYX", "Name": name}, photometric="minisblack")
    assert named_images(str(path)) == ("A01_f1", "A01_f2", "A02")
    for key, value in (("A01_f1", 11), ("A01_f2", 12), ("A02", 21)):
        with open_source(f"{path}#{key}") as source:
            assert (source.read(Region((0, 0), (40, 50))) == value).all()


def test_images_that_are_no_wells_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "scenes.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        for k in range(3):
            image = np.full((2, 40, 50), k, np.uint8)
            writer.write(image, metadata={"axes": "CYX", "Name": f"scene {k}"}, photometric="minisblack")
    assert inputs_of(path) == ["scenes.ome.tif/0", "scenes.ome.tif/1", "scenes.ome.tif/2"]
    with open_source(f"{path}#2") as source:
        assert (source.read(Region((0, 0), (40, 50))) == 2).all()
    assert plates_of(inputs_of(path)) == {}


def test_a_slide_with_label_and_overview_is_one_image(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        for size in (300, 80, 50):
            image = np.zeros((size, size, 3), np.uint8)
            writer.write(image, tile=(64, 64), photometric="rgb", metadata={"axes": "YXS"})
    assert inputs_of(path) == ["slide.ome.tif"]
    with open_source(path) as source:
        assert source.shape == (300, 300)
    with pytest.raises(UsageError, match=r"WSI084 .*it is one image; leave the # out"):
        inputs_of(f"{path}#A01")


def test_a_plate_of_one_well_opens_by_its_file(tmp_path: Path) -> None:
    path = write_plate(tmp_path / "one.ome.tiff", [field(4)], plate_xml({"C05": 1}))
    assert inputs_of(path) == ["one.ome.tiff/C05"]
    with open_source(path) as plain, open_source(f"{path}#C5") as well:
        region = Region((0, 0), (EDGE, EDGE))
        np.testing.assert_array_equal(plain.read(region), well.read(region))


def test_a_file_whose_name_has_a_hash_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "slide#2.tif"
    tifffile.imwrite(path, np.zeros((30, 40), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "slide", np.zeros((30, 50), np.uint8), photometric="minisblack")
    with open_source(path) as source:
        assert source.shape == (30, 40)
    assert inputs_of(path) == ["slide#2.tif"]


def test_plates_that_contradict_themselves(tmp_path: Path) -> None:
    xml = plate_xml({"A01": 1, "B01": 1})
    images = [field(1), field(2)]
    for number, text in enumerate((
        xml.replace('Row="1"', 'Row="0"'),
        xml.replace('Row="1"', 'Row="77"'),
        xml.replace('<Well ID="W:B01"', '</Plate><Plate ID="Plate:1"><Well ID="W:B01"'),
    )):  # fmt: skip
        path = write_plate(tmp_path / f"{number}.ome.tiff", images, text)
        assert inputs_of(path) == [path.name]  # opening it tells
        with pytest.raises(SourceError, match="WSI173"):
            open_source(path)


# --- runs --------------------------------------------------------------------------------------------


def test_a_plate_of_96_wells_runs_from_one_command_into_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {well_name(k): (7 * k) % 24 for k in range(96)}
    plate = tmp_path / "plate.ome.tiff"
    write_plate(
        plate, [field(n) for n in counts.values()], plate_xml(dict.fromkeys(counts, 1)), compression="zlib"
    )
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["run", "plate_data:discs", str(plate), "-o", str(out), "--channels", "hsp70,DAPI",
               "--no-supervise", "--no-maps", "--no-geojson", "--threads", "1", "--workers", "2"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = table(out)
    assert [row["well"] for row in rows] == list(counts)
    for row in rows:
        areas = np.array([area_um2(k) for k in range(counts[row["well"]])])
        assert (row["plate"], row["status"], row["fields"]) == ("plate.ome.tiff", "done", "1")
        assert row["objects"] == row["objects_disc"] == str(len(areas))
        assert float(row["area_mm2"]) == pytest.approx((EDGE * SPACING_UM) ** 2 / 1e6, rel=1e-5)
        if not len(areas):
            assert row["area_um2_mean"] == row["uncertain_fraction"] == row["intensity_HSP70_mean"] == ""
            continue
        assert float(row["area_um2_mean"]) == pytest.approx(areas.mean(), rel=1e-5)
        assert float(row["area_um2_median"]) == pytest.approx(np.median(areas), rel=1e-5)
        assert float(row["area_um2_p10"]) == pytest.approx(np.percentile(areas, 10), rel=1e-5)
        assert float(row["area_um2_p90"]) == pytest.approx(np.percentile(areas, 90), rel=1e-5)
        diameters = np.sqrt(4 * areas / np.pi)
        assert float(row["equivalent_diameter_um_mean"]) == pytest.approx(diameters.mean(), rel=1e-5)
        assert float(row["intensity_HSP70_mean"]) == pytest.approx(HIGH)
        small_discs = (len(areas) + 1) // 2  # seen by half of the samples
        assert float(row["uncertain_fraction"]) == pytest.approx(small_discs / len(areas), rel=1e-5)
    assert (out / "plate.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "summary.csv").read_text().splitlines()) == 1 + 96
    assert len(wsitk.Result(out / "plate.ome.tiff" / "D07").objects) == counts["D07"]


@pytest.fixture
def run() -> Callable[..., list[InputRow]]:
    def go(model: Any, out: Path, *given: object, **settings: Any) -> list[InputRow]:
        items = [Input(i.name, str(i.path)) for i in expand_inputs([str(g) for g in given]).items]
        with Runner(model, out, Settings(**{**PLAIN, **settings})) as runner:
            return runner.run(items)

    return go


def test_fields_of_a_well_are_summed(small: Path, tmp_path: Path, run: Callable[..., list[InputRow]]) -> None:
    run(DiscModel(), tmp_path / "out", small, channels=("HSP70", "DAPI"))
    rows = {row["well"]: row for row in table(tmp_path / "out")}
    assert {w: (r["fields"], r["objects"]) for w, r in rows.items()} == {
        "A01": ("1", "7"), "A02": ("1", "3"), "A10": ("2", "3"), "B03": ("1", "0"),
        "C01": ("1", "8"), "H12": ("3", "15"),
    }  # fmt: skip
    areas = [area_um2(k) for count in (4, 5, 6) for k in range(count)]
    assert float(rows["H12"]["area_um2_median"]) == pytest.approx(np.median(areas), rel=1e-5)
    assert float(rows["H12"]["area_mm2"]) == pytest.approx(3 * (EDGE * SPACING_UM) ** 2 / 1e6, rel=1e-5)


def test_wells_run_apart_and_in_parts_give_the_same_table(
    small: Path, tmp_path: Path, run: Callable[..., list[InputRow]]
) -> None:
    run(DiscModel(), tmp_path / "a", small, channels=[1, 0])
    whole = (tmp_path / "a" / "plate.csv").read_bytes()
    picture = (tmp_path / "a" / "plate.png").read_bytes()
    # the same channels by another name are the same work; wells come in any order and any number of runs
    model = ModelRef("plate_data:discs")
    run(model, tmp_path / "b", f"{small}#H12", channels=("hsp70", "dapi"), supervise=True)
    assert len(table(tmp_path / "b")) == 1
    (tmp_path / "b" / "plate.csv").unlink()  # whoever runs last makes it again
    run(model, tmp_path / "b", small, channels=("hsp70", "dapi"))
    assert (tmp_path / "b" / "plate.csv").read_bytes() == whole
    assert (tmp_path / "b" / "plate.png").read_bytes() == picture


def test_another_choice_of_channels_is_another_run(
    small: Path, tmp_path: Path, run: Callable[..., list[InputRow]]
) -> None:
    (row,) = run(DiscModel(), tmp_path, f"{small}#A01", channels=("HSP70", "DAPI"))
    assert row.status == "done"
    (row,) = run(DiscModel(), tmp_path, f"{small}#A01", channels=("DAPI", "HSP70"))
    assert (row.status, row.code) == ("failed", "WSI510")
    assert table(tmp_path)[0]["status"] == "failed"


def test_a_model_that_names_its_channels_gets_them(
    small: Path, tmp_path: Path, run: Callable[..., list[InputRow]]
) -> None:
    (row,) = run(wanting(), tmp_path / "a", f"{small}#A01")
    assert row.objects == {"disc": 7}
    (row,) = run(DiscModel(), tmp_path / "b", f"{small}#A01")
    assert row.code == "WSI130"
    assert "choose some of DAPI, HSP70, GFP with --channels" in row.message
    (row,) = run(DiscModel(), tmp_path / "c", f"{small}#A01", channels=("Cy5", "DAPI"))
    assert row.code == "WSI171"
    image = np.moveaxis(field(5), 0, -1)
    result = wsitk.run(DiscModel(), image, out=tmp_path / "d", channels=[1, 0], **PLAIN)
    assert len(result.objects) == 5


def test_a_failed_well_has_a_row(tmp_path: Path, run: Callable[..., list[InputRow]]) -> None:
    wells = dict.fromkeys(("A01", "A02", "A03"), 1) | {"A04": 2}
    images = [field(k) for k in range(5)]
    path = write_plate(tmp_path / "p.ome.tiff", images, plate_xml(wells), compression="zlib")
    with tifffile.TiffFile(path) as file:
        broken = [int(file.pages[3 * k + 1].dataoffsets[0]) for k in (1, 4)]  # A02, and a field of A04
    with open(path, "r+b") as raw:
        for place in broken:
            raw.seek(place)
            raw.write(bytes(40))
    run(DiscModel(), tmp_path / "out", path, channels=(1, 0))
    rows = {row["well"]: row for row in table(tmp_path / "out")}
    assert {w: r["status"] for w, r in rows.items()} == {
        "A01": "done",
        "A02": "gaps",
        "A03": "done",
        "A04": "gaps",
    }
    assert rows["A04"]["objects"] == "3"
    (tmp_path / "out" / "p.ome.tiff" / "A03" / "objects.parquet").write_bytes(b"damaged")
    states = dict.fromkeys(("A01", "A03", "A04_f1"), "done") | {"A04_f2": "failed", "A02": "partial"}
    again = [InputRow(f"p.ome.tiff/{key}", status) for key, status in states.items()]
    assert write_plates(tmp_path / "out", again)
    rows = {row["well"]: row for row in table(tmp_path / "out")}
    got = {w: (r["status"], r["fields"], r["fields_failed"], r["objects"]) for w, r in rows.items()}
    assert got == {
        "A01": ("done", "1", "0", "0"), "A02": ("partial", "0", "1", ""),
        "A03": ("failed", "0", "1", ""), "A04": ("failed", "1", "1", "3"),
    }  # fmt: skip


def test_a_folder_of_fields_is_a_plate(tmp_path: Path, run: Callable[..., list[InputRow]]) -> None:
    for well, count in (("A01_f1", 2), ("A01_f2", 5), ("B11_f1", 1)):
        name = tmp_path / "in" / f"dose_{well}.ome.tif"
        name.parent.mkdir(exist_ok=True)
        write_plate(
            name, [field(count)], plate_xml({"A01": 1}).replace("<Plate", "<Plat").replace("/Plate", "/Plat")
        )
    run(DiscModel(), tmp_path / "out", tmp_path / "in", channels=(1, 0))
    assert [(r["plate"], r["well"], r["fields"], r["objects"]) for r in table(tmp_path / "out")] == [
        ("plate", "A01", "2", "7"), ("plate", "B11", "1", "1"),
    ]  # fmt: skip


def test_no_table_without_wells(tmp_path: Path, run: Callable[..., list[InputRow]]) -> None:
    path = write_plate(tmp_path / "x.ome.tif", [field(2)], plate_xml({"A01": 1}).replace("Plate", "Plat"))
    run(DiscModel(), tmp_path / "out", path, channels=(1, 0))
    assert not (tmp_path / "out" / "plate.csv").exists()


def test_wells_in_colour(tmp_path: Path) -> None:
    path = tmp_path / "he.ome.tif"
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (50, 60, 3), np.uint8) for _ in range(2)]
    with tifffile.TiffWriter(path) as writer:
        for name, image in zip(("A01", "A02"), images, strict=True):
            writer.write(image, photometric="rgb", metadata={"axes": "YXS", "Name": name}, compression="zlib")
    with open_source(f"{path}#A02") as source:
        assert source.channel_names == ("red", "green", "blue")
        np.testing.assert_array_equal(source.read(Region((0, 0), (50, 60))), images[1])


def test_a_pixel_size_for_the_plate_is_one_for_its_wells(small: Path) -> None:
    from wsitk.cli.execute import _by_name

    items = expand_inputs([str(small)]).items
    assert _by_name({"plate.ome.tiff": 0.4}, items) == {f"plate.ome.tiff/{key}": 0.4 for key in KEYS}
    assert _by_name({f"{small}": 0.4, "plate.ome.tiff/B03": 0.3}, items)["plate.ome.tiff/B03"] == 0.3


def test_info_tells_of_each_well(small: Path) -> None:
    result = CliRunner().invoke(app, ["info", f"{small}#A*", "--json"])
    assert result.exit_code == 0, result.output
    assert "A10_f2" in result.output
    assert "HSP70" in result.output
    assert "B03" not in result.output


def test_a_region_drawn_on_fluorescence_counts(
    small: Path, tmp_path: Path, run: Callable[..., list[InputRow]]
) -> None:
    half = [[0, 0], [EDGE, 0], [EDGE, 24], [0, 24], [0, 0]]
    drawn = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [half]}}
    (tmp_path / "roi.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn]}))
    chosen: dict[str, Any] = {"channels": (1, 0), "tile": 48, "halo": 16}
    (row,) = run(
        DiscModel(), tmp_path / "out", f"{small}#H12_f3", roi=str(tmp_path / "roi.geojson"), **chosen
    )
    assert row.tiles["background"] > 0
    assert row.tiles["ok"] > 0
    assert row.tissue_mm2 == pytest.approx(EDGE * 25 * SPACING_UM**2 / 1e6, rel=0.1)
