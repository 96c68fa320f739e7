"""`wsitk qupath check FILE...`: would QuPath import it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Work with QuPath's files.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Keep `check` a sub-command while it is the only one."""


@app.command("check")
def check(files: Annotated[list[Path], typer.Argument(help="GeoJSON files, also gzipped.")]) -> None:
    """Apply the rules of QuPath's importer; exits 1 if a file would be refused or lose something."""
    from wsitk.qupath import check_geojson

    good = True
    for file in files:
        report = check_geojson(file)
        good &= report.ok
        for line in report.lines():
            typer.echo(line)
    raise typer.Exit(int(not good))
