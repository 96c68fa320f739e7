"""The loader keeps the order, stays within its bound, and lets the first failure win."""

from __future__ import annotations

import threading

import pytest

from wsitk.loader import TileLoader


def test_results_come_in_the_order_of_the_requests() -> None:
    gate = threading.Event()

    def read(request: int) -> int:
        if request == 0:
            gate.wait(30)  # the first read ends after the second: order must not depend on that
        else:
            gate.set()
        return request * 10

    with TileLoader(read, range(20), workers=4) as loader:
        assert list(loader) == [(i, i * 10) for i in range(20)]


def test_no_more_than_depth_requests_are_drawn_ahead() -> None:
    drawn: list[int] = []

    def requests() -> object:
        for i in range(100):
            drawn.append(i)
            yield i

    loader = TileLoader(lambda r: r, requests(), workers=2, depth=5)  # type: ignore[arg-type]  # a plain generator
    for seen, _ in enumerate(loader):
        assert len(drawn) <= seen + 1 + 5


def test_the_first_failure_in_order_wins_and_names_its_request() -> None:
    def read(request: int) -> int:
        if request in (3, 5):
            raise ValueError(f"no {request}")
        return request

    seen = []
    with pytest.raises(ValueError, match="no 3") as caught, TileLoader(read, range(10), workers=3) as loader:
        seen += [r for r, _ in loader]
    assert "while reading 3" in caught.value.__notes__
    assert seen == [0, 1, 2] or seen == []


def test_leaving_early_cancels_the_rest() -> None:
    done: list[int] = []
    with TileLoader(done.append, range(1000), workers=2, depth=4) as loader:
        for _ in loader:
            break
    assert len(done) <= 6


def test_a_worker_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="positive, got 0"):
        TileLoader(lambda r: r, [], workers=0)
