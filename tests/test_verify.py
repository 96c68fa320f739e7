"""`wsitk verify`: damage of every kind is found, named, and nothing else is complained about."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from wsitk.cli.verify import verify as command
from wsitk.errors import OutputError
from wsitk.grid import Tile
from wsitk.journal import Journal
from wsitk.model import FieldSpec, TileModel, TileResult
from wsitk.pipeline import Input, Runner
from wsitk.settings import Settings
from wsitk.testing import OracleModel, SyntheticSlide
from wsitk.verify import Report, output_bytes, verify

if TYPE_CHECKING:
    import torch

SETTINGS = Settings(tissue="none", block=2, workers=1, threads=1, device="cpu")
MAPS = FieldSpec("image", ("red", "green", "blue"), kind="image", dtype="uint8")
SLIDES = ("case1/a.tiff", "case2/a.tiff", "b.tiff")


class ObjectsAndMaps(TileModel):
    """The oracle's objects, and the image itself as maps."""

    def __init__(self) -> None:
        self._oracle = OracleModel(tile=(128, 128), halo=(32, 32))
        self.spec = replace(self._oracle.spec, fields=(MAPS,))

    @property
    def network(self) -> torch.nn.Module:
        return self._oracle.network

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._oracle.predict(batch)

    def postprocess(self, outputs: Mapping[str, np.ndarray], tile: Tile) -> TileResult:
        pixels = np.asarray(outputs["pixels"], np.float32) / np.float32(255)
        return TileResult(self._oracle.postprocess(outputs, tile).objects, {"image": pixels})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder of three small inputs, two of them called alike."""
    folder = tmp_path_factory.mktemp("verify")
    inputs = []
    for seed, name in enumerate(SLIDES):
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = SyntheticSlide.make((200, 180), count=30, seed=seed).pixels
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", resolution=(20000, 20000),
                         resolutionunit="CENTIMETER")  # fmt: skip
        inputs.append(Input(name, str(path)))
    runner = Runner(ObjectsAndMaps(), folder / "out", SETTINGS)
    assert {row.status for row in runner.run(inputs)} == {"done"}
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def vouched(out: Path) -> list[str]:
    """Return every file on which a result depends."""
    found = []
    for name in SLIDES:
        listed = json.loads((out / name / "provenance.json").read_bytes())["outputs"]
        found += [f"{name}/{f}" for f in (*listed, "provenance.json", ".wsitk/seal.json", ".wsitk/key.json")]
    return sorted(found)


def codes(report: Report) -> set[str]:
    """Return the codes of all that was found."""
    every = [*report.findings, *(f for i in report.inputs for f in i.findings)]
    return {f.code for f in every if f.code}


def named(report: Report) -> set[str]:
    """Return the paths with a code, below the output folder."""
    inside = {f"{i.name}/{f.path}" for i in report.inputs for f in i.findings if f.code}
    return inside | {f.path for f in report.findings if f.code}


@contextmanager
def undone(*paths: Path) -> Iterator[None]:
    """Put files back as they were."""
    before = {path: path.read_bytes() for path in paths}
    yield
    for path, data in before.items():
        path.write_bytes(data)


def damage(out: Path, names: list[str], random_: random.Random) -> tuple[str, list[str]]:
    """Choose a kind of damage, and the files that it befalls."""
    kind = random_.choice(["flip", "flip", "flip", "delete", "swap", "cut", "empty", "grow", "zeros"])
    chosen = random_.sample(names, 2)
    while kind == "swap" and (out / chosen[0]).read_bytes() == (out / chosen[1]).read_bytes():
        chosen = random_.sample(names, 2)
    return kind, chosen if kind == "swap" else chosen[:1]


def inflict(kind: str, paths: list[Path], random_: random.Random) -> None:
    data = bytearray(paths[0].read_bytes())
    if kind == "flip":
        bit = random_.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del data[random_.randrange(len(data)) :]
    elif kind == "empty":
        data.clear()
    elif kind == "grow":
        data.append(0)
    elif kind == "zeros":
        start = random_.randrange(len(data))
        fresh = bytes(min(512, len(data) - start))
        data[start : start + len(fresh)] = (
            fresh if any(data[start : start + len(fresh)]) else b"\1" * len(fresh)
        )
    elif kind == "swap":
        data = bytearray(paths[1].read_bytes())
        paths[1].write_bytes(paths[0].read_bytes())
    if kind == "delete":
        paths[0].unlink()
    else:
        paths[0].write_bytes(data)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_every_damage_is_found_and_named(out: Path, seed: int, count: int) -> None:
    assert verify(out).ok
    names, random_ = vouched(out), random.Random(seed)
    for number in range(count):
        kind, chosen = damage(out, names, random_)
        paths = [out / name for name in chosen]
        with undone(*paths):
            inflict(kind, paths, random_)
            report = verify(out)
        what = f"{number}: {kind} {chosen}"
        assert not report.ok, what
        # the record, the seal and the key vouch for each other: there a finding need not name the culprit
        plain = [c for c in chosen if "/.wsitk/" not in c and not c.endswith("/provenance.json")]
        at_fault = {i.name for i in report.inputs if not i.ok} | {f.path for f in report.findings}
        assert all(any(c.startswith(f"{name}/") for name in at_fault) for c in chosen), what
        if len(plain) == len(chosen):
            assert named(report) == set(plain), what
    assert verify(out).ok


def test_a_tree_as_written_is_fine(out: Path) -> None:
    read: list[int] = []
    report = verify(out, on_bytes=read.append)
    assert report.ok
    assert not report.findings
    assert [i.name for i in report.inputs] == sorted(SLIDES)
    assert all(i.finished and i.files >= 5 and not i.findings for i in report.inputs)
    assert 0 < sum(read) == sum(i.nbytes for i in report.inputs) <= output_bytes(out)
    assert verify(out / "case1").ok
    assert verify(out / "case1" / "a.tiff").ok


def test_every_shard_of_a_map_is_listed(out: Path) -> None:
    listed = json.loads((out / "b.tiff" / "provenance.json").read_bytes())["outputs"]
    maps = out / "b.tiff" / "maps.ome.zarr"
    shards = {p.relative_to(out / "b.tiff").as_posix() for p in maps.rglob("*") if p.is_file()}
    assert {n for n in listed if n.startswith("maps.ome.zarr/")} == shards
    assert any(n.startswith("maps.ome.zarr/0/c/") for n in shards)


def test_every_chunk_and_index_of_a_map_has_a_checksum(out: Path) -> None:
    for path in (out / "b.tiff" / "maps.ome.zarr").glob("[0-9]*/zarr.json"):
        (sharding,) = json.loads(path.read_bytes())["codecs"]
        assert sharding["name"] == "sharding_indexed"
        parts = sharding["configuration"]
        assert [parts[k][-1]["name"] for k in ("codecs", "index_codecs")] == ["crc32c", "crc32c"]


def test_what_belongs_to_others_is_told_and_no_fault(out: Path) -> None:
    for name in ("notes.txt", "b.tiff/notes.txt", "b.tiff/maps.ome.zarr/0/c/x", "b.tiff/.wsitk/x"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("1")
    (out / "b.tiff" / "up").symlink_to(out)
    report = verify(out)
    assert report.ok
    assert [f.path for f in report.findings] == ["notes.txt"]
    told = [f.path for i in report.inputs for f in i.findings]
    assert sorted(told) == [".wsitk/x", "maps.ome.zarr/0/c/x", "notes.txt", "up"]


def test_leftovers_are_told_and_no_fault(out: Path) -> None:
    folder = out / "b.tiff"
    (folder / ".objects.parquet.partial").write_text("half")
    (folder / ".maps.ome.zarr.partial" / "0").mkdir(parents=True)
    (folder / "maps.ome.zarr" / "0" / "zarr.json.abc.partial").write_text("half")
    (folder / ".wsitk" / "blocks").mkdir()
    (folder / ".wsitk" / "blocks" / "000000.npz").write_text("half")
    (out / ".run.json.part").write_text("half")
    report = verify(out)
    assert report.ok
    said = [*report.findings, *(f for i in report.inputs for f in i.findings)]
    assert len(said) == 5
    assert all("stopped" in f.text for f in said)


def test_folders_swapped_renamed_or_missing(out: Path) -> None:
    one, two = out / "case1" / "a.tiff", out / "case2" / "a.tiff"
    one.rename(out / "x")
    two.rename(one)
    (out / "x").rename(two)
    report = verify(out)
    assert codes(report) == {"WSI523"}
    assert named(report) == {"case1/a.tiff/.", "case2/a.tiff/."}
    assert codes(verify(two)) == {"WSI523"}
    shutil.rmtree(two)
    report = verify(out)
    assert "case2/a.tiff" in named(report)
    assert {f.code for f in report.findings} == {"WSI521"}


def test_outputs_moved_in_from_another_input(out: Path) -> None:
    for name in ("objects.parquet", "provenance.json"):
        shutil.copy(out / "case1" / "a.tiff" / name, out / "b.tiff" / name)
    assert codes(verify(out / "b.tiff")) >= {"WSI520", "WSI522"}


def test_a_record_that_was_written_anew_is_not_the_sealed_one(out: Path) -> None:
    path = out / "b.tiff" / "provenance.json"
    record = json.loads(path.read_bytes())
    record["objects"] = {name: n + 1 for name, n in record["objects"].items()}
    path.write_text(json.dumps(record, indent=1, sort_keys=True))
    assert codes(verify(out)) == {"WSI522"}


def test_a_forged_record_reads_nothing_outside(out: Path) -> None:
    path = out / "b.tiff" / "provenance.json"
    record = json.loads(path.read_bytes())
    record["outputs"]["maps.ome.zarr/../../../../etc/hostname"] = record["outputs"]["/etc/hostname"] = "0"
    path.write_text(json.dumps(record))
    report = verify(out)
    assert codes(report) == {"WSI522"}
    assert sum("no result" in f.text for i in report.inputs for f in i.findings) == 2


def test_a_link_in_the_place_of_a_result_is_not_read(out: Path, tmp_path: Path) -> None:
    for name in ("objects.parquet", "maps.ome.zarr"):
        (out / "b.tiff" / name).rename(tmp_path / name)
        (out / "b.tiff" / name).symlink_to(tmp_path / name)
    report = verify(out)
    assert codes(report) == {"WSI526"}


def test_numbers_that_disagree_with_the_table(out: Path) -> None:
    from wsitk.seal import key_bytes, seal_of

    folder = out / "b.tiff"
    record = json.loads((folder / "provenance.json").read_bytes())
    record["tiles"]["ok"] += 1
    data = key_bytes(record)
    (folder / "provenance.json").write_bytes(data)
    (folder / ".wsitk" / "seal.json").write_bytes(seal_of("b.tiff", data))
    report = verify(out)
    assert codes(report) == {"WSI527"}
    assert named(report) == {"b.tiff/tiles.parquet"}


def test_an_unfinished_input_says_what_it_has(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.svs", {"key": 1}) as journal:
        for block in range(4):
            journal.commit(block, {"a": np.arange(100)}, {})
        path = journal.store.path / "000002.npz"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.truncate(journal.store.path / "000003.npz", 9)
    report = verify(tmp_path)
    (item,) = report.inputs
    assert (item.finished, item.blocks, report.ok) == (False, 2, False)
    assert codes(report) == {"WSI524", "WSI525"}
    assert named(report) == {f"a.svs/{p}" for p in (".", ".wsitk/blocks/000002", ".wsitk/blocks/000003")}
    assert len(os.listdir(journal.store.path)) == 8  # looking changes nothing


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("1")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(OutputError, match="WSI519") as caught:
            verify(folder)
        assert caught.value.exit_code == 2


def test_the_command(out: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command)
    good = CliRunner().invoke(app, [str(out)])
    assert good.exit_code == 0
    assert "all as written" in good.output
    (out / "b.tiff" / "preview.png").unlink()
    (out / "b.tiff" / "line\nbreak\x1b[31m").write_text("1")
    bad = CliRunner().invoke(app, [str(out)])
    assert bad.exit_code == 1
    assert "b.tiff: WSI521 preview.png: is missing" in bad.output
    assert "\x1b" not in bad.output
    found = json.loads(CliRunner().invoke(app, ["--json", str(out)]).stdout)
    assert not found["ok"]
    assert [i["ok"] for i in found["inputs"]] == [False, True, True]
