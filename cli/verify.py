"""`wsitk verify OUT...`: are these still the bytes that were written?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wsitk.verify import Report

__all__ = ["verify"]


def verify(
    outputs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Output folders of runs, or of single inputs.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each OUT.")] = False,
) -> None:
    """Find what has changed, is missing or unfinished; exits 1 if anything is, 2 without results."""
    from rich.console import Console
    from rich.progress import Progress

    from wsitk.verify import output_bytes
    from wsitk.verify import verify as look

    console = Console(stderr=True)
    good = True
    for folder in outputs:
        with Progress(
            console=console, transient=True, disable=as_json or not console.is_terminal
        ) as progress:
            task = progress.add_task(str(folder), total=output_bytes(folder))
            report = look(folder, on_bytes=partial(progress.advance, task))
        good &= report.ok
        if as_json:
            typer.echo(json.dumps({"out": str(folder), **report.as_dict()}))
        else:
            _print(folder, report)
    raise typer.Exit(int(not good))


def _print(folder: Path, report: Report) -> None:
    """Say one line for each thing found, and one for each OUT."""
    from wsitk.verify import shown

    for finding in report.findings:
        typer.echo(str(finding))
    for item in report.inputs:
        for finding in item.findings:
            typer.echo(f"{shown(item.name)}: {finding}")
    files, nbytes = sum(i.files for i in report.inputs), sum(i.nbytes for i in report.inputs)
    bad = sum(not i.ok for i in report.inputs) + any(f.code for f in report.findings)
    verdict = "all as written" if report.ok else f"{bad} not as written"
    typer.echo(
        f"{shown(str(folder))}: {len(report.inputs)} inputs, {files:,} files, {nbytes / 1e6:,.1f} MB: {verdict}"
    )
