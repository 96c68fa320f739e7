"""Are the results the same bytes, however many machines make them? One slide, run in several ways, one table.

    python benchmarks/many_machines.py                     # all ways; SLURM where it is installed
    python benchmarks/many_machines.py serial workers

Each way is `wsitk run` as a user would call it, on a synthetic slide with a model that knows the truth, and ends
with one sha256 over the tree of its results (all but run.json, summary.csv and HTML, which hold times). The exit
code is 0 if they are all equal. SLURM is a real one, on loopback (Debian: slurm-wlm, munge; as root); its array
script is the one of docs/how-to/cluster.md.

Measured on 2 busy cores (load 12), slide of 1536 pixels, 576 tiles in 144 blocks; seconds from the command to its
end, most of them for starting Python, torch, Dask and SLURM:

    serial        20.9 s    9 files   b9dac4811d73e0b3
    threads       21.2      9         b9dac4811d73e0b3
    workers       31.5      9         b9dac4811d73e0b3
    killed        38.1      9         b9dac4811d73e0b3   4 kills (54.5 s with 11 kills in another run)
    parts         31.1      9         b9dac4811d73e0b3
    slurm_array   76.3      9         b9dac4811d73e0b3   SLURM 22.05, array of 2
    slurm_dask    51.3      9         b9dac4811d73e0b3   dask-jobqueue 0.9, 2 jobs
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import tifffile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from crashing import tree  # noqa: E402
from loopback_slurm import LoopbackSlurm, missing  # noqa: E402

from wsitk.testing import SyntheticSlide  # noqa: E402

KILL_SECONDS = 3.0

SETTINGS = ("--tissue", "none", "--threads", "1", "--device", "cpu", "--block", "2", "--no-preview")
"""Those that may change bytes; a way of running adds none of them."""


@final
class Lane:
    """A slide, a folder for the results of each way, and what `wsitk` needs to find the model."""

    def __init__(self, folder: Path, pixels: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.slide = folder / "slide.tiff"
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        made = SyntheticSlide.make((pixels, pixels), count=pixels**2 // 1500, radius=(5.0, 9.0), seed=7)
        tifffile.imwrite(
            self.slide, made.pixels, tile=(256, 256), photometric="rgb", compression="zlib",
            resolution=(20000, 20000), resolutionunit="CENTIMETER",
        )  # fmt: skip

    def command(self, way: str, *more: str) -> list[str]:
        """Return the command of one way of running."""
        start = [sys.executable, "-m", "wsitk.cli.main", "run", "dying:oracle", str(self.slide)]
        return [*start, "-o", str(self.folder / way), *SETTINGS, *more]

    def start(self, way: str, *more: str) -> subprocess.Popen[str]:
        """Start a run."""
        return subprocess.Popen(
            self.command(way, *more), env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, way: str, *more: str) -> str:
        """Run to the end."""
        return ended(self.start(way, *more))


def ended(*runs: subprocess.Popen[str]) -> str:
    """Wait for runs, which must succeed."""
    for run in runs:
        _, said = run.communicate()
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}: {said.strip()[-2000:]}")
    return ""


# --- ways of running: each returns a remark -----------------------------------------------------------


def serial(lane: Lane) -> str:
    """One process, one thread."""
    return lane.run("serial", "--workers", "1", "--no-supervise")


def threads(lane: Lane) -> str:
    """Two threads that read and post-process, the model in a process of its own."""
    return lane.run("threads", "--workers", "2")


@contextmanager
def two_workers() -> Iterator[Any]:
    """Start two Dask workers, which are started again when they die."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
    ) as cluster:
        yield cluster


def workers(lane: Lane) -> str:
    """Two Dask workers."""
    with two_workers() as cluster:
        return lane.run("workers", "--scheduler", cluster.scheduler_address)


def killed(lane: Lane) -> str:
    """Two Dask workers, of which one is killed every three seconds.

    Only while both are there: Dask does not start a worker again that dies before it has said hello.
    """
    chance, gone, began = random.Random(1), 0, time.perf_counter()
    with two_workers() as cluster:
        run = lane.start("killed", "--scheduler", cluster.scheduler_address)
        while run.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(KILL_SECONDS)
                continue
            there = cluster.scheduler.workers
            living = [nanny.pid for nanny in cluster.workers.values() if nanny.worker_address in there]
            if len(living) == 2:
                os.kill(chance.choice(living), signal.SIGKILL)
                gone += 1
        ended(run)
    seconds = time.perf_counter() - began
    return f"{gone} kills, one in {seconds / max(1, gone):.1f} s"


def parts(lane: Lane) -> str:
    """Two processes that divide the blocks by number."""
    return ended(*(lane.start("parts", "--part", f"{i}/2") for i in range(2)))


def slurm_array(lane: Lane) -> str:
    """The array script of the documentation."""
    page = (ROOT / "docs" / "how-to" / "cluster.md").read_text(encoding="utf-8")
    found = re.search(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```$", page, re.M | re.S)
    if found is None:
        raise RuntimeError("docs/how-to/cluster.md has no array script any more")
    ours = " ".join(lane.command("slurm_array"))
    script, changed = re.subn(r"wsitk run cellvit slides/ -o out --threads 1 --device cpu", ours, found[1])
    if changed != 1:
        raise RuntimeError("the array script's command is another one than this lane knows")
    file = lane.folder / "array.sh"
    file.write_text(script)
    with LoopbackSlurm(lane.folder / "slurm-a") as slurm:
        environment = {**lane.environment, **slurm.environment}
        command = ["sbatch", "--wait", f"--output={lane.folder}/array-%a.log", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        logs = "\n".join(p.read_text() for p in sorted(lane.folder.glob("array-*.log")))
        raise RuntimeError(f"{done.stderr} {logs}"[-2000:])
    return "array of 2, --part"


def slurm_dask(lane: Lane) -> str:
    """Two Dask workers that SLURM started."""
    from dask_jobqueue import SLURMCluster

    with LoopbackSlurm(lane.folder / "slurm-d") as slurm:
        os.environ.update(slurm.environment)
        with SLURMCluster(
            cores=2,
            processes=1,
            memory="1900MB",
            walltime="01:00:00",
            python=sys.executable,
            local_directory=str(lane.folder / "scratch"),
            log_directory=str(lane.folder / "jobs"),
            worker_extra_args=["--host", "127.0.0.1"],
            job_script_prologue=[f"export PYTHONPATH={lane.environment['PYTHONPATH']} OMP_NUM_THREADS=1"],
            scheduler_options={"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
            silence_logs="error",
        ) as cluster:
            cluster.scale(jobs=2)
            cluster.wait_for_workers(2)
            return lane.run("slurm_dask", "--scheduler", cluster.scheduler_address) or "2 jobs, dask-jobqueue"


WAYS: dict[str, Callable[[Lane], str]] = {
    way.__name__: way for way in (serial, threads, workers, killed, parts, slurm_array, slurm_dask)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help="some of the ways; none is all of them")
    parser.add_argument("--pixels", type=int, default=2048, help="edge of the slide; a block is 128 pixels")
    parser.add_argument("--scratch", type=Path, help="keep everything here")
    chosen = parser.parse_args()
    names = list(chosen.ways or WAYS)
    if any(n.startswith("slurm") for n in names) and missing():
        print(f"no SLURM: {missing()}", file=sys.stderr)
        names = [n for n in names if not n.startswith("slurm")]
    with tempfile.TemporaryDirectory() as scratch:
        lane = Lane(chosen.scratch or Path(scratch), chosen.pixels)
        sums = [told(name, lane) for name in names]
    print("all the same" if len({*sums}) == 1 else "NOT the same")
    return int(len({*sums}) != 1)


def told(name: str, lane: Lane) -> str:
    """Run one way, print its line, and return the hash of its results."""
    began = time.perf_counter()
    try:
        remark = WAYS[name](lane)
    except (RuntimeError, ImportError) as error:
        print(f"{name:12} FAILED  {error}", flush=True)
        return f"failed: {name}"
    seconds = time.perf_counter() - began
    files = tree(lane.folder / name)
    total = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    print(f"{name:12} {seconds:6.1f} s  {len(files):4} files  {total[:16]}  {remark}", flush=True)
    return total


if __name__ == "__main__":
    sys.exit(main())
