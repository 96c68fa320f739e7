"""Every case of the fault corpus gives its code and its words, in one line, and takes nobody down."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.bases import BASES
from faults.cases import CASES, Case

from wsitk.errors import WsitkError
from wsitk.process import Death
from wsitk.reading.client import ReaderProcess

DEADLINE = 60.0
LIMIT_MIB = 1024


@pytest.fixture(scope="module")
def deaths() -> list[Death]:
    return []


@pytest.fixture(scope="module")
def reader(deaths: list[Death]) -> Iterator[ReaderProcess]:
    """Return a process that takes all the damage; `WSITK`'s own way of reading what may be hostile."""
    with ReaderProcess(
        preload=("wsitk.plan", "faults.use"), deadline=DEADLINE, on_death=deaths.append
    ) as process:
        yield process


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a sound file of each kind that the corpus damages."""
    folder = tmp_path_factory.mktemp("sound")
    for name in {case.base for case in CASES}:
        BASES[name](folder / name)
    return folder


def outcome(reader: ReaderProcess, case: Case, path: Path) -> tuple[str, str]:
    """Return what came of using a file: a word or codes, and the whole message."""
    try:
        return reader.call(f"faults.use:{case.use}", str(path), dict(case.options)), ""
    except WsitkError as error:
        return error.code, str(error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_has_its_code(
    case: Case, sound: Path, reader: ReaderProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / case.base
    shutil.copyfile(sound / case.base, path)
    caplog.set_level(logging.CRITICAL)  # what libraries say of damage is not of interest
    case.mutate(path)
    code, message = outcome(reader, case, path)
    assert re.fullmatch(case.code, code), message
    assert re.search(case.words, message, re.S), message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 1200


def test_nothing_died_of_it_and_memory_stayed_small(reader: ReaderProcess, deaths: list[Death]) -> None:
    assert not deaths
    assert reader.peak_mib < LIMIT_MIB


def test_the_corpus_is_as_large_as_promised() -> None:
    names = Counter(case.name for case in CASES)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(CASES) >= 150
    assert {case.row for case in CASES} >= {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 23, 24, 25, 26, 28, 29, 36} - {
        23
    }
    codes = {code for case in CASES for code in re.findall(r"WSI\d{3}", case.code)}
    assert len(codes) >= 18
