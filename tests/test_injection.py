"""The system refuses or kills at any call: a coded error, a state that resumes, and the bytes of a healthy run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from crashing import oracle_run, tree
from failing import ERRORS, fail_at
from test_resume import in_fresh_process, slide, whole

__all__ = ["slide", "whole"]

Whole = tuple[dict[str, str], int]

# What a person can act on: the disk is full, the output can't be written, a file can't be had.
CODED = {"WSI501", "WSI502", "WSI512", "WSI410", "WSI199"}


@pytest.fixture(scope="module")
def calls(slide: str, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Return how many calls a run makes that may be refused."""
    folder = tmp_path_factory.mktemp("calls")
    assert in_fresh_process(fail_at, 0, 0, slide, str(folder / "out"), str(folder / "n.txt")) == 0
    return int((folder / "n.txt").read_text())


def refused_and_resumed(step: int, name: str, slide: str, expected: dict[str, str], folder: Path) -> str:
    """Run with one refusal, then without any; return what was said of the refusal."""
    out, answer = folder / f"{name}-{step}", folder / f"{name}-{step}.txt"
    assert in_fresh_process(fail_at, step, ERRORS[name], slide, str(out), str(answer)) == 0, (step, name)
    said = answer.read_text()
    assert said == "done" or said in CODED, (step, name, said)
    if name == "ENOSPC" and said != "done":
        assert said in ("WSI501", "WSI512", "WSI502"), (step, said)
    assert in_fresh_process(oracle_run, slide, str(out)) == 0
    assert tree(out) == expected, f"{name} at call {step}"
    shutil.rmtree(out)
    return said


@pytest.mark.parametrize("name", ERRORS)
def test_a_refused_call_is_a_coded_error_and_can_be_resumed(
    name: str, slide: str, whole: Whole, calls: int, tmp_path: Path
) -> None:
    chance = random.Random(name)
    for step in sorted(chance.sample(range(1, calls + 1), 3)):
        refused_and_resumed(step, name, slide, whole[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_every_call_may_be_refused(name: str, slide: str, whole: Whole, calls: int, tmp_path: Path) -> None:
    stride = int(os.environ.get("WSITK_TEST_STRIDE", "1"))
    said = {
        step: refused_and_resumed(step, name, slide, whole[0], tmp_path)
        for step in range(1, calls + 1, stride)
    }
    assert set(said.values()) - {"done"}, "some refusals must be heard of"


# --- below Python, where libraries in C write, too -----------------------------------------------------

TRACED = "rename,renameat,renameat2,fsync,fdatasync"


def under_strace(injection: str, slide: str, out: Path) -> int:
    """Run the oracle under strace, with an injection into the calls of every thread."""
    code = f"from crashing import oracle_run; oracle_run({slide!r}, {str(out)!r})"
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={TRACED}",
        "-e",
        f"inject={TRACED}:{injection}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [*command, sys.executable, "-c", code], env=environment, capture_output=True, timeout=300, check=False
    ).returncode


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("injection", ["signal=KILL", "error=EIO", "error=ENOSPC"])
def test_every_rename_and_fsync_may_be_the_last(
    injection: str, slide: str, whole: Whole, tmp_path: Path
) -> None:
    """Calls are counted in each thread; when none has so many any more, the run ends well, and so does the test."""
    stride = int(os.environ.get("WSITK_TEST_STRIDE", "1"))
    for step in range(1, 1000, stride):
        out = tmp_path / str(step)
        unharmed = under_strace(f"{injection}:when={step}", slide, out) == 0
        assert in_fresh_process(oracle_run, slide, str(out)) == 0
        assert tree(out) == whole[0], f"{injection} at call {step}"
        shutil.rmtree(out)
        if unharmed and step > 10:
            return
    pytest.fail("the run never came to its end")
