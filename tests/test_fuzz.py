"""No damaged slide ends the reader's parent, hangs it, fills the memory, or fails without a code.

The fast lane takes 300 mutants, the slow lane `WSITK_TEST_FUZZ` of them (10,000 unless it says otherwise).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import headers, mutate, write_kinds

from wsitk.errors import WsitkError
from wsitk.reading.client import ReaderProcess

DEADLINE = 20.0
LIMIT_MIB = 1024


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_kinds(tmp_path_factory.mktemp("kinds"))


def fuzz(kinds: list[Path], seeds: range, folder: Path) -> tuple[Counter[str], ReaderProcess]:
    """Use a mutant for each seed; return what came of them, and the reader, closed."""
    bases = [(path.name, path.read_bytes(), headers(path)) for path in kinds]
    said: Counter[str] = Counter()
    uncoded = []
    with ReaderProcess(preload=("wsitk.plan", "fuzzing"), deadline=DEADLINE) as reader:
        for seed in seeds:
            name, data, places = bases[seed % len(bases)]
            path = folder / f"{seed}-{name}"
            path.write_bytes(mutate(data, places, seed))
            try:
                said[reader.call("fuzzing:use", str(path))] += 1
            except WsitkError as error:
                said[error.code] += 1
                if not re.fullmatch(r"WSI[12]\d\d", error.code):
                    uncoded.append(f"seed {seed}: {error}")
            path.unlink()
    assert not uncoded
    return said, reader


def test_undamaged_slides_of_every_kind_are_read(kinds: list[Path]) -> None:
    with ReaderProcess(preload=("wsitk.plan",)) as reader:
        assert {p.name: reader.call("fuzzing:use", str(p)) for p in kinds} == {p.name: "ok" for p in kinds}


def test_damaged_slides_are_refused_or_read(kinds: list[Path], tmp_path: Path) -> None:
    said, reader = fuzz(kinds, range(300), tmp_path)
    assert said.total() == 300
    assert said["ok"] > 30
    assert said["damaged"] + said["WSI101"] > 30  # the mutations do bite
    assert reader.peak_mib < LIMIT_MIB


@pytest.mark.slow
def test_ten_thousand_damaged_slides(kinds: list[Path], tmp_path: Path) -> None:
    count = int(os.environ.get("WSITK_TEST_FUZZ", "10000"))
    said, reader = fuzz(kinds, range(300, 300 + count), tmp_path)
    print(dict(said.most_common()), f"reader's peak {reader.peak_mib:.0f} MiB")
    assert said.total() == count
    assert reader.peak_mib < LIMIT_MIB
