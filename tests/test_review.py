"""The list of objects to look at first: against a full sort, in QuPath's eyes, and in the picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner
from writers_data import CLASSES, blobs, rows_of

from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.qupath import check_geojson
from wsitk.review import most_doubtful, runs_in, write_review
from wsitk.review_sheet import slides_of
from wsitk.sources import open_source
from wsitk.writers import parquet
from wsitk.writers.geojson import write_geojson
from wsitk.writers.parquet import ObjectWriter

COLUMNS = ("mutual_information", "existence")


def write_run(folder: Path, doubt, *, shapes=None, bounds=(0.0, 0.0), seed=0, source=None) -> Path:
    """Write an output folder whose objects have the given mutual information."""
    folder.mkdir(parents=True)
    doubt = np.asarray(doubt, np.float32)
    shapes = blobs(len(doubt), seed=seed, extent=900.0) if shapes is None else shapes
    columns = {"mutual_information": doubt, "existence": 1 - doubt / 2}
    with ObjectWriter(folder / "objects.parquet", CLASSES, COLUMNS) as writer:
        writer.write(rows_of(shapes, columns=columns, seed=seed))
    write_geojson(folder / "objects.parquet", folder / "objects.geojson.gz", bounds_xy=bounds)
    identity = source.identity() if source else {"name": "x"}
    (folder / "provenance.json").write_text(json.dumps({"input": identity}))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for k, name in enumerate(("a.svs", "case/b.tiff")):
        write_run(tmp_path / "out" / name, rng.permutation(np.linspace(0, 1, 90)) + k / 1000, seed=k)
    return tmp_path / "out"


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_most_doubtful_come_first_whatever_the_groups(out: Path, monkeypatch) -> None:
    """Against a sort of the whole table, in the rows' own order among equals."""
    whole = most_doubtful(out, 20)
    stored = pq.read_table(out / "a.svs/objects.parquet")
    order = np.argsort(-stored["mutual_information"].to_numpy(), kind="stable")[:20]
    wanted = [stored["id"][int(k)].as_py() for k in order]
    assert [i.id for i in whole.inputs["a.svs"]] == wanted
    assert [i.rank for i in whole.inputs["a.svs"]] == list(range(1, 21))
    assert whole.by == "mutual_information"
    assert len(whole.all) == 20
    scores = [i.score for i in whole.all]
    assert scores == sorted(scores, reverse=True)
    assert {i.input for i in whole.all} == {"a.svs", "case/b.tiff"}
    each = sorted((i.score for items in whole.inputs.values() for i in items), reverse=True)
    assert scores == each[:20]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 4), st.just(float("nan"))), min_size=1, max_size=60),
    st.integers(1, 70),
    st.integers(1, 25),
)
def test_ties_and_row_groups(tmp_path_factory, doubt, count, group) -> None:
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setattr(parquet, "ROW_GROUP", group)
    write_run(folder / "a.svs", doubt)
    patch.undo()
    found = most_doubtful(folder, count, "mutual_information")
    values = np.asarray(doubt)
    held = np.flatnonzero(~np.isnan(values))
    order = held[np.argsort(-values[held], kind="stable")][:count]
    ids = pq.read_table(folder / "a.svs/objects.parquet")["id"].to_pylist()
    assert [i.id for i in found.inputs["a.svs"]] == [ids[k] for k in order]
    assert found.skipped == len(doubt) - len(held)


def test_confidences_rank_upward(out: Path) -> None:
    sure = most_doubtful(out, 5, "existence")
    assert [i.id for i in sure.all] == [i.id for i in most_doubtful(out, 5).all]
    large = most_doubtful(out, 5, "area_um2").all
    assert [i.score for i in large] == sorted((i.score for i in large), reverse=True)


def test_what_cannot_be_ranked_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI847.*mutual_information"):
        most_doubtful(out, 5, "mood")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="WSI846"):
        most_doubtful(tmp_path / "nothing")
    with pytest.raises(UsageError, match="WSI848"):
        write_review(out / "a.svs", most_doubtful(out, 5), runs_in(out), overwrite=True)


def test_one_input_may_be_named_alone(out: Path) -> None:
    assert list(runs_in(out / "a.svs")) == ["a.svs"]
    assert list(runs_in(out)) == ["a.svs", "case/b.tiff"]


def test_the_layer_imports_into_qupath(tmp_path: Path) -> None:
    """Annotations that lie where the run's own detections lie, under ids of their own."""
    out = tmp_path / "out"
    write_run(out / "a.svs", np.linspace(1, 0, 40), bounds=(123.0, 45.0))
    review = most_doubtful(out, 12)
    write_review(out / "review", review, runs_in(out))
    layer = out / "review/a.svs/review.geojson"
    report = check_geojson(layer)
    assert report.ok
    assert not report.counts
    assert dict(report.objects) == {"annotation": 12}
    features = json.loads(layer.read_bytes())["features"]
    first = features[0]["properties"]
    assert first["name"].startswith("Review 1: Mutual information 1")
    assert first["measurements"]["Review rank"] == 1
    item = review.inputs["a.svs"][0]
    assert first["classification"] == {"name": item.kind.name, "color": list(item.kind.color)}
    assert features[0]["id"] != item.id
    drawn = shapely.from_geojson(json.dumps(features[0]["geometry"]))
    moved = shapely.transform(item.outline, lambda xy: xy - (123, 45))
    assert shapely.intersection(drawn, moved).area / shapely.union(drawn, moved).area > 0.99


def test_tables_hold_what_the_run_holds(out: Path) -> None:
    review = most_doubtful(out, 7)
    write_review(out / "review", review, runs_in(out))
    rows = table_of(out / "review/review.csv")
    assert [r["rank"] for r in rows] == [str(k) for k in range(1, 8)]
    assert [r["id"] for r in rows] == [i.id for i in review.all]
    assert float(rows[0]["mutual_information"]) == pytest.approx(review.all[0].score, rel=1e-5)
    assert len(table_of(out / "review/case/b.tiff/review.csv")) == 7
    assert list(runs_in(out)) == ["a.svs", "case/b.tiff"]  # the lists are no results themselves


def slide(path: Path) -> np.ndarray:
    """Write a slide of which each 32 px square has a colour of its own."""
    y, x = np.mgrid[:1024, :1024] // 32
    pixels = np.stack([y * 8, x * 8, (x + y) * 3], axis=-1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path, pixels, tile=(128, 128), photometric="rgb", resolution=(2e4, 2e4), resolutionunit=3
    )
    return pixels


def test_pictures_show_the_slide_under_the_outline(tmp_path: Path) -> None:
    pixels = slide(tmp_path / "slides/a.tiff")
    middle = [(500, 300), (200, 700), (5, 5)]
    shapes = np.array([shapely.box(x - 10, y - 10, x + 10, y + 10) for x, y in middle], object)
    with open_source(str(tmp_path / "slides/a.tiff")) as source:
        assert source.spacing is not None
        assert source.spacing.mean == pytest.approx(0.5)
        write_run(tmp_path / "out/a.tiff", [0.9, 0.5, 0.1], shapes=shapes, source=source)
    runs = runs_in(tmp_path / "out")
    at_hand = slides_of(runs, tmp_path / "slides", tmp_path / "out/run.json")
    assert at_hand == {"a.tiff": tmp_path / "slides/a.tiff"}
    notes: list[str] = []
    write_review(
        tmp_path / "lists", most_doubtful(tmp_path / "out"), runs, slides=at_hand, on_note=notes.append
    )
    assert not notes
    with Image.open(tmp_path / "lists/review.png") as picture:
        sheet = np.asarray(picture)
    from wsitk import review_sheet as module

    side, left, top = module._SIDE, module._GAP, module._TOP
    zoom = side / 64  # 32 µm at 0.5 µm
    for k, (x, y) in enumerate(middle[:2]):
        corner = left + k * (side + left)
        for dy, dx in ((0, 0), (-20, 20), (25, -25)):
            seen = sheet[top + round(side / 2 + dy * zoom), corner + round(side / 2 + dx * zoom)]
            near = pixels[y + dy - 1 : y + dy + 2, x + dx - 1 : x + dx + 2].reshape(-1, 3).astype(int)
            assert np.abs(near - seen).max(axis=1).min() < 12


def test_a_slide_that_was_not_run_is_not_shown(tmp_path: Path) -> None:
    slide(tmp_path / "slides/a.tiff")
    with open_source(str(tmp_path / "slides/a.tiff")) as source:
        write_run(tmp_path / "out/a.tiff", [0.9, 0.5], source=source)
        assert source.read(Region((0, 0), (1, 1))).shape == (1, 1, 3)
    runs = runs_in(tmp_path / "out")
    other = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    tifffile.imwrite(tmp_path / "slides/a.tiff", other, tile=(128, 128), photometric="rgb")
    notes: list[str] = []
    assert slides_of(runs, tmp_path / "slides", tmp_path / "none", notes.append) == {}
    assert "not the file that was run" in notes[0]


def test_the_command_of_the_run_tells_where_slides_are(tmp_path: Path) -> None:
    slide(tmp_path / "slides/a.tiff")
    with open_source(str(tmp_path / "slides/a.tiff")) as source:
        write_run(tmp_path / "out/a.tiff", [0.9], source=source)
    runs = runs_in(tmp_path / "out")
    record = tmp_path / "out/run.json"
    assert slides_of(runs, None, record) == {}
    for word in (tmp_path / "slides", tmp_path / "slides/a.tiff"):
        record.write_text(json.dumps({"command": ["wsitk", "run", "m", str(word), "-o", "x"]}))
        assert slides_of(runs, None, record) == {"a.tiff": tmp_path / "slides/a.tiff"}


def test_an_unreadable_slide_costs_only_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/a.tiff").write_bytes(b"II*\0 no slide at all")
    write_run(tmp_path / "out/a.tiff", [0.9])
    runs = runs_in(tmp_path / "out")
    notes: list[str] = []
    at_hand = slides_of(runs, tmp_path / "slides", tmp_path / "none", notes.append)
    write_review(
        tmp_path / "lists", most_doubtful(tmp_path / "out"), runs, slides=at_hand, on_note=notes.append
    )
    assert any("outlines only" in note for note in notes)
    assert (tmp_path / "lists/review.png").is_file()


def test_lists_repeat_themselves(out: Path, tmp_path: Path) -> None:
    trees = []
    for name in ("one", "two"):
        write_review(tmp_path / name, most_doubtful(out, 9), runs_in(out))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        trees.append({p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in files})
    assert trees[0] == trees[1]
    assert set(trees[0]) == {
        *(f"review.{e}" for e in ("csv", "png")),
        *(f"{n}/review.{e}" for n in ("a.svs", "case/b.tiff") for e in ("csv", "png", "geojson")),
    }


def test_from_the_command_line(out: Path) -> None:
    from wsitk.cli.review import review

    app = typer.Typer()
    app.command()(review)
    done = CliRunner().invoke(app, [str(out), "--count", "3", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["inputs"] == {"a.svs": 3, "case/b.tiff": 3}
    assert (out / "review/a.svs/review.geojson").is_file()
    again = CliRunner().invoke(app, [str(out), "--count", "3"])
    assert getattr(again.exception, "code", "") == "WSI510"
    assert CliRunner().invoke(app, [str(out), "--count", "3", "--overwrite"]).exit_code == 0
