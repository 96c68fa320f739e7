"""The pixel work: blocks of tiles in, committed blocks out.

Tiles are read ahead by threads, across blocks and inputs; the network runs in the caller's thread; results
are post-processed in a pool and collected in order. A block is forgotten once it is in the journal.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.blocks import BlockError, BlockReport, BlockTask, OpenBlock, TileStatus
from wsitk.blockstore import BlockStore
from wsitk.errors import SourceError, WorkError
from wsitk.grid import Tile
from wsitk.loader import TileLoader
from wsitk.model import ChunkedModel, TileModel, TileResult
from wsitk.predictor import Predictor
from wsitk.reading.server import TileImage
from wsitk.sources.base import Reading

if TYPE_CHECKING:
    import torch

__all__ = ["BlockWorker", "blame"]


@dataclass(frozen=True, slots=True)
class _Request:
    """One tile of an open block."""

    home: OpenBlock
    tile: Tile

    def __str__(self) -> str:
        return f"{self.home.task.input} tile {self.tile.index} {self.tile.read}"


@dataclass(frozen=True, slots=True)
class _Read:
    """A tile's pixels, or why there are none."""

    pixels: NDArray[Any] | None
    status: TileStatus
    seconds: float


@dataclass(frozen=True, slots=True)
class _Done:
    """A tile's final status and result."""

    status: TileStatus
    result: TileResult | None
    seconds: float
    infinite: int = 0


_Predicted = tuple[_Request, TileStatus, "Mapping[str, torch.Tensor] | None"]


@final
class BlockWorker:
    """Runs one model over a stream of block tasks.

    `groups` is the number of batches in flight on the device; `open_image` turns a task's input into the image
    on the model's working grid; `store` takes the blocks of an input; `on_tile` is called as tiles are done.
    """

    def __init__(
        self,
        model: TileModel,
        predictor: Predictor,
        *,
        workers: int,
        groups: int,
        open_image: Callable[[BlockTask], TileImage],
        store: Callable[[str], BlockStore],
        on_tile: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._predictor = predictor
        self._workers = workers
        self._groups = 1 if model.spec.labels else groups
        # one tile of a volume may say a gigabyte of scores: no second one waits beside it
        self._ahead = 0 if model.spec.labels else 2 * workers
        self._open_image = open_image
        self._store = store
        self._on_tile = on_tile
        self._images: dict[str, TileImage] = {}
        self._busy: Counter[str] = Counter()
        self._last: OpenBlock | None = None

    def run(self, tasks: Iterable[BlockTask]) -> Iterator[BlockReport]:
        """Yield a report for each task, in order, once its block is committed.

        Raises BlockError, which names the input, for whatever is not the data's fault.
        """
        loader = TileLoader(self._read, self._requests(tasks), workers=self._workers)
        try:
            with ThreadPoolExecutor(self._workers, thread_name_prefix="wsitk-post") as pool, loader:
                for request, future in self._postprocessed(loader, pool):
                    self._on_tile()
                    if self._collected(request, self._settled(request, future.result())):
                        yield self._commit(request.home)
        finally:
            if self._last is not None:
                self._last.release()
            self._last = None
            for image in self._images.values():
                image.close()
            self._images.clear()

    def _collected(self, request: _Request, done: _Done) -> bool:
        """Put a tile into its block; tell whether the block is complete now."""
        home = request.home
        home.seconds["postprocess"] += done.seconds
        with blame(home.task, str(request)):
            home.add(request.tile, done.status, done.result)
        return home.complete

    # --- reading -------------------------------------------------------------------------------------

    def _requests(self, tasks: Iterable[BlockTask]) -> Iterator[_Request]:
        for task in tasks:
            with blame(task, task.input, SourceError):  # the file may have gone since it was planned
                home = self._open(task)
            self._busy[task.input] += 1
            for index in (*home.again, *task.tried):
                yield _Request(home, task.grid[index])

    def _open(self, task: BlockTask) -> OpenBlock:
        self._image(task)
        store = self._store(task.input)
        scratch = store.folder / ".wsitk" if self._model.spec.labels else None
        self._last = OpenBlock(
            task, self._model.spec, before=self._last, scratch=scratch, records=store.record
        )
        return self._last

    def _image(self, task: BlockTask) -> TileImage:
        if task.input not in self._images:
            self._images[task.input] = self._open_image(task)
            for name in [n for n in self._images if not self._busy[n] and n != task.input]:
                self._images.pop(name).close()
        return self._images[task.input]

    def _read(self, request: _Request) -> _Read:
        began = time.perf_counter()
        tile = request.tile
        if not self._model.wants(tile):
            return _Read(None, TileStatus(tile.index, "background", "the model wants nothing of it"), 0.0)
        try:
            with blame(request.home.task, str(request)):
                reading = self._images[request.home.task.input].read(tile.read)
        except SourceError as error:
            status = TileStatus(tile.index, "unreadable", str(error))
            return _Read(None, status, time.perf_counter() - began)
        status = TileStatus(tile.index, *_presence(reading, tile))
        pixels = _turned(reading.pixels, request, 0) if status.status == "ok" else None
        return _Read(pixels, status, time.perf_counter() - began)

    # --- computing -----------------------------------------------------------------------------------

    def _postprocessed(
        self, loader: TileLoader[_Request, _Read], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Request, Future[_Done]]]:
        """Yield every tile with its pending result, in order, a bounded number ahead."""
        waiting: deque[tuple[_Request, Future[_Done]]] = deque()
        for item in self._predicted(loader):
            waiting.append((item[0], self._submit(pool, item)))
            del item  # a tile's outputs live no longer than they must
            while len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting

    def _submit(self, pool: ThreadPoolExecutor, item: _Predicted) -> Future[_Done]:
        """Have a tile post-processed: in the pool, or at once where only the device's thread may do it."""
        if not isinstance(self._model, ChunkedModel):
            return pool.submit(self._postprocess, *item)
        future: Future[_Done] = Future()
        future.set_result(self._postprocess(*item))
        return future

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
        began = time.perf_counter()
        present = [(read.pixels, _start(r, read.pixels)) for r, read in group if read.pixels is not None]
        outputs: list[Mapping[str, torch.Tensor]] = []
        problem = ""
        if present:
            with blame(group[0][0].home.task, str(group[0][0])):
                outputs, problem = self._predictor(
                    [pixels for pixels, _ in present], [at for _, at in present]
                )
        each = iter(outputs)
        result: list[_Predicted] = []
        for request, read in group:
            request.home.seconds["read"] += read.seconds
            request.home.seconds["predict"] += (time.perf_counter() - began) / len(group)
            if read.pixels is None:
                result.append((request, read.status, None))
            elif problem:
                result.append((request, TileStatus(read.status.tile, "model_failed", problem), None))
            else:
                result.append((request, read.status, next(each)))
        return result

    def _postprocess(
        self,
        request: _Request,
        status: TileStatus,
        outputs: Mapping[str, torch.Tensor] | None,
        precision: str = "",
    ) -> _Done:
        began = time.perf_counter()
        if outputs is None:
            return _Done(status, None, 0.0)
        if isinstance(self._model, ChunkedModel):
            return self._in_chunks(self._model, request, status, outputs, precision)
        arrays = {n: _turned(_plain(v), request, 1) for n, v in outputs.items()}
        bad = sum(int(np.size(v) - np.isfinite(v).sum()) for v in arrays.values())
        if bad:
            reason = f"WSI310 {bad} non-finite values in the network's output, in float32 too"
            return _Done(TileStatus(status.tile, "model_failed", reason), None, 0.0, bad)
        with blame(request.home.task, str(request)):
            result = self._model.postprocess(arrays, request.tile)
            result = request.home.put_forward(result, request.tile)
        return _Done(status, result, time.perf_counter() - began)

    def _in_chunks(
        self,
        model: ChunkedModel,
        request: _Request,
        status: TileStatus,
        features: Mapping[str, torch.Tensor],
        precision: str,
    ) -> _Done:
        """Return a tile whose fields are computed when the stitcher asks for them."""
        began = time.perf_counter()
        with blame(request.home.task, str(request)):
            fields = {
                f.name: self._predictor.scores(model, features, f, precision=precision)
                for f in model.spec.fields
            }
        bad = sum(not scores.finite for scores in fields.values())
        if bad:
            reason = f"WSI310 non-finite scores in {bad} fields, in float32 too"
            return _Done(TileStatus(status.tile, "model_failed", reason), None, 0.0, bad)
        return _Done(status, TileResult(scores=fields), time.perf_counter() - began)

    def _settled(self, request: _Request, done: _Done) -> _Done:
        """Return a tile's result; one that half precision could not hold is computed again in float32."""
        if not done.infinite or self._predictor.precision == "float32":
            return done
        read = self._read(request)
        if read.pixels is None:
            return _Done(read.status, None, 0.0)
        with blame(request.home.task, str(request)):
            start = _start(request, read.pixels)
            outputs, problem = self._predictor([read.pixels], [start], precision="float32")
        if problem:
            return _Done(TileStatus(request.tile.index, "model_failed", problem), None, 0.0)
        return self._postprocess(request, read.status, outputs[0], "float32")

    def _commit(self, home: OpenBlock) -> BlockReport:
        task = home.task
        with blame(task, str(home)):
            arrays, record = home.contents()
            self._store(task.input).commit(task.block, arrays, record)
        self._busy[task.input] -= 1
        return home.report(record["objects"])


@contextmanager
def blame(task: BlockTask, place: str, *more: type[Exception]) -> Iterator[None]:
    """Turn an unforeseen error into a `BlockError` that names the input, so that the others go on.

    A SourceError passes, since an unreadable tile is data; unless it is among `more`.
    """
    try:
        yield
    except BlockError:
        raise
    except Exception as error:
        if isinstance(error, SourceError) and not isinstance(error, more):
            raise
        words = error.message if isinstance(error, WorkError) else f"{type(error).__name__}: {error}"
        raise BlockError("WSI410", f"{place}: {words}", task.input, _errno(error)) from error


def _errno(error: BaseException | None) -> int | None:
    """Return the system's number for an error, however deep it lies: a full disk must be known as such."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number is not None:
            return int(number)
        error = error.__cause__
    return None


def _start(request: _Request, pixels: NDArray[Any]) -> tuple[int, ...]:
    """Return where a tile's pixels begin on the working grid: at the image's border, if it cuts them.

    Along an axis that was turned for the network, the grid counts from the other end.
    """
    read, view = request.tile.read, request.home.task.view
    box = read if pixels.shape[:-1] == read.shape else read.intersect(request.home.task.image)
    turned = () if view is None else view.turned
    return tuple(-b if k in turned else a for k, (a, b) in enumerate(zip(box.start, box.stop, strict=True)))


def _plain(value: torch.Tensor) -> NDArray[Any]:
    """Return numbers as float32, and whole ones as they are."""
    return np.asarray((value.float() if value.is_floating_point() else value).cpu().numpy())


def _turned(values: NDArray[Any], request: _Request, first: int) -> NDArray[Any]:
    """Return a tile's values as the network wants them to lie, or the network's as the input does.

    `first` is where the spatial axes begin; what has no spatial axes stays as it is.
    """
    view = request.home.task.view
    if view is None or not view.turned or values.ndim - first < len(view.shape):
        return values
    return np.ascontiguousarray(np.flip(values, tuple(axis + first for axis in view.turned)))


def _presence(reading: Reading, tile: Tile) -> tuple[str, str]:
    """Return status and reason for what the file holds of a tile's owned region."""
    if reading.absent is None:
        return "ok", ""
    # a window cut at the image's border begins where the image does
    clipped = reading.absent.shape != tile.read.shape
    start = tuple(max(0, a) for a in tile.read.start) if clipped else tile.read.start
    inside = reading.absent[tile.owned.slices(start)]
    if inside.all():
        return "absent", "WSI110 the file holds no pixels here"
    share = float(inside.mean())
    return "ok", f"WSI110 {share:.1%} of the pixels are absent in the file" if share else ""
