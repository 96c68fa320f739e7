"""`wsitk artifacts SLIDE... -o OUT`: where slides are spoiled by folds, bubbles, blur, pen, dust, coverslips."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wsitk.artifacts.detector import ArtifactDetector
    from wsitk.artifacts.mask import ArtifactMask
    from wsitk.artifacts.planes import Planes
    from wsitk.reading.client import ReaderProcess
    from wsitk.sources.discover import Input

__all__ = ["artifacts"]

DEADLINE = 6 * 3600.0
"""Seconds after which a reading process that measures one slide counts as hung."""


def artifacts(
    inputs: Annotated[list[str], typer.Argument(metavar="SLIDE...", help="Slides, folders or globs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results: one folder a slide.")],
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds to look for, such as fold,pen; all that can be seen if left out."),
    ] = None,
    detector: Annotated[str, typer.Option(help="Which detector looks.")] = "classical",
    mpp: Annotated[
        float | None, typer.Option(help="Pixel size in µm, instead of what the files state.")
    ] = None,
    spacing: Annotated[float, typer.Option(min=1.0, help="Pixel size of the mask in µm, about.")] = 8.0,
    overwrite: Annotated[bool, typer.Option(help="Replace results that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each slide.")] = False,
) -> None:
    """Mark artifacts: outlines for QuPath, a mask, a picture, and a table of mm²; exits 1 if a slide failed."""
    from wsitk.artifacts.detector import detector_named
    from wsitk.artifacts.mask import KINDS, check_kinds
    from wsitk.durable import own_folder
    from wsitk.errors import OutputError, UsageError, WsitkError
    from wsitk.reading.client import ReaderProcess
    from wsitk.sources.discover import expand_inputs

    wanted = None if kinds is None else check_kinds([k.strip() for k in kinds.split(",")], KINDS)
    looks = detector_named(detector)
    found = expand_inputs(inputs)
    if not found.items:
        raise UsageError(
            "WSI001", f"no slides in {', '.join(inputs)} ({dict(found.skipped)}); name slides or a folder"
        )
    rows: list[dict[str, Any]] = []
    with ReaderProcess(deadline=DEADLINE) as reader:
        for item in found.items:
            try:
                planes, mask = _look(reader, item, mpp, spacing, wanted, looks)
                _write(own_folder(out, *item.name.split("/")), planes, mask, overwrite)
                rows.append(_row(item.name, planes, mask))
            except WsitkError as error:
                if isinstance(error, OutputError):  # a full disk is so for all, a bad slide for itself
                    raise
                rows.append({"input": item.name, "error": str(error)})
            typer.echo(json.dumps(rows[-1]) if as_json else _text(rows[-1]))
    _write_table(own_folder(out), rows, overwrite)
    raise typer.Exit(int(any("error" in row for row in rows)))


def _look(
    reader: ReaderProcess,
    item: Input,
    mpp: float | None,
    spacing: float,
    kinds: tuple[str, ...] | None,
    detector: ArtifactDetector,
) -> tuple[Planes, ArtifactMask]:
    """Return a slide's planes, read by a process that may die of it, and what is found in them."""
    from wsitk.artifacts.detector import judge
    from wsitk.sources import SourceRef

    origin = SourceRef(str(item.path), {} if mpp is None else {"mpp": mpp})
    planes: Planes = reader.call("wsitk.artifacts.planes:measured", origin, spacing)
    return planes, judge(planes, kinds, detector)


def _write(folder: Path, planes: Planes, mask: ArtifactMask, overwrite: bool) -> None:
    from wsitk.artifacts.results import write_mask, write_outlines, write_picture

    write_mask(folder / "artifacts.png", mask, overwrite=overwrite)
    write_picture(folder / "artifacts-preview.png", planes, mask, overwrite=overwrite)
    corner = planes.bounds.start[0], planes.bounds.start[1]
    write_outlines(
        folder / "artifacts.geojson", mask, name=planes.name, bounds_yx=corner, overwrite=overwrite
    )


def _row(name: str, planes: Planes, mask: ArtifactMask) -> dict[str, Any]:
    areas = {kind: mask.area_um2(kind) / 1e6 for kind in mask.kinds}
    return {"input": name, "mm2": areas, "mask_um": planes.um, "warnings": list(mask.warnings)}


def _text(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['input']}\n  {row['error']}"
    found = ", ".join(f"{kind} {area:.3f} mm²" for kind, area in row["mm2"].items() if area)
    missed = "".join(f"\n  {warning}" for warning in row["warnings"])
    return f"{row['input']}\n  {found or 'nothing of ' + ', '.join(row['mm2'])}{missed}"


def _write_table(folder: Path, rows: list[dict[str, Any]], overwrite: bool) -> None:
    """Write `artifacts.csv`: a row per slide, mm² of each kind, empty for what was not looked for."""
    from wsitk.artifacts.mask import KINDS
    from wsitk.writers.base import atomic_file

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["input", *(f"{kind}_mm2" for kind in KINDS), "error"])
    for row in rows:
        areas = row.get("mm2", {})
        table.writerow(
            [row["input"], *(f"{areas[k]:.6f}" if k in areas else "" for k in KINDS), row.get("error", "")]
        )
    with atomic_file(folder / "artifacts.csv", overwrite=overwrite) as stream:
        stream.write(text.getvalue().encode())
