"""What the model's process does: loads the model, works off blocks, commits them, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import final

from wsitk.blocks import BlockError, BlockTask
from wsitk.blockstore import BlockStore
from wsitk.errors import ModelError, WsitkError
from wsitk.model import Model
from wsitk.plan import resolve_spec
from wsitk.predictor import Predictor
from wsitk.process import Death
from wsitk.reading.client import ReaderProcess
from wsitk.record import peak_memory_mib
from wsitk.region_worker import RegionPredictor
from wsitk.registry import load_model
from wsitk.work.base import Order, as_asked, cost_of_a_tile, ready, slot_bytes, worker_for

__all__ = ["serve"]


def serve(connection: Connection) -> None:
    """Load the model of the `Order` that comes first, answer ``ready`` or ``refused``, then do as told."""
    order: Order = connection.recv()
    try:
        model = as_asked(_load(order), order.settings, order.model.options)
        predictor, device = ready(model, order.settings)
        spec = resolve_spec(model.spec, order.settings)
    except WsitkError as error:
        connection.send(("refused", error))
        return
    connection.send(("ready", model.spec, device.type))

    def mourn(death: Death) -> None:
        connection.send(("death", f"the reading process died ({death})"))

    with ReaderProcess(
        threads=order.settings.workers or 1,
        slot_bytes=slot_bytes(spec),
        preload=("wsitk.plan",),
        deadline=order.settings.read_deadline,
        on_death=mourn,
    ) as reader:
        _Desk(connection, order, model, predictor, reader).work()


def _load(order: Order) -> Model:
    try:
        return load_model(order.model.name, **order.model.options)
    except WsitkError:
        raise
    except Exception as error:  # a plug-in may raise anything
        text = f"{order.model.name} could not be loaded: {type(error).__name__}: {error}"
        raise ModelError("WSI336", text) from error


@final
class _Desk:
    """Takes orders from the socket: ``estimate``, or ``run`` followed by tasks and None."""

    def __init__(
        self,
        connection: Connection,
        order: Order,
        model: Model,
        predictor: Predictor | RegionPredictor,
        reader: ReaderProcess,
    ) -> None:
        self._connection = connection
        self._model = model
        self._predictor = predictor
        self._ended = False
        self._worker = worker_for(
            model,
            predictor,
            order.settings,
            open_image=lambda task: reader.image(
                "wsitk.plan:tile_image", task.source, resolve_spec(model.spec, order.settings), task.view
            ),
            store=lambda name: BlockStore(order.out / name),
            on_tile=lambda: connection.send(("tick",)),
        )

    def work(self) -> None:
        """Take orders until the other side leaves, which ends the process."""
        while True:
            if self._connection.recv() == "estimate":
                seconds = cost_of_a_tile(self._predictor, self._model.spec)
                self._connection.send(("estimate", seconds, peak_memory_mib()))
            else:
                self._run()

    def _run(self) -> None:
        self._ended = False
        try:
            for report in self._worker.run(self._tasks()):
                self._connection.send(("done", report))
            self._connection.send(("flushed",))
        except BlockError as error:
            self._connection.send(("failed", error))
            while not self._ended:  # what was sent before the other side heard of it
                self._ended = self._connection.recv() is None

    def _tasks(self) -> Iterator[BlockTask]:
        while True:
            task = self._connection.recv()
            if task is None:
                self._ended = True
                return
            self._connection.send(("open", task.input, task.block))
            yield task
