"""How each input of a run ended: rows, and the exit code they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wsitk.errors import SourceError, WorkError, WsitkError
from wsitk.plan import Plan
from wsitk.record import InputRow

__all__ = ["done_row", "exit_code", "failed_row", "known_error"]


def done_row(
    plan: Plan,
    record: Mapping[str, Any],
    seconds: Mapping[str, float],
    max_unreadable: float,
    peak_mib: float,
) -> InputRow:
    """Return the row of a finished input, from its provenance; ``gaps`` if too much of it was lost."""
    tiles = record["tiles"]
    lost = tiles["unreadable"] + tiles["model_failed"]
    tried = tiles["ok"] + lost
    gaps = lost > max_unreadable * tried
    message = str(record.get("remark", ""))
    if gaps:
        message = (
            f"{tiles['unreadable']} tiles unreadable and {tiles['model_failed']} failed in the model, of {tried}; "
            f"more than {max_unreadable:.1%}; tiles.parquet says which"
        )
    return InputRow(
        input=plan.name,
        status="gaps" if gaps else "done",
        code="WSI411" if gaps else "",
        message=message,
        spacing_um=plan.spacing.mean if plan.spacing else None,
        spacing_provenance=plan.spacing.provenance if plan.spacing else "",
        tissue_mm2=_tissue(plan),
        tiles=tiles,
        objects=record["objects"],
        voxels={name: facts["voxels"] for name, facts in record.get("labels", {}).items()},
        measures=record.get("measurements", {}),
        seconds=seconds,
        peak_mib=peak_mib,
        exit_code=int(gaps),
    )


def _tissue(plan: Plan) -> float | None:
    """Return the tissue of a slide in mm²; None where there is no saying, and for volumes."""
    return plan.tissue_mm2 if plan.spacing and len(plan.scale) == 2 else None


def partial_row(plan: Plan, done: int, blocks: int) -> InputRow:
    """Return the row of an input of which other processes still owe blocks."""
    return InputRow(
        input=plan.name,
        status="partial",
        message=f"{done} of {blocks} blocks are done; the last of the parts writes the results",
        spacing_um=plan.spacing.mean if plan.spacing else None,
        spacing_provenance=plan.spacing.provenance if plan.spacing else "",
        tissue_mm2=_tissue(plan),
    )


def failed_row(name: str, error: WsitkError) -> InputRow:
    """Return the row of an input that could not be finished: one code, one line."""
    message = " ".join(error.message.split())
    return InputRow(name, "failed", error.code, message, exit_code=error.exit_code)


def known_error(name: str, error: Exception) -> WsitkError:
    """Return `error` as one of ours: a file's fault (WSI199) or a bug (WSI412)."""
    if isinstance(error, WsitkError):
        return error
    if isinstance(error, OSError):
        return SourceError("WSI199", f"{name}: {error}")
    return WorkError("WSI412", f"{name}: {type(error).__name__}: {error}; please report this")


def exit_code(rows: Iterable[InputRow]) -> int:
    """Return 0 if every input is done, 3 if the environment stopped one, else 1."""
    codes = {row.exit_code for row in rows}
    if not codes - {0}:
        return 0
    return 3 if 3 in codes else 1
