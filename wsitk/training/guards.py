"""What holds around a run: the folder's lock, signals that wait for a checkpoint, arithmetic that repeats."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wsitk.durable import open_own, try_lock
from wsitk.errors import OutputError
from wsitk.training import processes

__all__ = ["alone", "caught_signals", "fixed_arithmetic"]


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yield a list into which SIGTERM and SIGINT put their numbers instead of ending the process."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:  # twice is meant
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever owns that decides
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; raises OutputError WSI503 if another run does."""
    if processes.rank() != 0:
        yield
        return
    with os.fdopen(open_own(folder / ".lock", os.O_RDWR | os.O_CREAT), "r+b") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise OutputError(
                "WSI503", f"{folder} is in use by another run; wait for it or choose another output"
            )
        yield


@contextmanager
def fixed_arithmetic(wanted: int | None, device: torch.device) -> Iterator[None]:
    """Compute with `wanted` threads (None: as many as before), so that on a CPU the same steps give the same bits."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # its one property is unknown to the type checker
    filled = memory.fill_uninitialized_memory
    try:
        if wanted:
            torch.set_num_threads(wanted)
        torch.set_flush_denormal(True)
        if device.type == "cpu":  # where some backward passes otherwise add up in the order of threads
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = filled
