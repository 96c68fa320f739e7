"""Atomic writing: the final name appears whole, or not at all; links are never followed."""

from __future__ import annotations

import hashlib
import os

import pytest

from wsitk.errors import OutputError, SourceError
from wsitk.writers.base import atomic_dir, atomic_file, sha256_file, tree_files, tree_sha256


def write_tree(folder):
    (folder / "b").mkdir()
    (folder / "b" / "two").write_bytes(b"2")
    (folder / "one").write_bytes(b"1")


def test_file_appears_only_when_whole(tmp_path):
    target = tmp_path / "a.bin"
    with atomic_file(target) as stream:
        stream.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SourceError("WSI111", "bad tile")])
def test_an_exception_leaves_nothing_and_arrives_as_it_is(tmp_path, error):
    def fail_in_file():
        with atomic_file(tmp_path / "a") as stream:
            stream.write(b"half")
            raise error

    def fail_in_folder():
        with atomic_dir(tmp_path / "d") as folder:
            write_tree(folder)
            raise error

    for fail in (fail_in_file, fail_in_folder):
        with pytest.raises(type(error)) as caught:
            fail()
        assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_failure_keeps_the_old_result(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail():
        with atomic_file(target, overwrite=True) as stream:
            stream.write(b"new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert target.read_bytes() == b"old"


def test_refuses_to_overwrite_unless_told(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"WSI510 .*--overwrite"), atomic_file(target):
        pass
    assert target.read_bytes() == b"old"
    with atomic_file(target, overwrite=True) as stream:
        stream.write(b"new")
    assert target.read_bytes() == b"new"


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "d"
    for text in ("first", "second"):
        with atomic_dir(target, overwrite=True) as folder:
            (folder / text).write_text(text)
    assert tree_files(target) == ["second"]
    assert os.listdir(tmp_path) == ["d"]
    with pytest.raises(OutputError, match="WSI510"), atomic_dir(target):
        pass


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".a.partial").write_bytes(b"half of a killed run")
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "old").write_bytes(b"half")
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"1")
    with atomic_dir(tmp_path / "d") as folder:
        write_tree(folder)
    assert sorted(os.listdir(tmp_path)) == ["a", "d"]
    assert tree_files(tmp_path / "d") == ["b/two", "one"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_writes_through_a_link(tmp_path, overwrite):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "file_link").symlink_to(outside)
    (tmp_path / "folder_link").symlink_to(folder)
    with pytest.raises(OutputError, match="WSI511"), atomic_file(tmp_path / "file_link", overwrite=overwrite):
        pass
    with (
        pytest.raises(OutputError, match="WSI511"),
        atomic_dir(tmp_path / "folder_link", overwrite=overwrite),
    ):
        pass
    assert outside.read_bytes() == b"precious"
    assert os.listdir(folder) == []


def test_a_link_planted_at_the_partial_name_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / ".a.partial").symlink_to(outside)
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"mine")
    assert outside.read_bytes() == b"precious"
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_missing_folder_is_a_coded_error(tmp_path):
    with pytest.raises(OutputError, match=r"WSI512 .*No such file"), atomic_file(tmp_path / "no" / "a"):
        pass


def test_hashes(tmp_path):
    write_tree(tmp_path)
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    assert sha256_file(tmp_path / "one") == tree_sha256(tmp_path / "one") == one
    lines = f"{two}  b/two\n{one}  one\n"
    assert tree_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    before = tree_sha256(tmp_path)
    (tmp_path / "one").rename(tmp_path / "uno")
    assert tree_sha256(tmp_path) != before


def test_a_link_in_a_tree_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(OutputError, match="WSI511"):
        tree_sha256(tmp_path)
