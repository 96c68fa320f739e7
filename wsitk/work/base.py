"""What a run asks of whoever computes: blocks in, reports out, wherever the model lives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsitk.blocks import BlockReport, BlockTask
from wsitk.blockstore import BlockStore
from wsitk.device import choose_device, fix_arithmetic
from wsitk.errors import UsageError
from wsitk.model import Model, ModelSpec, RegionModel
from wsitk.predictor import Predictor
from wsitk.reading.server import TileImage
from wsitk.region_worker import RegionPredictor, RegionWorker
from wsitk.settings import Settings
from wsitk.worker import BlockWorker

if TYPE_CHECKING:
    import torch

__all__ = ["ModelRef", "Order", "Work", "as_asked", "cost_of_a_tile", "ready", "slot_bytes", "worker_for"]


@dataclass(frozen=True)
class ModelRef:
    """A model by the name or path that `load_model` takes, and its options. Picklable, unlike most models."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Everything that stays the same over a run: the model, the settings, and where results go."""

    model: ModelRef
    settings: Settings
    out: Path


class Work(ABC):
    """A model at work: `spec` as the model states it, and the kind of `device` that it runs on."""

    spec: ModelSpec
    device: str

    @abstractmethod
    def run(self, tasks: Iterator[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task once its block is committed; tasks are drawn as they are needed.

        Raises BlockError, which names the input, for whatever is not the data's fault. Whoever goes on calls
        again, with the tasks that were drawn and not reported.
        """

    @abstractmethod
    def estimate(self) -> tuple[float, float]:
        """Return what a tile costs on this machine: seconds in the network, and MiB of memory in all."""

    @abstractmethod
    def peak_mib(self) -> float:
        """Return the most memory that the process with the model has held, in MiB."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model and of its processes."""


def as_asked(model: Model, settings: Settings, options: Mapping[str, Any] | None = None) -> Model:
    """Return the model as the settings want it asked: once, or several times for its uncertainty."""
    if isinstance(model, RegionModel):
        if settings.samples != 1:
            raise UsageError(
                "WSI682",
                f"{model.spec.name} paints; say how often by --restore-samples {settings.samples}, not by --samples",
            )
        return model
    from wsitk.uncertainty.choose import sampled  # brings torch along, which the supervisor does without

    return sampled(model, settings, options)


def ready(model: Model, settings: Settings) -> tuple[Predictor | RegionPredictor, torch.device]:
    """Return the model on its device, its arithmetic fixed."""
    device = choose_device(settings.device)
    fix_arithmetic(settings.threads or 1)
    if isinstance(model, RegionModel):
        samples, seed = settings.restore_samples, settings.seed
        return RegionPredictor(model, device, settings.precision, seed=seed, samples=samples), device
    return Predictor(model, device, settings.precision), device


def worker_for(
    model: Model,
    predictor: Predictor | RegionPredictor,
    settings: Settings,
    *,
    open_image: Callable[[BlockTask], TileImage],
    store: Callable[[str], BlockStore],
    on_tile: Callable[[], None] = lambda: None,
) -> BlockWorker | RegionWorker:
    """Return what works off blocks with a model that `ready` has put on its device."""
    workers = settings.workers or 1
    if isinstance(model, RegionModel):
        assert isinstance(predictor, RegionPredictor)
        return RegionWorker(
            model, predictor, workers=workers, open_image=open_image, store=store, on_tile=on_tile
        )
    assert isinstance(predictor, Predictor)
    return BlockWorker(
        model,
        predictor,
        workers=workers,
        groups=settings.batch,
        open_image=open_image,
        store=store,
        on_tile=on_tile,
    )


def cost_of_a_tile(predictor: Predictor | RegionPredictor, spec: ModelSpec) -> float:
    """Return the seconds that the network takes for a tile: a blank group is run twice, the second is timed."""
    import time

    if isinstance(predictor, RegionPredictor):
        return predictor.cost()
    blank = [np.full((*spec.tile, spec.channels), 255, spec.tile_dtype or "uint8")] * spec.compute_batch
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for outputs in predictor(blank)[0]:
            for value in outputs.values():
                value.cpu()
        seconds = time.perf_counter() - began
    return seconds / len(blank)


def slot_bytes(spec: ModelSpec) -> int:
    """Return the room that a tile of any type takes, with a mask of what is absent; `spec` is resolved."""
    widest = np.dtype(spec.tile_dtype).itemsize if spec.tile_dtype else 8
    return prod(spec.tile) * (spec.channels * widest + 1)
