"""What `wsitk run` does once its options are understood: inputs to models, and what came of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wsitk.errors import UsageError, WsitkError
from wsitk.settings import Settings

if TYPE_CHECKING:
    from wsitk.cli.display import Display, JsonLines
    from wsitk.model_map import Choice
    from wsitk.pipeline import Input, Runner
    from wsitk.record import InputRow

__all__ = ["execute"]


def execute(
    models: Sequence[Choice],
    inputs: list[str],
    out: Path,
    settings: Settings,
    *,
    mpp: float | dict[str, float] | None = None,
    also: Sequence[tuple[str, str]] = (),
    restore: str = "",
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Find the inputs, run them, say what came of it; exits with the run's code.

    One model of no kind takes all inputs; several take those of their kinds. `restore` names a model that paints
    over artifacts first.
    """
    from wsitk.cli.display import Display, JsonLines
    from wsitk.pipeline import ModelRef, Runner, exit_code
    from wsitk.sources.discover import expand_inputs

    found = expand_inputs(inputs)
    if not found.items:
        raise UsageError(
            "WSI001", f"no slides in {', '.join(inputs)} ({dict(found.skipped)}); name slides or a folder"
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    work = _with_channels(found.items, also)
    by_name = _by_name(mpp, found.items) if isinstance(mpp, dict) else mpp
    with JsonLines() if as_json else Display(len(work), dict(found.skipped)) as display:
        rows: list[InputRow] = []
        if restore and dry_run:
            with Runner(ModelRef(restore), out, settings, mpp=by_name) as runner:
                _dry_run(runner, work, as_json)
        elif restore:
            work, rows = _restored(restore, work, out, settings, by_name, display, as_json=as_json)
        if work:
            rows += _run_each(models, work, out, settings, by_name, display, dry_run=dry_run, as_json=as_json)
        if not dry_run:
            display.close(out, rows)
    raise typer.Exit(exit_code(rows))


def _restored(
    model: str,
    work: Sequence[Input],
    out: Path,
    settings: Settings,
    mpp: Mapping[str, float] | float | None,
    display: Display | JsonLines,
    *,
    as_json: bool,
) -> tuple[list[Input], list[InputRow]]:
    """Return the inputs with their artifacts painted over, and a row for each restoration and each that failed."""
    from wsitk.pipeline import ModelRef
    from wsitk.restore_first import restore_first

    items, rows, lost = restore_first(ModelRef(model), work, out, settings, mpp=mpp, on_event=display.event)
    _tell(lost, out, settings, display, dry_run=False, as_json=as_json)
    return items, rows + lost


def _run_each(
    models: Sequence[Choice],
    work: Sequence[Input],
    out: Path,
    settings: Settings,
    mpp: Mapping[str, float] | float | None,
    display: Display | JsonLines,
    *,
    dry_run: bool,
    as_json: bool,
) -> list[InputRow]:
    """Run every model over its inputs, one after the other; a row for each input."""
    from wsitk.anonymous import Veil
    from wsitk.outcome import failed_row
    from wsitk.pipeline import ModelRef, Runner

    refused: dict[str, WsitkError] = {}
    groups = [(models[0], list(work))] if not models[0].kind else _assigned(models, work, mpp, refused)
    rows: list[InputRow] = []
    # a dry run says everything itself, at its end
    listener = (lambda event: None) if dry_run else display.event
    for choice, items in groups:
        try:
            runner = Runner(ModelRef(choice.model, choice.options), out, settings, mpp=mpp, on_event=listener)
        except WsitkError as error:
            if not choice.kind:
                raise
            refused |= {item.name: error for item in items}  # other models go on
            continue
        with runner:
            if dry_run:
                _dry_run(runner, items, as_json)
            else:
                runner.run(items)
            rows += runner.rows.values()
    veil = Veil(settings, out)
    veil.inputs(work)
    lost = [failed_row(veil.name(name), veil.error(name, error)) for name, error in refused.items()]
    _tell(lost, out, settings, display, dry_run=dry_run, as_json=as_json)
    return rows + lost


def _assigned(
    models: Sequence[Choice],
    work: Sequence[Input],
    mpp: Mapping[str, float] | float | None,
    refused: dict[str, WsitkError],
) -> list[tuple[Choice, list[Input]]]:
    """Return every model with its inputs, which are opened, apart, for a look at what they are."""
    from wsitk.model_map import choose
    from wsitk.planner import reference_to
    from wsitk.reading.client import ReaderProcess

    groups: dict[int, list[Input]] = {}
    with ReaderProcess(threads=1, preload=("wsitk.model_map",)) as reader:
        for item in work:
            try:
                kinds = reader.call("wsitk.model_map:kinds_of", reference_to(item, mpp))
                groups.setdefault(models.index(choose(models, item.name, kinds)), []).append(item)
            except WsitkError as error:
                refused[item.name] = error
    return [(models[k], groups[k]) for k in sorted(groups)]


def _tell(
    rows: Sequence[InputRow],
    out: Path,
    settings: Settings,
    display: Display | JsonLines,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Say of inputs that no model could take why, and put them into the summary."""
    from wsitk.pipeline import Event
    from wsitk.reports import write_report

    for row in rows:
        if dry_run:
            typer.echo(json.dumps(row.cells()) if as_json else f"{row.input}: {row.code} {row.message}")
        else:
            facts = {"status": row.status, "code": row.code, "message": row.message, "objects": {}}
            display.event(Event("ended", row.input, facts))
    if rows and not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        write_report(out, {row.input: row for row in rows}, settings, seconds=0.0)


def _leave(number: int, frame: object) -> None:
    """Leave as a shell expects of a program that got this signal; the journal needs no farewell."""
    typer.echo("wsitk: interrupted; run the same command again to resume", err=True)
    raise SystemExit(128 + number)


def _dry_run(runner: Runner, work: Sequence[Input], as_json: bool) -> None:
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


def _with_channels(items: Any, also: Sequence[tuple[str, str]]) -> list[Input]:
    """Return the inputs of the run, each with the files that hold its further channels.

    A file that is a further channel of another is no input of its own. Raises UsageError (WSI019) for an input
    without the file that a rule asks for.
    """
    from wsitk.pipeline import Input

    partners: dict[str, tuple[str, ...]] = {}
    for item in items:
        path = Path(item.path)
        given = [old for old, _ in also]
        if also and any(old not in path.name for old in given):
            continue
        partners[str(path)] = tuple(str(path.with_name(path.name.replace(a, b))) for a, b in also)
    further = {p for names in partners.values() for p in names}
    chosen = [item for item in items if str(item.path) not in further]
    for item in chosen:
        missing = [p for p in partners.get(str(item.path), ("",)) if also and not os.path.isfile(p)]
        if missing:
            rules = " ".join(f"--also {a}={b}" for a, b in also)
            raise UsageError(
                "WSI019",
                f"{item.name} has no partner by {rules} ({missing[0] or 'its name has none of that'}); "
                "name the inputs that have, or mend the rule",
            )
    return [Input(item.name, str(item.path), partners.get(str(item.path), ())) for item in chosen]


def _by_name(table: dict[str, float], items: Any) -> dict[str, float]:
    """Return input name -> spacing; a CSV line names an input by its path, its name or its file name.

    Raises UsageError (WSI013) for a line that names no input: a typing error would go unseen.
    """
    from wsitk.sources.plate import split_path

    wanted = dict.fromkeys(table, False)
    found = {}
    for item in items:
        file = split_path(str(item.path))[0]  # a line for a plate is one for each of its wells
        names = (item.name, Path(item.path).name, str(item.path), Path(file).name, file)
        for line in table:
            if line in names or os.path.abspath(line) in (str(item.path), file):
                found[item.name] = table[line]
                wanted[line] = True
    unknown = [line for line, used in wanted.items() if not used]
    if unknown:
        raise UsageError(
            "WSI013", f"--mpp names {unknown[0]!r}, which is none of the inputs; give its path or name"
        )
    return found
