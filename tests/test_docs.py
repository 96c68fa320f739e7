"""What the documentation says is so: blocks run, commands exist, codes and columns are all there.

A Python block runs unless the line above it says why not: ``<!-- not run: reason -->``. The blocks of a page
share one namespace and run in an empty folder that holds a small `slide.svs`.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import typer

import wsitk
from wsitk.cli.main import app
from wsitk.testing import SyntheticSlide

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>.*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
CODE = re.compile(r"\bWSI\d{3}\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is, where it starts, and why it isn't run (None if it is)."""

    kind: str
    body: str
    line: int
    why: str | None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["kind"], m["body"], text.count("\n", 0, m.start("body")) + 1, m["why"])
        for m in FENCE.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^```", text, re.M)), f"{page.name}: a fence is not closed"
    return found


def commands(
    node: object = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    """Yield (words, command) for every verb."""
    node = node or typer.main.get_command(app)
    for name, child in node.commands.items():  # type: ignore[attr-defined]  # groups only
        if hasattr(child, "commands"):
            yield from commands(child, (*path, name))
        else:
            yield (*path, name), child


COMMANDS = dict(commands())


def options(words: tuple[str, ...]) -> set[str]:
    """Return the options of a verb."""
    every = {o for p in COMMANDS[words].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    return {o for o in every if o.startswith("-")}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.kind == "python" for b in blocks(p))], ids=lambda p: name_of(p)
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_slide(tmp_path / "slide.svs")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.kind != "python":
            continue
        code = compile("\n" * block.line + block.body, name_of(page), "exec")
        if block.why is None:
            exec(code, namespace)
        else:
            assert len(block.why) > 5, f"{name_of(page)}:{block.line}: say why it is not run"


def write_slide(path: Path) -> None:
    """Write a tiled TIFF of synthetic H&E with glass around it, 0.25 µm per pixel."""
    pixels = np.full((1024, 1024, 3), 245, np.uint8)
    pixels[192:832, 192:832] = SyntheticSlide.make((640, 640), count=60, radius=(10.0, 18.0), seed=3).pixels
    per_cm = 1e4 / 0.25
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", compression="zlib",
        resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
    )  # fmt: skip


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            where = f"{name_of(page)}:{block.line}"
            assert block.kind in {"python", "bash", "text", "toml", "csv"}, f"{where}: {block.kind!r}"
            assert block.why is None or block.kind == "python", f"{where}: only Python blocks are run"


def test_public_names_are_documented() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [n for n in wsitk.__all__ if f"`wsitk.{n}" not in text and f"wsitk.{n}(" not in text]
    assert not missing


# --- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_verb_has_help_and_is_documented(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help
    assert len(command.help.split()) > 3
    for parameter in command.params:
        assert getattr(parameter, "help", ""), f"{' '.join(words)}: {parameter.name} has no help"
    assert any(f"wsitk {' '.join(words)}" in p.read_text(encoding="utf-8") for p in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_pages_exist(page: Path) -> None:
    for block in blocks(page):
        if block.kind != "bash":
            continue
        for line in block.body.replace("\\\n", " ").splitlines():
            for words in called(line):
                check_call(words, f"{name_of(page)}:{block.line}: {line.strip()}")


def called(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `wsitk` in a line of shell."""
    words = shlex.split(line, comments=True)
    starts = [i for i, w in enumerate(words) if w == "wsitk" or w.endswith("/wsitk")]
    for start in starts:
        rest = words[start + 1 :]
        stops = [i for i, w in enumerate(rest) if w in ("&&", "||", "|", ";")]
        yield rest[: stops[0]] if stops else rest


def check_call(words: list[str], where: str) -> None:
    if words and words[0] in ("--help", "--version"):
        return
    verb = next((v for v in (tuple(words[:2]), tuple(words[:1])) if v in COMMANDS), None)
    assert verb is not None, f"{where}: no such verb"
    for word in words[len(verb) :]:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in options(verb), f"{where}: no option {word}"


def test_every_option_of_run_is_documented() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert not [
        o for o in options(("run",)) - {"-o", "--help"} if f"`{o}" not in text and f"/{o}`" not in text
    ]


# --- error codes -------------------------------------------------------------------------------------


def codes_in_sources() -> dict[str, set[str]]:
    """Return code -> the files that say it in a string (docstrings don't count)."""
    found: dict[str, set[str]] = {}
    for file in (f for folder in ("wsitk", "models", "cli") for f in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        prose = {
            id(n.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                for code in CODE.findall(node.value):
                    found.setdefault(code, set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_error_codes_and_their_page_agree() -> None:
    raised = codes_in_sources()
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (WSI\d{3}) \|", page, re.M)
    assert len(rows) == len(set(rows))
    assert rows == sorted(rows)
    assert {c: sorted(f) for c, f in raised.items() if c not in rows} == {}, "add them to docs/errors.md"
    assert set(rows) - set(raised) == set(), "no longer said anywhere; take them out of docs/errors.md"


RANGE = {
    "UsageError": "[0689]",
    "SourceError": "[1689]",
    "SpacingError": "2",
    "ModelError": "[36]",
    "WorkError": "[468]",
    "OutputError": "[0568]",
}


def test_codes_lie_in_the_range_of_their_class() -> None:
    for file in (f for folder in ("wsitk", "models", "cli") for f in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in RANGE
                and node.args
            ):
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"
                    assert re.fullmatch(rf"WSI{RANGE[node.func.id]}\d\d", str(code.value)), (
                        f"{where}: {code.value}"
                    )


def test_error_rows_say_what_to_do() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| WSI\d{3} \|.*$", page, re.M):
        cells = [c.strip() for c in row.strip("|").split(" | ")]
        assert len(cells) == 3, row
        assert all(len(c) > 5 for c in cells), row


# --- links and layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+\.py)` \|", text, re.M)
    there = set()
    for folder, within in (("wsitk", ROOT / "wsitk"), ("models", ROOT), ("cli", ROOT)):
        for base, folders, files in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if f != "__pycache__"]
            paths = [Path(base, f) for f in files if f.endswith(".py") and f != "__main__.py"]
            there |= {
                p.relative_to(within).as_posix() for p in paths if p.name != "__init__.py" or p.stat().st_size
            }
    there -= {"__init__.py"}
    assert len(rows) == len(set(rows))
    assert there - set(rows) == set(), "modules without a line in docs/architecture.md"
    assert set(rows) - there == set(), "docs/architecture.md tells of modules that are gone"
