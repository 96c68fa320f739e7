"""The model in this process: for model objects and arrays, which can't be sent to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from wsitk.blocks import BlockReport, BlockTask
from wsitk.blockstore import BlockStore
from wsitk.model import Model
from wsitk.reading.server import TileImage
from wsitk.record import peak_memory_mib
from wsitk.settings import Settings
from wsitk.work.base import Work, as_asked, cost_of_a_tile, ready, worker_for

__all__ = ["WorkHere"]


@final
class WorkHere(Work):
    """Runs a model object. A crash of the model is a crash of the caller.

    `options` are what it was loaded with, for further models of an ensemble.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        out: Path,
        open_image: Callable[[BlockTask], TileImage],
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        model = as_asked(model, settings, options)
        self._model = model
        self._settings = settings
        self._out = out
        self._open_image = open_image
        self._predictor, device = ready(model, settings)
        self.spec, self.device = model.spec, device.type

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task; see `Work`."""
        worker = worker_for(
            self._model,
            self._predictor,
            self._settings,
            open_image=self._open_image,
            store=lambda name: BlockStore(self._out / name),
        )
        return worker.run(tasks)

    def estimate(self) -> tuple[float, float]:
        """Return seconds and MiB for a tile; see `Work`."""
        return cost_of_a_tile(self._predictor, self.spec), peak_memory_mib()

    def peak_mib(self) -> float:
        """Return this process's peak; see `Work`."""
        return peak_memory_mib()

    def close(self) -> None:
        """Do nothing: the model is the caller's."""
