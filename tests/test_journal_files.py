"""What a run removes and writes: its own files, never others', and nothing through a link."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsitk.discard import discard_results
from wsitk.errors import OutputError, SourceError
from wsitk.geometry import Region
from wsitk.journal import BlockStore, DamagedBlockError, Journal
from wsitk.record import provenance
from wsitk.writers.ome_zarr import MapChannel, write_maps

OLD, NEW = {"run": 1}, {"run": 2}
LINKS = (".wsitk", ".wsitk/lock", ".wsitk/opening", ".wsitk/finish", ".wsitk/key.json", ".wsitk/seen.json",
         ".wsitk/blocks", ".wsitk/claims", ".wsitk/seal.json", "provenance.json")  # fmt: skip


def write_results(folder: Path, value: int = 1) -> None:
    """Write small results as a run does."""
    folder.mkdir(exist_ok=True)

    def pixels(region: Region) -> np.ndarray:
        return np.full((1, *region.shape), value, np.uint8)

    for name in ("objects.parquet", "tiles.parquet", "preview.png"):
        (folder / name).write_bytes(b"%d" % value)
    write_maps(folder / "maps.ome.zarr", (600, 700), "uint8", [MapChannel("a", (1, 2, 3))], (1.0, 1.0),
               (0.5, 0.5), pixels, overwrite=True)  # fmt: skip


def finished(folder: Path, key: dict[str, int], *, overwrite: bool = False) -> None:
    with Journal(folder, key, overwrite=overwrite) as journal:
        journal.commit(0, {"a": np.arange(3)}, {})
        write_results(folder, key["run"])
        journal.complete(provenance(folder, {"key": key}))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FOREIGN = ("notes.txt", "maps.ome.zarr/notes.txt", "maps.ome.zarr/labels/zarr.json", "maps.ome.zarr/0/c/0/a.bak",
           ".wsitk/notes.txt", "report/page.html")  # fmt: skip


def plant(folder: Path) -> None:
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("complete", [True, False])
def test_overwriting_leaves_what_others_put_there(tmp_path: Path, complete: bool) -> None:
    finished(tmp_path / "fresh" / "a.svs", NEW)
    folder = tmp_path / "out" / "a.svs"
    finished(folder, OLD)
    plant(folder)
    if not complete:
        (folder / "provenance.json").unlink()
    finished(folder, NEW, overwrite=True)
    assert files(folder) == files(tmp_path / "fresh" / "a.svs") | {name: name.encode() for name in FOREIGN}


def test_finishing_again_leaves_what_others_put_there(tmp_path: Path) -> None:
    finished(tmp_path, OLD)
    before = files(tmp_path)
    plant(tmp_path)
    (tmp_path / "maps.ome.zarr").rename(tmp_path / ".maps.ome.zarr.old")  # killed between the renames
    (tmp_path / "provenance.json").unlink()
    finished(tmp_path, OLD)
    assert files(tmp_path) == before | {name: name.encode() for name in FOREIGN}


def test_a_folder_killed_while_being_replaced_is_discarded_but_for_foreign_files(tmp_path: Path) -> None:
    finished(tmp_path, OLD)
    plant(tmp_path)
    (tmp_path / "maps.ome.zarr").rename(tmp_path / ".maps.ome.zarr.old")
    write_results(tmp_path / "other")
    (tmp_path / "other" / "maps.ome.zarr").rename(tmp_path / "maps.ome.zarr")
    shutil.rmtree(tmp_path / "other")
    discard_results(tmp_path)
    mine = {f".wsitk/{n}" for n in ("lock", "opening", "finish", "key.json", "seal.json")}
    assert files(tmp_path).keys() == {*FOREIGN, *mine}


def test_an_interrupted_discard_goes_on_and_is_never_taken_for_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path, OLD)

    class Killed(BaseException):
        pass

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("wsitk.discard._remove", die)
        with pytest.raises(Killed), Journal(tmp_path, NEW, overwrite=True):
            pass
    with Journal(tmp_path, OLD) as journal:  # the first run's key again: nothing of it is left to be trusted
        assert not journal.finished
        assert not (tmp_path / "maps.ome.zarr").exists()
        assert not (tmp_path / ".wsitk" / "discarding.json").exists()


def test_a_forged_record_makes_nothing_else_be_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    finished(folder, OLD)
    (tmp_path / "precious").write_text("1")
    (folder / "notes.txt").write_text("1")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "maps.ome.zarr" / "link").symlink_to(tmp_path)
    record = json.loads((folder / "provenance.json").read_text())
    record["outputs"] |= dict.fromkeys(
        ["../precious", str(tmp_path / "precious"), "notes.txt", "maps.ome.zarr/../../precious",
         "maps.ome.zarr/link/precious", "outside/precious", "", "."], "0"
    )  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(record))
    finished(folder, NEW, overwrite=True)
    assert (tmp_path / "precious").read_text() == (folder / "notes.txt").read_text() == "1"


def test_damaged_results_are_made_anew_when_overwriting(tmp_path: Path) -> None:
    finished(tmp_path, OLD)
    before = files(tmp_path)
    for name in sorted(before.keys() - {".wsitk/lock", ".wsitk/opening", ".wsitk/finish", ".wsitk/key.json"}):
        with Journal(tmp_path, OLD, overwrite=True) as journal:
            assert journal.finished
        (tmp_path / name).write_bytes(before[name] + b" ")
        with Journal(tmp_path, OLD) as journal:  # nobody looks unless told to
            assert journal.finished
        finished(tmp_path, OLD, overwrite=True)
        assert files(tmp_path) == before


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("name", LINKS)
def test_links_in_the_place_of_our_files_are_refused(tmp_path: Path, name: str, directory: bool) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "000001.json").write_text("precious")
    link = folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if directory else outside / "000001.json")
    with (
        pytest.raises(OutputError, match="WSI511"),
        Journal(folder, OLD, overwrite=True, stamp={"files": []}),
    ):
        pass
    assert files(outside) == {"000001.json": b"precious"}
    assert link.is_symlink()


def test_an_input_folder_that_is_a_link_is_refused_but_not_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")  # the user's own choice
    with Journal(tmp_path / "out" / "case" / "a.svs", OLD, name="case/a.svs"):
        pass
    (tmp_path / "elsewhere" / "linked").symlink_to(tmp_path / "elsewhere" / "case")
    for name in ("linked", "linked/a.svs"):
        with pytest.raises(OutputError, match="WSI511"), Journal(tmp_path / "out" / name, OLD, name=name):
            pass


def test_a_link_in_the_place_of_a_result_is_neither_followed_nor_removed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    finished(folder, OLD)
    os.rename(folder / "maps.ome.zarr", outside)
    (folder / "maps.ome.zarr").symlink_to(outside)
    before = files(outside)
    with pytest.raises(OutputError, match="WSI511"):
        finished(folder, NEW, overwrite=True)
    assert files(outside) == before
    assert (folder / "maps.ome.zarr").is_symlink()


# --- blocks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BlockStore:
    """Return a store with one block."""
    folder = tmp_path_factory.mktemp("block")
    (folder / ".wsitk").mkdir()
    store = BlockStore(folder)
    store.make()
    arrays = {"objects:a": np.arange(40, dtype=np.int32), "field:p:b": np.linspace(0, 1, 9)}
    store.commit(3, arrays, {"tiles": [[1, "ok", ""], [2, "unreadable", "why"]], "foreground": 0.25})
    return store


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_block_is_found(store: BlockStore, data: st.DataObject) -> None:
    before = {path: path.read_bytes() for path in store.path.iterdir()}
    path = store.path / data.draw(st.sampled_from(["000003.npz", "000003.json"]))
    bit = data.draw(st.integers(0, 8 * len(before[path]) - 1))
    changed = bytearray(before[path])
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    with pytest.raises(DamagedBlockError, match=r"WSI517 .*again") as caught:
        store.load(3, "objects:")
    assert caught.value.block == 3
    assert not store.intact(3)
    assert store.committed(verify=True) == {}
    assert os.listdir(store.path) == []
    for place, content in before.items():
        place.write_bytes(content)
    assert store.committed(verify=True).keys() == {3}


def test_cut_short_or_emptied_blocks_are_not_done(tmp_path: Path) -> None:
    with Journal(tmp_path, OLD) as journal:
        for block in range(6):
            journal.commit(block, {"a": np.arange(30)}, {})
        blocks = journal.store.path
        os.truncate(blocks / "000001.npz", 100)
        os.truncate(blocks / "000002.npz", 0)
        os.truncate(blocks / "000003.json", 0)
        os.truncate(blocks / "000004.json", 20)
        (blocks / "000005.npz").unlink()
        assert journal.committed().keys() == {0}


def test_forgetting_blocks_keeps_files_of_others(tmp_path: Path) -> None:
    with Journal(tmp_path, OLD) as journal:
        journal.commit(0, {"a": np.arange(3)}, {})
        (journal.store.path / "notes.txt").write_text("mine")
        (journal.store.path / "12.json").write_text("mine")
        journal.forget_blocks()
        assert sorted(os.listdir(journal.store.path)) == ["12.json", "notes.txt"]


def test_stores_and_damage_cross_processes(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(BlockStore(tmp_path))) == BlockStore(tmp_path)
    error = pickle.loads(pickle.dumps(DamagedBlockError(7, "gone")))
    assert (error.block, str(error)) == (7, "WSI517 gone")


# --- a changing input --------------------------------------------------------------------------------

FIRST, LATER = {"files": [["a.svs", 10, 111]]}, {"files": [["a.svs", 10, 222]]}


def test_an_input_that_changes_while_unfinished_is_noticed(tmp_path: Path) -> None:
    with Journal(tmp_path, OLD, stamp=FIRST) as journal:
        pass
    with Journal(tmp_path, OLD, stamp=LATER) as journal:  # nothing was done with the first one
        journal.commit(0, {"a": np.arange(3)}, {})
        journal.check_unchanged(LATER)
        with pytest.raises(SourceError, match=r"WSI160 .*changed since block 0"):
            journal.check_unchanged(FIRST)
    with (
        pytest.raises(SourceError, match=r"WSI160 .*10 bytes.*--overwrite"),
        Journal(tmp_path, OLD, stamp=FIRST),
    ):
        pass
    with Journal(tmp_path, OLD, stamp=FIRST, overwrite=True) as journal:
        assert journal.committed() == {}
        journal.complete({"key": OLD, "outputs": {}})
    assert not (tmp_path / ".wsitk" / "seen.json").exists()
    with Journal(tmp_path, OLD, stamp=LATER) as journal:  # a copy of a slide that is done
        assert journal.finished


def test_sharers_with_different_files_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, OLD, stamp=FIRST, shared=True),
        pytest.raises(SourceError, match="WSI160"),
        Journal(tmp_path, OLD, stamp=LATER, shared=True),
    ):
        pass
    with Journal(tmp_path, OLD, stamp=LATER, shared=True):
        pass
