"""`wsitk info FILE...`: what wsitk sees in a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsitk.errors import UsageError, WsitkError

if TYPE_CHECKING:
    from wsitk.reading.client import ReaderProcess
    from wsitk.sources import Origin

__all__ = ["info"]


def info(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Slides, folders or globs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Show levels, pixel size and where it is known from. Label and macro images are never opened."""
    from wsitk.reading.client import ReaderProcess
    from wsitk.sources.discover import expand_inputs

    found = expand_inputs(inputs)
    if not found.items:
        raise UsageError(
            "WSI001", f"no slides in {', '.join(inputs)} ({dict(found.skipped)}); name slides or a folder"
        )
    failed = False
    with ReaderProcess() as reader:  # a damaged header may abort whoever opens it
        for item in found.items:
            facts = _facts(reader, str(item.path), item.name)
            failed |= "error" in facts
            typer.echo(json.dumps(facts) if as_json else _text(facts))
    raise typer.Exit(int(failed))


def describe(origin: Origin) -> dict[str, Any]:
    """Return what there is to say about an input; called in the reading process."""
    from wsitk.sources import borrowed

    with borrowed(origin) as source:
        return {
            "reader": type(source).__name__,
            "axes": "".join(source.axes),
            "dtype": str(source.dtype),
            "channels": list(source.channel_names),
            "levels": [
                {"shape": level.shape, "downsample": [round(d, 4) for d in level.downsample]}
                for level in source.levels
            ],
            "spacing_um": list(source.spacing.um) if source.spacing else None,
            "spacing_from": source.spacing.provenance if source.spacing else source.spacing_error,
            "bounds": {"start": source.bounds.start, "shape": source.bounds.shape},
        }


def _facts(reader: ReaderProcess, path: str, name: str) -> dict[str, Any]:
    from wsitk.sources import SourceRef

    try:
        return {"input": name, **reader.call("wsitk.cli.info:describe", SourceRef(path))}
    except WsitkError as error:
        return {"input": name, "error": str(error)}


def _text(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"{facts['input']}\n  {facts['error']}"
    levels = ", ".join("×".join(map(str, level["shape"])) for level in facts["levels"])
    spacing = " × ".join(f"{um:.4f}" for um in facts["spacing_um"] or ()) or "unknown"
    return (
        f"{facts['input']}\n"
        f"  {facts['axes']} {facts['dtype']}, {len(facts['channels'])} channels, read by {facts['reader']}\n"
        f"  levels {levels}\n"
        f"  spacing {spacing} µm ({facts['spacing_from']})"
    )
