"""objects.geojson.gz: what QuPath is given, against a slow reference and QuPath's own reduction."""

from __future__ import annotations

import gzip
import json
import math
import uuid
from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from writers_data import CLASSES, COLUMNS, blobs, rows_of

from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.model import ObjectClass
from wsitk.qupath import check_geojson
from wsitk.writers.base import sha256_file
from wsitk.writers.digits import ring_text
from wsitk.writers.geojson import fit_to_grid, measurement_name, write_geojson
from wsitk.writers.gz import GzipStream
from wsitk.writers.parquet import ObjectWriter


def export(folder, rows, **options):
    with ObjectWriter(folder / "o.parquet", CLASSES, COLUMNS, overwrite=True) as writer:
        writer.write(rows)
    out = folder / "o.geojson.gz"
    counts = write_geojson(folder / "o.parquet", out, overwrite=True, **options)
    with gzip.open(out) as stream:
        value = json.loads(stream.read(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(value) == ["type", "features"]
    return counts, value["features"], out


def round_sig(value):
    return value if value == 0 else round(value, 4 - math.floor(math.log10(abs(value))))


def slow_feature(rows, i, shift):
    """One feature the long way: the reference for the fast encoder."""
    measured = {"Detection probability": rows.probability, "Area µm^2": rows.area_um2}
    measured |= {"Perimeter µm": rows.perimeter_um, "Circularity": rows.columns["circularity"]}
    measured |= {"Max diameter µm": rows.columns["max_diameter_um"]}
    kind = CLASSES[rows.class_id[i]]
    xy = np.round(shapely.get_coordinates(rows.geometry[i]) - shift, 2)
    properties = {
        "objectType": "detection",
        "classification": {"name": kind.name, "color": list(kind.color)},
        "measurements": {k: round_sig(float(v[i])) for k, v in measured.items() if np.isfinite(v[i])},
    }
    flags = {n: "true" for n in ("touches_unreadable", "restored") if getattr(rows, n)[i]}
    if flags:
        properties["metadata"] = flags
    shape = {"type": "Polygon", "coordinates": [xy.tolist()]}
    return {"type": "Feature", "id": rows.id[i].decode(), "geometry": shape, "properties": properties}


def test_equals_the_slow_reference(tmp_path):
    rows = rows_of(blobs(400))
    rows.columns["circularity"][::7] = np.nan
    rows.columns["max_diameter_um"][::11] = np.inf
    rows.columns["max_diameter_um"][5] = 0
    shift = (1000.5, 37.0)
    counts, features, out = export(tmp_path, rows, bounds_xy=shift)
    assert (counts.written, counts.repaired, counts.dropped) == (400, 0, 0)
    for i, feature in enumerate(features):
        wanted = slow_feature(rows, i, shift)
        for name, value in wanted["properties"]["measurements"].items():
            got = feature["properties"]["measurements"].pop(name)
            assert got == pytest.approx(value, rel=2e-5)
        assert not feature["properties"]["measurements"]
        wanted["properties"]["measurements"] = {}
        assert feature == wanted
    assert check_geojson(out).ok


def test_bytes_are_compact_and_the_same_twice(tmp_path):
    rows = rows_of(blobs(200))
    _, _, out = export(tmp_path, rows)
    first = sha256_file(out)
    _, _, out = export(tmp_path, rows)
    assert sha256_file(out) == first
    raw = out.read_bytes()
    assert raw[3:10] == bytes([0, 0, 0, 0, 0, 0, 255])  # no name, no time, no system
    text = gzip.decompress(raw).decode()
    assert ": " not in text.replace("Tumor: Positive", "")
    assert ", " not in text


def test_holes_and_parts_survive(tmp_path):
    ring = shapely.Polygon([(0, 0), (9, 0), (9, 9), (0, 9)], [[(2, 2), (4, 2), (4, 4), (2, 4)]])
    two = shapely.MultiPolygon([ring, shapely.box(20.123, 20.456, 30, 30)])
    shapes = [ring, two, shapely.box(50, 50, 60, 60)]
    _, features, out = export(tmp_path, rows_of(shapes))
    for shape, feature in zip(shapes, features, strict=True):
        back = shapely.geometry.shape(feature["geometry"])
        assert back.geom_type == shape.geom_type
        assert shapely.normalize(back).equals_exact(shapely.normalize(shape), 0.006)
    assert check_geojson(out).ok


def test_bad_outlines_are_repaired_or_dropped_with_count(tmp_path):
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    overlapping = shapely.MultiPolygon([shapely.box(0, 0, 10, 10), shapely.box(5, 5, 15, 15)])
    sliver = shapely.Polygon([(0, 0), (30, 0.001), (60, 0)])
    speck = shapely.box(0.001, 0.001, 0.002, 0.003)
    spike = shapely.Polygon([(0, 0), (10, 0), (10, 10), (30, 10.001), (10, 10.002), (0, 10)])
    fine = shapely.box(3, 3, 9, 9)
    shapes = [bow_tie, overlapping, sliver, speck, spike, fine]
    rows = rows_of(shapes)
    counts, features, out = export(tmp_path, rows)
    assert counts.dropped == 2
    assert counts.written == len(features) == 4
    assert counts.repaired >= 2
    areas = [shapely.geometry.shape(f["geometry"]).area for f in features]
    assert areas == pytest.approx([50, 175, 100, 36], abs=0.2)
    kept = [rows.id[i].decode() for i in (0, 1, 4, 5)]
    assert [f["id"] for f in features] == kept
    assert check_geojson(out).ok


def test_an_empty_table_is_an_empty_collection(tmp_path):
    counts, features, out = export(tmp_path, rows_of([]))
    assert features == []
    assert counts.written == counts.annotations == 0
    assert check_geojson(out).ok


@pytest.mark.parametrize("count", [0, 5])
def test_unreadable_regions_become_locked_annotations(tmp_path, count):
    regions = [Region((0, 0), (10, 10)), Region((0, 10), (10, 10)), Region((40, 40), (5, 5))]
    counts, features, out = export(tmp_path, rows_of(blobs(count)), unreadable=regions, bounds_xy=(1, 2))
    notes, cells = features[: counts.annotations], features[counts.annotations :]
    assert len(notes) == 2
    assert len(cells) == count
    boxes = sorted(shapely.geometry.shape(f["geometry"]).bounds for f in notes)
    assert boxes == [(-1, -2, 19, 8), (39, 38, 44, 43)]
    for note in notes:
        assert note["properties"]["objectType"] == "annotation"
        assert note["properties"]["classification"] == {"name": "Unreadable*", "color": [180, 180, 180]}
        assert note["properties"]["isLocked"] is True
        assert uuid.UUID(note["id"]).version == 5
    assert check_geojson(out).ok


def test_other_classes_and_illegal_names(tmp_path):
    other = [ObjectClass(n, (1, 2, 3)) for n in ("A", 'quote " and µ', "C")]
    _, features, _ = export(tmp_path, rows_of(blobs(20)), classes=other)
    assert {f["properties"]["classification"]["name"] for f in features} == {c.name for c in other}
    for name in ("two\nlines", " "):
        with pytest.raises(OutputError, match="WSI516"):
            export(tmp_path, rows_of(blobs(3)), classes=[ObjectClass(name, (0, 0, 0))] * 3)


def test_a_failure_leaves_no_file(tmp_path):
    with ObjectWriter(tmp_path / "o.parquet", CLASSES, COLUMNS) as writer:
        writer.write(rows_of(blobs(10)))
    with pytest.raises(IndexError):  # a class that the given list does not have
        write_geojson(tmp_path / "o.parquet", tmp_path / "o.geojson.gz", classes=CLASSES[:1])
    assert [p.name for p in tmp_path.iterdir()] == ["o.parquet"]


# small integer-like grids provoke touching, crossing and collapsing rings
_COORDINATE = st.one_of(st.integers(0, 6).map(float), st.floats(0, 6).map(lambda v: round(v, 3)))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(_COORDINATE, _COORDINATE), min_size=3, max_size=9))
def test_what_is_kept_passes_qupaths_reduction(points):
    shape = np.array([shapely.Polygon(points)])
    fitted, _ = fit_to_grid(shape, (0.5, 0.25))
    if fitted[0] is None:
        assert shapely.make_valid(shape[0]).area < 0.5  # only what has (next to) no area is lost
        return
    written = shapely.set_coordinates(fitted, np.round(shapely.get_coordinates(fitted), 2))[0]
    assert shapely.is_valid(written)
    reduced = shapely.set_precision(written, 0.01)
    assert reduced.area > 0
    assert reduced.area == pytest.approx(shapely.make_valid(shape[0]).area, abs=0.3)


@given(st.lists(st.tuples(st.integers(-(10**12), 10**12), st.integers(-(10**6), 10**6)), min_size=1))
def test_digits_equal_json(points):
    hundredths = np.array(points, np.int64)
    cut = len(points) // 2
    text, ends = ring_text(hundredths, np.array([0, cut, len(points)], np.int64))
    raw = text.tobytes()
    back = [json.loads(raw[a:b]) for a, b in pairwise(ends)]
    assert back[0] + back[1] == [[x / 100, y / 100] for x, y in points]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), max_size=4), st.integers(1, 4))
def test_gzip_stream_is_one_member_whatever_the_threads(tmp_path_factory, sizes, threads):
    folder = tmp_path_factory.mktemp("gz")
    blocks = [np.random.default_rng(k).integers(0, 4, n, np.uint8).tobytes() for k, n in enumerate(sizes)]
    for name, count in (("a", threads), ("b", 1)):
        with open(folder / name, "wb") as raw, GzipStream(raw, threads=count) as stream:
            for block in blocks if name == "a" else [b"".join(blocks)]:
                stream.write(block)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert gzip.decompress((folder / "a").read_bytes()) == b"".join(blocks)


def test_measurement_names():
    names = {
        "probability": "Detection probability",
        "area_um2": "Area µm^2",
        "max_diameter_um": "Max diameter µm",
        "solidity": "Solidity",
        "uncertainty_mutual_information": "Uncertainty: mutual information",
        "probability_Neoplastic": "Probability: Neoplastic",
        "hull_area_um2": "Hull area µm^2",
    }
    assert {k: measurement_name(k) for k in names} == names
