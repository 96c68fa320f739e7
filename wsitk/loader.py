"""Bounded, ordered read-ahead: decoders run in threads, results come in the order of the requests.

The stream of requests may span blocks and inputs, so the first tiles of the next slide decode while the
last ones of this slide are still being computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar, final

__all__ = ["TileLoader"]

Request = TypeVar("Request")
Result = TypeVar("Result")


@final
class TileLoader(Generic[Request, Result]):
    """Iterate over ``(request, read(request))`` with at most `depth` results waiting.

    The first failure wins: it is re-raised at its place in the order, with the request in a note, and
    what was still queued is cancelled. Requests are drawn lazily, in the consumer's thread.
    """

    def __init__(
        self,
        read: Callable[[Request], Result],
        requests: Iterable[Request],
        *,
        workers: int,
        depth: int | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be positive, got {workers}")
        self._read = read
        self._requests = iter(requests)
        self._depth = depth or 2 * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="wsitk-read")
        self._waiting: deque[tuple[Request, Future[Result]]] = deque()

    def __iter__(self) -> Iterator[tuple[Request, Result]]:
        try:
            self._fill()
            while self._waiting:
                request, future = self._waiting.popleft()
                try:
                    result = future.result()
                except Exception as error:
                    error.add_note(f"while reading {request}")
                    raise
                self._fill()
                yield request, result
        finally:
            self.close()

    def _fill(self) -> None:
        while len(self._waiting) < self._depth:
            try:
                request = next(self._requests)
            except StopIteration:
                return
            self._waiting.append((request, self._pool.submit(self._read, request)))

    def close(self) -> None:
        """Cancel what waits and let running reads end."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
