"""`wsitk models list|show|check|convert`: what can be run, under which licence, and whether a file is sound."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsitk.cli.models_convert import convert
from wsitk.errors import ModelError

if TYPE_CHECKING:
    from wsitk.card import Card
    from wsitk.model import RegionModel, TileModel

__all__ = ["app"]

app = typer.Typer(help="List, show, check and convert models.", no_args_is_help=True)
app.command("convert")(convert)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A model's name or a checkpoint file.")]
NameOrFolder = Annotated[str, typer.Argument(help="A model's name, a model folder or a checkpoint file.")]

CARD = "card.toml"


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
def show(name: NameOrFolder, as_json: Json = False) -> None:
    """Show a model's whole card: data and licences, figures, failures, cost, how to cite, checksum."""
    card = _card(name)
    if card is None:
        _show_spec(name, as_json)
        return
    verified = card.verified()
    if as_json:
        typer.echo(json.dumps({**card.content, "verified": verified}))
    else:
        from wsitk.cli.card_text import card_text

        typer.echo(card_text(card, verified))
    if verified is False:
        raise ModelError(
            "WSI317", f"{card.weights} is not the file that {card.path} describes; copy it again"
        )


def _card(name: str) -> Card | None:
    """Return the card of a model by name, or of a folder or card file; None if it has none."""
    from importlib.metadata import entry_points
    from importlib.resources import files

    from wsitk.card import read_card
    from wsitk.models import BUILTIN

    target = ({point.name: point.value for point in entry_points(group="wsitk.models")} | BUILTIN).get(name)
    if target is None:
        path = Path(name) / CARD if Path(name).is_dir() else Path(name)
        return read_card(path) if path.name == CARD else None
    # A card belongs to the model of its own name: a package may announce several models, and hold one card.
    path = Path(str(files(target.partition(":")[0].rpartition(".")[0]))) / CARD
    card = read_card(path) if path.is_file() else None
    return card if card is not None and card.name == name else None


def _show_spec(name: str, as_json: bool) -> None:
    """Show what the engine knows of a model that has no card, a published checkpoint for one."""
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
    from wsitk.model import RegionModel
    from wsitk.registry import load_model

    model = load_model(name)
    model.network.eval()
    said = _painted(name, model) if isinstance(model, RegionModel) else _answered(name, model)
    size = sum(p.numel() for p in model.network.parameters())
    typer.echo(f"{model.spec.name} {model.spec.version}: {size:,} parameters load; {said}")


def _answered(name: str, model: TileModel) -> str:
    """Return what a model says of a blank tile."""
    import numpy as np
    import torch

    from wsitk.geometry import Region
    from wsitk.grid import TileGrid

    spec = model.spec
    grid = TileGrid.fit(Region((0,) * spec.ndim, spec.tile), spec.tile, spec.halo, align=spec.align)
    blank = torch.full((1, spec.channels, *spec.tile), 255, dtype=torch.uint8)
    with torch.inference_mode():
        outputs = model.predict(blank)
    arrays = {k: v[0].numpy() for k, v in outputs.items()}
    bad = [k for k, v in arrays.items() if not np.isfinite(v).all()]
    if bad:
        raise _unusable(name, ", ".join(bad))
    found = model.postprocess(arrays, grid[0]).objects
    return f"{0 if found is None else len(found)} objects on blank glass"


def _painted(name: str, model: RegionModel) -> str:
    """Return what a model does about a hole in blank glass."""
    import numpy as np
    import torch

    from wsitk.geometry import Region

    side = tuple(min(t, 4 * max(h, 1)) for t, h in zip(model.spec.tile, model.spec.halo, strict=True))
    image, mask = np.full((*side, model.spec.channels), 240, np.uint8), np.zeros(side, bool)
    mask[tuple(slice(n // 2 - 4, n // 2 + 4) for n in side)] = True
    with torch.inference_mode():
        painted = model.process_region(image, mask, Region((0,) * len(side), side))
    if not np.isfinite(painted).all():
        raise _unusable(name, "pixels")
    return f"a hole in blank glass is painted with mean {painted[mask].mean():.0f} of 255"


def _unusable(name: str, what: str) -> ModelError:
    return ModelError("WSI310", f"{name} gives non-finite {what} on a blank tile; the weights are unusable")
