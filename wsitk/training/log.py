"""What a run says while it goes on: a CSV that grows, and TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from wsitk.journal import write_durably

__all__ = ["Log"]


@final
class Log:
    """Rows of numbers by step. Rows after step `resumed` are dropped: that part of the run comes again."""

    def __init__(self, folder: Path, resumed: int) -> None:
        self.path = folder / "log.csv"
        self.rows = [row for row in self._stored() if int(row["step"]) <= resumed]
        self._board = _tensorboard(folder / "tensorboard", resumed)

    def _stored(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row; the file is whole at any instant."""
        self.rows.append({"step": str(step), **{k: f"{v:.6g}" for k, v in row.items()}})
        names = list(dict.fromkeys(name for each in self.rows for name in each))
        text = io.StringIO()
        table = csv.DictWriter(text, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_durably(self.path, text.getvalue().encode())
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, resumed: int) -> Any:
    """Return TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resumed + 1)
