"""Processes that want the same input at the same instant: targets for the tests of the journal's locks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from wsitk.errors import OutputError
from wsitk.journal import Journal


def enter_often(
    who: int, root: str, rounds: int, shared: bool, keys: list[Any], barrier: Any, said: Any
) -> None:
    """Enter a fresh journal `rounds` times, each time together with others; say what came of it."""
    answers = []
    for i in range(rounds):
        folder = Path(root) / str(i)
        barrier.wait()
        try:
            with Journal(folder, {"key": keys[who]}, shared=shared):
                # a second holder at the same time would fail here, or find the other's file
                mark = folder / ("shared" if shared else "held")
                mark.touch(exist_ok=shared)
                barrier.wait()
                answers.append("held")
        except OutputError as error:
            barrier.wait()
            answers.append(error.code)
    said.put((who, answers))


def divide(who: int, folder: str, blocks: int, barrier: Any, said: Any) -> None:
    """Do the blocks of an input together with others, and finish it; say which blocks were done here."""
    mine, finished = [], False
    barrier.wait()
    with Journal(Path(folder), {"key": 1}, shared=True) as journal:
        for block in range(blocks):
            claim = journal.claim(block)
            if claim is not None:
                with claim:
                    (Path(folder) / f"began-{block}").touch(exist_ok=False)
                    journal.commit(block, {"objects:a": np.full(50, block)}, {"by": "anyone"})
                mine.append(block)
        barrier.wait()  # all blocks are committed now
        with journal.finishing() as wanted:
            if wanted:
                assert sorted(journal.committed(verify=True)) == list(range(blocks))
                journal.complete({"key": {"key": 1}, "outputs": {}})
                finished = True
    said.put((who, mine, finished))


def die_holding(folder: str, shared: bool) -> None:
    """Take an input, commit block 0, claim block 1, and be killed."""
    journal = Journal(Path(folder), {"key": 1}, shared=shared).__enter__()
    journal.commit(0, {"objects:a": np.arange(3)}, {})
    claim = journal.claim(1)
    assert claim is not None
    os.kill(os.getpid(), signal.SIGKILL)


def refused_with(folder: str, shared: bool, key: int, overwrite: bool, said: Any) -> None:
    """Say with which code an input is refused here; empty if it is not."""
    try:
        with Journal(Path(folder), {"key": key}, shared=shared, overwrite=overwrite):
            said.put("")
    except OutputError as error:
        said.put(error.code)
