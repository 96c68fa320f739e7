"""`--restore`: artifacts are painted over first, then any model runs over what came of it, in one command.

    OUT/restoration/NAME/    the restoration: its own input, journal, key and seal
    OUT/NAME/                the model's results; their key holds the restoration's model, mask and pixels

Both are inputs like any other, so that resuming, verifying and overwriting mean what they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wsitk.errors import UsageError, WorkError
from wsitk.outcome import failed_row
from wsitk.pipeline import Event, Input, ModelRef, Runner
from wsitk.record import InputRow
from wsitk.settings import Settings
from wsitk.sources.base import Source

__all__ = ["FOLDER", "restore_first"]

FOLDER = "restoration"
"""Where restorations lie below the output folder."""


def restore_first(
    model: ModelRef,
    inputs: Sequence[Input],
    out: Path,
    settings: Settings,
    *,
    mpp: Mapping[str, float] | float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[list[Input], list[InputRow], list[InputRow]]:
    """Restore `inputs`; return them with the restored pixels laid over, and a row for each restoration.

    An input whose restoration failed is not among them: it has a row in the third list, since nobody looked at it.
    Raises UsageError: WSI686 with `part`, `scheduler` or `anonymize`, or for an open source.
    """
    if settings.part is not None or settings.scheduler:
        raise UsageError(
            "WSI686",
            "--restore does all of a slide in one process; run the restoring model with --part or --scheduler into "
            f"OUT/{FOLDER}, or leave them out",
        )
    if settings.anonymize:
        raise UsageError(
            "WSI686",
            "--restore with --anonymize: two results of a slide would bear two names; restore by itself first",
        )
    if any(isinstance(item.source, Source) for item in inputs):
        raise UsageError("WSI686", "only files can be restored first; restore, and open the result")
    items = [replace(item, name=f"{FOLDER}/{item.name}") for item in inputs]
    by_name = {f"{FOLDER}/{name}": um for name, um in mpp.items()} if isinstance(mpp, Mapping) else mpp
    with Runner(model, out, _for_painting(settings), mpp=by_name, on_event=on_event) as runner:
        rows = {row.input: row for row in runner.run(items)}
    restored: list[Input] = []
    lost: list[InputRow] = []
    for item, first in zip(inputs, items, strict=True):
        row = rows[first.name]
        if row.status in ("done", "gaps"):
            restored.append(replace(item, restored=str((out / first.name).absolute())))
        else:
            text = f"{item.name}: not looked at, since restoring it failed ({row.code}); mend that, or leave --restore"
            lost.append(failed_row(item.name, WorkError("WSI685", text)))
    return restored, list(rows.values()), lost


def _for_painting(settings: Settings) -> Settings:
    """Return the settings of the restoration: what is said of tiles and samples is meant for the other model."""
    plain = Settings()
    return replace(
        settings,
        tile=plain.tile,
        halo=plain.halo,
        samples=plain.samples,
        uncertainty=plain.uncertainty,
        dropout=plain.dropout,
        members=plain.members,
        count_restored=plain.count_restored,
        channels=plain.channels,
        restored_image=settings.ome_tiff,
    )
