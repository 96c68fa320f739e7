"""What goes wrong around a run stays small: one input, one line, nothing lost."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import wsitk
from wsitk.errors import OutputError, UsageError
from wsitk.pipeline import Event, Input, Runner
from wsitk.settings import Settings
from wsitk.sources.discover import expand_inputs
from wsitk.testing import ConstantModel, IdentityModel, OracleModel, SyntheticSlide

PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "preview": False}
SLIDE = SyntheticSlide.make((520, 610), count=200, seed=4)


def oracle() -> OracleModel:
    return OracleModel(tile=(192, 192), halo=(32, 32))


def write(path: Path, **options: Any) -> Path:
    tifffile.imwrite(
        path, SLIDE.pixels, tile=(128, 128), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER", **options,
    )  # fmt: skip
    return path


def two(tmp_path: Path) -> list[Input]:
    return [Input(n, str(write(tmp_path / n))) for n in ("a.tiff", "b.tiff")]


def test_an_input_that_vanishes_after_planning_does_not_stop_the_others(tmp_path: Path) -> None:
    inputs = two(tmp_path)

    def vanish(event: Event) -> None:
        if event.kind == "planned" and event.input == "a.tiff":
            (tmp_path / "a.tiff").unlink()

    rows = {
        r.input: r for r in Runner(oracle(), tmp_path / "out", Settings(**PLAIN), on_event=vanish).run(inputs)
    }
    assert (rows["a.tiff"].status, rows["a.tiff"].code) == ("failed", "WSI410")
    assert rows["b.tiff"].status == "done"


@pytest.mark.parametrize("damage", ["{}", "not json", '{"key": 3}'])
def test_a_damaged_record_stops_its_own_input_only(damage: str, tmp_path: Path) -> None:
    inputs = two(tmp_path)
    Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run(inputs)
    (tmp_path / "out" / "a.tiff" / "provenance.json").write_text(damage)
    rows = {r.input: r for r in Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run(inputs)}
    assert rows["a.tiff"].status == "failed"
    assert rows["b.tiff"].status == "done"


def test_a_file_where_the_folder_should_be_is_the_environments_fault(tmp_path: Path) -> None:
    inputs = two(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.tiff").write_text("in the way")
    rows = {r.input: r for r in Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run(inputs)}
    assert (rows["a.tiff"].code, rows["a.tiff"].exit_code) == ("WSI502", 3)
    assert rows["b.tiff"].status == "done"


@pytest.mark.parametrize("tissue", ["auto", "none"])
def test_a_corrupt_tile_of_the_file_is_data(tissue: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tiff", compression="jpeg", compressionargs={"level": 95})
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        begin, count = page.dataoffsets[7], page.databytecounts[7]
    with open(path, "r+b") as file:
        file.seek(begin + count // 2)
        file.write(b"\xff\xd8" * 100)
    settings = Settings(**{**PLAIN, "tissue": tissue, "max_unreadable": 0.9})
    (row,) = Runner(oracle(), tmp_path / "out", settings).run([Input("a.tiff", str(path))])
    assert row.status == "done"
    assert row.tiles["unreadable"] >= 1
    assert row.tiles["ok"] >= 1


def test_every_pixel_has_a_tile_even_where_the_mask_was_rounded(tmp_path: Path) -> None:
    model = IdentityModel(tile=(256, 256), halo=(32, 32))
    pixels = np.ascontiguousarray(SLIDE.pixels[:391, :391])
    maps = wsitk.run(model, pixels, out=tmp_path, spacing=0.5, **PLAIN).maps.compute()
    assert np.array_equal(np.moveaxis(np.rint(maps), 0, -1).astype(np.uint8), pixels)


def test_overwrite_takes_the_folder_over_and_leaves_what_is_not_ours(tmp_path: Path) -> None:
    wsitk.run(oracle(), SLIDE.pixels, out=tmp_path, spacing=0.5, **PLAIN)
    foreign = tmp_path / "array" / "notes.txt"
    foreign.write_text("mine")
    other = {**PLAIN, "maps": False}
    result = wsitk.run(oracle(), SLIDE.pixels, out=tmp_path, spacing=0.5, overwrite=True, **other)
    assert foreign.read_text() == "mine"
    assert not (tmp_path / "array" / "maps.ome.zarr").exists()
    assert "notes.txt" not in result.provenance["outputs"]


def test_overwrite_with_the_same_settings_keeps_what_is_done(tmp_path: Path) -> None:
    inputs = two(tmp_path)[:1]
    settings = Settings(**PLAIN, overwrite=True, roi=(0, 0, 400, 400))
    Runner(oracle(), tmp_path / "out", settings).run(inputs)
    events: list[str] = []
    Runner(oracle(), tmp_path / "out", settings, on_event=lambda e: events.append(e.kind)).run(inputs)
    assert events == ["ended"]


def test_results_without_their_journal_still_belong_to_their_run(tmp_path: Path) -> None:
    wsitk.run(oracle(), SLIDE.pixels, out=tmp_path, spacing=0.5, **PLAIN)
    shutil.rmtree(tmp_path / "array" / ".wsitk")
    with pytest.raises(OutputError, match="WSI510"):
        wsitk.run(
            ConstantModel(0.5, tile=(192, 192), halo=(32, 32)),
            SLIDE.pixels,
            out=tmp_path,
            spacing=0.5,
            **PLAIN,
        )
    again = wsitk.run(oracle(), SLIDE.pixels, out=tmp_path, spacing=0.5, **PLAIN)
    assert len(again.objects) == len(SLIDE.truth)


def test_strays_of_a_crash_do_not_enter_the_record(tmp_path: Path) -> None:
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / ".provenance.json.part").write_text("half")
    (tmp_path / "array" / ".DS_Store").write_text("")
    outputs = wsitk.run(oracle(), SLIDE.pixels, out=tmp_path, spacing=0.5, **PLAIN).provenance["outputs"]
    assert not [name for name in outputs if name.startswith(".")]


def test_results_are_not_taken_for_inputs(tmp_path: Path) -> None:
    inputs = two(tmp_path)
    Runner(oracle(), tmp_path / "out", Settings(**{**PLAIN, "preview": True})).run(inputs)
    assert [i.name for i in expand_inputs([tmp_path]).items] == ["a.tiff", "b.tiff"]


def test_a_second_run_into_the_same_folder_adds_its_rows(tmp_path: Path) -> None:
    for item in two(tmp_path):
        Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run([item])
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        assert [r["input"] for r in csv.DictReader(file)] == ["a.tiff", "b.tiff"]
    assert set(json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]) == {"a.tiff", "b.tiff"}


@pytest.mark.parametrize("name", ["../escaped", "/absolute", "", "summary.csv"])
def test_a_name_cannot_leave_the_output_folder(name: str, tmp_path: Path) -> None:
    source = wsitk.open_source(SLIDE.pixels, mpp=0.5, name="array")
    runner = Runner(oracle(), tmp_path / "out", Settings(**PLAIN))
    (row,) = runner.run([Input(name, source)])
    assert row.code == "WSI015"
    assert not (tmp_path / "escaped").exists()


def test_a_pixel_size_for_an_open_source_is_refused_not_dropped(tmp_path: Path) -> None:
    source = wsitk.open_source(SLIDE.pixels)
    with pytest.raises(UsageError, match="WSI020"):
        wsitk.run(oracle(), source, out=tmp_path, spacing=0.5)


@pytest.mark.parametrize("when", ["commit", "finish"])
def test_a_full_disk_stops_the_run_and_can_be_resumed(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = two(tmp_path)
    real, target = os.replace, "000000.npz" if when == "commit" else "objects.parquet"

    def full(source: Any, target_path: Any, **more: Any) -> None:
        if Path(target_path).name == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target_path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(os, "rename", full)
        with pytest.raises(OutputError, match="WSI501"):
            Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run(inputs)
    rows = Runner(oracle(), tmp_path / "out", Settings(**PLAIN)).run(inputs)
    assert [r.status for r in rows] == ["done", "done"]
