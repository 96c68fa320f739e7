"""An input under way: its plan, what is left of it, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wsitk.blocks import BlockReport, BlockTask
from wsitk.journal import Claim, Journal
from wsitk.plan import Plan
from wsitk.reading.access import Access

__all__ = ["Job"]


@dataclass
class Job:
    """The books of one input; `part` (i, n) takes every n-th block from the i-th on, None all of them."""

    plan: Plan
    folder: Path
    journal: Journal
    access: Access
    part: tuple[int, int] | None = None
    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: bool = False
    ending: bool = False
    left: set[int] = field(default_factory=set)
    _claims: dict[int, Claim] = field(default_factory=dict)
    _every: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._every = {task.block for task in self.plan.tasks()}
        done = self.journal.committed(verify=True).keys()
        self.left = {b for b in self._every if self.mine(b)} - done

    def mine(self, block: int) -> bool:
        """Tell whether a block belongs to this part."""
        return self.part is None or block % self.part[1] == self.part[0]

    def tasks(self) -> Iterator[BlockTask]:
        """Yield the blocks that are left and that no other process has taken, each claimed as it is yielded."""
        todo = frozenset(self.left)
        for task in self.plan.tasks():
            if task.block not in todo or self.failed:
                continue
            claim = self.journal.claim(task.block)
            if claim is None:
                self.left.discard(task.block)
                continue
            self._claims[task.block] = claim
            yield task

    def done(self, report: BlockReport) -> None:
        """Note a block that has been committed."""
        self._claims.pop(report.block).close()
        self.left.discard(report.block)
        for stage, value in report.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def counts(self) -> tuple[int, int]:
        """Return how many blocks are committed, by whichever process, and how many there are."""
        return len(self.journal.committed().keys() & self._every), len(self._every)

    def close(self) -> None:
        """Let go of everything."""
        for claim in self._claims.values():
            claim.close()
        self.journal.close()
