"""`import wsitk` and every `--help` stay light; asserted by what was imported, never by a clock."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "torchvision", "timm", "zarr", "dask", "numba", "geopandas", "pandas", "pyarrow", "cv2"),
    *("scipy", "skimage", "openslide", "tifffile", "imagecodecs", "shapely"),
}

HELP = """
import json, sys
sys.argv = ["wsitk", *json.loads(sys.argv[1])]
from wsitk.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


def modules(code: str, *arguments: str) -> set[str]:
    """Return the top-level modules a fresh interpreter has imported after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr)}


def test_import_wsitk() -> None:
    found = modules("import json, sys, wsitk; sys.stderr.write(json.dumps(sorted(sys.modules)))")
    assert "wsitk" in found
    assert not found & HEAVY


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["run", "--help"], ["demo", "--help"], ["models", "list", "--help"]],
    ids=" ".join,
)
def test_help(words: list[str]) -> None:
    found = modules(HELP, json.dumps(words))
    assert "typer" in found
    assert not found & HEAVY


def test_source_folders_stay_off_the_path() -> None:
    """An editable install puts the checkout on the path; nothing may import a second copy through it."""
    code = (
        "import json, sys, wsitk.models, wsitk.cli.main\n"
        "from wsitk.registry import model_names\n"
        "assert 'cellvit' in model_names()\n"
        "sys.stderr.write(json.dumps(sorted(sys.modules)))"
    )
    assert not modules(code) & {"models", "cli"}
