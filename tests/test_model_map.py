"""A mixed folder, each input to the model that is meant for its kind."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner
from volume_data import noise, oblique, save_nifti, save_series

from wsitk.cli.execute import _with_channels
from wsitk.cli.main import app
from wsitk.errors import UsageError
from wsitk.model_map import Choice, choose, kinds_of, read_map
from wsitk.sources.array import ArraySource
from wsitk.sources.discover import expand_inputs

MAP = """
[slide]
model = "mapped_models:slide"
[xray]
model = "mapped_models:x_ray"
options = { side = 16 }
[ct]
model = "volume_models:organs"
[[volume]]
model = "nothing:at_all"
files = "other_*"
[[volume]]
model = "volume_models:organs"
"""


def written(folder: Path, text: str) -> Path:
    (folder / "map.toml").write_text(text)
    return folder / "map.toml"


def test_a_map_is_read_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    choices = read_map(written(tmp_path, MAP + '[mr]\nmodel = "weights.pth"\n'))
    assert [c.kind for c in choices] == ["slide", "xray", "ct", "volume", "volume", "mr"]
    assert choices[1].options == {"side": 16}
    assert choices[-1].model == str(tmp_path / "weights.pth"), "files are named relative to the map"
    assert choose(choices, "a/other_1.nii", ["volume"]).model == "nothing:at_all"
    assert choose(choices, "a/one.nii", ["volume"]).model == "volume_models:organs"
    assert choose(choices, "series", ["ct", "volume"]).kind == "ct"
    assert choose(choices, "series", ["pet", "volume"]).kind == "volume"
    with pytest.raises(UsageError, match=r"WSI018 f\.tif is a flat image with other .* \[fluorescence\]"):
        choose(choices, "f.tif", ["fluorescence"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("[slide", "Expected .]. at the end"),
        ("[slides]\nmodel='a'", r"no kind \[slides\].*did you mean \[slide\]"),
        ("[slide]\nfiles=['a']", "names no model"),
        ("[slide]\nmodel='a'\nweights='b'", "says weights"),
        ("[slide]\nmodel='a'\noptions=3", "options is a table"),
        ("[slide]\nmodel='a'\nfiles=[3]", "files a list"),
    ],
)
def test_what_a_map_cannot_say_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"WSI017 .*{words}"):
        read_map(written(tmp_path, text))


@pytest.mark.parametrize(
    ("shape", "axes", "kinds"),
    [
        ((8, 8, 3), "yxc", ("slide",)),
        ((8, 8), "yx", ("xray",)),
        ((8, 8, 1), "yxc", ("xray",)),
        ((8, 8, 2), "yxc", ("fluorescence",)),
        ((4, 8, 8), "zyx", ("volume",)),
    ],
)
def test_kinds_are_told_by_axes_and_channels(
    shape: tuple[int, ...], axes: str, kinds: tuple[str, ...]
) -> None:
    with ArraySource(np.zeros(shape, np.uint8), axes=tuple(axes)) as source:
        assert kinds_of(source) == kinds


def test_one_command_runs_a_mixed_folder_into_one_summary(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 200, (96, 96, 3), np.uint8)
    tifffile.imwrite(
        folder / "slide.tif", pixels, tile=(32, 32), photometric="rgb", resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    tifffile.imwrite(folder / "chest.png.tif", pixels[..., 0], photometric="minisblack")
    tifffile.imwrite(folder / "cells.tif", pixels[..., :2], photometric="minisblack", planarconfig="contig")
    save_nifti(folder / "head.nii.gz", noise(20, 20, 40).astype(np.int16))
    save_series(
        folder / "series", noise(12, 20, 40, low=-500, high=900).astype(np.int16), oblique((1.0, 1.0, 1.0))
    )
    out = tmp_path / "out"
    words = [
        "run",
        "--models",
        str(written(tmp_path, MAP)),
        str(folder),
        "-o",
        str(out),
        "--no-supervise",
        "--json",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, (result.output, result.exception)
    with (out / "summary.csv").open(newline="") as file:
        rows = {row["input"]: row for row in csv.DictReader(file)}
    assert {n: (r["status"], r["code"]) for n, r in rows.items()} == {
        "cells.tif": ("failed", "WSI018"),
        "chest.png.tif": ("done", ""),
        "head.nii.gz": ("done", ""),
        "series": ("done", ""),
        "slide.tif": ("done", ""),
    }
    wanted = pixels[::6, ::6, 0].mean() / 255
    assert float(rows["chest.png.tif"]["mean_brightness"]) == pytest.approx(wanted, rel=1e-4)
    assert (out / "slide.tif/maps.ome.zarr").is_dir()
    assert (out / "head.nii.gz/labels.nii.gz").is_file()
    assert (out / "series/labels.nii.gz").is_file()


def test_options_of_one_model_and_a_map_contradict_each_other(tmp_path: Path) -> None:
    words = ["run", "--models", str(written(tmp_path, MAP)), str(tmp_path), "-o", "out", "--support", "x"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UsageError)
    assert result.exception.code == "WSI017"


# --- channels in files of their own --------------------------------------------------------------------


def test_a_further_channel_is_found_by_its_name_and_is_no_input(tmp_path: Path) -> None:
    for name in ("a_ct.nii.gz", "a_pet.nii.gz", "b_ct.nii.gz", "b_pet.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    items = expand_inputs([tmp_path]).items
    work = _with_channels(items, [("_ct", "_pet")])
    assert [(i.name, [Path(p).name for p in i.also]) for i in work] == [
        ("a_ct.nii.gz", ["a_pet.nii.gz"]),
        ("b_ct.nii.gz", ["b_pet.nii.gz"]),
    ]
    assert [i.also for i in _with_channels(items, [])] == [()] * 4
    (tmp_path / "b_pet.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"WSI019 b_ct\.nii\.gz has no partner"):
        _with_channels(expand_inputs([tmp_path]).items, [("_ct", "_pet")])
    (tmp_path / "b_ct.nii.gz").rename(tmp_path / "b.nii.gz")
    with pytest.raises(UsageError, match=r"WSI019 b\.nii\.gz has no partner .*its name has none of that"):
        _with_channels(expand_inputs([tmp_path]).items, [("_ct", "_pet")])


def test_a_choice_without_patterns_takes_every_name() -> None:
    assert Choice("slide", "m").takes("anything", ("slide",))
    assert not Choice("slide", "m", files=("a*",)).takes("x/b.svs", ("slide",))
