"""Dask workers do the blocks, come and go, and leave the bytes of a run on one machine."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashing import tree
from test_supervision import PLAIN, healthy, slide

from wsitk.errors import ModelError, UsageError
from wsitk.pipeline import Event, Input, ModelRef, Runner
from wsitk.settings import Settings

distributed = pytest.importorskip("distributed")

__all__ = ["healthy", "slide"]

pytestmark = pytest.mark.filterwarnings("ignore")  # what distributed and tornado leave behind


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None
    ) as started:
        yield started


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
            nannies = list(cluster.workers.values())
            pid = chance.choice(nannies).pid
            if pid and pid not in gone:
                os.kill(pid, signal.SIGKILL)
                gone.append(pid)

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
    with pytest.raises(UsageError, match="WSI026 .*local, local:N"):
        Runner(ModelRef("dying:oracle"), tmp_path, Settings(**PLAIN, scheduler="local:many"))
    from dying import oracle

    with pytest.raises(UsageError, match="WSI026 .*model object"):
        Runner(oracle(), tmp_path, Settings(**PLAIN, scheduler="local"))


def test_a_model_that_does_not_load_is_refused_at_once(cluster: Any, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises((ModelError, UsageError)):
        Runner(ModelRef("dying:nothing"), tmp_path, Settings(**PLAIN, scheduler=cluster.scheduler_address))
    assert threading.active_count() <= before + 2
