"""`wsitk run MODEL INPUT... -o OUT`: the verb that matters."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from wsitk.errors import UsageError
from wsitk.settings import Settings

if TYPE_CHECKING:
    from wsitk.pipeline import Input, Runner

__all__ = ["run"]

DEFAULTS = Settings()


def run(
    model: Annotated[str, typer.Argument(help="A model's name (`wsitk models list`) or a checkpoint file.")],
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Slides, folders or globs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    mpp: Annotated[
        str,
        typer.Option(help="Pixel size in µm, instead of what files state: a number, or a CSV of path,mpp."),
    ] = "",
    tile: Annotated[
        int | None, typer.Option(help="Read window in pixels at the model's spacing.")
    ] = DEFAULTS.tile,
    halo: Annotated[int | None, typer.Option(help="Margin of a tile, in the same pixels.")] = DEFAULTS.halo,
    roi: Annotated[
        str, typer.Option(help="Work on x,y,width,height (level-0 pixels) or on a GeoJSON's regions.")
    ] = "",
    tissue: Annotated[str, typer.Option(help="auto, none, or a GeoJSON of the tissue.")] = DEFAULTS.tissue,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = DEFAULTS.device,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Arithmetic of the network.")
    ] = DEFAULTS.precision,
    batch: Annotated[
        int, typer.Option(min=1, help="Groups of tiles in flight on the device.")
    ] = DEFAULTS.batch,
    block: Annotated[
        int, typer.Option(min=1, help="Tiles along each side of a block, the unit of resuming.")
    ] = DEFAULTS.block,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode and post-process.")
    ] = DEFAULTS.workers,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the network on a CPU.")
    ] = DEFAULTS.threads,
    max_unreadable: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of bad tiles above which an input counts as failed."),
    ] = DEFAULTS.max_unreadable,
    maps: Annotated[bool, typer.Option(help="Write maps.ome.zarr.")] = DEFAULTS.maps,
    geojson: Annotated[bool, typer.Option(help="Write objects.geojson.gz for QuPath.")] = DEFAULTS.geojson,
    preview: Annotated[bool, typer.Option(help="Write preview.png.")] = DEFAULTS.preview,
    supervise: Annotated[
        bool, typer.Option(help="Run the model in a process of its own, which may die.")
    ] = DEFAULTS.supervise,
    deadline: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a finished tile before the model counts as hung.")
    ] = DEFAULTS.deadline,
    read_deadline: Annotated[
        float, typer.Option(min=1.0, help="Seconds that reading one tile may take.")
    ] = DEFAULTS.read_deadline,
    max_ram: Annotated[
        float | None, typer.Option(min=0.1, help="GiB that the model's process may hold.")
    ] = DEFAULTS.max_ram,
    part: Annotated[
        str, typer.Option(help="i/n: do the i-th of n parts (from 0), beside processes that do the others.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another run.")
    ] = DEFAULTS.overwrite,
    classifier: Annotated[
        str, typer.Option(help="A token classifier's file, for checkpoints of CellViT.")
    ] = "",
    postprocessing: Annotated[
        str, typer.Option(help="For checkpoints of CellViT: default, or upstream to reproduce CellViT 1.0.9.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say everything as JSON lines.")] = False,
) -> None:
    """Run a model over slides. Running the same command again resumes."""
    if tissue not in ("auto", "none") and not Path(tissue).is_file():
        raise UsageError("WSI014", f"--tissue wants auto, none or a GeoJSON file, got {tissue!r}")
    given = locals().copy()  # of this function: inside a comprehension they would be the comprehension's
    parsed = {"roi": _region(roi), "part": _part(part)}
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)} | parsed)
    named = {"classifier": classifier, "postprocessing": postprocessing}
    options = {key: value for key, value in named.items() if value}
    execute(
        model, inputs, out, settings, mpp=_spacing(mpp), options=options, dry_run=dry_run, as_json=as_json
    )


def execute(
    model: str,
    inputs: list[str],
    out: Path,
    settings: Settings,
    *,
    mpp: float | dict[str, float] | None = None,
    options: Mapping[str, str] | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Find the inputs, run them, say what came of it; exits with the run's code."""
    from wsitk.cli.display import Display, JsonLines
    from wsitk.pipeline import Input, ModelRef, Runner, exit_code
    from wsitk.sources.discover import expand_inputs

    found = expand_inputs(inputs)
    if not found.items:
        raise UsageError(
            "WSI001", f"no slides in {', '.join(inputs)} ({dict(found.skipped)}); name slides or a folder"
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    with JsonLines() if as_json else Display(len(found.items), dict(found.skipped)) as display:
        by_name = _by_name(mpp, found.items) if isinstance(mpp, dict) else mpp
        # a dry run says everything itself, at its end
        listener = (lambda event: None) if dry_run else display.event
        work = [Input(item.name, str(item.path)) for item in found.items]
        reference = ModelRef(model, dict(options or {}))
        with Runner(reference, out, settings, mpp=by_name, on_event=listener) as runner:
            if dry_run:
                _dry_run(runner, work, as_json)
            else:
                runner.run(work)
                display.close(out, list(runner.rows.values()))
    raise typer.Exit(exit_code(runner.rows.values()))


def _leave(number: int, frame: object) -> None:
    """Leave as a shell expects of a program that got this signal; the journal needs no farewell."""
    typer.echo("wsitk: interrupted; run the same command again to resume", err=True)
    raise SystemExit(128 + number)


def _dry_run(runner: Runner, work: list[Input], as_json: bool) -> None:
    """Print, for each input, what a run would do."""
    seconds, memory = runner.estimate()
    for plan in runner.plans(work):
        facts: dict[str, Any] = {
            "input": plan.name,
            "spacing_um": [round(um, 4) for um in plan.spacing_um],
            "tiles": int(plan.active.sum()),
            "tiles_on_glass": int((~plan.active).sum()),
            "tissue_mm2": round(plan.tissue_mm2, 2),
            "pixels": plan.grid.extent.shape,
            "minutes": round(float(plan.active.sum()) * seconds / 60, 1),
            "memory_mib": round(memory),
        }
        text = ", ".join(f"{k} {v}" for k, v in facts.items() if k != "input")
        typer.echo(json.dumps(facts) if as_json else f"{plan.name}: {text}")
    for row in runner.rows.values():
        typer.echo(json.dumps(row.cells()) if as_json else f"{row.input}: {row.code} {row.message}")


def _region(text: str) -> tuple[int, int, int, int] | str | None:
    """Return --roi as numbers or as the path of a GeoJSON file."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) == 4 and all(p.strip().lstrip("-").isdigit() for p in parts):
        numbers = cast("tuple[int, int, int, int]", tuple(int(p) for p in parts))
        if min(numbers[2:]) > 0:
            return numbers
    if Path(text).is_file():
        return text
    raise UsageError(
        "WSI012", f"--roi wants x,y,width,height in level-0 pixels or a GeoJSON file, got {text!r}"
    )


def _part(text: str) -> tuple[int, int] | None:
    """Return --part i/n as two numbers."""
    if not text:
        return None
    first, _, count = text.partition("/")
    if first.isdigit() and count.isdigit() and int(first) < int(count):
        return int(first), int(count)
    raise UsageError("WSI016", f"--part wants i/n with i from 0 to n - 1, such as 0/4, got {text!r}")


def _spacing(text: str) -> float | dict[str, float] | None:
    """Return --mpp as a number, or as path -> number from a CSV."""
    if not text:
        return None
    if Path(text).is_file():
        with open(text, newline="", encoding="utf-8") as file:
            rows = [r for r in csv.reader(file) if len(r) >= 2 and r[1].strip() != "mpp"]
        return {r[0].strip(): _number(r[1], text) for r in rows}
    return _number(text, "--mpp")


def _number(text: str, place: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError("WSI013", f"{place} wants a pixel size in µm such as 0.25, got {text!r}") from error


def _by_name(table: dict[str, float], items: Any) -> dict[str, float]:
    """Return input name -> spacing; a CSV line names an input by its path, its name or its file name.

    Raises UsageError (WSI013) for a line that names no input: a typing error would go unseen.
    """
    wanted = dict.fromkeys(table, False)
    found = {}
    for item in items:
        names = (item.name, Path(item.path).name, str(item.path))
        for line in table:
            if line in names or os.path.abspath(line) == str(item.path):
                found[item.name] = table[line]
                wanted[line] = True
    unknown = [line for line, used in wanted.items() if not used]
    if unknown:
        raise UsageError(
            "WSI013", f"--mpp names {unknown[0]!r}, which is none of the inputs; give its path or name"
        )
    return found
