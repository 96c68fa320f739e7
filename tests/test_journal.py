"""The journal: what is committed is there whole, what is not committed is not there at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wsitk.errors import OutputError
from wsitk.journal import Journal, write_durably

KEY = {"model": ["m", "1"], "settings": {"tile": None}}


def test_commit_and_load(tmp_path: Path) -> None:
    with Journal(tmp_path, KEY) as journal:
        journal.commit(
            7, {"objects:size": np.arange(3), "field:p:done": np.ones((2, 2))}, {"tiles": [[1, "ok", ""]]}
        )
        assert journal.committed()[7]["tiles"] == [[1, "ok", ""]]
        assert set(journal.load(7, "objects:")) == {"size"}
        assert np.array_equal(journal.load(7, "field:p:")["done"], np.ones((2, 2)))


def test_data_without_a_commit_record_does_not_count(tmp_path: Path) -> None:
    with Journal(tmp_path, KEY) as journal:
        journal.commit(0, {"a": np.arange(3)}, {})
        (tmp_path / ".wsitk" / "blocks" / "000001.npz").write_bytes(b"half")
        (tmp_path / ".wsitk" / "blocks" / ".000002.npz.part").write_bytes(b"half")
        assert set(journal.committed()) == {0}
    with Journal(tmp_path, KEY) as journal:
        assert set(journal.committed()) == {0}
        assert not list((tmp_path / ".wsitk" / "blocks").glob(".*.part"))


def test_a_record_whose_data_is_cut_short_does_not_count(tmp_path: Path) -> None:
    with Journal(tmp_path, KEY) as journal:
        journal.commit(0, {"a": np.arange(300)}, {})
        os.truncate(tmp_path / ".wsitk" / "blocks" / "000000.npz", 100)
        assert journal.committed() == {}


def test_another_key_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    with Journal(tmp_path, KEY):
        pass
    with (
        pytest.raises(OutputError, match=r"WSI510 .*settings differ.*--overwrite"),
        Journal(tmp_path, {**KEY, "settings": {"tile": 512}}),
    ):
        pass
    with Journal(tmp_path, KEY):  # the refusal let go of the lock
        pass


def test_two_processes_cannot_hold_one_journal(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from wsitk.errors import OutputError; from wsitk.journal import Journal\n"
        "try:\n"
        f"    Journal(Path(sys.argv[1]), {KEY!r}).__enter__()\n"
        "except OutputError as error:\n"
        "    print(error.code)\n"
    )
    with Journal(tmp_path, KEY):
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    assert said.stdout.strip() == "WSI503"


def test_write_durably_leaves_the_old_file_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_durably(target, b"old")
    (tmp_path / ".a.json.part").mkdir()  # stands in the way of the temporary file
    with pytest.raises(OSError, match="directory"):
        write_durably(target, b"new")
    assert target.read_bytes() == b"old"
