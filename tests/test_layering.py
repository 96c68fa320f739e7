"""Imports point downward: what a module knows of the others is decided here, and only here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    "errors",
    "geometry",
    "frame",
    "settings",
    "compiled",
    "keyed",
    "noise",
    "plaincalls",
    "plainpickle",
    "torch_containers",
    "volumes",
    "durable",
    "process",
    "grid",
    "objects",
    "sources",
    "anonymous",
    "reading",
    "tissue",
    "loader",
    "model_map",
    "model",
    "torchvision_guard",
    "device",
    "predictor",
    "registry",
    "uncertainty",
    "stitch",
    "outlines",
    "polygons",
    "density",
    "metrics",
    "blockstore",
    "discard",
    "seal",
    "journal",
    "writers",
    "torchfile",
    "card",
    "splits",
    "record",
    "plate_table",
    "result",
    "contact_sheet",
    "json_stream",
    "artifacts",
    "repair",
    "evaluation",
    "qupath",
    "review_sheet",
    "review",
    "blocks",
    "worker",
    "region_worker",
    "plan",
    "planner",
    "label_results",
    "restoration",
    "work",
    "jobs",
    "outcome",
    "finish",
    "reports",
    "pipeline",
    "run_one",
    "restore_first",
    "verify",
    "training",
    "testing",
)
"""Lowest first. A new module or package is put in its place here, or the tests below fail."""


def engine_files() -> Iterator[tuple[str, Path]]:
    """Yield (layer, file) for each module of the engine; not the package's own face, which imports lazily."""
    for path in sorted((ROOT / "wsitk").iterdir()):
        if path.is_symlink() or path.name.startswith(("_", ".")):
            continue
        if path.is_dir():
            yield from ((path.name, file) for file in sorted(path.rglob("*.py")))
        elif path.suffix == ".py":
            yield path.stem, path


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: write the absolute name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def text_constants(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) for each string that is not a docstring."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


ENGINE = list(engine_files())
MODELS = sorted((ROOT / "models").rglob("*.py"))


def test_every_layer_has_its_place() -> None:
    assert {layer for layer, _ in ENGINE} <= set(ORDER)


@pytest.mark.parametrize(("layer", "file"), ENGINE, ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_engine_imports_only_what_lies_below(layer: str, file: Path) -> None:
    for line, name in imported(file):
        parts = name.split(".")
        if parts[0] != "wsitk" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        assert parts[1] in ORDER, f"{where}, which is no layer of the engine"
        assert ORDER.index(parts[1]) <= ORDER.index(layer), f"{where}, which lies above {layer}"


@pytest.mark.parametrize(("layer", "file"), ENGINE, ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_engine_names_models_only_in_the_registry(layer: str, file: Path) -> None:
    if layer == "registry":
        return
    for line, text in text_constants(file):
        named = text.startswith(("wsitk.models", "wsitk.cli"))
        assert not named, f"{file.relative_to(ROOT)}:{line} names {text!r}; only the registry may look up"


@pytest.mark.parametrize("file", MODELS, ids=lambda x: str(x.relative_to(ROOT)))
def test_models_never_import_the_command_line(file: Path) -> None:
    for line, name in imported(file):
        assert not name.startswith("wsitk.cli"), f"{file.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("file", [f for _, f in ENGINE] + MODELS, ids=lambda x: str(x.relative_to(ROOT)))
def test_nobody_imports_the_source_folders(file: Path) -> None:
    for line, name in imported(file):
        first = name.split(".")[0]
        assert first not in ("models", "cli", "tests"), f"{file.relative_to(ROOT)}:{line} imports {name}"


def test_a_violation_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "grid.py"
    file.write_text("def f():\n    from wsitk.pipeline import run\n    import wsitk.cli.main\n")
    assert list(imported(file)) == [(2, "wsitk.pipeline.run"), (3, "wsitk.cli.main")]
    file.write_text('"""wsitk.models in prose."""\nNAME = "wsitk.models.cellvit"\n')
    assert list(text_constants(file)) == [(2, "wsitk.models.cellvit")]
