"""Readers, pairing, outlines of whole slides, the matrix and the command line of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from typer.testing import CliRunner
from writers_data import CLASSES, COLUMNS, blobs, rows_of

from wsitk.errors import SourceError, UsageError, WsitkError
from wsitk.evaluation import Length, Options, evaluate
from wsitk.evaluation import outline_table as module
from wsitk.evaluation.classmap import parse_classes, read_map
from wsitk.evaluation.label_files import PANNUKE, LabelReader
from wsitk.evaluation.labels import Packed, PackedOutlines
from wsitk.evaluation.matrix import evaluate_matrix, matrix_dict, write_matrix
from wsitk.evaluation.outline_files import read_geojson, read_objects, read_points
from wsitk.evaluation.outline_table import AREA_UNIT, draw, outline_table
from wsitk.evaluation.pairing import find_items, pair_items
from wsitk.objects import ObjectTable
from wsitk.polygons import rings, to_shapely
from wsitk.writers.parquet import ObjectWriter

READER = LabelReader()


def discs(seed: int, side: int = 80, count: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    yy, xx = np.mgrid[:side, :side]
    for label in range(1, count + 1):
        y, x = rng.uniform(5, side - 5, 2)
        disc = (np.hypot(yy - y, xx - x) < rng.uniform(3, 7)) & (labels == 0)
        labels[disc] = label
    return labels


def write_objects(folder: Path, shapes: np.ndarray, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    with ObjectWriter(folder / "objects.parquet", CLASSES, COLUMNS) as writer:
        for start in range(0, len(shapes), 1000):
            writer.write(rows_of(shapes[start : start + 1000], seed=seed))
    (folder / "provenance.json").write_text(json.dumps({"spacing_um": [0.25, 0.25]}))
    return folder


def write_geojson(path: Path, shapes, names) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shape),
            "properties": {"classification": {"name": name}} if name else {},
        }
        for shape, name in zip(shapes, names, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


# label images


def test_every_label_format_says_the_same(tmp_path: Path) -> None:
    import tifffile
    from PIL import Image
    from scipy.io import savemat

    labels = discs(1).astype(np.uint16)
    kinds = np.arange(1, labels.max() + 1) % 3 + 1
    kind_map = np.concatenate([[0], kinds])[labels]
    np.savez(tmp_path / "a.npz", inst=labels, type=kinds)
    np.savez(tmp_path / "b.npz", inst_map=labels, type_map=kind_map)
    savemat(tmp_path / "c.mat", {"inst_map": labels.astype(float), "inst_type": kinds[:, None]})
    np.save(tmp_path / "d.npy", np.stack([labels, kind_map], axis=-1))
    tifffile.imwrite(tmp_path / "e.tif", labels)
    Image.fromarray(labels).save(tmp_path / "f.png")
    np.save(tmp_path / "g.npy", labels.astype(np.float64))
    for file in sorted(tmp_path.iterdir()):
        read = READER.read(file)
        assert np.array_equal(read.flat(), labels), file
        assert read.typed == (file.name[0] in "abcd")
        if read.typed:
            assert read.names == ("class 1", "class 2", "class 3")
            assert np.array_equal(read.of("class 2") > 0, kind_map == 2), file


def test_volumes_in_nifti(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((4, 5, 6), np.int16)
    labels[1:3, 1:3, 1:3] = 2
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([1, 2, 3, 1])), tmp_path / "v.nii.gz")
    read = LabelReader(semantic=True, classes={1: "A", 2: "B"}).read(tmp_path / "v.nii.gz")
    assert (read.spacing, read.unit, read.names) == ((1.0, 2.0, 3.0), "mm", ("A", "B"))
    assert np.array_equal(read.of("B") > 0, labels == 2)
    assert not read.of("A").any()


def test_layers_of_pannuke_keep_overlapping_nuclei(tmp_path: Path) -> None:
    masks = np.zeros((2, 16, 16, 6))
    masks[1, 2:8, 2:8, 0] = 1
    masks[1, 6:12, 6:12, 2] = 1
    np.save(tmp_path / "masks.npy", masks)
    item = find_items(tmp_path, READER).items["00001"]
    labels = item.read()
    assert labels.names == PANNUKE
    assert labels.overlapping() == 4
    assert (labels.of("Neoplastic") > 0).sum() == 36
    assert sorted(np.unique(labels.flat(), return_counts=True)[1]) == [32, 36, 188]
    places, kinds = labels.points()
    assert places.tolist() == [[5, 5], [9, 9]]
    assert kinds.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.npz", b"PK\x03\x04 no archive", "WSI821"),
        ("a.npy", b"\x93NUMPY broken", "WSI821"),
        ("a.mat", b"MATLAB 5.0 MAT-file" + b"\xff" * 200, "WSI821"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "WSI821"),
        ("a.tif", b"II*\x00\xff\xff\xff\xff", "WSI822"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": [{', "WSI190"),
        ("a.parquet", b"PAR1", "WSI515"),
        ("a.csv", b"left,right\n1,2\n", "WSI838"),
        ("a.csv", b"x,y\n1,two\n", "WSI838"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WsitkError) as caught:
        find_items(tmp_path / name, READER).items["a"].read()
    assert caught.value.code == code
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [np.full((4, 4), -1), np.full((4, 4), 0.5), np.zeros((4, 4, 3), np.uint8), np.zeros(5), np.zeros((0, 3))],
)
def test_arrays_that_are_no_labels_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", inst=values)
    with pytest.raises(SourceError, match="WSI822"):
        READER.read(tmp_path / "a.npz")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inst=np.array([{"a": 1}], object))
    with pytest.raises(SourceError, match="WSI821"):
        READER.read(tmp_path / "a.npz")


# outlines


def test_drawing_our_own_outlines_gives_the_masks_back() -> None:
    labels = discs(5)
    labels[20:40, 20:40] = 99
    labels[25:35, 25:35] = 0  # a hole
    labels[labels == 3] = 0
    table = ObjectTable.from_labels(labels)
    shapes = to_shapely(rings(table))
    drawn, twice = draw(
        PackedOutlines([Packed.of(shapes)], np.zeros(len(shapes), np.int64), ()), labels.shape
    )
    present = np.unique(labels)[1:]
    assert np.array_equal(np.append(0, present)[drawn.flat()], labels)
    assert twice == 0


def test_table_of_outlines_equals_a_naive_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    shapes = blobs(60, seed=1, extent=300.0)
    others = shapely.transform(shapes, lambda xy: xy + 3.0)[::-1][:50]
    truth, predicted = (
        PackedOutlines([Packed.of(s)], np.zeros(len(s), np.int64), ()) for s in (shapes, others)
    )
    table = outline_table(truth, predicted)
    expected = {
        (t, p): round(a.intersection(b).area * AREA_UNIT)
        for t, a in enumerate(shapes)
        for p, b in enumerate(others)
        if round(a.intersection(b).area * AREA_UNIT)
    }
    found = zip(table.truth.tolist(), table.predicted.tolist(), strict=True)
    assert dict(zip(found, table.shared.tolist(), strict=True)) == expected
    assert np.allclose(table.truth_area / AREA_UNIT, shapely.area(shapes), atol=0.01)


def test_outlines_and_pixels_agree(tmp_path: Path) -> None:
    """The same slide as polygons on both sides, as pixels on both, and mixed."""
    truth, found = discs(7, 200, 40), np.roll(discs(7, 200, 40), 1, axis=0)
    figures = []
    for side, labels in (("t", truth), ("p", found)):
        (tmp_path / side).mkdir()
        np.savez(tmp_path / side / "s.npz", inst=labels)
        shapes = to_shapely(rings(ObjectTable.from_labels(labels)))
        write_geojson(tmp_path / f"{side}_poly" / "s.geojson", shapes, [""] * len(shapes))
    for p in ("p", "p_poly"):
        for t in ("t", "t_poly"):
            evaluation = evaluate(tmp_path / p, tmp_path / t, Options(mpp=0.25))
            figures.append([evaluation.figure(k).value for k in ("bpq@pooled", "f1@pooled", "aji@images")])
    assert figures[0] == figures[1] == figures[2]
    assert np.allclose(figures[3], figures[0], atol=0.02)  # areas of polygons cut their corners


def test_our_own_output_is_read_and_never_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = blobs(3000, seed=2, extent=200_000.0)  # drawn, this would be 40 gigapixels
    ours = write_objects(tmp_path / "out" / "a.svs", shapes)
    stored = read_objects(ours / "objects.parquet")
    assert (len(stored), stored.spacing_um, stored.names) == (3000, 0.25, tuple(c.name for c in CLASSES))
    rows = np.array([0, 1, 999, 2999])
    assert shapely.equals_exact(stored.polygons(rows), shapes[rows], 1e-9).all()
    truth = write_geojson(tmp_path / "truth" / "a.geojson", shapes[:2900], ["Neoplastic"] * 2900)
    evaluation = evaluate(tmp_path / "out", truth.parent, Options(group="slide"))
    assert evaluation.images[0].unit == "um"
    objects = evaluation.images[0].counts["all"]
    assert (objects.tp + objects.fp, objects.tp + objects.fn) == (3000, 2900)
    assert objects.tp >= 2890  # blobs may overlap each other
    assert evaluation.vocabulary.shared[0] == "Neoplastic"


def test_geojson_as_qupath_writes_it(tmp_path: Path) -> None:
    square, bow = shapely.box(2, 2, 12, 12), shapely.Polygon([(20, 20), (30, 30), (30, 20), (20, 30)])
    read = read_geojson(write_geojson(tmp_path / "a.geojson", [square, bow], ["Tumor", ""]))
    assert read.names == ("Tumor",)
    assert read.kinds.tolist() == [0, -1]
    assert "1 invalid ones mended" in read.source
    assert shapely.is_valid(read.polygons(np.array([0, 1]))).all()
    with pytest.raises(SourceError, match="WSI822"):
        read_geojson(write_geojson(tmp_path / "b.geojson", [square, shapely.Point(1, 1)], ["", ""]))


def test_points_serve_detection_only(tmp_path: Path) -> None:
    write_geojson(tmp_path / "t.geojson", [shapely.Point(10, 10), shapely.Point(50, 50)], ["A", "B"])
    (tmp_path / "p.csv").write_text("x,y,class\n11,10,A\n90,90,B\n")
    assert read_points(tmp_path / "p.csv").kinds.tolist() == [0, 1]
    evaluation = evaluate(tmp_path / "p.csv", tmp_path / "t.geojson", Options(task="detection", mpp=0.25))
    assert evaluation.figure("f1@pooled").value == 0.5
    assert evaluation.figure("f1:A@pooled").value == 1
    with pytest.raises(UsageError, match="WSI830"):
        evaluate(tmp_path / "p.csv", tmp_path / "t.geojson", Options(mpp=0.25))


# pairing


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.savez(folder / name, inst=np.ones((4, 4), np.uint8))
    return folder


def test_names_pair_without_their_tails(tmp_path: Path) -> None:
    truth = find_items(files(tmp_path / "t", "a_inst.npz", "b.svs_mask.npz", "c.npz"), READER)
    found = find_items(files(tmp_path / "p", "a.npz", "b.npz"), READER)
    pairs, extra = pair_items(truth, found)
    assert [(p.name, p.predicted is not None) for p in pairs] == [("a", True), ("b", True), ("c", False)]
    assert extra == []


def test_pictures_are_no_labels_where_there_are_labels(tmp_path: Path) -> None:
    from PIL import Image

    files(tmp_path, "a.npz")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    side = find_items(tmp_path, READER)
    assert list(side.items) == ["a"]
    assert "1 other files left alone" in side.said
    from wsitk.geometry import Region

    assert side.items["a"].picture(Region((0, 0), (4, 4))).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("truth", "found", "code", "named"),
    [
        (("a.npz", "b.npz"), ("c.npz", "d.npz"), "WSI824", "'c'"),
        (("a.npz", "b.npz"), ("a.npz", "x.npz"), "WSI825", "'x'"),
        (("a.npz", "a_inst.npz"), ("a.npz",), "WSI823", "'a'"),
        ((), ("a.npz",), "WSI820", "no labels"),
    ],
)
def test_names_that_do_not_pair_are_listed(tmp_path: Path, truth, found, code: str, named: str) -> None:
    files(tmp_path / "t", *truth)
    files(tmp_path / "p", *found)
    with pytest.raises(UsageError, match=code) as caught:
        evaluate(tmp_path / "p", tmp_path / "t")
    assert named in str(caught.value)


def test_extra_predictions_may_be_left_aside(tmp_path: Path) -> None:
    files(tmp_path / "t", "a.npz")
    files(tmp_path / "p", "a.npz", "x.npz")
    evaluation = evaluate(tmp_path / "p", tmp_path / "t", Options(mpp=0.25, allow_extra=True))
    assert evaluation.extra == ("x",)


def test_grids_and_pixel_sizes_must_agree(tmp_path: Path) -> None:
    for side, size in (("t", 8), ("p", 9)):
        (tmp_path / side).mkdir()
        np.savez(tmp_path / side / "a.npz", inst=np.ones((size, size), np.uint8))
    with pytest.raises(SourceError, match=r"WSI826 a: truth is \(8, 8\)"):
        evaluate(tmp_path / "p", tmp_path / "t")
    ours = write_objects(tmp_path / "o" / "a.svs", blobs(5, extent=100.0))
    with pytest.raises(UsageError, match="WSI828"):
        evaluate(ours, ours, Options(mpp=0.5))


@pytest.mark.parametrize("text", ["2", "um", "0um", "-1px", "1.2.3um", "3 miles"])
def test_lengths_need_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="WSI829"):
        Length.parse(text, "--tolerance")


def test_lengths_are_converted() -> None:
    assert Length.parse("2 µm", "x") == Length(2.0, "um")
    assert Length(2.0, "um").to("mm", 1.0) == 0.002
    assert Length(2.0, "mm").to("um", 0.25) == 2000
    assert Length(3.0, "px").to("um", 0.25) == 0.75
    with pytest.raises(UsageError, match="WSI829"):
        Length(3.0, "um").to("px", 1.0)


def test_class_names_from_words_and_files(tmp_path: Path) -> None:
    assert parse_classes("1=A, 2=B c") == {1: "A", 2: "B c"}
    for text in ("A", "0=A", "1=A,1=B", "1="):
        with pytest.raises(UsageError, match="WSI839"):
            parse_classes(text)
    file = tmp_path / "map.toml"
    file.write_text(
        '[truth]\nTumour = "Neoplastic"\nunmapped = ["misc"]\n[prediction]\nunmapped = ["Dead"]\n'
    )
    assert read_map(file) == ({"Tumour": "Neoplastic", "misc": None}, {"Dead": None})
    for content in ("[other]\n", "truth = 3\n", '[truth]\nA = "B"\nunmapped = ["A"]\n', "[truth\n"):
        file.write_text(content)
        with pytest.raises(UsageError, match="WSI832"):
            read_map(file)


# the matrix


def test_matrix_by_class_name(tmp_path: Path) -> None:
    import tifffile

    def save(folder: str, labels: np.ndarray) -> None:
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", labels.astype(np.uint8))

    one = np.zeros((20, 20))
    one[2:8, 2:8] = 1
    both = one.copy()
    both[10:16, 10:16] = 2
    save("home", both)
    save("away", one)
    save("m_home", both)
    save("m_away", np.roll(one, 3, axis=0))  # half of it: Dice 0.5
    (tmp_path / "models.toml").write_text(
        '[m]\ntrained_on = ["home"]\npredictions = {home = "m_home", away = "m_away"}\n'
        'classes = {"class 1" = "tumour", "class 2" = "stroma"}\n[other]\npredictions = {home = "m_home"}\n'
    )
    (tmp_path / "sets.toml").write_text(
        '[home]\ntruth = "home"\nmpp = 0.5\nclasses = {"class 1" = "tumour", "class 2" = "stroma"}\n'
        '[away]\ntruth = "away"\nmpp = 0.5\nclasses = {"class 1" = "tumour"}\n'
    )
    matrix = evaluate_matrix(tmp_path / "models.toml", tmp_path / "sets.toml", Options(task="segmentation"))
    row = matrix.rows[0]
    assert row.cells[0].value == 1
    assert row.cells[0].in_domain
    assert row.cells[1].value == pytest.approx(0.5)
    assert (row.diagonal, row.elsewhere, row.drop) == (1, pytest.approx(0.5), pytest.approx(0.5))
    other = matrix.rows[1]
    assert all(np.isnan(c.value) for c in other.cells)  # no name in common; no predictions
    assert any("unmapped" in n for n in matrix.notes)
    assert any("no predictions" in n for n in matrix.notes)
    write_matrix(tmp_path / "out", matrix)
    assert json.loads((tmp_path / "out" / "matrix.json").read_text())["models"][1]["in_domain"] is None
    assert (tmp_path / "out" / "matrix.csv").read_text().splitlines()[1] == "m,1,0.5,1,0.5,0.5"
    json.dumps(matrix_dict(matrix), allow_nan=False)


def test_an_absent_class_is_not_perfect(tmp_path: Path) -> None:
    """A-Eval's rule, both empty is 1, would give the model 0.75 here for finding none of what isn't there."""
    import tifffile

    one = np.zeros((20, 20), np.uint8)
    one[2:8, 2:8] = 1
    for folder, labels in (("t", one), ("p", np.roll(one, 3, axis=0))):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", labels)
    (tmp_path / "models.toml").write_text('[m]\npredictions = {s = "p"}\n')
    (tmp_path / "sets.toml").write_text('[s]\ntruth = "t"\nmpp = 0.5\n')
    options = Options(task="segmentation", classes={1: "A", 2: "B"})
    cell = evaluate_matrix(tmp_path / "models.toml", tmp_path / "sets.toml", options).rows[0].cells[0]
    assert cell.value == pytest.approx(0.5)
    assert np.isnan(cell.classes["B"])


@pytest.mark.parametrize(
    ("models", "sets"),
    [
        ('[m]\npredictions = {typo = "p"}\n', '[s]\ntruth = "t"\n'),
        ("[m]\n", '[s]\ntruth = "t"\n'),
        ('[m]\npredictions = {s = "p"}\n', "[s]\n"),
        ('[m]\npredictions = {s = "p"}\n', '[s]\ntruth = "t"\nmpp = "fine"\n'),
        ("", '[s]\ntruth = "t"\n'),
    ],
)
def test_bad_matrices_are_refused(tmp_path: Path, models: str, sets: str) -> None:
    (tmp_path / "m.toml").write_text(models)
    (tmp_path / "s.toml").write_text(sets)
    with pytest.raises(UsageError, match="WSI836"):
        evaluate_matrix(tmp_path / "m.toml", tmp_path / "s.toml", Options())


# the command line


@pytest.fixture
def command():
    import typer

    from wsitk.cli.evaluate import evaluate as verb

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verb)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


def test_command_line(command, tmp_path: Path) -> None:
    for side in "tp":
        (tmp_path / side).mkdir()
        np.savez(tmp_path / side / "a.npz", inst=discs(3))
    done = command(tmp_path / "p", tmp_path / "t", "--mpp", 0.25, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "bPQ" in done.output
    assert "one image, and so no intervals" in done.output
    assert (tmp_path / "out" / "cases.png").is_file()
    again = command(tmp_path / "p", tmp_path / "t", "-o", tmp_path / "out")
    assert isinstance(again.exception, WsitkError)
    assert again.exception.code == "WSI510"
    said = command(tmp_path / "p", tmp_path / "t", "--json")
    assert json.loads(said.output)["counts"]["objects:all"]["fn"] == 0
    wrong = command(tmp_path / "p", tmp_path / "t", "--tolerance", "2")
    assert wrong.exception.code == "WSI829"
    assert command(tmp_path / "p", tmp_path / "t", "--task", "poetry").exit_code == 2
