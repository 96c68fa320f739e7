"""Several processes and one input: never two owners, never one block twice, one finisher, no stale lock."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contending
import numpy as np
import pytest

from wsitk.errors import OutputError
from wsitk.journal import Journal

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["wsitk.journal", "contending"])


def together(target: Callable[..., None], count: int, *args: Any) -> list[Any]:
    """Run `target(who, *args, barrier, queue)` in `count` processes; return what each said."""
    barrier, said = SPAWN.Barrier(count, timeout=120), SPAWN.Queue()
    processes = [SPAWN.Process(target=target, args=(i, *args, barrier, said)) for i in range(count)]
    for process in processes:
        process.start()
    answers = sorted(said.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return answers


def alone(target: Callable[..., None], *args: Any) -> int | None:
    process = SPAWN.Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_200_double_starts_have_one_holder_each(tmp_path: Path) -> None:
    first, second = together(contending.enter_often, 2, str(tmp_path), 200, False, [1, 1])
    for a, b in zip(first[1], second[1], strict=True):
        assert sorted((a, b)) == ["WSI503", "held"]


def test_200_double_starts_that_share_both_enter(tmp_path: Path) -> None:
    for _, answers in together(contending.enter_often, 2, str(tmp_path), 200, True, [1, 1]):
        assert set(answers) == {"held"}


def test_200_double_starts_with_two_keys_have_one_key_each(tmp_path: Path) -> None:
    first, second = together(contending.enter_often, 2, str(tmp_path), 200, True, [1, 2])
    for a, b in zip(first[1], second[1], strict=True):
        assert sorted((a, b)) == ["WSI510", "held"]


def test_blocks_are_divided_and_finished_once(tmp_path: Path) -> None:
    answers = together(contending.divide, 3, str(tmp_path), 60)
    assert sorted(block for _, mine, _ in answers for block in mine) == list(range(60))
    assert sum(finished for _, _, finished in answers) == 1
    left = {n for n in names(tmp_path) if not n.startswith("began-")}
    kept = {".wsitk", *(f".wsitk/{n}" for n in ("lock", "opening", "finish", "key.json", "seal.json"))}
    assert left == kept | {"provenance.json"}


def test_alone_and_divided_leave_the_same_files(tmp_path: Path) -> None:
    for shared in (False, True):
        folder = tmp_path / str(shared) / "a.svs"
        with Journal(folder, {"key": 1}, shared=shared, stamp={"files": []}) as journal:
            claim = journal.claim(0)
            assert claim is not None
            with claim:
                journal.commit(0, {"a": np.arange(3)}, {})
            with journal.finishing() as wanted:
                assert wanted
                journal.complete({"key": {"key": 1}, "outputs": {}})
            with journal.finishing() as wanted:
                assert not wanted
    places = (tmp_path / str(shared) / "a.svs" / ".wsitk" for shared in (False, True))
    alone, divided = ({p.name: p.read_bytes() for p in place.iterdir()} for place in places)
    assert alone == divided


@pytest.mark.parametrize("shared", [False, True])
def test_a_killed_process_holds_nothing(tmp_path: Path, shared: bool) -> None:
    assert alone(contending.die_holding, str(tmp_path), shared) == -signal.SIGKILL
    with Journal(tmp_path, {"key": 1}) as journal:  # exclusively, at once
        assert set(journal.committed(verify=True)) == {0}
    with Journal(tmp_path, {"key": 1}, shared=True) as journal:
        assert journal.claim(0) is None
        again = journal.claim(1)
        assert again is not None
        assert journal.claim(1) is None
        again.close()
        with journal.claim(1) or pytest.fail("let go of, but not to be had"):
            pass


def test_who_shares_keeps_others_from_owning_or_overwriting(tmp_path: Path) -> None:
    said = SPAWN.Queue()
    with Journal(tmp_path, {"key": 1}, shared=True) as journal:
        journal.commit(0, {"a": np.arange(3)}, {})
        for shared, key, overwrite, code in (
            (False, 1, False, "WSI503"),
            (False, 2, True, "WSI503"),
            (True, 2, False, "WSI510"),
            (True, 2, True, "WSI503"),
            (True, 1, True, ""),
        ):
            assert alone(contending.refused_with, str(tmp_path), shared, key, overwrite, said) == 0
            assert said.get(timeout=60) == code
        assert journal.committed().keys() == {0}
    assert alone(contending.refused_with, str(tmp_path), True, 2, True, said) == 0
    assert said.get(timeout=60) == ""


def test_a_claim_outlived_by_the_results_is_worth_nothing(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, {"key": 1}, shared=True) as slow,
        Journal(tmp_path, {"key": 1}, shared=True) as fast,
    ):
        fast.complete({"key": {"key": 1}, "outputs": {}})
        assert slow.claim(3) is None
        with slow.finishing() as wanted:
            assert not wanted
    assert not (tmp_path / ".wsitk" / "claims").exists()


def test_who_shares_drops_damaged_blocks_unless_they_are_being_redone(tmp_path: Path) -> None:
    with Journal(tmp_path, {"key": 1}, shared=True) as one, Journal(tmp_path, {"key": 1}, shared=True) as two:
        for block in (0, 1, 2):
            one.commit(block, {"a": np.arange(30)}, {})
        path = one.store.path / "000001.npz"
        data = bytearray(path.read_bytes())
        data[-30] ^= 1
        path.write_bytes(data)
        assert one.committed().keys() == {0, 1, 2}
        assert two.committed(verify=True).keys() == {0, 2}
        claim = one.claim(1)
        assert claim is not None
        with claim:
            one.commit(1, {"a": np.arange(30)}, {})
            path.write_bytes(data)
            assert 1 in two.committed(verify=True)  # left alone: its owner has not let go of it yet
        assert two.committed(verify=True).keys() == {0, 2}


def test_storage_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OutputError, match=r"WSI518 .*No locks available"), Journal(tmp_path, {"key": 1}):
        pass
