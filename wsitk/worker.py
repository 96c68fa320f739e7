"""The pixel work: blocks of tiles in, committed blocks out. Everything that crosses its border is small.

A task names its input by reference and its output by folder, so it can be sent to another process. The
worker keeps the last few inputs open, reads ahead across blocks and inputs, and forgets a block once it is
in the journal.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.device import autocast
from wsitk.errors import SourceError, WorkError
from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.journal import Journal
from wsitk.loader import TileLoader
from wsitk.model import TileModel, TileResult
from wsitk.objects import ObjectTable
from wsitk.sources.base import Reading, SourceRef
from wsitk.sources.working import WorkingImage
from wsitk.stitch.fields import FieldStitcher
from wsitk.stitch.objects import select

if TYPE_CHECKING:
    import torch

__all__ = ["BlockError", "BlockReport", "BlockTask", "BlockWorker", "TileStatus"]

STAGES = ("read", "predict", "postprocess")

OPEN_INPUTS = 3
"""Inputs kept open at once: the one being computed, the one being read ahead, one to spare."""


@dataclass(frozen=True, slots=True)
class BlockTask:
    """One block of one input: what to read, which of its tiles to run, and which journal takes it."""

    input: str
    source: SourceRef
    grid: TileGrid
    block: int
    tiles: tuple[int, ...]
    band: int
    image: Region


@dataclass(frozen=True, slots=True)
class TileStatus:
    """What became of a tile: ``ok``, ``absent``, ``unreadable`` or ``model_failed``, and why."""

    tile: int
    status: str
    reason: str = ""


@dataclass(frozen=True)
class BlockReport:
    """What the worker says when a block is in the journal."""

    input: str
    block: int
    statuses: tuple[TileStatus, ...]
    objects: int
    seconds: Mapping[str, float]


class BlockError(WorkError):
    """Raised when a tile failed in a way that is nobody's data: a bug in a model, a full disk, no memory."""

    def __init__(self, code: str, message: str, name: str = "") -> None:
        super().__init__(code, message)
        self.input = name


@dataclass
class _OpenBlock:
    """A block whose tiles are on their way."""

    task: BlockTask
    image: WorkingImage
    stitchers: dict[str, FieldStitcher]
    waiting: int
    objects: list[ObjectTable] = field(default_factory=list)
    statuses: list[TileStatus] = field(default_factory=list)
    foreground: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def __str__(self) -> str:
        return f"{self.task.input} block {self.task.block}"


@dataclass(frozen=True, slots=True)
class _Request:
    """One tile of an open block."""

    home: _OpenBlock
    tile: Tile

    def __str__(self) -> str:
        return f"{self.home.task.input} tile {self.tile.index} {self.tile.read}"


@dataclass(frozen=True, slots=True)
class _Read:
    """A tile's pixels, or why there are none."""

    pixels: NDArray[Any] | None
    status: TileStatus
    seconds: float


@final
class BlockWorker:
    """Runs one model over a stream of block tasks on one device.

    `open_image` turns a reference into the image on the model's working grid; `journal` gives the open
    journal of an input. Inputs named in `keep_open` belong to the caller and are not closed.
    """

    def __init__(
        self,
        model: TileModel,
        device: torch.device,
        *,
        precision: str,
        workers: int,
        groups: int,
        open_image: Callable[[SourceRef], WorkingImage],
        journal: Callable[[str], Journal],
        keep_open: frozenset[str] = frozenset(),
    ) -> None:
        self._model = model
        self._device = device
        self._precision = precision
        self._workers = workers
        self._groups = groups
        self._open_image = open_image
        self._journal = journal
        self._keep_open = keep_open
        self._images: dict[str, WorkingImage] = {}
        self._busy: Counter[str] = Counter()
        model.network.to(device).eval()

    def run(self, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task, in order, once its block is committed."""
        loader = TileLoader(self._read, self._requests(tasks), workers=self._workers)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="wsitk-post") as pool, loader:
            for request, future in self._postprocessed(loader, pool):
                report = self._collect(request, future)
                if report is not None:
                    yield report
        for name in list(self._images):
            self._close(name)

    # --- reading -------------------------------------------------------------------------------------

    def _requests(self, tasks: Iterable[BlockTask]) -> Iterator[_Request]:
        for task in tasks:
            block = task.grid.block_at(task.block)
            stitchers = {f.name: FieldStitcher(task.grid, block, f) for f in self._model.spec.fields}
            for stitcher in stitchers.values():
                for index in sorted({*block.tiles} - {*task.tiles}):
                    stitcher.skip(task.grid[index])
            home = _OpenBlock(task, self._image(task), stitchers, len(task.tiles))
            self._busy[task.input] += 1
            for index in task.tiles:
                yield _Request(home, task.grid[index])

    def _image(self, task: BlockTask) -> WorkingImage:
        if task.input not in self._images:
            self._images[task.input] = self._open_image(task.source)
            idle = [name for name in self._images if not self._busy[name] and name != task.input]
            for name in idle[: len(self._images) - OPEN_INPUTS]:
                self._close(name)
        return self._images[task.input]

    def _close(self, name: str) -> None:
        image = self._images.pop(name)
        if name not in self._keep_open:
            image.source.close()

    def _read(self, request: _Request) -> _Read:
        began = time.perf_counter()
        tile = request.tile
        try:
            with _blame(request):
                reading = request.home.image.read(tile.read)
        except SourceError as error:
            status = TileStatus(tile.index, "unreadable", str(error))
            return _Read(None, status, time.perf_counter() - began)
        status = TileStatus(tile.index, *_presence(reading, tile))
        pixels = reading.pixels if status.status == "ok" else None
        return _Read(pixels, status, time.perf_counter() - began)

    # --- computing -----------------------------------------------------------------------------------

    def _postprocessed(
        self, loader: TileLoader[_Request, _Read], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Request, Future[_Done]]]:
        """Yield every tile with its pending result, in order, a bounded number ahead."""
        waiting: deque[tuple[_Request, Future[_Done]]] = deque()
        for item in self._predicted(loader):
            waiting.append((item[0], pool.submit(self._postprocess, *item)))
            while len(waiting) > 2 * self._workers:
                yield waiting.popleft()
        yield from waiting

    def _predicted(self, loader: TileLoader[_Request, _Read]) -> Iterator[_Predicted]:
        """Yield tiles with their outputs; `groups` batches are kept in flight on the device."""
        flight: deque[list[_Predicted]] = deque()
        for group in self._grouped(loader):
            flight.append(self._predict(group))
            while len(flight) >= self._groups:
                yield from flight.popleft()
        while flight:
            yield from flight.popleft()

    def _grouped(self, loader: TileLoader[_Request, _Read]) -> Iterator[list[tuple[_Request, _Read]]]:
        """Yield `spec.compute_batch` tiles of one block at a time: what a resumed run would group, too."""
        group: list[tuple[_Request, _Read]] = []
        for request, read in loader:
            if group and group[0][0].home is not request.home:
                yield group
                group = []
            group.append((request, read))
            if len(group) == self._model.spec.compute_batch:
                yield group
                group = []
        if group:
            yield group

    def _predict(self, group: list[tuple[_Request, _Read]]) -> list[_Predicted]:
        import torch

        began = time.perf_counter()
        outputs: dict[str, torch.Tensor] = {}
        present = [read.pixels for _, read in group if read.pixels is not None]
        problem = ""
        if present:
            try:
                with _blame(group[0][0]), torch.inference_mode(), autocast(self._device, self._precision):
                    outputs = self._model.predict(self._batch(present))
            except torch.OutOfMemoryError as error:  # the tile's fault, not the run's
                problem = f"WSI320 out of device memory at {len(present)} tiles: {str(error).splitlines()[0]}"
        share = (time.perf_counter() - began) / len(group)
        result: list[_Predicted] = []
        place = 0
        for request, read in group:
            request.home.seconds["read"] += read.seconds
            request.home.seconds["predict"] += share
            own = None
            if read.pixels is not None and not problem:
                own = {name: value[place] for name, value in outputs.items()}
                place += 1
            status = TileStatus(read.status.tile, "model_failed", problem) if problem else read.status
            result.append((request, status, own))
        return result

    def _batch(self, tiles: list[NDArray[Any]]) -> torch.Tensor:
        """Return (compute_batch, C, *tile) on the device; short groups are filled up with blank tiles."""
        import torch

        size = self._model.spec.compute_batch
        stack = np.zeros((size, *tiles[0].shape), tiles[0].dtype)
        for place, pixels in enumerate(tiles):
            stack[place] = pixels
        batch = torch.from_numpy(np.ascontiguousarray(np.moveaxis(stack, -1, 1)))
        return batch.to(self._device, non_blocking=True)

    def _postprocess(
        self, request: _Request, status: TileStatus, outputs: Mapping[str, torch.Tensor] | None
    ) -> _Done:
        began = time.perf_counter()
        if outputs is None:
            return _Done(status, None, 0.0)
        arrays = {n: v.float().cpu().numpy() for n, v in outputs.items()}
        bad = sum(int(np.size(v) - np.isfinite(v).sum()) for v in arrays.values())
        if bad:
            reason = f"WSI310 {bad} non-finite values in the network's output"
            return _Done(TileStatus(status.tile, "model_failed", reason), None, 0.0)
        with _blame(request):
            result = self._model.postprocess(arrays, request.tile)
        if result.objects is not None:
            task = request.home.task
            kept = select(result.objects, request.tile, task.grid, task.band, image=task.image)
            result = TileResult(kept, result.fields)
        return _Done(status, result, time.perf_counter() - began)

    # --- collecting ----------------------------------------------------------------------------------

    def _collect(self, request: _Request, future: Future[_Done]) -> BlockReport | None:
        """Put one tile into its block; return the report if that was the last one."""
        home = request.home
        done = future.result()
        home.statuses.append(done.status)
        home.seconds["postprocess"] += done.seconds
        if done.result is not None:
            if done.result.objects is not None:
                home.objects.append(done.result.objects)
            for name, stitcher in home.stitchers.items():
                stitcher.add(request.tile, done.result.fields[name])
                home.foreground.append(float(done.result.fields[name][0].mean()))
        else:
            for stitcher in home.stitchers.values():
                stitcher.skip(request.tile)
        home.waiting -= 1
        return self._commit(home) if home.waiting == 0 else None

    def _commit(self, home: _OpenBlock) -> BlockReport:
        with _blame(home):
            return self._store(home)

    def _store(self, home: _OpenBlock) -> BlockReport:
        arrays: dict[str, NDArray[Any]] = {}
        for name, stitcher in home.stitchers.items():
            arrays |= {f"field:{name}:{k}": v for k, v in stitcher.finalize().to_arrays().items()}
        count = 0
        if self._model.spec.objects:
            empty = ObjectTable.empty(self._model.spec.ndim, self._model.spec.object_columns)
            table = ObjectTable.concat([empty, *home.objects])
            count = len(table)
            arrays |= {f"objects:{k}": v for k, v in table.to_arrays().items()}
        record = {
            "tiles": [[s.tile, s.status, s.reason] for s in home.statuses],
            "objects": count,
            "foreground": float(np.mean(home.foreground)) if home.foreground else 0.0,
        }
        self._journal(home.task.input).commit(home.task.block, arrays, record)
        self._busy[home.task.input] -= 1
        return BlockReport(home.task.input, home.task.block, tuple(home.statuses), count, home.seconds)


@dataclass(frozen=True, slots=True)
class _Done:
    """A tile's final status and result."""

    status: TileStatus
    result: TileResult | None
    seconds: float


@contextmanager
def _blame(place: _Request | _OpenBlock) -> Iterator[None]:
    """Turn an unforeseen error into a `BlockError` that names the input, so that the others go on."""
    try:
        yield
    except (SourceError, BlockError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        home = place.home if isinstance(place, _Request) else place
        text = f"{place}: {type(error).__name__}: {error}"
        raise BlockError("WSI410", text, home.task.input) from error


_Predicted = tuple[_Request, TileStatus, "Mapping[str, torch.Tensor] | None"]


def _presence(reading: Reading, tile: Tile) -> tuple[str, str]:
    """Return status and reason for what the file holds of a tile's owned region."""
    if reading.absent is None:
        return "ok", ""
    inside = reading.absent[tile.owned.slices(tile.read.start)]
    if inside.all():
        return "absent", "WSI110 the file holds no pixels here"
    share = float(inside.mean())
    return "ok", f"WSI110 {share:.1%} of the pixels are absent in the file" if share else ""
