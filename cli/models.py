"""`wsitk models list|show|check`: what can be run, under which licence, and whether a file is sound."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from wsitk.errors import ModelError

__all__ = ["app"]

app = typer.Typer(help="List, show and check models.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A model's name or a checkpoint file.")]


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models by name; those whose weights are not here say what is missing."""
    from wsitk.registry import load_model, model_names

    rows: list[dict[str, Any]] = []
    for name in model_names():
        try:
            spec = load_model(name).spec
            classes = [c.name for c in spec.classes]
            rows.append({"name": name, "ready": True, "spacing_um": spec.spacing, "classes": classes,
                         "weights": spec.licences.weights})  # fmt: skip
        except ModelError as error:
            rows.append({"name": name, "ready": False, "why": error.message})
    for row in rows:
        if as_json:
            typer.echo(json.dumps(row))
        elif row["ready"]:
            typer.echo(
                f"{row['name']:<16} ready    {row['spacing_um']} µm, {', '.join(row['classes'])}; {row['weights']}"
            )
        else:
            typer.echo(f"{row['name']:<16} missing  {row['why']}")


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Show everything the engine knows of a model."""
    from wsitk.registry import load_model

    spec = asdict(load_model(name).spec)
    if as_json:
        typer.echo(json.dumps(spec))
        return
    for key, value in spec.items():
        typer.echo(f"{key:<18} {value}")


@app.command("check")
def check(name: Name) -> None:
    """Load a model strictly and run one blank tile through it; exits 3 with the reason if it can't."""
    import numpy as np
    import torch

    from wsitk.geometry import Region
    from wsitk.grid import TileGrid
    from wsitk.registry import load_model

    model = load_model(name)
    spec = model.spec
    model.network.eval()
    grid = TileGrid.fit(Region((0,) * spec.ndim, spec.tile), spec.tile, spec.halo, align=spec.align)
    blank = torch.full((1, spec.channels, *spec.tile), 255, dtype=torch.uint8)
    with torch.inference_mode():
        outputs = model.predict(blank)
    arrays = {k: v[0].numpy() for k, v in outputs.items()}
    bad = [k for k, v in arrays.items() if not np.isfinite(v).all()]
    if bad:
        raise ModelError(
            "WSI310", f"{name} gives non-finite {', '.join(bad)} on a blank tile; the weights are unusable"
        )
    found = model.postprocess(arrays, grid[0]).objects
    count = 0 if found is None else len(found)
    size = sum(p.numel() for p in model.network.parameters())
    typer.echo(f"{spec.name} {spec.version}: {size:,} parameters load; {count} objects on blank glass")
