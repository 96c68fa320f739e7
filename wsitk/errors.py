"""Every way in which wsitk refuses, as one tree with stable codes.

    WsitkError
    ├── UsageError        WSI0xx  the command or the call is wrong             exit 2
    │                     WSI6xx  uncertainty, restoration, artifacts          exit 2
    │                     WSI8xx  evaluating and training                      exit 2
    │                     WSI9xx  data to learn from, and splits               exit 2
    ├── SourceError       WSI1xx  a file cannot be opened or read              exit 1
    │                     WSI82x  of labels, to be compared                    exit 1
    │   └── SpacingError  WSI2xx  the pixel size is missing or absurd          exit 1
    ├── ModelError        WSI3xx  a model, a checkpoint or a device            exit 3
    ├── WorkError         WSI4xx  a piece of work failed                       exit 1
    └── OutputError       WSI5xx  the output cannot be written or resumed      exit 3

A message is one line: what, got, wanted, what to do next. `docs/errors.md` lists the codes.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "WsitkError",
    "UsageError",
    "SourceError",
    "SpacingError",
    "ModelError",
    "WorkError",
    "OutputError",
]


class WsitkError(Exception):
    """Base of all refusals; `code` is stable, `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[WsitkError], tuple[str, ...]]:
        """Keep code and message when the error crosses a process border."""
        return type(self), (self.code, self.message)


class UsageError(WsitkError, ValueError):
    """Raised when a command, an argument or a combination of them makes no sense."""

    exit_code = 2


class SourceError(WsitkError, OSError):
    """Raised when an input cannot be opened, or a region of it cannot be decoded."""

    def __str__(self) -> str:  # OSError would format its own arguments
        return f"{self.code} {self.message}"


class SpacingError(SourceError):
    """Raised when an input states no pixel size, or one that cannot be true."""


class ModelError(WsitkError, RuntimeError):
    """Raised when a model, its weights or its device cannot be used."""

    exit_code = 3


class WorkError(WsitkError, RuntimeError):
    """Raised when a piece of work failed for a reason other than its input file."""


class OutputError(WsitkError, RuntimeError):
    """Raised when results cannot be written, are held by another run, or belong to another one."""

    exit_code = 3
