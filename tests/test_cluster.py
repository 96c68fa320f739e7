"""Dask workers do the blocks, come and go, and leave the bytes of a run on one machine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
from crashing import tree
from dying import POISON, oracle
from test_supervision import PLAIN, healthy, slide
from test_volume_deaths import labelled, marked, smooth
from volume_data import save_nifti

from wsitk.blocks import BlockError, BlockReport, BlockTask
from wsitk.errors import ModelError, UsageError
from wsitk.grid import Tile
from wsitk.model import TileModel, TileResult
from wsitk.pipeline import Event, Input, ModelRef, Runner
from wsitk.settings import Settings
from wsitk.work import cluster as on_cluster
from wsitk.work import station
from wsitk.work.base import Order

distributed = pytest.importorskip("distributed")

__all__ = ["healthy", "slide"]

pytestmark = pytest.mark.filterwarnings("ignore")  # what distributed and tornado leave behind


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None
    ) as started:
        yield started


@pytest.fixture
def pair(cluster: Any) -> Any:
    """Return the cluster once both workers are there: another test may have killed them."""
    cluster.wait_for_workers(2)
    return cluster


def run(
    address: str,
    slide: Path,
    out: Path,
    on_event: Any = lambda event: None,
    model: str = "oracle",
    **more: Any,
):
    settings = Settings(**{**PLAIN, "scheduler": address, "block": 1, "max_unreadable": 0.9, **more})
    runner = Runner(ModelRef(f"dying:{model}"), out, settings, on_event=on_event)
    (row,) = runner.run([Input("a.tiff", str(slide))])
    return row


@pytest.fixture(scope="module")
def alone(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert run("", slide, out).status == "done"
    return out


def test_two_workers_give_the_bytes_of_one_process(
    cluster: Any, slide: Path, alone: Path, tmp_path: Path
) -> None:
    assert run(cluster.scheduler_address, slide, tmp_path).status == "done"
    assert tree(tmp_path) == tree(alone)


def test_workers_that_die_take_no_block_with_them(
    cluster: Any, slide: Path, alone: Path, tmp_path: Path
) -> None:
    chance, gone = random.Random(3), []

    def kill(event: Event) -> None:
        if event.kind == "block" and len(gone) < 3:
            there = cluster.scheduler.workers  # Dask gives a worker up that dies before it has said hello
            pids = [
                n.pid for n in cluster.workers.values() if n.worker_address in there and n.pid not in gone
            ]
            if pids:
                gone.append(chance.choice(pids))
                os.kill(gone[-1], signal.SIGKILL)

    assert run(cluster.scheduler_address, slide, tmp_path, kill).status == "done"
    assert len(gone) == 3
    assert tree(tmp_path) == tree(alone)


def test_a_block_that_kills_the_model_is_found_out_on_the_worker(
    cluster: Any, slide: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "death":
            said.append(event.facts["message"])

    row = run(cluster.scheduler_address, slide, tmp_path, listen, model="killed", block=2)
    assert row.tiles["model_failed"] > 0
    assert row.tiles["ok"] > 0
    assert any("signal 9" in words for words in said)


def test_what_cannot_be_reached_or_sent_is_refused(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"WSI026 .*local, local:N"):
        Runner(ModelRef("dying:oracle"), tmp_path, Settings(**PLAIN, scheduler="local:many"))
    with pytest.raises(UsageError, match=r"WSI026 .*model object"):
        Runner(oracle(), tmp_path, Settings(**PLAIN, scheduler="local"))


def test_a_model_that_does_not_load_is_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises((ModelError, UsageError)):
        Runner(ModelRef("dying:nothing"), tmp_path, Settings(**PLAIN, scheduler=cluster.scheduler_address))
    assert threading.active_count() <= before + 2
    assert not models_below(cluster)


# --- who runs it, and what is left of it -----------------------------------------------------------------


class _Raising(TileModel):
    """The oracle, with a bug that shows at one tile."""

    def __init__(self) -> None:
        self._oracle = oracle()
        self.spec = self._oracle.spec

    @property
    def network(self) -> Any:
        return self._oracle.network

    def predict(self, batch: Any) -> Any:
        return self._oracle.predict(batch)

    def postprocess(self, outputs: Any, tile: Tile) -> TileResult:
        if tile.index == POISON:
            raise ZeroDivisionError("a bug")
        return self._oracle.postprocess(outputs, tile)


def raising() -> TileModel:
    """Return a model with a bug; built on the workers."""
    return _Raising()


def picky(mark: str) -> TileModel:
    """Return the oracle on the worker that asks first; any other can't run it. The file `mark` remembers."""
    try:
        with open(mark, "x") as file:
            file.write(str(os.getppid()))
    except FileExistsError:
        if Path(mark).read_text() not in ("", str(os.getppid())):
            raise RuntimeError("no such weights on this machine") from None
    return oracle()


def models_below(cluster: Any) -> list[psutil.Process]:
    """Return the processes of models that the workers have."""
    workers = [psutil.Process(nanny.pid) for nanny in cluster.workers.values() if nanny.pid]
    return [
        p for worker in workers for p in worker.children(recursive=True) if "wsitk" in "".join(p.cmdline())
    ]


def test_an_input_that_fails_leaves_the_others_alone(cluster: Any, slide: Path, tmp_path: Path) -> None:
    """All blocks of an input that shows a bug are given up; those of others under way are done, once."""
    small = tmp_path / "b.tiff"
    tifffile.imwrite(
        small, np.full((120, 120, 3), 240, np.uint8), tile=(128, 128), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    blocks: list[str] = []
    settings = Settings(**{**PLAIN, "block": 1, "scheduler": cluster.scheduler_address})
    runner = Runner(
        ModelRef("test_cluster:raising"), tmp_path / "out", settings,
        on_event=lambda e: blocks.append(e.input) if e.kind == "block" else None,
    )  # fmt: skip
    rows = runner.run([Input("b.tiff", str(small)), Input("a.tiff", str(slide)), Input("c.tiff", str(small))])
    assert {row.input: row.code for row in rows} == {"a.tiff": "WSI410", "b.tiff": "", "c.tiff": ""}
    assert blocks.count("b.tiff") == blocks.count("c.tiff") == 4
    assert not models_below(cluster)


def test_nothing_is_left_of_an_interrupted_run(
    cluster: Any, slide: Path, alone: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cluster.scheduler_address, slide, tmp_path, interrupt)
    assert not models_below(cluster)
    assert run("", slide, tmp_path).status == "done"  # nobody writes or holds anything any more
    assert tree(tmp_path) == tree(alone)


@pytest.mark.slow
def test_a_worker_that_cannot_run_the_model_is_not_asked_again(
    pair: Any, slide: Path, alone: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    settings = Settings(**{**PLAIN, "block": 1, "scheduler": pair.scheduler_address})
    model = ModelRef("test_cluster:picky", {"mark": str(tmp_path / "mark")})
    runner = Runner(
        model, tmp_path / "out", settings,
        on_event=lambda e: said.append(e.facts["message"]) if e.kind == "death" else None,
    )  # fmt: skip
    (row,) = runner.run([Input("a.tiff", str(slide))])
    assert row.status == "done"
    refused = [words for words in said if "not asked again" in words]
    assert 1 <= len(refused) <= 4  # what it had been sent before
    assert all("no such weights" in words for words in refused)
    assert {p.name for p in (tmp_path / "out" / "a.tiff").iterdir()} == {
        p.name for p in (alone / "a.tiff").iterdir()
    }


@pytest.mark.slow
def test_without_workers_or_scheduler_a_run_ends_and_resumes(
    slide: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cluster, "PATIENCE_SECONDS", 0.5)
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as bare:
        with pytest.raises(on_cluster.ClusterError, match="WSI403 no worker has come") as refused:
            run(bare.scheduler_address, slide, tmp_path)
        assert refused.value.exit_code == 3
        bare.scale(1)
        bare.wait_for_workers(1)

        def cut(event: Event) -> None:
            if event.kind == "block":
                bare.sync(bare.scheduler.close)

        with pytest.raises(on_cluster.ClusterError, match=r"WSI403 .*no longer answers"):
            run(bare.scheduler_address, slide, tmp_path, cut)
    assert run("", slide, tmp_path).status == "done"
    assert tree(tmp_path) == tree(alone)


# --- volumes: a layer goes on with what the one before has left --------------------------------------------


def test_volumes_on_workers_have_the_bytes_of_one_process(cluster: Any, tmp_path: Path) -> None:
    scans = []
    for name in ("a", "b"):
        volume = smooth((24, 30, 40)) + (ord(name) - ord("a"))
        scans.append(Input(name, str(save_nifti(tmp_path / f"{name}.nii.gz", volume))))
    plain: dict[str, Any] = {"threads": 1, "workers": 2, "preview": False, "device": "cpu"}
    for out, scheduler in (("there", cluster.scheduler_address), ("here", "")):
        settings = Settings(**plain, scheduler=scheduler)
        runner = Runner(ModelRef("volume_models:organs"), tmp_path / out, settings)
        assert [row.status for row in runner.run(scans)] == ["done", "done"]
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


@pytest.mark.slow
def test_a_layer_that_kills_is_the_only_one_that_is_lost_on_workers(cluster: Any, tmp_path: Path) -> None:
    _, scan = marked(tmp_path / "ct.nii", 1)
    settings = Settings(
        threads=1,
        workers=2,
        preview=False,
        device="cpu",
        max_unreadable=1.0,
        scheduler=cluster.scheduler_address,
    )
    (row,) = Runner(ModelRef("volume_models:unlucky"), tmp_path / "there", settings).run([Input("a", scan)])
    labelled("unlucky", scan, tmp_path / "here")
    assert row.tiles["model_failed"] > 0
    assert tree(tmp_path / "there" / "a" / "labels.ome.zarr") == tree(
        tmp_path / "here" / "a" / "labels.ome.zarr"
    )


# --- a worker's station, with a model that does as it is told ----------------------------------------------


class _Apart:
    """In the place of a model's process: reports blocks, raises at those of the input `bad`."""

    made = 0
    closed = 0
    fate: Exception | None = None

    def __init__(self, order: Order, **more: Any) -> None:
        type(self).made += 1
        if self.fate is not None:
            raise self.fate
        more["on_death"]("it coughed")

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        for task in list(tasks):
            if task.input == "bad":
                raise BlockError("WSI410", "bad", "bad")
            yield BlockReport(task.input, task.block, (), 0, {})

    def peak_mib(self) -> float:
        return 1.0

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Order:
    fresh = type("Apart", (_Apart,), {"made": 0, "closed": 0, "fate": None})
    monkeypatch.setattr(station, "WorkApart", fresh)
    return Order(ModelRef("any"), Settings(), tmp_path)


def block(name: str, number: int) -> BlockTask:
    nothing: Any = None
    return BlockTask(name, nothing, nothing, number, (), 0, nothing)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run in threads of their own; return what each returned or raised."""
    answers: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def do(place: int) -> None:
        barrier.wait()
        try:
            answers[place] = jobs[place]()
        except Exception as error:
            answers[place] = error

    threads = [threading.Thread(target=do, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_at_a_station_a_bad_block_takes_its_input_with_it_and_no_other(order: Order) -> None:
    at = station._Station(order)
    jobs = [("bad", 0), ("a", 0), ("a", 1), ("bad", 1), ("b", 0)]
    answers = together(*(lambda j=j: at.do([block(*j)]) for j in jobs))
    for (name, number), answer in zip(jobs, answers, strict=True):
        if name == "bad":
            assert isinstance(answer, BlockError)
        else:
            assert [(r.input, r.block) for r in answer.reports] == [(name, number)]
    said = [w for a in answers if isinstance(a, station.Answer) for w in a.words]
    assert said == ["it coughed"] or not said  # the first answer tells; it may have been a bad one
    at.close()


def test_at_a_station_a_model_that_does_not_start_fails_all_who_wait(order: Order) -> None:
    station.WorkApart.fate = ModelError("WSI336", "no")  # type: ignore[attr-defined]
    at = station._Station(order)
    answers = together(*(lambda n=n: at.do([block("a", n)]) for n in range(4)))
    assert all(isinstance(a, ModelError) for a in answers)


def test_a_model_that_rests_comes_back_and_one_that_is_dismissed_does_not(order: Order) -> None:
    at = station._station("token", order)
    assert len(at.do([block("a", 0), block("a", 1)]).reports) == 2
    at.rest()
    assert station.WorkApart.closed == 1  # type: ignore[attr-defined]
    assert len(at.do([block("a", 2)]).reports) == 1
    asyncio.run(station.dismiss("token"))
    assert station.WorkApart.closed == 2  # type: ignore[attr-defined]
    with pytest.raises(station.DismissedError):
        at.do([block("a", 3)])
    with pytest.raises(station.DismissedError):
        station._station("token", order)
