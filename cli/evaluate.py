"""`wsitk evaluate PRED TRUTH`: how good predictions are, and what to beware of when saying so."""

from __future__ import annotations

import json
import sys
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsitk.evaluation.settings import Length, Options, Protocol, Task, Unit

if TYPE_CHECKING:
    from wsitk.evaluation.figures import Figure
    from wsitk.evaluation.matrix import Matrix
    from wsitk.evaluation.run import Evaluation
    from wsitk.evaluation.uncertainty import Uncertainty

__all__ = ["evaluate"]

DEFAULTS = Options()


def evaluate(
    predicted: Annotated[
        Path,
        typer.Argument(
            metavar="PRED", help="Predictions: a file, a folder, or an output folder of `wsitk run`."
        ),
    ],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="The truth, under the same names.")],
    task: Annotated[Task, typer.Option(help="Objects, areas, or centroids.")] = "nuclei",
    protocol: Annotated[
        Protocol, typer.Option(help="Of nuclei: whose averages come first. The others stand beside them.")
    ] = "pannuke",
    mpp: Annotated[
        float | None, typer.Option(min=0.0, help="Pixel size in µm, where the files don't state it.")
    ] = None,
    group: Annotated[
        Unit, typer.Option(help="What the confidence intervals draw: images, slides or patients.")
    ] = "image",
    table: Annotated[
        Path | None, typer.Option(help="CSV of image, slide, patient, tissue, where names don't tell.")
    ] = None,
    radius: Annotated[str, typer.Option(help="How far apart the centroids of a pair may lie.")] = "3um",
    tolerance: Annotated[str, typer.Option(help="Of NSD, such as 2um or 1.5mm; one pixel if left out.")] = "",
    classes: Annotated[str, typer.Option(help="Names of numbered classes: 1=Tumor,2=Stroma.")] = "",
    labels: Annotated[
        Path | None, typer.Option(help="TOML that maps the class names of both sides onto each other.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="What the model was trained on: a list, a CSV or a folder.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with the images or slides themselves, for cases.png.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    allow_extra: Annotated[
        bool, typer.Option("--allow-extra", help="Leave predictions without truth aside.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", help="Of an output folder: is what it says of its certainty worth anything?"
        ),
    ] = False,
    interval_level: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of true areas that area intervals mean to hold.")
    ] = DEFAULTS.interval_level,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for evaluation.json, images.csv and cases.png.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that folder.")] = False,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="PRED is a TOML of models and TRUTH one of data sets: every model on every set."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare predictions with the truth: figures with intervals, and warnings of what they hide."""
    from wsitk.evaluation.classmap import parse_classes, read_map

    truth_names, predicted_names = read_map(labels) if labels else ({}, {})
    options = Options(
        task=task,
        protocol=protocol,
        mpp=mpp,
        group=group,
        radius=Length.parse(radius, "--radius"),
        tolerance=Length.parse(tolerance, "--tolerance") if tolerance else None,
        table=table,
        classes=parse_classes(classes),
        truth_names=truth_names,
        predicted_names=predicted_names,
        train=train,
        images=images,
        resamples=resamples,
        seed=seed,
        allow_extra=allow_extra,
        uncertainty=uncertainty,
        interval_level=interval_level,
    )
    if matrix:
        _matrix(predicted, truth, options, out, overwrite, as_json)
        return
    from wsitk.evaluation.report import as_dict, write_report
    from wsitk.evaluation.run import evaluate as run

    with _Progress(quiet=as_json) as progress:
        evaluation = run(predicted, truth, options, on_image=progress.image)
        if out is not None:
            write_report(out, evaluation, overwrite=overwrite)
    if as_json:
        sys.stdout.write(json.dumps(as_dict(evaluation), allow_nan=False) + "\n")
    else:
        _show(evaluation, out)


def _matrix(
    models: Path, datasets: Path, options: Options, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    from wsitk.evaluation.matrix import evaluate_matrix, matrix_dict, write_matrix

    with _Progress(quiet=as_json) as progress:
        matrix = evaluate_matrix(models, datasets, options, on_image=progress.image)
    if out is not None:
        write_matrix(out, matrix, overwrite=overwrite)
    if as_json:
        sys.stdout.write(json.dumps(matrix_dict(matrix), allow_nan=False) + "\n")
    else:
        _show_matrix(matrix)


class _Progress:
    """A bar over the images, on stderr, where that is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=quiet or not console.is_terminal, transient=True)
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def image(self, name: str, total: int) -> None:
        """Take note of the image that comes next."""
        self._bar.update(self._task, total=total, advance=1, description=name)


def _show(evaluation: Evaluation, out: Path | None) -> None:
    """Print what was read, the figures and the warnings."""
    from rich.table import Table

    console = _console()
    options = evaluation.options
    say = _say(console)
    say(f"truth: {evaluation.truth_said}; prediction: {evaluation.predicted_said}")
    named = f"{options.task}, protocol {options.protocol}" if options.task == "nuclei" else options.task
    say(f"{len(evaluation.images)} images, {named}; {_about_intervals(evaluation)}\n")
    table = Table(box=None, pad_edge=False)
    for name in ("figure", "value", "95 %", "over", "n", "left out"):
        table.add_column(
            name, justify="right" if name in ("value", "n") else "left", no_wrap=name != "left out"
        )
    for figure in evaluation.figures:
        table.add_row(
            figure.label,
            _number(figure.value),
            f"{_number(figure.low)} - {_number(figure.high)}" if not isnan(figure.low) else "",
            figure.over,
            str(figure.n),
            f"{figure.skipped} ({figure.why})" if figure.why else "",
            style="" if figure.headline else "dim",
        )
    console.print(table, highlight=False, markup=False)
    for name, counts in _counts(evaluation):
        say(f"{name}: {', '.join(f'{key} {value:,}' for key, value in counts.items())}")
    if evaluation.uncertainty is not None:
        _show_uncertainty(evaluation.uncertainty, console)
    for warned in evaluation.warnings:
        say(f"\n{warned.code}: {warned.found}\n  {warned.advice}")
    if out is not None:
        say(f"\nLook at {out / 'cases.png'}; numbers in {out / 'evaluation.json'} and {out / 'images.csv'}")


def _show_uncertainty(uncertainty: Uncertainty, console: Any) -> None:
    """Print what each score of certainty is worth."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = {
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "aurc": "AURC",
        "eaurc": "E-AURC",
        "ece": "ECE",
        "brier": "Brier",
    }
    for name in ("score", "wrong is", "items", "errors", *columns.values()):
        table.add_column(name, justify="left" if name in ("score", "wrong is") else "right", no_wrap=True)
    for doubt in uncertainty.doubts:
        values = {f.key.split(":")[0]: _number(f.value) for f in doubt.figures}
        values |= {"auroc": _with_interval(doubt.figures[0])}
        cells = [values.get(key, "") for key in columns]
        table.add_row(doubt.score, doubt.error, f"{doubt.items:,}", f"{doubt.errors:,}", *cells)
    console.print("\nwhat the doubt is worth", highlight=False)
    console.print(table, highlight=False, markup=False)
    for figure in uncertainty.intervals:
        _say(console)(f"{figure.label}: {_with_interval(figure)}, over {figure.over}")
    for note in uncertainty.notes:
        _say(console)(f"({note})")


def _with_interval(figure: Figure) -> str:
    interval = f" ({_number(figure.low)} - {_number(figure.high)})" if not isnan(figure.low) else ""
    return _number(figure.value) + interval


def _about_intervals(evaluation: Evaluation) -> str:
    unit = evaluation.options.group
    count = len({i.facts[unit] for i in evaluation.images})
    return f"intervals (95 %) over {count} {unit}s" if count > 1 else f"one {unit}, and so no intervals"


def _counts(evaluation: Evaluation) -> list[tuple[str, Any]]:
    """Return the summed counts under names for people; of areas those of each class."""
    from wsitk.evaluation.report import totals

    names = {"objects:all": "\nobjects at IoU > 0.5", "centroids": "centroids"}
    return [
        (names.get(key, key.replace("pixels:", "pixels of ")), counts)
        for key, counts in totals(evaluation).items()
        if key in names or key.startswith("pixels:")
    ]


def _show_matrix(matrix: Matrix) -> None:
    """Print the table of models and data sets."""
    from rich.table import Table

    console = _console()
    table = Table(box=None, pad_edge=False, title=matrix.label, title_justify="left")
    for name in ("model", *matrix.datasets, "in domain", "elsewhere", "drop"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in matrix.rows:
        cells = [f"{_number(c.value)}{'*' if c.in_domain else ''}" for c in row.cells]
        table.add_row(row.model, *cells, _number(row.diagonal), _number(row.elsewhere), _number(row.drop))
    console.print(table, highlight=False, markup=False)
    for line in matrix.notes:
        _say(console)(line)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _say(console: Any) -> Any:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def _number(value: float) -> str:
    return "n/a" if isnan(value) else f"{value:.3f}"
