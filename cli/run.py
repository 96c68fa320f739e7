"""`wsitk run MODEL INPUT... -o OUT`: the verb that matters."""

from __future__ import annotations

import csv
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from wsitk.cli.execute import execute
from wsitk.errors import UsageError
from wsitk.settings import Settings

if TYPE_CHECKING:
    from wsitk.model_map import Choice

__all__ = ["run"]

DEFAULTS = Settings()


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's name (`wsitk models list`), folder or checkpoint; none with --models."
        ),
    ],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="Slides, volumes, folders or globs.")
    ] = None,
    *,
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
    channels: Annotated[
        str, typer.Option(help="Channels that the model sees, by name or number: DAPI,HSP70 or 2,0.")
    ] = "",
    samples: Annotated[
        int, typer.Option(min=1, help="Ask the model so often; from 2 on, its uncertainty is measured.")
    ] = DEFAULTS.samples,
    uncertainty: Annotated[
        Literal["dropout", "spatial", "element", "tta", "ensemble"],
        typer.Option(help="What differs between samples: dropout, turned views, or --member."),
    ] = DEFAULTS.uncertainty,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Rate of dropout, instead of the network's own.")
    ] = DEFAULTS.dropout,
    seed: Annotated[int, typer.Option(help="Of the samples' dropout masks.")] = DEFAULTS.seed,
    members: Annotated[
        list[str], typer.Option("--member", help="A further model of an ensemble; may be repeated.")
    ] = [],  # noqa: B006  # typer wants a list, and copies it
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
    scheduler: Annotated[
        str, typer.Option(help="Run on Dask workers: local, local:N or tcp://HOST:PORT.")
    ] = DEFAULTS.scheduler,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of another run.")
    ] = DEFAULTS.overwrite,
    restore: Annotated[
        bool, typer.Option("--restore", help="Paint over artifacts first, and mark what is found there.")
    ] = False,
    restore_model: Annotated[
        str, typer.Option(help="What paints: a model's name, folder or checkpoint.")
    ] = "artifusion",
    mask: Annotated[
        str, typer.Option(help="Where artifacts lie: auto finds them, or a GeoJSON file.")
    ] = DEFAULTS.mask,
    restore_samples: Annotated[
        int, typer.Option(min=1, help="How often each artifact is painted, to see how sure that is.")
    ] = DEFAULTS.restore_samples,
    restored_image: Annotated[
        bool, typer.Option(help="Write the whole restored image, restored.ome.zarr.")
    ] = DEFAULTS.restored_image,
    ome_tiff: Annotated[
        bool, typer.Option("--ome-tiff", help="Write it as restored.ome.tiff, too, for OpenSlide and QuPath.")
    ] = DEFAULTS.ome_tiff,
    count_restored: Annotated[
        bool, typer.Option("--count-restored", help="Count objects in restored pixels with the others.")
    ] = DEFAULTS.count_restored,
    models: Annotated[
        str, typer.Option(help="A TOML file that says which model takes which kind of input.")
    ] = "",
    also: Annotated[
        list[str] | None,
        typer.Option(help="FROM=TO: a further channel is the file with TO in its name for FROM: _ct=_pet."),
    ] = None,
    support: Annotated[
        str, typer.Option(help="A folder of example images and masks, for UniverSeg and Tyche.")
    ] = "",
    prompts: Annotated[
        str, typer.Option(help="A file of points, boxes or masks, for Segment Anything.")
    ] = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Let a MONAI bundle run its Python expressions.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the model, as in TOML: slices=true, target=Liver."),
    ] = None,
    classifier: Annotated[
        str, typer.Option(help="A token classifier's file, for checkpoints of CellViT.")
    ] = "",
    postprocessing: Annotated[
        str, typer.Option(help="For checkpoints of CellViT: default, or upstream to reproduce CellViT 1.0.9.")
    ] = "",
    anonymize: Annotated[
        bool, typer.Option("--anonymize", help="Call inputs by pseudonyms, in everything that is written.")
    ] = DEFAULTS.anonymize,
    anonymize_key: Annotated[
        str, typer.Option(help="A file with a secret, so that nobody can check guesses of names.")
    ] = DEFAULTS.anonymize_key,
    anonymize_table: Annotated[
        str, typer.Option(help="A file outside OUT that will say which pseudonym is which input.")
    ] = DEFAULTS.anonymize_table,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say everything as JSON lines.")] = False,
) -> None:
    """Run a model over slides. Running the same command again resumes."""
    if tissue not in ("auto", "none") and not Path(tissue).is_file():
        raise UsageError("WSI014", f"--tissue wants auto, none or a GeoJSON file, got {tissue!r}")
    if mask != "auto" and not Path(mask).is_file():
        raise UsageError("WSI687", f"--mask wants auto or a GeoJSON file, got {mask!r}")
    given = locals().copy()  # of this function: inside a comprehension they would be the comprehension's
    parsed: dict[str, Any] = {"roi": _region(roi), "part": _part(part), "members": tuple(members)}
    parsed["channels"] = _channels(channels)
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)} | parsed)
    named = {
        "classifier": classifier,
        "postprocessing": postprocessing,
        "support": support,
        "prompts": prompts,
        "trust": trust,
    }
    options = {key: value for key, value in named.items() if value} | dict(map(_option, option or ()))
    execute(
        _choices(model, models, options, bool(inputs)),
        [*([model] if models else []), *(inputs or [])],
        out,
        settings,
        mpp=_spacing(mpp),
        also=[_rule(text) for text in also or ()],
        restore=restore_model if restore else "",
        dry_run=dry_run,
        as_json=as_json,
    )


def _choices(model: str, models: str, options: dict[str, Any], inputs: bool) -> tuple[Choice, ...]:
    """Return the models of the run: the one that was named, or those of a map."""
    from wsitk.model_map import Choice, read_map

    if not models and not inputs:
        raise UsageError(
            "WSI001", f"no inputs for {model}; name slides, volumes or a folder behind the model"
        )
    if not models:
        return (Choice("", model, options),)
    if options:
        raise UsageError(
            "WSI017", f"--models and options of one model ({', '.join(options)}); put them into the map"
        )
    return read_map(models)


def _option(text: str) -> tuple[str, Any]:
    """Return --option KEY=VALUE as a name and a TOML value; what is no TOML is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError("WSI031", f"--option wants KEY=VALUE, such as slices=true, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def _rule(text: str) -> tuple[str, str]:
    """Return --also FROM=TO as two texts."""
    old, equals, new = text.partition("=")
    if not equals or not old or old == new:
        raise UsageError("WSI019", f"--also wants FROM=TO, such as _ct=_pet, got {text!r}")
    return old, new


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


def _channels(text: str) -> tuple[str | int, ...] | None:
    """Return --channels as names and numbers."""
    from wsitk.sources.channel_choice import parse_channels

    return parse_channels(text) or None


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
