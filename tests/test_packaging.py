"""What a user installs is what the checkout holds, and nothing lands outside the package `wsitk`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"wsitk": "wsitk", "models": "wsitk/models", "cli": "wsitk/cli"}


def checkout() -> set[str]:
    """Return the files of the three source folders under their installed names."""
    found = set()
    for folder, installed in FOLDERS.items():
        for base, folders, files in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if f != "__pycache__" and not f.startswith(".")]
            inside = Path(base).relative_to(ROOT / folder)
            found |= {(installed / inside / f).as_posix() for f in files if not f.startswith(".")}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


def test_links_are_links() -> None:
    for name in ("models", "cli"):
        link = ROOT / "wsitk" / name
        assert link.is_symlink(), (
            f"wsitk/{name} should be a link to ../{name}. On Windows, turn on Developer Mode, run "
            "`git config core.symlinks true`, then `git checkout -- wsitk/models wsitk/cli`"
        )
        assert (ROOT / "wsitk" / os.readlink(link)).resolve() == ROOT / name


def test_wheel_installs_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {n for n in top if not n.endswith(".dist-info")} == {"wsitk"}
    assert len(top) == 2


def test_wheel_holds_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert {n for n in names if n.startswith("wsitk/")} == checkout()
    assert {"wsitk/py.typed", "wsitk/cli/main.py", "wsitk/models/__init__.py"} <= set(names)


def test_wheel_has_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "wsitk = wsitk.cli.main:main" in archive.read(entry).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_sdist_holds_no_links(wheel: Path) -> None:
    (path,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert all(m.isfile() or m.isdir() for m in archive.getmembers())
        inner = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert {"pyproject.toml", "LICENSE", "README.md", "models/__init__.py", "cli/main.py"} <= inner
    assert not any(n.startswith(("wsitk/models/", "wsitk/cli/")) for n in inner)


def test_what_is_imported_is_declared() -> None:
    """A package that comes along with another one today may not do so tomorrow."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "dev"}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {re.split(r"[\[<>=! ]", line)[0].lower().replace("_", "-") for line in lines}
    imported: dict[str, str] = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.partition(".")[0]: path.relative_to(ROOT).as_posix() for name in names}
    homes = packages_distributions()
    for name, where in imported.items():
        if name not in sys.stdlib_module_names and name != "wsitk":
            ours = {d.lower().replace("_", "-") for d in homes.get(name, [name])}
            assert ours & declared, f"{where} imports {name}; declare {' or '.join(ours)} in pyproject.toml"
