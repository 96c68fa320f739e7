"""objects.parquet: GeoParquet 1.1 that reads back as written, in bytes that depend on the rows alone."""

from __future__ import annotations

import json
import uuid
from dataclasses import fields, replace
from itertools import pairwise

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from writers_data import CLASSES, COLUMNS, NAMESPACE, blobs, rows_of

from wsitk.errors import OutputError
from wsitk.writers.base import sha256_file
from wsitk.writers.ids import id_namespace, object_ids
from wsitk.writers.parquet import ROW_GROUP, ObjectRows, ObjectsFile, ObjectWriter


def part(rows, low, high):
    plain = {f.name: getattr(rows, f.name)[low:high] for f in fields(rows) if f.name != "columns"}
    return ObjectRows(**plain, columns={k: v[low:high] for k, v in rows.columns.items()})


def write(path, batches, **options):
    with ObjectWriter(path, CLASSES, COLUMNS, **options) as writer:
        for batch in batches:
            writer.write(batch)
    return path


def test_reads_back_in_geopandas(tmp_path):
    rows = rows_of(blobs(300))
    table = geopandas.read_parquet(write(tmp_path / "o.parquet", [rows]))
    assert table.crs is None
    assert table["id"].tolist() == [i.decode() for i in rows.id]
    assert table["class"].tolist() == [CLASSES[k].name for k in rows.class_id]
    np.testing.assert_array_equal(table["probability"], rows.probability)
    np.testing.assert_array_equal(table[["centroid_x", "centroid_y"]], rows.centroid_xy)
    for name in COLUMNS:
        np.testing.assert_array_equal(table[name], rows.columns[name])
    np.testing.assert_array_equal(table["restored"], rows.restored)
    assert shapely.equals_exact(table.geometry.values, rows.geometry, 0).all()
    window = geopandas.read_parquet(tmp_path / "o.parquet", bbox=(0, 0, 5000, 5000))
    assert len(window) == shapely.intersects(rows.geometry, shapely.box(0, 0, 5000, 5000)).sum()


def check_geoparquet(path):
    """The rules of GeoParquet 1.1 that concern a planar WKB column with a bbox covering."""
    file = pq.ParquetFile(path)
    geo = json.loads(file.metadata.metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert set(geo["columns"]) == {geo["primary_column"]} == {"geometry"}
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB"
    assert column["crs"] is None
    assert column["edges"] == "planar"
    schema = file.schema_arrow
    assert str(schema.field("geometry").type) == "binary"
    paths = column["covering"]["bbox"]
    assert paths == {n: ["bbox", n] for n in ("xmin", "ymin", "xmax", "ymax")}
    assert [f.name for f in schema.field("bbox").type] == ["xmin", "ymin", "xmax", "ymax"]
    assert {str(f.type) for f in schema.field("bbox").type} == {"double"}
    table = file.read()
    shapes = shapely.from_wkb(table["geometry"].to_numpy())
    assert set(column["geometry_types"]) == {s.geom_type for s in shapes}
    boxes = np.array([list(b.values()) for b in table["bbox"].to_pylist()]).reshape(-1, 4)
    np.testing.assert_array_equal(boxes, shapely.bounds(shapes).reshape(-1, 4))
    if len(shapes):
        np.testing.assert_array_equal(column["bbox"], shapely.total_bounds(shapes))
    else:
        assert "bbox" not in column


def test_metadata_follow_geoparquet(tmp_path):
    check_geoparquet(write(tmp_path / "a.parquet", [rows_of(blobs(50))]))
    two = shapely.MultiPolygon([shapely.box(0, 0, 4, 4), shapely.box(9, 9, 12, 12)])
    check_geoparquet(write(tmp_path / "b.parquet", [rows_of([two, shapely.box(0, 0, 1, 1)])]))
    check_geoparquet(write(tmp_path / "c.parquet", []))


def test_empty_table_is_valid(tmp_path):
    for name, batches in (("a", []), ("b", [ObjectRows.empty(COLUMNS)])):
        path = write(tmp_path / name, batches)
        assert len(geopandas.read_parquet(path)) == 0
        with ObjectsFile(path) as table:
            assert len(table) == 0
            assert list(table.groups()) == []
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(0, ROW_GROUP + 3000), max_size=6))
def test_bytes_do_not_depend_on_batches(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("batches")
    rows = rows_of(blobs(ROW_GROUP + 3000, vertices=5))
    edges = [0, *sorted(cuts), len(rows)]
    whole = write(folder / "whole", [rows])
    split = write(folder / "split", [part(rows, a, b) for a, b in pairwise(edges)])
    assert sha256_file(whole) == sha256_file(split)
    assert pq.ParquetFile(whole).num_row_groups == 2


def test_memory_does_not_follow_the_rows(tmp_path):
    rows = rows_of(blobs(5000, vertices=4))
    with ObjectWriter(tmp_path / "o", CLASSES, COLUMNS) as writer:
        for _ in range(12):
            writer.write(rows)
            assert sum(map(len, writer._pending)) < ROW_GROUP
    groups = pq.ParquetFile(tmp_path / "o").metadata
    assert [groups.row_group(i).num_rows for i in range(4)] == [ROW_GROUP] * 3 + [60_000 - 3 * ROW_GROUP]


def test_exception_in_the_middle_leaves_nothing(tmp_path):
    rows = rows_of(blobs(20_000, vertices=4))

    def fail():
        with ObjectWriter(tmp_path / "o.parquet", CLASSES, COLUMNS) as writer:
            writer.write(rows)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_id": np.array([0, 3], np.int16)}, "class ids 0 to 3, but there are 3"),
        ({"class_id": np.array([-1, 0], np.int16)}, "class ids -1 to 0"),
        ({"columns": {"circularity": np.zeros(2)}}, "columns \\['circularity'\\] given"),
        ({"restored": np.zeros(1, bool)}, "differ in length"),
        ({"geometry": np.array([shapely.box(0, 0, 1, 1), shapely.Polygon()])}, "no finite outline"),
    ],
)
def test_rows_that_would_lie_are_refused(tmp_path, change, message):
    rows = replace(rows_of(blobs(2)), **change)
    with pytest.raises(OutputError, match=f"WSI514 .*{message}"):
        write(tmp_path / "o", [rows])
    assert list(tmp_path.iterdir()) == []


def test_column_names_are_unique(tmp_path):
    for columns in (("a", "a"), ("geometry",), ("probability",)):
        with pytest.raises(OutputError, match="WSI514"):
            ObjectWriter(tmp_path / "o", CLASSES, columns)
    with pytest.raises(OutputError, match="WSI514 class names repeat"):
        ObjectWriter(tmp_path / "o", (CLASSES[0], CLASSES[0]))
    assert list(tmp_path.iterdir()) == []


def test_objects_file_gives_notes_classes_and_columns(tmp_path):
    with ObjectsFile(write(tmp_path / "o", [rows_of(blobs(3))], notes={"model": "m"})) as table:
        assert table.classes == CLASSES
        assert table.columns == COLUMNS
        assert table.notes["model"] == "m"
        assert [len(g) for g in table.groups(["class_id"])] == [3]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no parquet")
    geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.box(0, 0, 1, 1)]).to_parquet(tmp_path / "other")
    for name in ("text", "other", "missing"):
        with pytest.raises(OutputError, match="WSI515"):
            ObjectsFile(tmp_path / name)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(0, 200), st.integers(0, 1 << 40)),
        max_size=20,
    )
)
def test_ids_are_uuid5(rows):
    xy = np.array([r[:2] for r in rows], float).reshape(-1, 2)
    kind, size = (np.array([r[k] for r in rows], np.int64) for k in (2, 3))
    ids = object_ids(NAMESPACE, xy, kind, size)
    for name, (x, y), k, s in zip(ids, xy, kind, size, strict=True):
        text = f"{round(x * 100)},{round(y * 100)},{k},{s}"
        assert name.decode() == str(uuid.uuid5(NAMESPACE, text))


def test_ids_differ_by_input_model_place_class_and_size():
    one = np.ones(1, np.int64)
    at = np.array([[5.0, 6.0]])
    base = object_ids(NAMESPACE, at, one, one)
    others = [
        object_ids(id_namespace("cd", "model", "1"), at, one, one),
        object_ids(id_namespace("ab" * 32, "model", "2"), at, one, one),
        object_ids(NAMESPACE, at + 0.01, one, one),
        object_ids(NAMESPACE, at, one * 2, one),
        object_ids(NAMESPACE, at, one, one * 2),
    ]
    assert len({bytes(i[0]) for i in [base, *others]}) == 6
