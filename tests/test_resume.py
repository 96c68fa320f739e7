"""A run that is killed at any instant and started again gives the bytes of one that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile
from crashing import count_steps, die_at, oracle_run, tree

from wsitk.testing import SyntheticSlide

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    ["wsitk.pipeline", "wsitk.testing", "wsitk.finish", "torch", "cv2", "zarr", "numba"]
)


def in_fresh_process(target: Callable[..., None], *args: Any) -> int | None:
    """Run `target` in a process of its own; return its exit code (negative: the signal that ended it)."""
    process = SPAWN.Process(target=target, args=args)
    process.start()
    process.join(300)
    return process.exitcode


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("slide") / "synthetic.tiff"
    pixels = SyntheticSlide.make((520, 600), count=250, seed=5).pixels
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    return str(path)


@pytest.fixture(scope="module")
def whole(slide: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Return the tree of an uninterrupted run, and the number of instants at which it can be killed."""
    folder = tmp_path_factory.mktemp("whole")
    answer = folder / "count.txt"
    assert in_fresh_process(count_steps, slide, str(folder / "out"), str(answer)) == 0
    return tree(folder / "out"), int(answer.read_text())


def test_a_run_repeated_gives_the_same_bytes(
    slide: str, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    assert in_fresh_process(oracle_run, slide, str(tmp_path)) == 0
    assert tree(tmp_path) == whole[0]


@pytest.mark.parametrize("seed", range(10))
def test_killed_and_resumed_equals_never_killed(
    seed: int, slide: str, whole: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    expected, steps = whole
    step = random.Random(seed).randint(1, steps - 1)
    assert in_fresh_process(die_at, step, slide, str(tmp_path)) == -signal.SIGKILL
    assert in_fresh_process(oracle_run, slide, str(tmp_path)) == 0
    assert tree(tmp_path) == expected


@pytest.mark.slow
def test_killed_at_every_instant(slide: str, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    expected, steps = whole
    for step in range(1, steps):
        out = tmp_path / str(step)
        assert in_fresh_process(die_at, step, slide, str(out)) == -signal.SIGKILL
        assert in_fresh_process(oracle_run, slide, str(out)) == 0
        assert tree(out) == expected, f"killed before step {step}"


def test_killed_again_and_again(slide: str, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    for step in (3, 9, 2, 17):
        assert in_fresh_process(die_at, step, slide, str(tmp_path)) == -signal.SIGKILL
    assert in_fresh_process(oracle_run, slide, str(tmp_path)) == 0
    assert tree(tmp_path) == whole[0]


def test_resuming_does_not_do_the_committed_blocks_again(slide: str, tmp_path: Path) -> None:
    from wsitk.journal import Journal

    assert in_fresh_process(die_at, 25, slide, str(tmp_path)) == -signal.SIGKILL
    blocks = tmp_path / "synthetic.tiff" / ".wsitk" / "blocks"
    before = {p.name: p.stat().st_mtime_ns for p in blocks.glob("*.json")}
    assert before
    key = json.loads((blocks.parent / "key.json").read_text())
    with Journal(tmp_path / "synthetic.tiff", key) as journal:
        assert len(journal.committed()) == len(before)
