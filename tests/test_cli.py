"""The command line: help, defaults, and how it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from wsitk import __version__
from wsitk.cli.main import app, main
from wsitk.settings import Settings

VERBS = [
    ["run"],
    ["demo"],
    ["info"],
    ["doctor"],
    ["models"],
    ["models", "list"],
    ["models", "show"],
    ["models", "check"],
    ["qupath"],
    ["qupath", "check"],
]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """`run` takes SIGTERM for itself; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that calls `wsitk` as a shell would: (exit code, stdout, stderr)."""

    def wsitk(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["wsitk", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return wsitk


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a path that is found as an input; its bytes are no image."""
    path = tmp_path / "a.svs"
    path.write_bytes(b"not a slide")
    return path


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert f"wsitk {' '.join(words)}" in result.output.replace("root", "wsitk")


def test_bare_call_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "Usage" in result.output
    for verb in ("run", "demo", "info", "models", "doctor", "qupath"):
        assert verb in result.output


def test_version(call: Call) -> None:
    code, out, _ = call("--version")
    assert code == 0
    assert __version__ in out
    assert "research use only" in out.lower()


def test_defaults_are_those_of_settings() -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]  # it is a group
    offered = {p.name: p.default for p in command.params}
    plain = Settings()
    missing = [f.name for f in fields(Settings) if f.name not in offered]
    assert not missing, f"settings without an option: {missing}"
    for field in fields(Settings):
        said = offered[field.name]
        if field.name == "roi":
            said = said or None
        assert said == getattr(plain, field.name), field.name


def one_line(err: str) -> str:
    """Return the one line that was said."""
    (line,) = err.strip().splitlines()
    assert line.startswith("wsitk: WSI")
    return line


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--roi", "1,2,3", "WSI012"),
        ("--roi", "1,2,x,4", "WSI012"),
        ("--roi", "missing.geojson", "WSI012"),
        ("--mpp", "many", "WSI013"),
    ],
)
def test_option_that_makes_no_sense(
    call: Call, image: Path, tmp_path: Path, option: str, value: str, code: str
) -> None:
    exit_code, out, err = call("run", "cellvit", image, "-o", tmp_path / "out", option, value)
    assert exit_code == 2
    assert not out
    assert code in one_line(err)
    assert repr(value) in err
    assert not (tmp_path / "out").exists()


def test_csv_of_spacings_with_junk(call: Call, image: Path, tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text("path,mpp\na.svs,soon\n")
    exit_code, _, err = call("run", "cellvit", image, "-o", tmp_path / "out", "--mpp", table)
    assert exit_code == 2
    assert "WSI013" in one_line(err)
    assert "'soon'" in err


def test_unknown_model(call: Call, image: Path, tmp_path: Path) -> None:
    exit_code, _, err = call("run", "celvit", image, "-o", tmp_path / "out")
    assert exit_code == 2
    assert "WSI030" in one_line(err)
    assert "'celvit'" in err
    assert "cellvit-sam-h" in err, "it should say which names there are"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["run", "cellvit"], ["info"]], ids=" ".join)
def test_nothing_to_work_on(call: Call, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    tail = ["-o", tmp_path / "out"] if words[0] == "run" else []
    exit_code, _, err = call(*words, tmp_path / "empty", *tail)
    assert exit_code == 2
    assert "WSI001" in one_line(err)


def test_missing_argument_and_unknown_option(call: Call) -> None:
    assert call("run")[0] == 2
    assert call("run", "cellvit", "a.svs", "-o", "x", "--magnification", "40")[0] == 2
    assert call("explode")[0] == 2


def test_precision_is_one_of_three(call: Call, image: Path, tmp_path: Path) -> None:
    assert call("run", "cellvit", image, "-o", tmp_path / "out", "--precision", "int8")[0] == 2


def test_info_of_a_broken_file(call: Call, image: Path) -> None:
    exit_code, out, _ = call("info", image, "--json")
    assert exit_code == 1
    facts = json.loads(out)
    assert facts["input"] == "a.svs"
    assert facts["error"].startswith("WSI1")


def test_info_of_a_real_slide(call: Call, data: Path) -> None:
    exit_code, out, _ = call("info", data / "data/wsi/cmu-1-small-region.svs", "--json")
    facts = json.loads(out)
    assert exit_code == 0
    assert facts["levels"][0]["shape"] == [2967, 2220]
    assert facts["spacing_um"] == pytest.approx([0.499, 0.499])
    assert facts["axes"] == "yxc"
    exit_code, out, _ = call("info", data / "data/wsi/cmu-1-small-region.svs")
    assert exit_code == 0
    assert "2967×2220" in out
    assert "0.4990" in out


def test_doctor_finds_nothing_wrong_with_torch_and_readers(call: Call) -> None:
    _, out, _ = call("doctor", "--json")
    facts = json.loads(out)
    assert facts["wsitk"] == __version__
    assert facts["torchvision ops"] in ("native", "patched")
    assert facts["openslide library"]
    assert facts["problems"] == []
