"""Does memory grow with the slide? Runs over 10^9, 10^10 and 10^11 pixels, and a slide with 10^6 planted objects.

    python benchmarks/gigapixel.py                  # three sizes, a sample of each slide's blocks
    python benchmarks/gigapixel.py --objects        # every tile of the smallest: 1,048,576 objects, all must be found

The slides are BigTIFF pyramids whose tiles all point at one real JPEG tile with 256 disks, so that a slide of 10^11
pixels takes a few megabytes and every tile is decoded as any other. The model calls each dark spot an object. Linux
only (reads /proc).

Measured on 2 busy cores, 64 tiles of 1024 pixels each, peak of one process and of all together (PSS):

    10^9 pixels     320 MiB    833 MiB
    10^10           337        940
    10^11           365        954     (of the growth, 30 MB are offsets and lengths of 382,000 TIFF tiles)

`--objects`, all 1,369 tiles: 1,048,576 of 1,048,576 objects, each once; 481 MiB, 1,005 MiB.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import tifffile
import torch
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.model import ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.objects import ObjectTable

TILE, STEP, RADIUS = 512, 32, 8
GLASS, SPOT = (238, 225, 232), (110, 60, 140)


class Planted(TileModel):
    """Every dark spot is an object; sure of all of them."""

    def __init__(self) -> None:
        spotted = (ObjectClass("Spot", (200, 80, 80)),)
        self.spec = ModelSpec(
            "planted",
            "1",
            (0.5, 0.5),
            (1024, 1024),
            (64, 64),
            (64, 64),
            objects=True,
            classes=spotted,
            seam_um=12.0,
        )

    @property
    def network(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"dark": (batch[:, :1] < 170).float()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        count, labels = cv2.connectedComponents((outputs["dark"][0] > 0).astype(np.uint8))
        ones = np.ones(count - 1, np.float32)
        table = ObjectTable.from_labels(
            labels.astype(np.int32),
            origin=tile.read.start,
            probability=ones,
            class_id=np.zeros(count - 1, np.int16),
        )
        return TileResult(table)


def planted() -> Planted:
    """Build the model; named on the command line as ``gigapixel:planted``."""
    return Planted()


# --- slides --------------------------------------------------------------------------------------------


def jpeg_tile() -> bytes:
    """Return a JPEG stream of one tile: a lattice of disks, none of which touches its border."""
    pixels = np.empty((TILE, TILE, 3), np.uint8)
    pixels[:] = GLASS
    for y in range(STEP // 2, TILE, STEP):
        for x in range(STEP // 2, TILE, STEP):
            cv2.circle(pixels, (x, y), RADIUS, SPOT, -1)
    ok, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert ok
    return data.tobytes()


def write_slide(path: Path, side: int) -> None:
    """Write a pyramid of `side` x `side` pixels (and 4, 16, … times smaller) of 0.5 µm."""
    tile = jpeg_tile()
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        at = file.tell()
        file.write(tile)
        link = 8
        for level in range(1 + max(0, (side // 2048).bit_length() // 2)):
            length = side >> 2 * level
            link = _page(file, link, length, at, len(tile), reduced=level > 0)
    with tifffile.TiffFile(path) as check:
        assert check.pages[0].shape == (side, side, 3)


def _page(file: Any, link: int, side: int, at: int, size: int, *, reduced: bool) -> int:
    """Append an IFD whose tiles all lie at `at`; return where it names the next one."""
    count = (-(-side // TILE)) ** 2
    offsets = file.seek(0, 2)
    file.write(np.full(count, at, "<u8").tobytes())
    counts = file.tell()
    file.write(np.full(count, size, "<u4").tobytes())
    short, long, rational, long8 = 3, 4, 5, 16
    centimetre = struct.pack("<II", 20000 >> (2 if reduced else 0), 1)
    entries = [
        (254, long, 1, struct.pack("<I", int(reduced))),
        (256, long, 1, struct.pack("<I", side)),
        (257, long, 1, struct.pack("<I", side)),
        (258, short, 3, struct.pack("<HHH", 8, 8, 8)),
        (259, short, 1, struct.pack("<H", 7)),
        (262, short, 1, struct.pack("<H", 6)),
        (277, short, 1, struct.pack("<H", 3)),
        (282, rational, 1, centimetre),
        (283, rational, 1, centimetre),
        (284, short, 1, struct.pack("<H", 1)),
        (296, short, 1, struct.pack("<H", 3)),
        (322, short, 1, struct.pack("<H", TILE)),
        (323, short, 1, struct.pack("<H", TILE)),
        (324, long8, count, struct.pack("<Q", offsets if count > 1 else at)),
        (325, long, count, struct.pack("<Q", counts) if count > 2 else np.full(count, size, "<u4").tobytes()),
        (530, short, 2, struct.pack("<HH", 2, 2)),
    ]
    start = file.tell() + file.tell() % 2
    file.seek(start)
    body = BytesIO()
    body.write(struct.pack("<Q", len(entries)))
    for tag, kind, length, value in entries:
        body.write(struct.pack("<HHQ", tag, kind, length) + value.ljust(8, b"\0"))
    after = start + body.tell()
    body.write(struct.pack("<Q", 0))
    file.write(body.getvalue())
    file.seek(link)
    file.write(struct.pack("<Q", start))
    return after


def write_region(path: Path, side: int, sample: int) -> None:
    """Write the square in the middle that is worked on, `sample` pixels wide, as GeoJSON."""
    low, high = (side - sample) // 2, (side + sample) // 2
    ring = [[low, low], [high, low], [high, high], [low, high], [low, low]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))


# --- runs ----------------------------------------------------------------------------------------------


def watched(command: list[str]) -> tuple[int, float, float, float]:
    """Run a command; return its exit code, its seconds, and the peaks of one process and of all, in MiB (PSS)."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root, done = psutil.Process(process.pid), threading.Event()
    peak = {"one": 0.0, "all": 0.0}

    def watch() -> None:
        while not done.wait(0.5):
            try:
                each = [_pss(p.pid) for p in (root, *root.children(recursive=True))]
            except psutil.NoSuchProcess:
                return
            peak["one"], peak["all"] = max(peak["one"], *each), max(peak["all"], sum(each))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    return code, time.perf_counter() - began, peak["one"], peak["all"]


def _pss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure(side: int, sample: int, folder: Path) -> dict[str, Any]:
    """Return the figures of a run over the middle `sample` x `sample` pixels; 0 takes all of the slide."""
    slide, region, out = folder / f"{side}.tiff", folder / "region.geojson", folder / f"out-{side}"
    write_slide(slide, side)
    write_region(region, side, sample)
    command = [
        *(sys.executable, "-m", "wsitk.cli.main", "run", "gigapixel:planted", str(slide), "-o", str(out)),
        *(
            "--tissue",
            str(region) if sample else "none",
            "--no-maps",
            "--workers",
            "2",
            "--threads",
            "1",
            "--json",
        ),
    ]
    code, seconds, one, every = watched(command)
    record = json.loads((out / slide.name / "provenance.json").read_bytes())
    return {
        "pixels": float(side) ** 2, "exit": code, "seconds": round(seconds), "tiles": record["tiles"]["ok"],
        "objects": sum(record["objects"].values()), "peak_mib_one": round(one), "peak_mib_all": round(every),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", action="store_true", help="every tile of a slide with 1,048,576 objects")
    parser.add_argument("--tiles", type=int, default=64, help="TIFF tiles along a side of that slide")
    parser.add_argument("--sample", type=int, default=8192, help="pixels along a side of the sample")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.objects:
            found = measure(arguments.tiles * TILE, 0, Path(folder))
            wanted = arguments.tiles**2 * (TILE // STEP) ** 2
            print(json.dumps({**found, "planted": wanted, "all_found_once": found["objects"] == wanted}))
            return int(found["objects"] != wanted)
        for side in (31_744, 100_352, 316_416):
            print(json.dumps(measure(side, arguments.sample, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
