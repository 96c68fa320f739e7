"""`wsitk train cellvit DATA... -o OUT`: labelled images in, a model that `wsitk run` takes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self, final

import typer

from wsitk.cli.display import JsonStream

if TYPE_CHECKING:
    from wsitk.training.fit import Outcome

__all__ = ["app"]

app = typer.Typer(help="Train models on labelled images.", no_args_is_help=True)

Data = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATA...",
        help="Folders: slides with GeoJSON beside them, images/ with masks/, or PanNuke's folds.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the model and the log.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings, on top of its recipe's.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as fit.epochs=20.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run's results.")]
Json = Annotated[bool, typer.Option("--json", help="Say everything as JSON lines.")]


@app.callback()
def root() -> None:
    """Keep the models sub-commands."""


@app.command("cellvit")
def cellvit(
    data: Data,
    out: Out,
    config: Config = None,
    recipe: Annotated[
        str, typer.Option(help="Settings to start from: compact (the shipped model's), paper, paper-sam.")
    ] = "",
    settings: Set = None,
    device: Device = "auto",
    minutes: Annotated[
        float | None, typer.Option(help="End at the first checkpoint after this time; run again to go on.")
    ] = None,
    fam: Annotated[
        str, typer.Option(help="Flatness penalty: auto, or its strength; see docs/how-to/flatness.md.")
    ] = "",
    upstream: Annotated[
        bool, typer.Option("--upstream", help="Write a checkpoint for CellViT's own tools, too.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show images, cells and steps, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train CellViT to find and type nuclei. Running the same command again resumes."""
    from wsitk.device import choose_device
    from wsitk.models.cellvit.training.config import read_config
    from wsitk.models.cellvit.training.run import prepare, train
    from wsitk.training import processes

    wishes = list(settings or [])
    wishes += [f"fit.minutes={minutes}"] if minutes is not None else []
    wishes += [f"fam={fam}"] if fam else []
    chosen = read_config(config, wishes, recipe)
    prepared = prepare(data, chosen, None if dry_run else out)
    for warning in prepared.warnings if processes.first() else ():
        _warn(warning, as_json)
    if dry_run:
        _show(prepared.plan(), as_json)
        return
    where = str(choose_device(device))
    with JsonLines() if as_json else Display() as display:
        outcome = train(
            prepared, out, device=where, overwrite=overwrite, upstream=upstream, on_event=display.event
        )
    if processes.first():
        display.close(out, outcome)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


@app.command("cellvit-classifier")
def cellvit_classifier(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tokens, classifier and log.")],
    model: Annotated[
        str, typer.Option(help="The network whose tokens the classifier reads: a name, folder or checkpoint.")
    ],
    config: Config = None,
    settings: Set = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a classifier of cells on a frozen network's tokens (the CellViT++ way): minutes on a CPU."""
    from wsitk.device import choose_device
    from wsitk.models.cellvit.training.classify import read_head_config, train_classifier

    where = str(choose_device(device))
    chosen = read_head_config(config, settings or [])
    facts = train_classifier(data, out, model, chosen, device=where, overwrite=overwrite)
    _show(facts, as_json)


def _warn(text: str, as_json: bool) -> None:
    typer.echo(json.dumps({"event": "warning", "message": text}) if as_json else text, err=not as_json)


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, a line each or as one line of JSON."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        said = (
            ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in value.items())
            if isinstance(value, Mapping)
            else ", ".join(map(str, value))
            if isinstance(value, list)
            else f"{value:,}"
            if isinstance(value, int | float)
            else str(value)
        )
        typer.echo(f"{name.replace('_', ' '):<22} {said or 'none'}")


@final
class JsonLines(JsonStream):
    """Says every event as one line of JSON on stdout, but for single steps."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Print one event."""
        if kind != "step":
            self._say({"event": kind, **facts})

    def close(self, out: Path, outcome: Outcome) -> None:
        """Print how it ended."""
        self._say({"event": "finished", "status": outcome.status, "step": outcome.step, "out": str(out),
                   "held_out": dict(outcome.scores)})  # fmt: skip


@final
class Display:
    """A progress bar over all steps, with rate and time left, and a line for each row of the log."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps · {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Take note of an event."""
        if kind == "started":
            self._progress.update(self._task, total=facts["steps"], completed=facts["step"])
            if facts["step"]:
                self._say(f"resumed at step {facts['step']:,} of {facts['steps']:,}")
        elif kind == "step":
            speed = self._progress.tasks[0].speed
            rate = f"{speed:.2f}/s" if speed else ""
            self._progress.update(self._task, completed=facts["step"], description="training", rate=rate)
        elif kind == "validating":
            self._progress.update(self._task, description="judging")
        elif kind == "log":
            self._say("  ".join(f"{name} {_short(value)}" for name, value in facts.items()))

    def close(self, out: Path, outcome: Outcome) -> None:
        """Say how it ended and what comes next."""
        if outcome.status == "done":
            self._say(f"done: {out / 'card.toml'}; use it with: wsitk run {out} SLIDE -o RESULTS")
        else:
            why = "the deadline has passed" if outcome.status == "deadline" else "interrupted"
            self._say(f"{why} at step {outcome.step:,}; run the same command again to go on")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
