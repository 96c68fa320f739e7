"""Peak memory of labelling a CT with many classes, and nnU-Net's way beside it.

    OMP_NUM_THREADS=2 python benchmarks/volume_memory.py [--shape 700 512 512] [--classes 2 105] [--step 0.5] [--theirs]

A synthetic CT of 700 x 512 x 512 voxels goes through `wsitk.run` with a stub network: features are powers of the
intensity, its head gives each class a fixed mixture of them. The volume is computed where it is read, and the
run is one process, so that its peak is the memory of everything: reading, network, joining, writing. Each number
of classes has a process of its own. `--step 1` has an eighth of the tiles, and the same memory.

Scratch is the room on disk that the scores of one layer of tiles take, beside the output; it does not grow with
the number of slices. nnU-Net's way is computed: scores of all classes for the whole volume, in version 1 in
float32 with as many weights, in version 2 in float16 with one weight for each voxel; not counted are the copies
made when they are resampled. With ``--theirs`` version 1's accumulators are really filled, tile by tile, in a
process of its own: choose a shape that fits.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import wsitk
from wsitk.geometry import Region
from wsitk.grid import TileGrid
from wsitk.model import ChunkedModel, FieldSpec, ModelSpec
from wsitk.sources.array import ArraySource
from wsitk.stitch.labels import LabelStitcher
from wsitk.stitch.layers import Canvas
from wsitk.volumes.nnunet_rules import IntensityRule, gaussian

TILE = (128, 128, 128)
FEATURES = 16
"""As many as STU-Net-S has before its head."""


class SyntheticCT:
    """Smooth waves in Hounsfield units, made where they are asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, np.dtype(np.int16)

    def __getitem__(self, key: Any) -> NDArray[np.int16]:
        where = key if isinstance(key, tuple) else (key,)
        full = (*where, *(slice(None),) * (3 - len(where)))
        z, y, x = np.ogrid[tuple(slice(*s.indices(n)) for s, n in zip(full, self.shape, strict=True))]
        waves = np.sin(z / np.float32(31)) + np.sin(y / np.float32(23)) + np.sin(x / np.float32(17))
        return np.asarray(400 * waves, np.int16)


class Stub(ChunkedModel):
    """Features without a network, and a head of `classes` channels."""

    def __init__(self, classes: int, step: float) -> None:
        field = FieldSpec(
            "organs",
            tuple(f"class {k}" for k in range(classes)),
            kind="labels",
            reduction="argmax",
            window="gaussian",
            activation="softmax",
            dtype="uint8" if classes <= 256 else "uint16",
        )
        self.spec = ModelSpec(
            "stub",
            "1",
            spacing=None,
            tile=TILE,
            halo=(0, 0, 0),
            align=(1, 1, 1),
            step=step,
            channels=1,
            dtype="",
            border="constant",
            fill=0.0,
            normalise=(IntensityRule("ct", shift=0.0, scale=400.0, low=-1000.0, high=1000.0),),
            fields=(field,),
        )
        places = torch.arange(classes * FEATURES, dtype=torch.float32).reshape(classes, FEATURES)
        self.weight = torch.sin(places)

    @property
    def network(self) -> torch.nn.Module:
        """Return the identity."""
        return torch.nn.Identity()

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return (1, FEATURES, *tile)."""
        waves = [torch.sin(batch[:, 0] * (k + 1) / 4) for k in range(FEATURES)]
        return {"features": torch.stack(waves, 1)}

    def head(self, features: Mapping[str, torch.Tensor], name: str, start: int, stop: int) -> torch.Tensor:
        """Return the mixtures of a few classes."""
        weight = self.weight[start:stop, :, None, None, None]
        return torch.nn.functional.conv3d(features["features"], weight)


def once(shape: tuple[int, ...], classes: int, step: float, out: str) -> dict[str, float]:
    """Run one volume here; return what it took."""
    model = Stub(classes, step)
    grid = TileGrid.sliding(Region((0, 0, 0), shape), TILE, step)
    stitcher = LabelStitcher(grid, model.spec.fields[0], Canvas(shape, (1.0, 1.0, 1.0)))
    started = time.perf_counter()
    source = ArraySource(SyntheticCT(shape), axes="zyx", spacing=1000.0)
    result = wsitk.run(model, source, out=out, threads=2, workers=1, preview=False)
    return {
        "classes": classes,
        "tiles": len(grid),
        "seconds": time.perf_counter() - started,
        "peak_gb": peak_gb(),
        "scratch_gb": stitcher.scratch_bytes / 1e9,
        "labels": len(result.provenance["labels"]),
    }


def theirs(shape: tuple[int, ...], classes: int, step: float) -> dict[str, float]:
    """Fill version 1's accumulators for a volume; return how much memory that took."""
    model, source = Stub(classes, step), SyntheticCT(shape)
    before = peak_gb()
    scores = np.zeros((classes, *shape), np.float32)
    weights = np.zeros((classes, *shape), np.float32)
    window = gaussian(TILE)
    for tile in TileGrid.sliding(Region((0, 0, 0), shape), TILE, step):
        here = tile.read.intersect(Region((0, 0, 0), shape)).slices()
        pixels = torch.from_numpy(source[here].astype(np.float32) / 400)[None, None]
        with torch.inference_mode():
            found = model.head(model.predict(pixels), "organs", 0, classes)[0].softmax(0).numpy()
        part = window[tuple(slice(0, n) for n in found.shape[1:])]
        scores[(slice(None), *here)] += found * part
        weights[(slice(None), *here)] += part
    scores /= weights
    return {"labels": int(scores.argmax(0).max()), "before_gb": before, "peak_gb": peak_gb()}


def peak_gb() -> float:
    """Return the most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024


def main() -> None:
    """Print a line for each number of classes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(700, 512, 512))
    parser.add_argument("--classes", type=int, nargs="+", default=(2, 105))
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--scratch", help="folder for output and scratch file; default: the system's")
    parser.add_argument("--theirs", action="store_true", help="fill nnU-Net 1's accumulators, too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = tuple(options.shape)
    if options.fill:
        print(json.dumps(theirs(shape, options.fill, options.step)))
        return
    if options.one:
        with tempfile.TemporaryDirectory(dir=options.scratch) as out:
            print(json.dumps(once(shape, options.one, options.step, out)))
        return
    print(f"{shape[0]} x {shape[1]} x {shape[2]} voxels, tile {TILE[0]}, step {options.step}", flush=True)
    for classes in options.classes:
        rest = ["--shape", *map(str, shape), "--step", str(options.step)]
        rest += ["--scratch", options.scratch] if options.scratch else []
        got = apart([*rest, "--one", str(classes)])
        one, two = 8e-9 * prod(shape) * classes, 2e-9 * prod(shape) * (classes + 1)
        print(
            f"{classes:4d} classes: peak {got['peak_gb']:.2f} GB, scratch {got['scratch_gb']:.2f} GB on disk, "
            f"{got['tiles']} tiles in {got['seconds']:.0f} s; nnU-Net's accumulators {one:.1f} GB (version 1), "
            f"{two:.1f} GB (version 2)",
            flush=True,
        )
        if options.theirs:
            got = apart([*rest, "--fill", str(classes)])
            print(
                f"     version 1's, filled: peak {got['peak_gb']:.2f} GB, {got['before_gb']:.2f} GB before",
                flush=True,
            )


def apart(arguments: list[str]) -> dict[str, float]:
    """Return what this script prints with other arguments, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


if __name__ == "__main__":
    main()
