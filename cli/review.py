"""`wsitk review OUT`: which objects to look at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["review"]


def review(
    results: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder of `wsitk run`, or of one input.")
    ],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Objects on each list.")] = 50,
    by: Annotated[
        str, typer.Option(help="Column of objects.parquet: mutual_information where there is one.")
    ] = "",
    slides: Annotated[
        Path | None, typer.Option(help="The slides, for the pictures: a folder, or the one slide.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the lists; OUT/review if left out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON.")] = False,
) -> None:
    """Rank objects by doubt: a list for each slide and one over all, for QuPath, as a table and a picture."""
    from wsitk.review import most_doubtful, runs_in, write_review
    from wsitk.review_sheet import slides_of

    found = most_doubtful(results, count, by)
    runs = runs_in(results)
    folder = out or results / "review"
    notes: list[str] = []
    at_hand = slides_of(runs, slides, results / "run.json", notes.append)
    write_review(folder, found, runs, slides=at_hand, overwrite=overwrite, on_note=notes.append)
    listed = {name: len(items) for name, items in found.inputs.items()}
    if as_json:
        typer.echo(
            json.dumps({"review": str(folder), "by": found.by, "inputs": listed, "skipped": found.skipped})
        )
        return
    for note in dict.fromkeys(notes):
        typer.echo(note, err=True)
    if found.skipped:
        typer.echo(f"{found.skipped:,} objects have no {found.by} and were left out", err=True)
    typer.echo(f"{len(found.all)} objects of {len(listed)} inputs by {found.by}: {folder / 'review.png'}")
    typer.echo("drag review.geojson of a slide's folder onto the slide in QuPath")
