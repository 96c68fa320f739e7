"""How much memory does a run take? Peak of the proportional set sizes of all its processes, and its time.

    python benchmarks/memory.py run cellvit SLIDE -o OUT

Everything after the script's name goes to `wsitk`. Linux only (reads /proc/PID/smaps_rollup).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil


def proportional_mib(pid: int) -> float:
    """Return a process's memory in MiB, shared pages divided among those who share them; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> int:
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "wsitk.cli.main", *sys.argv[1:]])
    root, peak, done = psutil.Process(process.pid), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            peak = max(peak, sum(proportional_mib(p.pid) for p in family))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    print(f"peak {peak:.0f} MiB over all processes, {time.perf_counter() - began:.0f} s, exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
