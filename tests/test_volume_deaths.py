"""Runs over volumes that die: the same bytes after any death, and no label lost but where a tile failed."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from crashing import DURABLE, count_steps, die_at, tree
from scipy.ndimage import gaussian_filter
from volume_data import oblique, save_nifti
from volume_models import ONCE, POISON, run_organs

from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.pipeline import Event, Input, ModelRef, Runner
from wsitk.settings import Settings

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["wsitk.pipeline", "wsitk.finish", "torch", "zarr", "nibabel", "scipy.ndimage"])

PLAIN: dict[str, Any] = {"threads": 1, "workers": 2, "preview": False, "device": "cpu"}


def in_fresh_process(target: Callable[..., None], *args: Any) -> int | None:
    """Run `target` in a process of its own; return its exit code (negative: the signal that ended it)."""
    process = SPAWN.Process(target=target, args=args)
    process.start()
    process.join(300)
    return process.exitcode


def smooth(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int16]]:
    noise = gaussian_filter(np.random.default_rng(4).normal(size=shape), 1.5)
    return (noise * 3000).astype(np.int16)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> str:
    volume = smooth((24, 30, 40))
    volume[:, :3] = 0
    return str(save_nifti(tmp_path_factory.mktemp("scan") / "ct.nii.gz", volume, oblique((2.5, 0.8, 0.8))))


@pytest.fixture(scope="module")
def whole(scan: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the tree of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_fresh_process(run_organs, scan, str(folder)) == 0
    return tree(folder)


def steps(scan: str, folder: Path, calls: tuple[str, ...]) -> int:
    """Return at how many instants a run can be killed before one of `calls`."""
    answer = folder / "count.txt"
    assert in_fresh_process(count_steps, scan, str(folder / "counted"), str(answer), run_organs, calls) == 0
    return int(answer.read_text())


# --- kill -9 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "times"), [(DURABLE, 3), (("pwritev",), 2)], ids=["while it commits", "while it computes"]
)
def test_killed_and_resumed_equals_never_killed(
    calls: tuple[str, ...], times: int, scan: str, whole: dict[str, str], tmp_path: Path
) -> None:
    count = steps(scan, tmp_path, calls)
    for step in random.Random(len(calls)).sample(range(1, count), times):
        out = tmp_path / str(step)
        assert in_fresh_process(die_at, step, scan, str(out), run_organs, calls) == -signal.SIGKILL
        assert in_fresh_process(run_organs, scan, str(out)) == 0
        assert tree(out) == whole, f"killed before call {step} of {count}"


@pytest.mark.slow
def test_killed_at_every_instant(scan: str, whole: dict[str, str], tmp_path: Path) -> None:
    for step in range(1, steps(scan, tmp_path, DURABLE)):
        out = tmp_path / str(step)
        assert in_fresh_process(die_at, step, scan, str(out), run_organs) == -signal.SIGKILL
        assert in_fresh_process(run_organs, scan, str(out)) == 0
        assert tree(out) == whole, f"killed before step {step}"


def test_parts_in_turn_equal_one_run(scan: str, whole: dict[str, str], tmp_path: Path) -> None:
    """Each part computes again what the other had; the last one of three dies and is started again."""
    model, item = ModelRef("volume_models:organs"), Input("ct.nii.gz", scan)
    states = []
    for part in (2, 0, 1):
        if part == 1:
            assert in_fresh_process(_dying_part, scan, str(tmp_path)) == -signal.SIGKILL
        (row,) = Runner(model, tmp_path, Settings(**PLAIN, part=(part, 3))).run([item])
        states.append(row.status)
    assert states == ["partial", "partial", "done"]
    assert tree(tmp_path) == whole


def _dying_part(scan: str, out: str) -> None:
    def run(path: str, folder: str) -> None:
        settings = Settings(**PLAIN, part=(1, 3), supervise=False)
        (row,) = Runner(ModelRef("volume_models:organs"), Path(folder), settings).run(
            [Input("ct.nii.gz", path)]
        )
        assert row.status != "failed", row.message

    die_at(5, scan, out, run, ("pwritev",))


# --- a layer that is set aside ---------------------------------------------------------------------------


def marked(path: Path, layer: int, once: int | None = None) -> tuple[TileGrid, str]:
    """Write a volume whose tiles of a layer begin with `POISON`, and the first one of layer `once` with `ONCE`."""
    volume = smooth((45, 24, 48))
    grid = TileGrid.sliding(Region((0, 0, 0), volume.shape), (16, 16, 32), 0.5)
    for tile in grid:
        (z, y, x), (kind, place) = tile.read.start, divmod(tile.index, len(grid) // grid.counts[0])
        if kind == layer or (kind == once and not place):
            volume[z, y, x] = POISON if kind == layer else ONCE
    return grid, str(save_nifti(path, volume))


def labelled(model: str, scan: str, out: Path) -> tuple[Any, list[dict[str, Any]], int]:
    """Return the labels of a run, its tiles, and how often something died."""
    events: list[Event] = []
    settings = Settings(**PLAIN, max_unreadable=1.0)
    with Runner(ModelRef(f"volume_models:{model}"), out, settings, on_event=events.append) as runner:
        (row,) = runner.run([Input("a", scan)])
    assert row.status == "done", row.message
    labels = np.asarray(zarr.open_array(str(out / "a" / "labels.ome.zarr" / "0"), mode="r")[:])
    tiles = pq.read_table(out / "a" / "tiles.parquet").to_pylist()
    return labels, tiles, [e.kind for e in events].count("death")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_set_aside_loses_what_its_tiles_own_and_nothing_else(layer: int, tmp_path: Path) -> None:
    """As if its tiles had answered without numbers: rows that waited for it are painted, later layers go on."""
    grid, scan = marked(tmp_path / "ct.nii", layer)
    found, tiles, deaths = labelled("unlucky", scan, tmp_path / "out")
    wanted, others, _ = labelled("failing", scan, tmp_path / "wanted")
    assert deaths == 3
    assert [t["status"] for t in tiles] == [t["status"] for t in others]
    lost = [t["tile"] for t in tiles if t["status"] != "ok"]
    size = len(grid) // grid.counts[0]
    assert lost == list(range(layer * size, (layer + 1) * size))
    assert all("WSI401" in t["reason"] for t in tiles if t["status"] != "ok")
    np.testing.assert_array_equal(found, wanted)
    assert found.any(axis=(1, 2)).sum() < len(found)  # the layer's own rows


def test_rows_that_cannot_be_painted_are_said_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer before the one that kills kills, too, when it is asked again."""
    monkeypatch.setenv("WSITK_TEST_MARK", str(tmp_path / "mark"))
    grid, scan = marked(tmp_path / "ct.nii", 2, once=1)
    labels, tiles, deaths = labelled("unlucky", scan, tmp_path / "out")
    assert deaths == 4
    size = len(grid) // grid.counts[0]
    layers = [t["tile"] // size for t in tiles if t["status"] == "model_failed"]
    assert sorted({*layers}) == [1, 2]
    assert len(layers) == 2 * size
    assert all("rows of this tile waited" in t["reason"] for t in tiles if t["tile"] // size == 1)
    for tile in grid:
        waited = labels[tile.owned.slices()][-1]  # the last row that it owns
        assert waited.any() == (tile.index // size not in (1, 2)), tile
