"""The replica of QuPath's importer: every rule is broken once, and by nothing else."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from wsitk.qupath import check_geojson

GOOD = {
    "type": "Feature",
    "id": "5d851fc0-a575-5331-b3c6-46fc9e38541b",
    "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9.5, 0], [9, 9], [0, 0]]]},
    "properties": {
        "objectType": "detection",
        "classification": {"name": "Tumor: Positive", "color": [255, 0, 0]},
        "measurements": {"Area µm^2": 4.5},
        "metadata": {"restored": "true"},
    },
}


def changed(path, value):
    feature = copy.deepcopy(GOOD)
    *folders, last = path.split("/")
    at = feature
    for name in folders:
        at = at[name]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return feature


def check(tmp_path, content, name="a.geojson"):
    file = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(content)
    raw = text.encode("utf-8", "surrogatepass")
    file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return check_geojson(file)


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def ring(*points):
    return {"type": "Polygon", "coordinates": [list(points)]}


BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
SQUARES = [[[[a, a], [a + 9, a], [a + 9, a + 9], [a, a + 9], [a, a]]] for a in (0, 5)]
ERRORS = [
    ("id", changed("id", "cell-17")),
    ("feature-type", {"type": "feature"}),
    ("feature-type", 7),
    ("object-type", changed("properties/objectType", ...)),
    ("object-type", changed("properties/objectType", "nucleus")),
    ("object-type", changed("properties/objectType", "tmaCore")),
    ("object-type", {**changed("properties/objectType", ...), "objectType": "detection"}),
    ("class-color", changed("properties/classification/color", ...)),
    ("class-color", changed("properties/classification/color", [255, 0])),
    ("class-color", changed("properties/classification/color", [256, 0, 0])),
    ("class-color", changed("properties/classification/color", "#ff0000")),
    ("class-name", changed("properties/classification/name", "two\nlines")),
    ("class-name", changed("properties/classification/name", 3)),
    ("class-name", changed("properties/classification", {"names": ["A", "B: C"], "color": None})),
    ("measurements", changed("properties/measurements", 4.5)),
    ("measurement-type", changed("properties/measurements", {"a": "4.5"})),
    ("measurement-type", changed("properties/measurements", {"a": None})),
    ("measurement-type", changed("properties/measurements", {"a": True})),
    ("measurement-nan", changed("properties/measurements", {"a": float("nan")})),
    ("metadata", changed("properties/metadata", {"a": {}})),
    ("properties", changed("properties", ["detection"])),
    ("geometry-type", changed("geometry", {"type": "GeometryCollection", "geometries": []})),
    ("geometry-type", changed("geometry", None)),
    ("geometry-type", changed("geometry/type", "Circle")),
    ("coordinates", changed("geometry/coordinates", [[0, 0], [9, 0], [9, 9], [0, 0]])),
    ("coordinates", changed("geometry", ring([0, 0], [9], [9, 9], [0, 0]))),
    ("coordinates", changed("geometry", ring([0, 0], ["9", 0], [9, 9], [0, 0]))),
    ("coordinate-nan", changed("geometry", ring([0, 0], [float("nan"), 0], [9, 9], [0, 0]))),
    ("ring-length", changed("geometry", ring([0, 0], [9, 0], [0, 0]))),
    ("ring-length", changed("geometry/coordinates", [])),
    ("ring-closure", changed("geometry", ring([0, 0], [9, 0], [9, 9], [0, 9]))),
    ("precision", changed("geometry", ring(*BOW_TIE))),
    ("precision", changed("geometry", {"type": "MultiPolygon", "coordinates": SQUARES})),
    ("precision", changed("geometry", ring([0, 0], [0.001, 0], [0.001, 0.001], [0, 0]))),
]
WARNINGS = [
    ("id", changed("id", ...)),
    ("bare-geometry", GOOD["geometry"]),
    ("measurement-nan", changed("properties/measurements", {"a": "NaN"})),
    ("measurements", changed("properties/measurements", [{"name": "a", "value": 1}])),
]
FILES = [
    ("json", '{"type":"FeatureCollection","features":[{"type":"Feature"'),
    ("json", '{"type":"FeatureCollection","features":[]} more'),
    ("json", "[" * 100_000),
    ("top-level", ""),
    ("top-level", '"text"'),
    ("top-level", '{"type":"featurecollection","features":[]}'),
    ("top-level", '{"type":"FeatureCollection"}'),
    ("encoding", '{"type":"FeatureCollection","features":["\ud800"]}'),
]


def test_a_good_file_has_no_findings(tmp_path):
    second = changed("id", "9ebdef95-9be1-5f57-af34-516b1323ae97")
    report = check(tmp_path, collection(GOOD, second))
    assert report.ok
    assert report.findings == ()
    assert (report.features, dict(report.objects)) == (2, {"detection": 2})


@pytest.mark.parametrize("form", [GOOD, [GOOD], [[GOOD]]])
def test_other_forms_that_qupath_takes(tmp_path, form):
    assert check(tmp_path, form).ok


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("properties/classification", "Tumor"),
        ("properties/classification/color", None),
        ("properties/classification/color", [-3670016]),
        ("properties/classification", {"names": ["A", "B"], "color": [1, 2, 3, 4]}),
        ("properties/classification", {"name": "old", "colorRGB": -3670016}),
        ("properties/measurements", None),
        ("properties/objectType", "cell"),
        ("geometry", {"type": "Point", "coordinates": [1, 2]}),
        ("geometry", {"type": "LineString", "coordinates": [[1, 2], [3, 4]]}),
        ("geometry", ring([0, 0, 5], [9, 0, 5], [9, 9, 5], [0, 0, 5])),
    ],
)
def test_what_qupath_takes_is_no_error(tmp_path, path, value):
    report = check(tmp_path, collection(changed(path, value)))
    assert report.ok, list(report.lines())
    assert report.findings == ()


@pytest.mark.parametrize(("rule", "feature"), ERRORS)
def test_each_error_is_found_and_nothing_else(tmp_path, rule, feature):
    report = check(tmp_path, collection(GOOD, feature) if feature != GOOD else collection(feature))
    assert not report.ok
    found = {f.rule for f in report.findings if f.severity == "error"} - {"duplicate-id"}
    # without properties there is no object type either
    assert found == ({rule, "object-type"} if rule == "properties" else {rule})
    assert {f.feature for f in report.findings if f.rule == rule} == {1}


@pytest.mark.parametrize(("rule", "feature"), WARNINGS)
def test_each_warning_is_found_and_is_no_error(tmp_path, rule, feature):
    report = check(tmp_path, collection(feature))
    assert report.ok
    assert [(f.rule, f.severity) for f in report.findings] == [(rule, "warning")]


@pytest.mark.parametrize(("rule", "text"), FILES)
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_bad_files(tmp_path, rule, text, name):
    report = check(tmp_path, text, name)
    assert [f.rule for f in report.findings if f.severity == "error"] == [rule]


def test_duplicate_ids_extension_and_broken_gzip(tmp_path):
    report = check(tmp_path, collection(GOOD, GOOD, GOOD))
    assert dict(report.counts) == {"duplicate-id": 1}
    assert "2 ids" in report.findings[0].message
    assert dict(check(tmp_path, collection(GOOD), "a.txt").counts) == {"extension": 1}
    whole = gzip.compress(json.dumps(collection(*[GOOD] * 50)).encode())
    (tmp_path / "cut.geojson.gz").write_bytes(whole[: len(whole) // 2])
    assert "gzip" in check_geojson(tmp_path / "cut.geojson.gz").counts
    (tmp_path / "plain.geojson.gz").write_bytes(b"{}")
    assert dict(check_geojson(tmp_path / "plain.geojson.gz").counts) == {"gzip": 1}
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_geojson(tmp_path / "missing.geojson")


def test_many_findings_are_counted_but_not_kept(tmp_path):
    report = check(tmp_path, collection(*[changed("id", f"cell {k}") for k in range(1000)]))
    assert report.counts["id"] == report.errors == 1000
    assert len(report.findings) == 5
    assert "… and 995 more of id" in "\n".join(report.lines())


def test_features_larger_than_a_piece_are_read(tmp_path):
    long = [[float(k % 1000), float(k // 1000)] for k in range(80_000)]
    line = changed("geometry", {"type": "LineString", "coordinates": long})
    report = check(tmp_path, collection(line, changed("id", "9ebdef95-9be1-5f57-af34-516b1323ae97")))
    assert report.ok
    assert report.features == 2
