"""Artifacts as files: what a person drew, what QuPath is given, and the verb."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from wsitk.artifacts import KINDS, ArtifactMask, artifacts_from_geojson
from wsitk.artifacts.results import COLORS, write_mask, write_outlines
from wsitk.artifacts.synthetic import paint
from wsitk.cli.artifacts import artifacts
from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.qupath import check_geojson
from wsitk.sources.array import ArraySource

app = Typer()
app.command()(artifacts)


def slide(shape: tuple[int, int] = (400, 600), um: float = 0.5) -> ArraySource:
    return ArraySource(np.zeros((*shape, 3), np.uint8), axes="yxc", spacing=um)


def feature(ring: Any, name: str | None = None, kind: str = "Polygon") -> dict[str, Any]:
    properties = {"classification": {"name": name, "color": [1, 2, 3]}} if name else {}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": ring}, "properties": properties}


def write(path: Path, *features: dict[str, Any]) -> Path:
    text = json.dumps({"type": "FeatureCollection", "features": features}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


@pytest.mark.parametrize("name", ["drawn.geojson", "drawn.geojson.gz"])
def test_a_drawn_square_is_its_pixels(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, feature([square(100, 50, 40), square(110, 60, 10)], "Fold"))
    mask = artifacts_from_geojson(path, slide())
    assert mask.kinds == ("fold",)
    assert mask.scale == (1.0, 1.0)
    marked = mask.over(Region((0, 0), (400, 600)))
    assert marked[50:90, 100:140].sum() == pytest.approx(1500, abs=50)
    assert marked[63:67, 113:117].sum() == 0
    assert marked.sum() <= 42 * 42
    assert mask.um == (0.5, 0.5)


def test_classes_decide_the_kind(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.geojson",
        feature([square(0, 0, 10)], "PEN"),
        feature([square(50, 0, 10)], "Tumor"),
        feature([[square(90, 0, 10)], [square(120, 0, 10)]], None, "MultiPolygon"),
    )
    mask = artifacts_from_geojson(path, slide())
    assert mask.kinds == ("pen", "other")
    assert mask.any(Region((2, 2), (2, 2)), ("pen",))
    assert all(mask.any(Region((2, x), (2, 2)), ("other",)) for x in (52, 92, 122))


def test_large_drawings_take_coarser_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsitk.artifacts.drawn.MAX_PIXELS", 10_000)
    path = write(tmp_path / "a.geojson", feature([square(0, 0, 380)], "fold"))
    mask = artifacts_from_geojson(path, slide())
    assert mask.scale == (4.0, 4.0)
    assert mask.codes.size <= 10_000
    assert mask.over(Region((0, 0), (380, 380))).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"type":"FeatureCollection","features":[]}',
        '{"type":"Point","coordinates":[1,2]}',
        '{"type":"Polygon"}',
        '{"type":"Polygon","coordinates":5}',
        '{"type":"Polygon","coordinates":[[[0,0],[1,1]]]}',
        '{"type":"Polygon","coordinates":[[[0,0],[1,"x"],[2,2]]]}',
        '{"type":"Polygon","coordinates":[[[0,0],[1,NaN],[2,2]]]}',
        '{"type":"Polygon","coordinates":[[[0,0],[1,1e300],[2,2]]]}',
        '{"type":"Polygon","coordinates":' + "[" * 100_000,
        '{"type":"Polygon","coordinates":[[[9000,0],[9100,0],[9100,50]]]}',
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.geojson"
    path.write_text(text)
    with pytest.raises(UsageError, match="WSI014") as caught:
        artifacts_from_geojson(path, slide())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI014"):
        artifacts_from_geojson(tmp_path / "none.geojson", slide())


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=6))
def test_outlines_are_the_pixels(tmp_path_factory: pytest.TempPathFactory, rows: list[list[bool]]) -> None:
    import shapely

    marked = np.array(rows)
    mask = ArtifactMask.of_kinds({"pen": marked}, (4.0, 8.0), corner=(12.0, 20.0))
    path = tmp_path_factory.mktemp("outlines") / "a.geojson"
    count = write_outlines(path, mask, name="a", bounds_yx=(2, 10))
    report = check_geojson(path)
    assert report.ok, report.findings
    assert report.features == count
    shapes = [shapely.geometry.shape(f["geometry"]) for f in json.loads(path.read_bytes())["features"]]
    assert sum(s.area for s in shapes) == marked.sum() * 32
    for (y, x), here in np.ndenumerate(marked):
        centre = shapely.Point(20 - 10 + (x + 0.5) * 8, 12 - 2 + (y + 0.5) * 4)
        assert any(s.contains(centre) for s in shapes) == here


def test_outlines_come_back_as_the_mask(tmp_path: Path) -> None:
    marked = np.zeros((50, 75), bool)
    marked[10:20, 30:60] = True
    mask = ArtifactMask.of_kinds({"fold": marked, "dust": np.roll(marked, 20, 0)}, (8.0, 8.0))
    write_outlines(tmp_path / "a.geojson", mask)
    again = artifacts_from_geojson(tmp_path / "a.geojson", slide())
    assert set(again.kinds) == {"fold", "dust"}
    whole = Region((0, 0), (400, 600))
    for kind in mask.kinds:
        before, after = (m.over(whole, kinds=(kind,)) for m in (mask, again))
        assert after[before].all()
        assert (after & ~before).sum() < 2 * (80 + 240) + 10  # the outline's own pixels


def test_the_mask_file_says_what_it_holds(tmp_path: Path) -> None:
    from PIL import Image

    mask = ArtifactMask.of_kinds({"fold": np.eye(5, dtype=bool), "pen": np.ones((5, 5), bool)}, (8.0, 8.5))
    write_mask(tmp_path / "a.png", mask)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {
            "wsitk:kinds": "fold,pen",
            "wsitk:scale_yx": "8.0,8.5",
            "wsitk:corner_yx": "0.0,0.0",
        }
        assert np.array_equal(np.asarray(image), mask.codes)


def test_every_kind_has_a_colour_of_its_own() -> None:
    assert set(KINDS) < set(COLORS)
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_verb_writes_all(tmp_path: Path) -> None:
    from test_artifacts import tissue

    pen = paint(tissue(800), "pen", 1.0, seed=2, size_um=450)
    slides = tmp_path / "slides"
    slides.mkdir()
    for name, pixels in (("pen.tif", pen.pixels), ("clean.tif", tissue(800))):
        tifffile.imwrite(
            slides / name, pixels, tile=(256, 256), photometric="rgb", compression="zlib",
            resolution=(1e4, 1e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
    (slides / "broken.tif").write_bytes(b"II*\0 nothing")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [str(slides), "-o", str(out), "--kinds", "pen, fold"])
    assert done.exit_code == 1, done.output
    rows = {row["input"]: row for row in csv.DictReader((out / "artifacts.csv").read_text().splitlines())}
    assert float(rows["pen.tif"]["pen_mm2"]) == pytest.approx(pen.mask.mean() * 0.64, rel=0.15)
    assert float(rows["clean.tif"]["pen_mm2"]) == 0
    assert rows["clean.tif"]["blur_mm2"] == ""
    assert rows["broken.tif"]["error"].startswith("WSI1")
    report = check_geojson(out / "pen.tif" / "artifacts.geojson")
    assert report.ok
    assert set(report.objects) == {"annotation"}
    assert {p.name for p in (out / "pen.tif").iterdir()} == {
        "artifacts.geojson", "artifacts.png", "artifacts-preview.png",
    }  # fmt: skip
    again = CliRunner().invoke(app, [str(slides / "clean.tif"), "-o", str(out), "--kinds", "pen"])
    assert again.exception is not None
    assert again.exception.code == "WSI510"  # type: ignore[attr-defined]  # the verb raises, main prints


def test_the_verb_refuses_unknown_words(tmp_path: Path) -> None:
    for words, code in ((["--kinds", "hair"], "WSI660"), (["--detector", "oracle"], "WSI663")):
        done = CliRunner().invoke(app, [str(tmp_path), "-o", str(tmp_path / "out"), *words])
        assert done.exception is not None
        assert done.exception.code == code  # type: ignore[attr-defined]  # as above
