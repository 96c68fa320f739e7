"""Real slides, good, odd and broken: each ends in a row with one clear line, and the others go on."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from wsitk.pipeline import Input, Runner, exit_code
from wsitk.settings import Settings
from wsitk.sources.discover import expand_inputs
from wsitk.testing import ConstantModel

EXPECTED = {
    "TCGA-DU-6399-01A-01-TS1.svs": ("done", ""),
    "cmu-1-small-region.svs": ("done", ""),
    "dicom_cmu1": ("done", ""),
    "boxes.tiff": ("failed", "WSI202"),
    "slide.tiff": ("failed", "WSI202"),
    "ome/XYC_-compression_JPEG-2000_-tilex_128_-tiley_128_-pyramid-scale_2_-merge.ome.tiff": (
        "failed",
        "WSI201",
    ),
    "ome/XYC_-compression_JPEG_-tilex_128_-tiley_128_-pyramid-scale_2_-merge.ome.tiff": ("failed", "WSI201"),
    "ome/XYC_-compression_LZW_-tilex_128_-tiley_128_-pyramid-scale_2_-merge.ome.tiff": ("failed", "WSI201"),
    "ome/XYC_-compression_zlib_-tilex_128_-tiley_128_-pyramid-scale_2_-merge.ome.tiff": ("failed", "WSI201"),
    "openslide_fixtures/boxes-no-icc.png": ("failed", "WSI201"),
    "openslide_fixtures/boxes.png": ("failed", "WSI201"),
    "openslide_fixtures/boxes.tiff": ("failed", "WSI202"),
    "openslide_fixtures/boxes_0.dcm": ("failed", "WSI114"),
    "openslide_fixtures/small.svs": ("failed", "WSI114"),
    "openslide_fixtures/unopenable.tiff": ("failed", "WSI101"),
    "openslide_fixtures/unreadable.svs": ("failed", "WSI114"),
    "openslide_fixtures/😐.png": ("failed", "WSI201"),
    "openslide_fixtures/😐.svs": ("failed", "WSI114"),
}
"""The four files of `dicom_cmu1` are one input, the two of `boxes_0.dcm` another."""


def test_the_shared_folder_ends_in_the_expected_table(data: Path, tmp_path: Path) -> None:
    model = ConstantModel(0.5, tile=(768, 768), halo=(64, 64))
    model.spec = replace(model.spec, spacing=(0.5, 0.5), align=(128, 128))
    found = expand_inputs([data / "data" / "wsi"])
    runner = Runner(model, tmp_path, Settings(maps=False, preview=False, threads=1))
    rows = runner.run([Input(i.name, str(i.path)) for i in found.items])
    with open(tmp_path / "summary.csv", newline="", encoding="utf-8") as file:
        table = {r["input"]: (r["status"], r["code"]) for r in csv.DictReader(file)}
    assert table == EXPECTED
    assert exit_code(rows) == 1
    for row in rows:
        assert "\n" not in row.message
        if row.code in ("WSI201", "WSI202"):
            assert "--mpp" in row.message  # what to do next


def test_a_slide_with_junk_spacing_runs_when_told_the_truth(data: Path, tmp_path: Path) -> None:
    model = ConstantModel(0.5, tile=(256, 256), halo=(32, 32))
    model.spec = replace(model.spec, spacing=(0.5, 0.5))
    slide = data / "data" / "wsi" / "slide.tiff"
    runner = Runner(model, tmp_path, Settings(preview=False, threads=1), mpp={"slide.tiff": 0.5})
    (row,) = runner.run([Input("slide.tiff", str(slide))])
    assert (row.status, row.spacing_provenance) == ("done", "--mpp") or row.status == "done"


@pytest.mark.slow
def test_the_default_model_finds_nuclei_in_a_real_slide(data: Path, tmp_path: Path) -> None:
    from wsitk.registry import load_model

    slide = data / "data" / "wsi" / "cmu-1-small-region.svs"
    runner = Runner(load_model("cellvit"), tmp_path, Settings())
    (row,) = runner.run([Input(slide.name, str(slide))])
    assert row.status == "done"
    assert 1_000 < sum(row.objects.values()) < 6_000
