"""The pipeline as a whole, with models whose answer is known by construction."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

import wsitk
from wsitk.errors import OutputError, SourceError, UsageError
from wsitk.grid import Tile
from wsitk.model import TileModel, TileResult
from wsitk.pipeline import Event, Input, Runner, exit_code
from wsitk.settings import Settings
from wsitk.testing import ConstantModel, IdentityModel, OracleModel, SyntheticSlide

PLAIN: dict[str, Any] = {"tissue": "none", "threads": 1, "preview": False}


@pytest.fixture(scope="module")
def slide() -> SyntheticSlide:
    return SyntheticSlide.make((700, 830), count=300, seed=2)


def write_tiff(path: Path, pixels: NDArray[np.uint8], um: float | None = 0.5) -> Path:
    unit = {"resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"} if um else {}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", **unit)
    return path


@pytest.mark.parametrize(("tile", "halo", "block"), [(256, 40, 2), (192, 32, 3), (320, 64, 1)])
def test_the_oracle_finds_exactly_the_truth(
    slide: SyntheticSlide, tile: int, halo: int, block: int, tmp_path: Path
) -> None:
    model = OracleModel(tile=(tile, tile), halo=(halo, halo))
    found = wsitk.run(model, slide.pixels, out=tmp_path, spacing=0.5, block=block, **PLAIN).objects
    assert sorted(found["number"].astype(int)) == list(range(1, len(slide.truth) + 1))
    by_number = found.set_index(found["number"].astype(int)).sort_index()
    assert np.allclose(by_number[["centroid_y", "centroid_x"]], slide.truth.anchor)
    assert np.allclose(by_number["area_um2"], slide.truth.size * 0.25)
    assert by_number.geometry.is_valid.all()


def test_a_constant_stays_that_constant_and_an_identity_the_image(
    slide: SyntheticSlide, tmp_path: Path
) -> None:
    constant = ConstantModel(0.7371, tile=(256, 256), halo=(32, 32))
    maps = wsitk.run(constant, slide.pixels, out=tmp_path / "c", spacing=0.5, **PLAIN).maps.compute()
    assert np.unique(maps).tolist() == [np.float32(0.7371)]
    same = IdentityModel(tile=(256, 256), halo=(32, 32))
    image = wsitk.run(same, slide.pixels, out=tmp_path / "i", spacing=0.5, **PLAIN).maps.compute()
    assert np.array_equal(np.moveaxis(np.rint(image), 0, -1).astype(np.uint8), slide.pixels)


def test_a_volume_goes_the_same_way(tmp_path: Path) -> None:
    volume = SyntheticSlide.make((40, 90, 100), count=60, radius=(2, 5), seed=1)
    model = IdentityModel(tile=(32, 64, 64), halo=(8, 16, 16))
    source = wsitk.open_source(volume.pixels, axes="zyxc", mpp=1000.0)
    maps = wsitk.run(model, source, out=tmp_path, **PLAIN).maps.compute()
    assert np.array_equal(np.moveaxis(np.rint(maps), 0, -1).astype(np.uint8), volume.pixels)


class WithABug(TileModel):
    """The oracle, but its post-processing raises on tile 4."""

    def __init__(self) -> None:
        self._oracle = OracleModel(tile=(256, 256), halo=(40, 40))
        self.spec = self._oracle.spec

    @property
    def network(self) -> Any:
        return self._oracle.network

    def predict(self, batch: Any) -> Any:
        return self._oracle.predict(batch)

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        if tile.index == 4:
            raise RuntimeError("the model has a bug")
        return self._oracle.postprocess(outputs, tile)


def test_a_bug_in_a_model_fails_the_input_and_not_the_others(slide: SyntheticSlide, tmp_path: Path) -> None:
    small = slide.pixels[:170, :170]
    inputs = [
        Input("big.tiff", str(write_tiff(tmp_path / "big.tiff", slide.pixels))),
        Input("small.tiff", str(write_tiff(tmp_path / "small.tiff", small))),
    ]
    runner = Runner(WithABug(), tmp_path / "out", Settings(**PLAIN))
    rows = {r.input: r for r in runner.run(inputs)}
    assert (rows["big.tiff"].status, rows["big.tiff"].code) == ("failed", "WSI410")
    assert "tile 4" in rows["big.tiff"].message
    assert "the model has a bug" in rows["big.tiff"].message
    assert rows["small.tiff"].status == "done"
    assert exit_code(rows.values()) == 1


class BlindSpot(WithABug):
    """The oracle, but the network's output is not finite where the image is pure green."""

    def predict(self, batch: Any) -> Any:
        outputs = self._oracle.predict(batch)
        green = (batch[:, 0] == 0).any() and (batch[:, 1] == 255).any()
        return {k: v.float() * float("nan") if green else v for k, v in outputs.items()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        return self._oracle.postprocess(outputs, tile)


def test_a_tile_that_the_model_cannot_do_is_data(slide: SyntheticSlide, tmp_path: Path) -> None:
    pixels = slide.pixels.copy()
    pixels[100, 100] = (0, 255, 0)  # inside the first tile alone
    path = write_tiff(tmp_path / "a.tiff", pixels)
    runner = Runner(BlindSpot(), tmp_path / "out", Settings(**PLAIN))
    (row,) = runner.run([Input("a.tiff", str(path))])
    assert (row.status, row.code, row.tiles["model_failed"]) == ("gaps", "WSI411", 1)
    folder = tmp_path / "out" / "a.tiff"
    features = json.loads(gzip.decompress((folder / "objects.geojson.gz").read_bytes()))["features"]
    regions = [f for f in features if f["properties"]["objectType"] == "annotation"]
    assert [r["properties"]["classification"]["name"] for r in regions] == ["Unreadable*"]
    touching = wsitk.result.Result(folder).objects.query("touches_unreadable")
    assert 0 < len(touching) < 40


def test_running_again_does_nothing_and_says_the_same(slide: SyntheticSlide, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tiff", slide.pixels)
    model = OracleModel(tile=(256, 256), halo=(40, 40))
    first = Runner(model, tmp_path / "out", Settings(**PLAIN)).run([Input("a.tiff", str(path))])
    events: list[Event] = []
    again = Runner(model, tmp_path / "out", Settings(**PLAIN), on_event=events.append)
    second = again.run([Input("a.tiff", str(path))])
    assert [e.kind for e in events] == ["ended"]
    assert (first[0].objects, first[0].tiles) == (second[0].objects, second[0].tiles)


def test_other_settings_are_refused_until_overwrite(slide: SyntheticSlide, tmp_path: Path) -> None:
    model = OracleModel(tile=(256, 256), halo=(40, 40))
    wsitk.run(model, slide.pixels, out=tmp_path, spacing=0.5, **PLAIN)
    foreign = tmp_path / "array" / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(OutputError, match=r"WSI510 .*settings differ"):
        wsitk.run(model, slide.pixels, out=tmp_path, spacing=0.5, **{**PLAIN, "block": 1})
    wsitk.run(model, slide.pixels, out=tmp_path, spacing=0.5, **{**PLAIN, "block": 1}, overwrite=True)
    assert foreign.read_text() == "mine"


def test_worker_count_does_not_change_a_byte(slide: SyntheticSlide, tmp_path: Path) -> None:
    model = OracleModel(tile=(192, 192), halo=(32, 32))
    records = []
    for workers in (1, 4):
        out = tmp_path / str(workers)
        records.append(
            wsitk.run(model, slide.pixels, out=out, spacing=0.5, workers=workers, **PLAIN).provenance
        )
    assert records[0] == records[1]


def test_a_region_of_interest_gives_the_objects_in_it(slide: SyntheticSlide, tmp_path: Path) -> None:
    model = OracleModel(tile=(192, 192), halo=(32, 32))
    found = wsitk.run(
        model, slide.pixels, out=tmp_path, spacing=0.5, roi=(101, 57, 333, 222), **PLAIN
    ).objects
    y, x = slide.truth.anchor.T
    inside = (x >= 101) & (x < 434) & (y >= 57) & (y < 279)
    assert sorted(found["number"].astype(int)) == (np.flatnonzero(inside) + 1).tolist()


def test_a_region_outside_the_image_is_refused(slide: SyntheticSlide, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="WSI011"):
        wsitk.run(
            OracleModel(tile=(192, 192), halo=(32, 32)), slide.pixels, out=tmp_path, roi=(9999, 0, 10, 10)
        )


def test_a_tile_that_does_not_fit_the_model_is_refused(slide: SyntheticSlide, tmp_path: Path) -> None:
    model = OracleModel(tile=(192, 192), halo=(32, 32))
    model.spec = replace(model.spec, align=(64, 64))
    with pytest.raises(UsageError, match=r"WSI010 .*multiples of"):
        wsitk.run(model, slide.pixels, out=tmp_path, tile=200)


def test_the_summary_has_a_line_for_every_input(slide: SyntheticSlide, tmp_path: Path) -> None:
    good = write_tiff(tmp_path / "good.tiff", slide.pixels)
    bad = tmp_path / "bad.tiff"
    bad.write_bytes(good.read_bytes()[:5000])
    runner = Runner(OracleModel(tile=(256, 256), halo=(40, 40)), tmp_path / "out", Settings(**PLAIN))
    runner.run([Input("good.tiff", str(good)), Input("bad.tiff", str(bad))])
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        rows = {r["input"]: r for r in csv.DictReader(file)}
    assert (rows["good.tiff"]["status"], rows["bad.tiff"]["status"]) == ("done", "failed")
    assert int(rows["good.tiff"]["objects_even"]) + int(rows["good.tiff"]["objects_odd"]) == len(slide.truth)
    assert rows["bad.tiff"]["code"].startswith("WSI1")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "good.tiff" in page
    assert "bad.tiff" in page


def test_pixels_of_another_type_are_refused(tmp_path: Path) -> None:
    deep = np.zeros((300, 300, 3), np.uint16)
    with pytest.raises(SourceError, match=r"WSI130 .*uint16.*uint8"):
        wsitk.run(OracleModel(tile=(192, 192), halo=(32, 32)), deep, out=tmp_path, spacing=0.5, **PLAIN)


def test_a_run_says_what_it_would_cost(tmp_path: Path) -> None:
    seconds, memory = Runner(OracleModel(tile=(64, 64), halo=(8, 8)), tmp_path, Settings(**PLAIN)).estimate()
    assert seconds > 0
    assert memory > 0
