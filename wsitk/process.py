"""A Python process of our own at the other end of a socket: started clean, watched, buried with its cause of death.

Decoders written in C abort on damaged files, models run out of memory, drivers hang. What may die does so in
a child; the parent learns what killed it and goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

from wsitk.errors import WorkError

__all__ = ["Child", "ChildError", "Death", "limit_address_space", "memory_bytes"]

WATCH_SECONDS = 0.2
"""How often a child's memory is looked at."""

LOG = "log"
"""First word of a message that carries a line of a child's log."""

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from wsitk.process import main; main(*sys.argv[2:])"


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended: `signal` (0 if it left by itself), exit `code`, most memory seen, and last words.

    `cause` is ``deadline`` or ``memory`` if we killed it for that, else empty.
    """

    signal: int
    code: int
    peak_mib: float
    cause: str = ""
    last_words: str = ""

    def __str__(self) -> str:
        return f"{self.reason}, {self.peak_mib:.0f} MiB used" + (
            f": {self.last_words}" if self.last_words else ""
        )

    @property
    def reason(self) -> str:
        """Return what killed it, in words that are the same each time."""
        if self.cause:
            return {"deadline": "no answer within the deadline", "memory": "over the memory limit"}[
                self.cause
            ]
        if self.signal:
            return f"signal {self.signal}, {signal.strsignal(self.signal) or 'unknown'}"
        return f"exit code {self.code}"


class ChildError(WorkError):
    """Raised when a child is gone: `death` says why (WSI401)."""

    def __init__(self, name: str, death: Death) -> None:
        super().__init__("WSI401", f"the {name} died ({death})")
        self.name = name
        self.death = death

    def __reduce__(self) -> tuple[type[ChildError], tuple[Any, ...]]:
        return type(self), (self.name, self.death)


@final
class Child:
    """A process that runs ``module:function(connection)``.

    It shares nothing with its parent but the socket and the `files` (descriptors kept under their numbers),
    runs no code of the user's main script, and ends when the parent does. `memory_limit` (bytes of resident
    memory) is enforced by a thread here, since a device's address space says little of what is in use.
    """

    def __init__(
        self,
        target: str,
        name: str,
        *,
        files: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.name = name
        self._cause = ""
        self._death: Death | None = None
        self._peak = 0
        self._limit = memory_limit
        self._sending = threading.Lock()
        self._burying = threading.Lock()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), target],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=[theirs.fileno(), *files],
                env={**os.environ, **(environment or {})},
            )
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self._gone = threading.Event()
        threading.Thread(target=self._watch, name=f"wsitk-watch-{name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the process's number."""
        return self._process.pid

    @property
    def peak_mib(self) -> float:
        """Return the most resident memory seen, in MiB."""
        return self._peak / 2**20

    def send(self, message: object) -> None:
        """Send a message; raises ChildError."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            raise self.died() from None

    def receive(self, timeout: float | None = None) -> Any:
        """Return the next message; log lines on the way are logged here.

        Raises ChildError, also when nothing comes for `timeout` seconds: the child is then killed.
        """
        while True:
            try:
                if timeout is not None and not self._connection.poll(timeout):
                    self.kill("deadline")
                message = self._connection.recv()
            except (OSError, EOFError):
                raise self.died() from None
            if not (isinstance(message, tuple) and message[0] == LOG):
                return message
            logging.getLogger(message[1]).log(message[2], "%s", message[3])

    def kill(self, cause: str) -> None:
        """Kill the child because of `cause`, ``deadline`` or ``memory``."""
        self._cause = self._cause or cause
        self._process.send_signal(signal.SIGKILL)

    def died(self) -> ChildError:
        """Return the error that says how it ended; ends it if it has not."""
        with self._burying:
            if self._death is None:
                self._death = self._bury()
        return ChildError(self.name, self._death)

    def close(self) -> None:
        """End the child, which sees its socket close, and wait for it."""
        self.died()

    def _bury(self) -> Death:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever listens, on either side
        self._socket.close()
        try:
            self._process.wait(5)  # it leaves by itself when the socket closes, unless it is stuck
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._gone.set()
        code = self._process.returncode
        self._words.seek(max(0, self._words.seek(0, os.SEEK_END) - 2000))
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        self._words.close()
        return Death(
            max(0, -code), max(0, code), self.peak_mib, self._cause, lines[-1][:200] if lines else ""
        )

    def _watch(self) -> None:
        while not self._gone.wait(WATCH_SECONDS):
            used = memory_bytes(self.pid)
            self._peak = max(self._peak, used)
            if self._limit is not None and used > self._limit:
                self.kill("memory")
                return


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- in the child ------------------------------------------------------------------------------------


class _LogToParent(logging.Handler):
    """Sends warnings to the parent, whose logging is the user's."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection
        self._sending = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send((LOG, record.name, record.levelno, self.format(record)))


def main(descriptor: str, target: str) -> None:
    """Run ``module:function`` on the socket; the entry point of every child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    connection = _OneAtATime(int(descriptor))
    threading.Thread(target=_leave_with_parent, args=(int(descriptor),), daemon=True).start()
    logging.basicConfig(handlers=[_LogToParent(connection)])
    module, _, name = target.partition(":")
    getattr(importlib.import_module(module), name)(connection)


@final
class _OneAtATime(Connection):
    """A connection on which several threads may send."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self._sending = threading.Lock()

    def send(self, obj: Any) -> None:
        """Send one message whole."""
        with self._sending:
            super().send(obj)


def _leave_with_parent(descriptor: int) -> None:
    """End the process as soon as the parent's end of the socket is closed, whatever else is going on."""
    watch = select.poll()
    watch.register(descriptor, getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR)
    while not watch.poll():
        time.sleep(0.1)
    os._exit(0)


def limit_address_space(extra: int) -> None:
    """Allow this process `extra` bytes of address space more than it has now."""
    if not sys.platform.startswith("linux"):
        return  # elsewhere the limit is not enforced, or counts other things
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))
