"""A run that dies at a chosen instant: the target of a fresh process, for the tests of resuming."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {"tissue": "none", "block": 2, "workers": 2, "threads": 1, "device": "cpu"}

DURABLE = ("replace", "rename", "fsync")
"""Calls that make something durable."""


def oracle_run(slide: str, out: str) -> None:
    """Run the oracle model over a slide file."""
    import wsitk
    from wsitk.testing import OracleModel

    wsitk.run(OracleModel(tile=(128, 128), halo=(32, 32)), slide, out=out, **SETTINGS)


def die_at(
    step: int,
    slide: str,
    out: str,
    job: Callable[[str, str], None] = oracle_run,
    calls: tuple[str, ...] = DURABLE,
) -> None:
    """Run, and be killed as with `kill -9` just before the `step`-th of such calls."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    job(slide, out)
    os._exit(0 if count < step else 1)


def count_steps(
    slide: str,
    out: str,
    answer: str,
    job: Callable[[str, str], None] = oracle_run,
    calls: tuple[str, ...] = DURABLE,
) -> None:
    """Run to the end, and write to the file `answer` how many such calls there were."""
    count = 0
    for name in calls:
        real = getattr(os, name)

        def call(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return real(*args, **kwargs)

        setattr(os, name, call)
    job(slide, out)
    Path(answer).write_text(str(count))


def tree(folder: Path) -> dict[str, str]:
    """Return path -> sha256 of everything that must be the same in every run."""
    timed = {"run.json", "summary.csv"}
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in timed and p.suffix != ".html"
    }
