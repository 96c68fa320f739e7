"""Restoring a slide: only what is masked changes, it comes out the same whatever happens, and everything is told."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from crashing import tree
from painting import PAINTER, SETTINGS, die_at, masked, paint, write_mask, write_slide

import wsitk
from wsitk.errors import UsageError
from wsitk.geometry import Region
from wsitk.pipeline import Input, ModelRef, Runner
from wsitk.qupath import check_geojson
from wsitk.settings import Settings
from wsitk.testing import SyntheticSlide
from wsitk.testing.painters import PlacePainter, TruthPainter
from wsitk.verify import verify

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    ["wsitk.pipeline", "wsitk.testing", "wsitk.finish", "torch", "cv2", "zarr", "numba"]
)

SHAPE = (300, 340)
BOXES = [
    ("pen", 10, 12, 30, 25),
    ("Fold", 90, 80, 12, 160),  # longer than a cell: cut
    ("dust", 200, 60, 4, 4),
    ("dust", 210, 66, 3, 5),
    ("nothing known", 320, 280, 20, 20),  # in the corner
]


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return SyntheticSlide.make(SHAPE, count=60, seed=3).pixels


@pytest.fixture(scope="module")
def slide(clean: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_slide(tmp_path_factory.mktemp("slide") / "a.tiff", clean)


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_mask(tmp_path_factory.mktemp("mask") / "mask.geojson", BOXES)


@pytest.fixture(scope="module")
def whole(slide: str, mask: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    paint(slide, mask, str(out))
    return out


def image_of(folder: Path, name: str = "restored.ome.zarr", level: int = 0) -> np.ndarray:
    array: Any = zarr.open_array(str(folder / name / str(level)), mode="r")
    values = np.asarray(array[:])
    return np.moveaxis(values, 0, -1) if values.ndim == 3 else values


def in_fresh_process(target: Callable[..., None], *args: Any) -> int | None:
    process = SPAWN.Process(target=target, args=args)
    process.start()
    process.join(300)
    return process.exitcode


# --- pixels ------------------------------------------------------------------------------------------


def test_what_is_masked_is_painted_and_nothing_else_changes(whole: Path, clean: np.ndarray) -> None:
    restored, inside = image_of(whole / "a.tiff"), masked(SHAPE, BOXES)
    assert np.array_equal(restored[~inside], clean[~inside])
    noise = PlacePainter.noise(Region((0, 0), SHAPE))
    assert np.array_equal(restored[inside], noise[inside])
    assert np.array_equal(image_of(whole / "a.tiff", "restored_mask.ome.zarr") > 0, inside)


def test_the_mask_says_of_which_kind_each_pixel_was(whole: Path) -> None:
    kinds = image_of(whole / "a.tiff", "restored_mask.ome.zarr")
    at = {"fold": kinds[100, 95], "pen": kinds[20, 20], "dust": kinds[61, 201], "other": kinds[290, 330]}
    labels: Any = zarr.open_group(str(whole / "a.tiff" / "restored_mask.ome.zarr"), mode="r").attrs["ome"]
    names = {p["label-value"]: p["name"] for p in labels["image-label"]["properties"]}
    assert {k: names[int(v)] for k, v in at.items()} == {k: k for k in at}


def test_uncertainty_is_the_deviation_over_samples(whole: Path) -> None:
    spread = image_of(whole / "a.tiff", "restoration.ome.zarr")[..., 3]
    region = Region((0, 0), SHAPE)
    each = np.stack([PlacePainter.noise(region, sample=k).astype(float) for k in range(2)])
    wanted = np.floor(each.std(axis=0, ddof=1).mean(axis=-1) + 0.5)
    inside = masked(SHAPE, BOXES)
    assert np.array_equal(spread[inside], wanted[inside])
    assert not spread[~inside].any()


def test_regions_are_told_one_by_one(whole: Path, clean: np.ndarray) -> None:
    rows = pq.read_table(whole / "a.tiff" / "restored_regions.parquet").to_pylist()
    pixels = {}
    for row in rows:
        pixels[row["kinds"]] = pixels.get(row["kinds"], 0) + row["pixels"]
    assert pixels == {"pen": 750, "fold": 1920, "dust": 31, "other": 400}
    assert {row["status"] for row in rows} == {"restored"}
    pen = next(row for row in rows if row["kinds"] == "pen")
    assert (pen["x"], pen["y"], pen["width"], pen["height"]) == (10, 12, 30, 25)
    box = Region((12, 10), (25, 30))
    before, after = clean[box.slices()].astype(float), PlacePainter.noise(box).astype(float)
    assert pen["change"] == pytest.approx(np.abs(after - before).mean(), abs=1e-3)
    assert pen["area_um2"] == pytest.approx(750 * 0.25)
    report = check_geojson(whole / "a.tiff" / "restored_regions.geojson.gz")
    assert report.ok
    assert report.objects == {"annotation": len(rows)}


def test_results_name_model_mask_and_seed(whole: Path) -> None:
    record = wsitk.Result(whole / "a.tiff").provenance
    said = record["restoration"]
    assert said["model"] == ["testing-place-painter", "1", ""]
    assert (said["seed"], said["samples"]) == (0, 2)
    assert said["regions"] == {"restored": 9, "left": 0}
    assert said["pixels"] == 3101
    assert verify(whole).ok
    assert (whole / "a.tiff" / "before_after.png").is_file()


@pytest.mark.parametrize("scale", [2.0, 2.5, 4.0])
def test_a_coarser_model_fills_in_without_a_shift(scale: float, tmp_path: Path) -> None:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ramp = np.stack([20 + y * 0.5, 20 + x * 0.5, 60 + (y + x) * 0.25], axis=-1)
    pixels = np.rint(ramp).astype(np.uint8)
    shape = tuple(int(n / scale + 0.5) for n in SHAPE)
    my, mx = ((np.arange(n) + 0.5) * scale - 0.5 for n in shape)
    truth = np.stack(
        np.broadcast_arrays(20 + my[:, None] * 0.5, 20 + mx * 0.5, 60 + (my[:, None] + mx) * 0.25), -1
    )
    spoiled = pixels.copy()
    spoiled[masked(SHAPE, BOXES)] = 0
    slide = write_slide(tmp_path / "a.tiff", spoiled)
    model = TruthPainter(np.rint(truth).astype(np.uint8), tile=64, halo=8, spacing_um=0.5 * scale)
    result = wsitk.run(
        model, slide, out=tmp_path / "out", mask=write_mask(tmp_path / "m.geojson", BOXES), threads=1
    )
    restored, inside = image_of(result.path), masked(SHAPE, BOXES)
    assert np.array_equal(restored[~inside], spoiled[~inside])
    import cv2

    depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_C, 3)
    deep = depth > 2  # the outermost two fade in
    assert np.abs(restored[deep].astype(int) - pixels[deep]).max() <= 2
    rim = depth == 1
    assert (np.abs(restored[rim].astype(int) - pixels[rim]) > 0).any()


# --- what is asked for -------------------------------------------------------------------------------


def test_a_mask_of_nothing_changes_nothing(slide: str, mask: str, clean: np.ndarray, tmp_path: Path) -> None:
    result = wsitk.run(
        PlacePainter(**PAINTER), slide, out=tmp_path, mask=mask, roi=(130, 100, 60, 60), **SETTINGS
    )
    assert np.array_equal(image_of(result.path), clean)
    assert result.provenance["restoration"]["regions"] == {"restored": 0, "left": 0}
    assert "nothing was restored" in result.provenance["remark"]
    assert verify(tmp_path).ok


def test_a_mask_of_everything_is_refused_in_one_line(slide: str, tmp_path: Path) -> None:
    everything = write_mask(tmp_path / "all.geojson", [("pen", -5, -5, SHAPE[1] + 10, SHAPE[0] + 10)])
    with pytest.raises(UsageError, match=r"WSI680 a\.tiff: the mask covers everything"):
        wsitk.run(PlacePainter(**PAINTER), slide, out=tmp_path / "out", mask=everything, **SETTINGS)


def test_a_region_without_a_known_pixel_is_left_and_told(
    slide: str, clean: np.ndarray, tmp_path: Path
) -> None:
    boxes = [("pen", 0, 0, 230, 230), ("dust", 300, 20, 5, 5)]
    result = wsitk.run(
        PlacePainter(**PAINTER),
        slide,
        out=tmp_path / "out",
        mask=write_mask(tmp_path / "m.geojson", boxes),
        max_unreadable=1.0,
        **SETTINGS,
    )
    rows = pq.read_table(result.path / "restored_regions.parquet").to_pylist()
    left = [r for r in rows if r["status"] == "left"]
    assert left
    assert all("WSI681" in r["reason"] for r in left)
    assert "left as they were (WSI681" in result.provenance["remark"]
    restored, told = image_of(result.path), image_of(result.path, "restored_mask.ome.zarr") > 0
    assert np.array_equal(restored[~told], clean[~told])
    assert told.sum() == sum(r["pixels"] for r in rows if r["status"] == "restored")
    assert not told[:90, :90].any()
    assert told[masked(SHAPE, boxes[1:])].all()


def test_artifacts_are_looked_for_where_no_mask_is_given(slide: str, tmp_path: Path) -> None:
    result = wsitk.run(PlacePainter(**PAINTER), slide, out=tmp_path, threads=1)
    assert result.provenance["key"]["restoration"]["mask"]["kinds"]


def test_other_masks_samples_or_seeds_are_other_runs(slide: str, mask: str, tmp_path: Path) -> None:
    paint(slide, mask, str(tmp_path / "out"))
    other = write_mask(tmp_path / "other.geojson", BOXES[:2])
    for change in ({"mask": other}, {"restore_samples": 3}, {"seed": 1}):
        with pytest.raises(wsitk.errors.OutputError, match="WSI510"):
            wsitk.run(
                PlacePainter(**PAINTER), slide, out=tmp_path / "out", **{**SETTINGS, "mask": mask, **change}
            )


def test_samples_of_another_kind_are_refused(slide: str, mask: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI682"):
        wsitk.run(PlacePainter(**PAINTER), slide, out=tmp_path, mask=mask, samples=4)
    with pytest.raises(UsageError, match="WSI683"):
        wsitk.run(PlacePainter(**PAINTER), slide, out=tmp_path, mask=mask, roi=mask)


# --- order, threads, deaths --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, str]:
    return tree(whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(
    workers: int, slide: str, mask: str, expected: dict[str, str], tmp_path: Path
) -> None:
    wsitk.run(PlacePainter(**PAINTER), slide, out=tmp_path, **{**SETTINGS, "mask": mask, "workers": workers})
    assert tree(tmp_path) == expected


def test_parts_in_any_order_give_the_same_bytes(
    slide: str, mask: str, expected: dict[str, str], tmp_path: Path
) -> None:
    for part in ((2, 3), (0, 3), (1, 3)):
        settings = Settings(**{**SETTINGS, "mask": mask, "part": part})
        Runner(PlacePainter(**PAINTER), tmp_path, settings).run([Input("a.tiff", slide)])
    assert tree(tmp_path) == expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_and_resumed_equals_never_killed(
    seed: int, slide: str, mask: str, expected: dict[str, str], tmp_path: Path
) -> None:
    step = random.Random(seed).randint(1, 40)
    assert in_fresh_process(die_at, step, slide, mask, str(tmp_path)) == -signal.SIGKILL
    assert in_fresh_process(paint, slide, mask, str(tmp_path)) == 0
    assert tree(tmp_path) == expected


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Let child processes find the models of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("WSITK_TEST_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def test_a_model_that_is_killed_is_asked_again(
    slide: str, mask: str, expected: dict[str, str], importable: Path, tmp_path: Path
) -> None:
    settings = Settings(**{**SETTINGS, "mask": mask})
    with Runner(ModelRef("painting:killed_once"), tmp_path / "out", settings) as runner:
        (row,) = runner.run([Input("a.tiff", slide)])
    assert row.status == "done"
    assert importable.exists()
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_region_that_kills_every_model_is_left(
    slide: str, mask: str, clean: np.ndarray, importable: Path, tmp_path: Path
) -> None:
    settings = Settings(**{**SETTINGS, "mask": mask, "max_unreadable": 1.0})
    with Runner(ModelRef("painting:poisoned"), tmp_path / "out", settings) as runner:
        (row,) = runner.run([Input("a.tiff", slide)])
    assert row.status == "done"
    assert "WSI401" in row.message
    restored, rest = image_of(tmp_path / "out" / "a.tiff"), masked(SHAPE, BOXES[2:])
    assert np.array_equal(restored[:40, :40], clean[:40, :40])
    assert np.array_equal(restored[rest], PlacePainter.noise(Region((0, 0), SHAPE))[rest])
    assert verify(tmp_path / "out").ok


# --- files as they are -------------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_left_and_grey_in_the_copy(
    slide: str, mask: str, clean: np.ndarray, tmp_path: Path
) -> None:
    import tifffile

    broken = tmp_path / "a.tiff"
    data = bytearray(Path(slide).read_bytes())
    with tifffile.TiffFile(slide) as file:
        offset = file.pages[0].dataoffsets[0]  # rows 0 to 64, columns 0 to 64: under the stroke of the pen
    data[offset : offset + 60] = b"\xff" * 60
    broken.write_bytes(data)
    settings = {**SETTINGS, "mask": mask, "max_unreadable": 1.0}
    result = wsitk.run(PlacePainter(**PAINTER), str(broken), out=tmp_path / "out", **settings)
    rows = pq.read_table(result.path / "restored_regions.parquet").to_pylist()
    (left,) = [row for row in rows if row["status"] == "left"]
    assert left["kinds"] == "pen"
    assert "WSI111" in left["reason"]
    restored, inside = image_of(result.path), masked(SHAPE, BOXES[1:])
    assert (restored[:64, :64] == 128).all()
    outside = ~inside
    outside[:64, :64] = False
    assert np.array_equal(restored[outside], clean[outside])
    assert np.array_equal(restored[inside], PlacePainter.noise(Region((0, 0), SHAPE))[inside])
    assert result.provenance["restoration"]["unreadable_pixels"] == 64 * 64
    assert "WSI689 4,096 pixels" in result.provenance["remark"]
    assert result.provenance["tiles"]["unreadable"] == 1

    from wsitk.restoration.looks import before_and_after

    with wsitk.open_source(broken) as source:
        before, after = before_and_after(source, str(result.path), Region((40, 40), (70, 70)), 40)
    assert (before[:24, :24] == 128).all()
    assert np.array_equal(after[24:], restored[64:110, 40:110])


def test_untouched_pixels_of_a_real_slide_are_equal(data: Path, tmp_path: Path) -> None:
    path = data / "data" / "wsi" / "cmu-1-small-region.svs"
    boxes = [("pen", 300, 200, 150, 300), ("dust", 1500, 2000, 20, 20), ("fold", 2100, 2900, 119, 66)]
    mask = write_mask(tmp_path / "m.geojson", boxes)
    model = PlacePainter(tile=512, halo=32, spacing_um=1.0)
    result = wsitk.run(model, path, out=tmp_path / "out", mask=mask, threads=1)
    with wsitk.open_source(path) as source:
        plain = source.read(Region((0, 0), source.shape))
    restored, inside = image_of(result.path), masked(plain.shape[:2], boxes)
    assert np.array_equal(restored[~inside], plain[~inside])
    assert (restored[inside] != plain[inside]).any(axis=1).mean() > 0.9
    assert np.array_equal(image_of(result.path, "restored_mask.ome.zarr") > 0, inside)
