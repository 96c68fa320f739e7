"""Whatever dies below a run, the run goes on, says what died, and loses no more than what killed it."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from crashing import tree
from dying import POISON

from wsitk.errors import ModelError, SourceError, UsageError
from wsitk.geometry import Region
from wsitk.pipeline import Event, Input, ModelRef, Runner
from wsitk.process import Child, ChildError
from wsitk.reading.client import ReaderProcess
from wsitk.record import InputRow
from wsitk.settings import Settings
from wsitk.testing import SyntheticSlide

PLAIN: dict[str, Any] = {
    "tissue": "none", "threads": 1, "workers": 2, "block": 2, "preview": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "a.tiff"
    tifffile.imwrite(
        path, SyntheticSlide.make((420, 460), count=150, seed=5).pixels, tile=(128, 128), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def run(model: str, slide: Path, out: Path, **settings: Any) -> tuple[InputRow, list[Event]]:
    events: list[Event] = []
    chosen = Settings(**{**PLAIN, "max_unreadable": 0.9, **settings})
    runner = Runner(ModelRef(f"dying:{model}"), out, chosen, on_event=events.append)
    (row,) = runner.run([Input("a.tiff", str(slide))])
    return row, events


@pytest.fixture(scope="module")
def healthy(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healthy")
    assert run("oracle", slide, out)[0].status == "done"
    return out


# --- the model's process -----------------------------------------------------------------------------


def test_in_a_process_of_its_own_or_here_the_same_bytes(slide: Path, healthy: Path, tmp_path: Path) -> None:
    assert run("oracle", slide, tmp_path, supervise=False)[0].status == "done"
    assert tree(tmp_path) == tree(healthy)


def test_a_death_that_does_not_come_again_costs_nothing(
    slide: Path, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSITK_TEST_MARK", str(tmp_path / "mark"))
    row, events = run("killed_once", slide, tmp_path / "out")
    assert row.status == "done"
    assert [e.kind for e in events].count("death") == 1
    assert tree(tmp_path / "out") == tree(healthy)


@pytest.mark.parametrize(
    ("model", "settings", "reason", "deaths"),
    [
        ("crashing", {}, "signal 11", 3),
        pytest.param("killed", {}, "signal 9", 3, marks=pytest.mark.slow),
        pytest.param("hanging", {"deadline": 8.0}, "deadline", 2, marks=pytest.mark.slow),
        pytest.param("greedy", {"max_ram": 1.0}, "memory limit", 3, marks=pytest.mark.slow),
    ],
)
def test_a_poisoned_block_is_set_aside_and_only_that(
    model: str, settings: dict[str, Any], reason: str, deaths: int, slide: Path, healthy: Path, tmp_path: Path
) -> None:
    row, events = run(model, slide, tmp_path, **settings)
    assert row.status == "done"  # within the share of bad tiles that this run allows
    assert [e.kind for e in events].count("death") == deaths
    assert len(json.loads((tmp_path / "run.json").read_text())["deaths"]) == deaths
    lost, whole = (pq.read_table(p / "a.tiff" / "tiles.parquet").to_pylist() for p in (tmp_path, healthy))
    bad = [t for t in lost if t["status"] == "model_failed"]
    assert POISON in {t["tile"] for t in bad}
    assert all("WSI401" in t["reason"] and reason in t["reason"] for t in bad)
    assert len(bad) == 4  # one block of 2 x 2 tiles
    kept = [(t["tile"], t["status"]) for t in lost if t not in bad]
    assert kept == [(t["tile"], t["status"]) for t in whole if t["tile"] not in {b["tile"] for b in bad}]


def test_a_model_that_cannot_be_loaded_says_why(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"WSI336 .*no such weights"):
        run("broken", slide, tmp_path)
    with pytest.raises(ModelError, match=r"WSI336 .*signal 9"):
        run("dead_on_arrival", slide, tmp_path)
    with pytest.raises(UsageError, match="WSI030"):
        run("no_such_function", slide, tmp_path)


def test_a_process_that_is_killed_from_outside_is_started_again(
    slide: Path, healthy: Path, tmp_path: Path
) -> None:
    runner: Runner

    def kill(event: Event) -> None:
        if event.kind == "block" and event.facts["tiles"] and not runner._deaths:
            child = runner._work._child  # type: ignore[attr-defined]  # the test must know whom to kill
            os.kill(child.pid, signal.SIGKILL)

    runner = Runner(ModelRef("dying:oracle"), tmp_path, Settings(**PLAIN), on_event=kill)
    (row,) = runner.run([Input("a.tiff", str(slide))])
    assert row.status == "done"
    assert "signal 9" in runner._deaths[0]
    assert tree(tmp_path) == tree(healthy)


@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_worker_killed_while_it_commits_leaves_no_trace(
    step: int, slide: Path, healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    mark.write_text(str(step))
    monkeypatch.setenv("WSITK_TEST_MARK", str(mark))
    row, events = run("killed_at_step", slide, tmp_path / "out")
    assert not mark.exists()
    assert row.status == "done"
    assert [e.kind for e in events].count("death") == 1
    assert tree(tmp_path / "out") == tree(healthy)


@pytest.mark.parametrize("count", [1, 3])
def test_a_supervisor_killed_with_its_children_at_work(
    count: int, slide: Path, healthy: Path, tmp_path: Path
) -> None:
    def die(event: Event) -> None:
        nonlocal count
        count -= event.kind == "block"
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        inputs = [Input("a.tiff", str(slide))]
        Runner(ModelRef("dying:oracle"), tmp_path, Settings(**PLAIN), on_event=die).run(inputs)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run("oracle", slide, tmp_path, max_unreadable=0.01)[0].status == "done"
    assert tree(tmp_path) == tree(healthy)


@pytest.mark.parametrize("supervise", [True, False])
def test_parts_done_by_different_processes_make_the_same_bytes(
    supervise: bool, slide: Path, healthy: Path, tmp_path: Path
) -> None:
    first = run("oracle", slide, tmp_path, part=(0, 2), supervise=supervise)[0]
    assert (first.status, first.exit_code) == ("partial", 0)
    assert not (tmp_path / "a.tiff" / "provenance.json").exists()
    assert run("oracle", slide, tmp_path, part=(1, 2), supervise=supervise)[0].status == "done"
    assert tree(tmp_path) == tree(healthy)
    assert run("oracle", slide, tmp_path, part=(0, 2))[0].status == "done"  # asked again, it says so


def test_parts_at_the_same_time_make_the_same_bytes(slide: Path, healthy: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        rows = [pool.submit(run, "oracle", slide, tmp_path, part=(i, 2)) for i in range(2)]
        statuses = sorted(row.result()[0].status for row in rows)
    assert statuses in (["done", "done"], ["done", "partial"])
    assert tree(tmp_path) == tree(healthy)


# --- the reading process -----------------------------------------------------------------------------


def test_the_reader_answers_and_imports_no_torch() -> None:
    with ReaderProcess(preload=("wsitk.plan",)) as reader:
        assert [reader.call("dying:twice", n) for n in range(5)] == [0, 2, 4, 6, 8]
        assert not reader.call("dying:imported", "torch")


def test_a_request_that_kills_its_reader_is_given_up_and_the_others_go_on() -> None:
    deaths: list[str] = []
    with ReaderProcess(on_death=lambda death: deaths.append(death.reason)) as reader:
        with pytest.raises(SourceError, match=r"WSI151 .*3 times.*signal 6"):
            reader.call("dying:abort")
        assert reader.call("dying:twice", 4) == 8
    assert len(deaths) == 3


def test_a_request_that_hangs_is_given_up() -> None:
    with ReaderProcess(deadline=2.0) as reader:
        with pytest.raises(SourceError, match=r"WSI151 .*deadline"):
            reader.call("dying:sleep")
        assert reader.call("dying:twice", 4) == 8


def test_memory_beyond_the_limit_is_refused_not_taken() -> None:
    with ReaderProcess() as reader:
        assert reader.call("dying:take", 300) == 300 << 20
        with pytest.raises(SourceError, match="WSI142"):
            reader.call("dying:take", 4000)
        assert reader.call("dying:twice", 4) == 8


def test_one_place_that_kills_is_found_among_many_read_at_once() -> None:
    regions = [Region((y, x), (16, 16)) for y in range(0, 64, 16) for x in range(0, 64, 16)]
    with ReaderProcess(threads=4, slot_bytes=16 * 16 * 4) as reader, ThreadPoolExecutor(4) as pool:
        image = reader.image("dying:Fragile", (16, 32))
        futures = {r: pool.submit(image.read, r) for r in regions}
        for region, future in futures.items():
            if region.start == (16, 32):
                with pytest.raises(SourceError, match="WSI151"):
                    future.result()
            else:
                assert (future.result().pixels == region.start[1] % 251).all()


def test_a_reader_killed_again_and_again_loses_nothing() -> None:
    regions = [Region((0, x), (16, 16)) for x in range(400)]
    with ReaderProcess(threads=3, slot_bytes=16 * 16 * 4) as reader, ThreadPoolExecutor(3) as pool:
        image = reader.image("dying:Fragile", (-1, -1))
        futures = [pool.submit(image.read, r) for r in regions]
        for place in (50, 150, 250):
            futures[place].result()
            os.kill(reader.pid, signal.SIGKILL)
        for region, future in zip(regions, futures, strict=True):
            assert (future.result().pixels == region.start[1] % 251).all()


# --- any child ---------------------------------------------------------------------------------------


def test_a_child_leaves_with_its_parent() -> None:
    child = Child("wsitk.reading.server:serve", "test")
    pid = child.pid
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_last_words_of_a_child_are_kept() -> None:
    child = Child("dying:no_such_function", "test")
    with pytest.raises(ChildError, match=r"WSI401 .*no_such_function"):
        child.receive()


def test_closing_wakes_who_listens() -> None:
    child = Child("wsitk.reading.server:serve", "test")
    heard = threading.Event()

    def listen() -> None:
        with pytest.raises(ChildError):
            child.receive()
        heard.set()

    thread = threading.Thread(target=listen)
    thread.start()
    child.close()
    thread.join(30)
    assert heard.is_set()


def test_closing_twice_is_closing_once() -> None:
    reader = ReaderProcess(slot_bytes=1 << 16)
    assert reader.call("dying:twice", 1) == 2
    reader.close()
    held = os.open(os.devnull, os.O_RDONLY)  # takes the number that the reader let go of
    reader.close()
    os.fstat(held)
    os.close(held)


def test_pixels_cross_unchanged() -> None:
    with ReaderProcess(slot_bytes=1 << 16) as reader:
        image = reader.image("dying:Fragile", (-1, -1))
        pixels = image.read(Region((3, 77), (20, 30))).pixels
    assert pixels.shape == (20, 30, 3)
    assert (pixels == np.uint8(77)).all()
