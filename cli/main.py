"""The command `wsitk`: one file per verb; heavy imports wait until a verb needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from wsitk import __version__
from wsitk.cli import (
    artifacts,
    demo,
    doctor,
    evaluate,
    info,
    models,
    qupath,
    review,
    run,
    split,
    train,
    verify,
)
from wsitk.errors import WsitkError

__all__ = ["app", "main"]

app = typer.Typer(
    name="wsitk",
    help="Whole-slide pathology: a folder of slides in, nuclei that open in QuPath out. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wsitk {__version__} (research use only; not a medical device)")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before any verb."""


app.command("run")(run.run)
app.command("evaluate")(evaluate.evaluate)
app.command("review")(review.review)
app.command("artifacts")(artifacts.artifacts)
app.command("demo")(demo.demo)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)
app.add_typer(models.app, name="models")
app.add_typer(split.app, name="split")
app.add_typer(train.app, name="train")
app.add_typer(qupath.app, name="qupath")


def main() -> None:
    """Run the command line; a WsitkError becomes one line on stderr and its exit code."""
    try:
        app()
    except WsitkError as error:
        typer.echo(f"wsitk: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
