"""`--restore`: one command paints over artifacts and finds objects; what is found there is marked and not counted."""

from __future__ import annotations

import csv
import gzip
import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from crashing import tree
from painting import masked, write_mask, write_slide
from typer.testing import CliRunner

import wsitk
from wsitk.cli.main import app
from wsitk.errors import UsageError
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.qupath import check_geojson
from wsitk.record import InputRow
from wsitk.restore_first import restore_first
from wsitk.settings import Settings
from wsitk.testing import OracleModel, SyntheticSlide
from wsitk.verify import verify

SHAPE = (260, 280)
BOXES = [("pen", 20, 30, 90, 60), ("fold", 150, 100, 14, 130)]
SETTINGS = Settings(tissue="none", workers=1, threads=1, device="cpu", supervise=False)
PAINTER = ModelRef("painting:truth")


@pytest.fixture(scope="module")
def truth() -> SyntheticSlide:
    return SyntheticSlide.make(SHAPE, count=160, seed=8)


@pytest.fixture(scope="module")
def spoiled(truth: SyntheticSlide, tmp_path_factory: pytest.TempPathFactory) -> str:
    pixels = truth.pixels.copy()
    pixels[masked(SHAPE, BOXES)] = (200, 10, 10)
    return write_slide(tmp_path_factory.mktemp("slide") / "a.tiff", pixels)


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mask(tmp_path_factory.mktemp("mask") / "mask.geojson", BOXES)


@pytest.fixture(autouse=True)
def known(truth: SyntheticSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "truth.npy", truth.pixels)
    monkeypatch.setenv("WSITK_TEST_TRUTH", str(tmp_path / "truth.npy"))


def oracle() -> OracleModel:
    return OracleModel(tile=(160, 160), halo=(32, 32))


def run_both(slide: str, out: Path, settings: Settings) -> list[InputRow]:
    inputs, rows, lost = restore_first(PAINTER, [Input("a.tiff", slide)], out, settings)
    with Runner(oracle(), out, settings) as runner:
        return [*rows, *lost, *runner.run(inputs)]


@pytest.fixture(scope="module")
def out(spoiled: str, mask: str, truth: SyntheticSlide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    np.save(folder.parent / "truth-of-module.npy", truth.pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSITK_TEST_TRUTH", str(folder.parent / "truth-of-module.npy"))
        rows = run_both(spoiled, folder, replace(SETTINGS, mask=mask))
    assert [(row.input, row.status) for row in rows] == [("restoration/a.tiff", "done"), ("a.tiff", "done")]
    return folder


def doubtful_numbers(truth: SyntheticSlide) -> set[int]:
    """Return the nuclei of which any pixel was restored."""
    return set(np.unique(truth.labels[masked(SHAPE, BOXES)]).tolist()) - {0}


def test_all_nuclei_are_found_and_those_in_restored_pixels_are_marked(
    out: Path, truth: SyntheticSlide
) -> None:
    rows = pq.read_table(out / "a.tiff" / "objects.parquet", columns=["number", "restored"]).to_pylist()
    assert {int(row["number"]) for row in rows} == set(range(1, len(truth.truth) + 1))
    marked = {int(row["number"]) for row in rows if row["restored"]}
    assert marked == doubtful_numbers(truth)
    assert 10 < len(marked) < len(rows)


def test_they_are_counted_apart(out: Path, truth: SyntheticSlide) -> None:
    record = wsitk.Result(out / "a.tiff").provenance
    doubtful = doubtful_numbers(truth)
    rest = set(range(1, len(truth.truth) + 1)) - doubtful
    for told, numbers in (("objects", rest), ("restored_objects", doubtful)):
        odd = sum(n % 2 for n in numbers)
        assert record[told] == {"even": len(numbers) - odd, "odd": odd}
    assert f"{len(doubtful)} objects in restored pixels are not counted" in record["remark"]
    with open(out / "summary.csv", newline="") as file:
        rows = {row["input"]: row for row in csv.DictReader(file)}
    assert int(rows["a.tiff"]["objects_even"]) == record["objects"]["even"]
    assert rows["restoration/a.tiff"]["status"] == "done"


def test_provenance_names_both_models(out: Path) -> None:
    record = wsitk.Result(out / "a.tiff").provenance
    assert record["model"]["name"] == "testing-oracle"
    assert record["input"]["restoration"]["model"][0] == "testing-truth-painter"
    assert any("WSI688" in line for line in record["warnings"])


def test_qupath_counts_them_apart_too(out: Path, truth: SyntheticSlide) -> None:
    path = out / "a.tiff" / "objects.geojson.gz"
    assert check_geojson(path).ok
    features = json.loads(gzip.decompress(path.read_bytes()))["features"]
    names = Counter(f["properties"]["classification"]["name"] for f in features)
    record = wsitk.Result(out / "a.tiff").provenance
    assert names == {
        **record["objects"],
        **{f"{name}: Restored": n for name, n in record["restored_objects"].items()},
    }
    flagged = [f for f in features if f["properties"].get("metadata", {}).get("restored") == "true"]
    assert len(flagged) == sum(record["restored_objects"].values())


def test_everything_verifies_and_running_again_changes_nothing(out: Path, spoiled: str, mask: str) -> None:
    report = verify(out)
    assert report.ok
    assert {i.name for i in report.inputs} == {"a.tiff", "restoration/a.tiff"}
    assert not any(i.findings for i in report.inputs)
    assert not report.findings
    before = tree(out)
    rows = run_both(spoiled, out, replace(SETTINGS, mask=mask))
    assert {row.status for row in rows} == {"done"}
    assert tree(out) == before


def test_counting_them_is_another_run(out: Path, spoiled: str, mask: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, mask=mask, count_restored=True)
    (first, second) = run_both(spoiled, out, settings)
    assert (first.status, second.status, second.code) == ("done", "failed", "WSI510")
    run_both(spoiled, tmp_path, settings)
    record = wsitk.Result(tmp_path / "a.tiff").provenance
    plain = wsitk.Result(out / "a.tiff").provenance
    assert sum(record["objects"].values()) == sum(plain["objects"].values()) + sum(
        plain["restored_objects"].values()
    )
    assert "restored_objects" not in record
    assert record["remark"] == ""


def test_a_slide_that_is_not_restored_is_not_looked_at(spoiled: str, tmp_path: Path) -> None:
    everything = write_mask(tmp_path / "all.geojson", [("pen", -5, -5, 400, 400)])
    settings = replace(SETTINGS, mask=everything)
    inputs, rows, lost = restore_first(PAINTER, [Input("a.tiff", spoiled)], tmp_path / "out", settings)
    assert not inputs
    assert [r.code for r in rows] == ["WSI680"]
    assert [(r.input, r.code) for r in lost] == [("a.tiff", "WSI685")]


def test_parts_and_open_sources_are_refused(spoiled: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI686"):
        restore_first(PAINTER, [Input("a.tiff", spoiled)], tmp_path, replace(SETTINGS, part=(0, 2)))
    with wsitk.open_source(spoiled) as source, pytest.raises(UsageError, match="WSI686"):
        restore_first(PAINTER, [Input("a.tiff", source)], tmp_path, SETTINGS)


# --- the command line --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """`run` takes SIGTERM and SIGINT for itself; give them back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["run", *words, "--no-supervise", "--threads", "1", "--workers", "1"])


def test_one_command_does_both(spoiled: str, mask: str, out: Path, tmp_path: Path) -> None:
    words: Sequence[str] = ("--tissue", "none", "--tile", "160", "--halo", "32", "--device", "cpu")
    model = "wsitk.testing.oracles:OracleModel"
    result = command(
        model, spoiled, "-o", str(tmp_path / "out"), "--restore", "--restore-model", "painting:truth", "--mask", mask,
        *words,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    a, b = (pq.read_table(folder / "a.tiff" / "objects.parquet") for folder in (out, tmp_path / "out"))
    assert a.column("restored").to_pylist() == b.column("restored").to_pylist()
    assert a.column("geometry").to_pylist() == b.column("geometry").to_pylist()


def test_a_mask_that_is_no_file_is_refused(spoiled: str, tmp_path: Path) -> None:
    result = command("painting:truth", spoiled, "-o", str(tmp_path / "out"), "--mask", "nowhere.geojson")
    assert isinstance(result.exception, UsageError)
    assert result.exception.code == "WSI687"


def test_a_dry_run_paints_nothing(spoiled: str, mask: str, tmp_path: Path) -> None:
    result = command("painting:truth", spoiled, "-o", str(tmp_path / "out"), "--mask", mask, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "tiles" in result.output
    assert not (tmp_path / "out").exists()


def test_restored_objects_are_told_at_any_scale(out: Path) -> None:
    from wsitk.objects import ObjectTable
    from wsitk.restoration.overlap import RestoredPixels

    inside = masked(SHAPE, BOXES)
    for scale in (1.0, 2.0, 0.5):
        pixels = RestoredPixels(out / "restoration" / "a.tiff", SHAPE, (scale, scale))
        labels = np.zeros(tuple(int(n / scale) for n in SHAPE), np.int32)
        # away from the pen, over its corner, beside it, and in it
        for value, (y, x) in enumerate(((4, 4), (26, 16), (20, 40), (60, 60)), 1):
            labels[int(y / scale) : int((y + 8) / scale), int(x / scale) : int((x + 8) / scale)] = value
        found = pixels.holds(ObjectTable.from_labels(labels))
        assert (
            found.tolist()
            == [False, True, False, True]
            == [bool(inside[y : y + 8, x : x + 8].any()) for y, x in ((4, 4), (26, 16), (20, 40), (60, 60))]
        )
