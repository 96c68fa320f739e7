"""The pixel work of models that paint: every piece of a block's mask read, painted and committed with its block.

The next pieces are read by threads while one is painted, in the caller's thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.blocks import BlockReport, BlockTask, OpenBlock, TileStatus
from wsitk.blockstore import BlockStore
from wsitk.device import autocast
from wsitk.errors import SourceError, WsitkError
from wsitk.geometry import Region
from wsitk.loader import TileLoader
from wsitk.model import Patch, RegionModel, TileResult
from wsitk.reading.server import TileImage
from wsitk.repair import MaskedPiece
from wsitk.sources.base import Reading
from wsitk.worker import blame

if TYPE_CHECKING:
    import torch

__all__ = ["MARGIN", "RegionPredictor", "RegionWorker"]

MARGIN = 2
"""Pixels around what was painted that are kept with it, so that it can be enlarged without a border."""


_SMALLEST = 32  # pixels on a side of what is given up as a whole where it can't be decoded


@final
class RegionPredictor:
    """Runs `model.process_region` on `device` at `precision`: `samples` times, with chance by `seed`."""

    def __init__(
        self, model: RegionModel, device: torch.device, precision: str, *, seed: int = 0, samples: int = 1
    ) -> None:
        self._model, self._device = model, device
        self.precision, self.samples, self._seed = precision, samples, seed
        model.network.to(device).eval()

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.bool_], region: Region, sample: int
    ) -> tuple[NDArray[np.float32] | None, str]:
        """Return one sample of a painted region; or None, and why not."""
        import torch

        try:
            with torch.inference_mode(), autocast(self._device, self.precision):
                painted = self._model.process_region(image, mask, region, seed=self._seed, sample=sample)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            return None, f"WSI320 out of device memory with a region of {region.shape}: {reason}"
        except WsitkError as error:  # the model itself refuses this region
            return None, str(error)
        bad = int(painted.size - np.isfinite(painted).sum())
        if bad:
            return None, f"WSI310 {bad} non-finite values in the painted region"
        return painted, ""

    def every_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call `call` after each evaluation of the network, until what is returned is called."""
        handle = self._model.network.register_forward_hook(lambda *anything: call())
        return handle.remove

    def cost(self) -> float:
        """Return the seconds that the smallest of artifacts takes."""
        spec = self._model.spec
        side = tuple(min(t, 2 * max(h, 1)) for t, h in zip(spec.tile, spec.halo, strict=True))
        mask = np.zeros(side, bool)
        mask[tuple(n // 2 for n in side)] = True
        began = time.perf_counter()
        self(np.full((*side, spec.channels), 200, np.uint8), mask, Region((0,) * len(side), side), 0)
        return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class _Request:
    """One piece of an open block."""

    home: OpenBlock
    piece: MaskedPiece
    last: bool

    def __str__(self) -> str:
        return f"{self.home.task.input} region {self.piece.box}"


@final
class RegionWorker:
    """Runs one model over a stream of block tasks; made and called as `BlockWorker` is."""

    def __init__(
        self,
        model: RegionModel,
        predictor: RegionPredictor,
        *,
        workers: int,
        open_image: Callable[[BlockTask], TileImage],
        store: Callable[[str], BlockStore],
        on_tile: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._predictor = model, predictor
        self._workers = workers
        self._open_image = open_image
        self._store = store
        self._on_tile = on_tile
        self._images: dict[str, TileImage] = {}
        self._busy: Counter[str] = Counter()

    def run(self, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task, in order, once its block is committed; see `BlockWorker.run`."""
        loader = TileLoader(self._read, self._requests(tasks), workers=self._workers, depth=self._workers)
        with ExitStack() as stack:
            stack.callback(self._close)
            stack.callback(self._predictor.every_step(self._on_tile))
            stack.enter_context(loader)
            patches: list[Patch] = []
            problems: list[TileStatus] = []
            for request, (reading, problem) in loader:
                status, patch = self._painted(request, reading, problem)
                patches += [patch] if patch else []
                problems += [status] if status.status != "ok" else []
                self._on_tile()
                if request.last:
                    yield self._commit(request.home, tuple(patches), problems)
                    patches, problems = [], []

    def _close(self) -> None:
        for image in self._images.values():
            image.close()
        self._images.clear()

    # --- reading -------------------------------------------------------------------------------------

    def _requests(self, tasks: Iterable[BlockTask]) -> Iterator[_Request]:
        for task in tasks:
            with blame(task, task.input, SourceError):  # the file may have gone since it was planned
                self._image(task)
            self._busy[task.input] += 1
            home = OpenBlock(task, self._model.spec)
            pieces = task.repair.pieces() if task.repair else ()
            for place, piece in enumerate(pieces, 1):
                yield _Request(home, piece, place == len(pieces))

    def _image(self, task: BlockTask) -> TileImage:
        if task.input not in self._images:
            self._images[task.input] = self._open_image(task)
            for name in [n for n in self._images if not self._busy[n] and n != task.input]:
                self._images.pop(name).close()
        return self._images[task.input]

    def _read(self, request: _Request) -> tuple[Reading | None, str]:
        """Return a piece's pixels and what surrounds them, and why some are absent; None if all are."""
        began = time.perf_counter()
        image, problem = self._images[request.home.task.input], ""
        with blame(request.home.task, str(request)):
            try:
                reading = image.read(request.piece.box)
            except SourceError as error:
                if error.code != "WSI111":  # what kills readers is not asked for in parts
                    return None, str(error)
                problem = str(error)
                reading = _in_parts(image, request.piece.box, self._model.spec.channels)
        request.home.seconds["read"] += time.perf_counter() - began
        return reading, problem

    # --- computing -----------------------------------------------------------------------------------

    def _painted(
        self, request: _Request, reading: Reading | None, problem: str
    ) -> tuple[TileStatus, Patch | None]:
        """Return what became of a piece."""
        tile = request.home.task.tiles[0]
        if reading is None:
            return TileStatus(tile, "unreadable", problem), None
        status = TileStatus(tile, "unreadable", problem) if problem else TileStatus(tile, "ok")
        piece, began = request.piece, time.perf_counter()
        # what the file doesn't hold is not known either, but nobody asked for it to be painted
        unknown = piece.unknown if reading.absent is None else piece.unknown | reading.absent
        if unknown.all() and problem:
            return status, None
        if unknown.all():
            return TileStatus(
                tile, "model_failed", f"WSI681 {piece.box}: no known pixel to go by; left as it is"
            ), None
        sums = _Sums(self._predictor.samples)
        for sample in range(self._predictor.samples):
            with blame(request.home.task, str(request)):
                painted, problem = self._predictor(reading.pixels, unknown, piece.box, sample)
            if painted is None:
                return TileStatus(tile, "model_failed", problem), None
            sums.add(painted)
        request.home.seconds["predict"] += time.perf_counter() - began
        return status, _patch(piece, reading, sums)

    def _commit(self, home: OpenBlock, patches: tuple[Patch, ...], problems: list[TileStatus]) -> BlockReport:
        """Store a block: what was painted of it, and the first thing that went wrong, if anything did."""
        task = home.task
        with blame(task, str(home)):
            tile = task.tiles[0]
            more = f" (and {len(problems) - 1} more regions)" if len(problems) > 1 else ""
            status = TileStatus(tile, "ok")
            if problems:
                status = TileStatus(tile, problems[0].status, problems[0].reason + more)
            home.add(task.grid[tile], status, TileResult(patches=patches))
            arrays, record = home.contents()
            self._store(task.input).commit(task.block, arrays, record)
        self._busy[task.input] -= 1
        return home.report(0)


def _in_parts(image: TileImage, box: Region, channels: int) -> Reading:
    """Return what can be decoded of a box; the rest, found by halving, is absent."""
    pixels = np.zeros((*box.shape, channels), np.uint8)
    absent = np.ones(box.shape, bool)
    parts = [box]
    while parts:
        part = parts.pop()
        try:
            reading = image.read(part)
        except SourceError:
            if max(part.shape) > _SMALLEST:
                parts += _halves(part)
            continue
        pixels[part.slices(box.start)] = reading.pixels
        absent[part.slices(box.start)] = False if reading.absent is None else reading.absent
    return Reading(pixels, absent)


def _halves(region: Region) -> list[Region]:
    """Return the two halves of a region, across its longer side."""
    axis = int(np.argmax(region.shape))
    middle = [
        a + n // 2 if k == axis else a
        for k, (a, n) in enumerate(zip(region.start, region.shape, strict=True))
    ]
    stop = [m if k == axis else b for k, (m, b) in enumerate(zip(middle, region.stop, strict=True))]
    return [Region.between(region.start, stop), Region.between(middle, region.stop)]


@final
class _Sums:
    """The first of several samples, and how much they differ."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.first: NDArray[np.float32] = np.empty(0, np.float32)
        self._sum: Any = 0.0
        self._square: Any = 0.0
        self._count = 0

    def add(self, painted: NDArray[np.float32]) -> None:
        """Take a sample."""
        if not self._count:
            self.first = painted
        self._count += 1
        if self._samples > 1:
            # from the first sample on: small numbers, whose squares keep their digits
            apart = (painted - self.first).astype(np.float64)
            self._sum, self._square = self._sum + apart, self._square + apart * apart

    def deviation(self) -> NDArray[np.float64] | None:
        """Return the standard deviation (H, W), its mean over the channels; None of a single sample."""
        if self._samples < 2:
            return None
        variance = (self._square - self._sum * self._sum / self._count) / (self._count - 1)
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)).mean(axis=-1))


def _patch(piece: MaskedPiece, reading: Reading, sums: _Sums) -> Patch | None:
    """Return what is kept of a painted piece; None if it answers for nothing that the file holds."""
    own = piece.own if reading.absent is None else piece.own & ~reading.absent
    if not own.any():
        return None
    rounded = np.floor(np.clip(sums.first, 0, 255) + np.float32(0.5)).astype(np.uint8)
    pixels = np.where(own[..., None], rounded, reading.pixels)
    deviation = sums.deviation()
    change = np.abs(pixels[own].astype(np.int16) - reading.pixels[own].astype(np.int16)).mean(
        dtype=np.float64
    )
    rows, columns = (np.flatnonzero(own.any(axis=axis)) for axis in (1, 0))
    frame = Region((0, 0), own.shape)
    box = Region.between((rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1))
    box = box.grow((MARGIN, MARGIN)).intersect(frame)
    spread = np.zeros((0, 0), np.uint8)
    if deviation is not None:
        spread = np.floor(np.minimum(np.where(own, deviation, 0.0), 255) + 0.5).astype(np.uint8)[box.slices()]
    return Patch(
        number=piece.number,
        start=tuple(a + b for a, b in zip(piece.box.start, box.start, strict=True)),
        pixels=np.ascontiguousarray(pixels[box.slices()]),
        own=np.ascontiguousarray(own[box.slices()]),
        spread=np.ascontiguousarray(spread),
        change=round(float(change), 4),
        deviation=round(float(deviation[own].mean()), 4) if deviation is not None else 0.0,
    )
