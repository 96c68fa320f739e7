"""Prompts from every kind of file say the same; those that make no sense are refused by their place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from writers_data import CLASSES, COLUMNS, blobs, rows_of

from wsitk.errors import UsageError, WsitkError
from wsitk.geometry import Region
from wsitk.models.sam.prompts import read_prompts
from wsitk.writers.parquet import ObjectWriter


def geojson(path: Path, *features: dict[str, Any]) -> Path:
    text = json.dumps({"type": "FeatureCollection", "features": list(features)})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def feature(kind: str, coordinates: Any, **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": properties,
    }


SQUARE = [[[10, 20], [40, 20], [40, 60], [10, 60], [10, 20]]]


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_geojson_and_csv_say_the_same(tmp_path: Path, name: str) -> None:
    drawn = geojson(
        tmp_path / name,
        feature("Polygon", SQUARE, prompt="p", classification={"name": "Tumour"}),
        feature("Point", [25.5, 30], prompt="p"),
        feature("MultiPoint", [[1, 2], [3, 4]], classification={"name": "Gland"}),
        feature("Point", [12, 22], prompt="p", label=0),
    )
    table = tmp_path / "a.csv"
    table.write_text(
        "x,y,label,x0,y0,x1,y1,prompt,class\n25.5,30,1,10,20,40,60,p,Tumour\n"
        "1,2,,,,,,q,Gland\n3,4,,,,,,q,\n12,22,0,,,,,p,\n"
    )
    one, two = read_prompts(drawn), read_prompts(table)
    assert one.sha256 == two.sha256
    assert one.classes == ("Tumour", "Gland")
    assert one.offset.tolist() == [0, 2, 4]
    assert one.point_label.tolist() == [1, 0, 1, 1]
    assert one.box_xy[0].tolist() == [10, 20, 40, 60]
    assert one.bounds_xy.tolist() == [[10, 20, 40, 60], [1, 2, 3, 4]]


def test_windows_that_divide_an_image_divide_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y,x0,y0,x1,y1\n,,10,20,40,60\n50,9,,,,\n,,60,20,90,60\n")
    prompts = read_prompts(path)
    assert prompts.centred(Region((0, 0), (100, 50))).tolist() == [0]
    assert prompts.centred(Region((0, 50), (100, 50))).tolist() == [1, 2]
    assert prompts.centred(Region((0, 0), (40, 100))).tolist() == [1]
    assert prompts.centred(Region((40, 0), (60, 100))).tolist() == [0, 2]


def test_objects_of_another_model_are_boxes(tmp_path: Path) -> None:
    rows = rows_of(blobs(50))
    with ObjectWriter(tmp_path / "objects.parquet", CLASSES, COLUMNS) as writer:
        writer.write(rows)
    prompts = read_prompts(tmp_path / "objects.parquet")
    assert len(prompts) == 50
    assert np.array_equal(prompts.bounds_xy, shapely.bounds(rows.geometry))
    names = [CLASSES[k].name for k in rows.class_id]
    assert [prompts.classes[k] for k in prompts.class_id] == names
    assert not len(prompts.point_xy)


def test_labels_are_boxes_and_masks_slice_by_slice(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((20, 30, 4), np.int16)  # NIfTI's (x, y, z)
    labels[3:8, 10:20, 1] = 5
    labels[12:15, 2:4, 1] = 9
    labels[3:6, 10:12, 3] = 5
    labels[3, 10, 3] = 0
    nibabel.Nifti1Image(labels, np.eye(4)).to_filename(tmp_path / "l.nii.gz")
    prompts = read_prompts(tmp_path / "l.nii.gz")
    assert prompts.box_xy.tolist() == [[3, 10, 8, 20], [12, 2, 15, 4], [3, 10, 6, 12]]
    assert prompts.plane.tolist() == [1, 1, 3]
    assert [prompts.classes[k] for k in prompts.class_id] == ["5", "9", "5"]
    assert prompts.masks is not None
    assert prompts.masks.mask(0).all()
    assert prompts.masks.mask(2).tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "WSI075 .*wanted one of"),
        ("a.csv", "x,y\n", "WSI075 .*holds no prompt"),
        ("a.csv", "x,y\n1,2\n3,a\n", "WSI076 .*line 3"),
        ("a.csv", "x,y,label\n1,2,7\n", "WSI076 .*label is 7"),
        ("a.csv", "x,y\n1,inf\n", "WSI076 .*no place"),
        ("a.csv", "x0,y0,x1,y1\n5,5,5,9\n", "WSI076 .*is empty"),
        ("a.csv", "name\nq\n", "WSI076 .*neither points nor a box"),
        (
            "a.geojson",
            '{"type": "FeatureCollection", "features": [{"geometry": null}]}',
            "WSI076 .*feature 1",
        ),
        ("a.geojson", '{"type": "FeatureCollection", "features": [', "WSI190"),
        ("a.parquet", "PAR1", "WSI075 .*no objects.parquet"),
    ],
)
def test_odd_files_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(WsitkError, match=said):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_said_in_the_systems_words(tmp_path: Path) -> None:
    with pytest.raises(WsitkError, match=r"WSI100 .*No such file"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="WSI075"):
        read_prompts(tmp_path / "none")
