"""A run in which the system refuses one call, at a chosen index; the target of a fresh process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crashing import oracle_run

CALLS = ("open", "fsync", "replace", "rename")
"""Calls of the system that may be refused."""

ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "ESTALE", "EMFILE")}


def _is_about(folder: str, first: object) -> bool:
    """Tell whether a call's first argument, a path or a descriptor, lies in the output."""
    try:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fsdecode(first)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return False
    return path.startswith(folder)


def fail_at(step: int, number: int, slide: str, out: str, answer: str) -> None:
    """Run, have the `step`-th such call on the output fail, and write to `answer` what the run said of it.

    0 lets all of them pass; `answer` then holds their number. What is no refusal of ours ends the process with 1.
    """
    from wsitk.errors import WsitkError

    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if _is_about(out, first):
                count += 1
                if count == step:
                    raise OSError(number, os.strerror(number), str(first))
            return real(first, *args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in CALLS}
    for name in CALLS:
        setattr(os, name, counted(real[name]))
    try:
        oracle_run(slide, out)
        said = "done"
    except WsitkError as error:
        said = error.code
    finally:
        for name in CALLS:
            setattr(os, name, real[name])
    Path(answer).write_text(said if step else str(count))
