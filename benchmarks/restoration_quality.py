"""What restorations are worth, and what they cost: samplers against each other, and against OpenCV's inpainting.

    WSITK_TEST_DATA=... python benchmarks/restoration_quality.py --out FOLDER [--model FOLDER]
        [--part samplers|model] [--per-source 4] [--samples 8] [--full]

Folds, bubbles and specks of dust (wsitk.artifacts.synthetic) are painted over clean tissue at 0.5 µm/px that no
training saw: the last fifth of the TCGA slide and of CMU-1's region that the demonstration model learned from,
every fifth CoNSeP tile, and MoNuSeg's training images (CC BY-NC-SA: measured on, never trained on). What was there
is the truth.

Only masked pixels are judged, in float:

- PSNR: of the mean squared error over R, G and B; the mean over cases.
- SSIM: the map of the whole crop (Wang et al. 2004, 7 x 7), its mean over the mask.
- colour: distance of the mean colour from that of the 8 µm around, in grey levels; the truth has one too.
- density: mean absolute difference of the sorted optical densities (the earth mover's distance), painted against
  the 8 µm around; the mean over channels.
- texture: standard deviation of the Laplacian over the truth's; 1 is as rough as tissue, 0 is smooth.
- cells: nuclei of the default model whose centre lies in the mask, more or fewer than in the truth.

``samplers``: single windows and small artifacts, so that the full schedule's 2,410 evaluations can be afforded
(``--full``). ``model``: crops of four windows' side and artifacts of usual sizes, joined as in a slide (without CoNSeP,
whose tiles are smaller). Writes samplers.json and samplers.png, or model.json and cases.png.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from wsitk.artifacts.synthetic import paint
from wsitk.geometry import Region
from wsitk.models.artifusion.data import Place, clean_crops
from wsitk.models.artifusion.demonstration import APART, part_of
from wsitk.models.artifusion.fill import membrane
from wsitk.models.artifusion.model import ArtiFusion, default_model, from_folder
from wsitk.models.artifusion.restore import UPSTREAM, Damaged, Restorer, Sampling

Array = NDArray[Any]
Restore = Callable[[list["Case"]], list[Array]]

UM = 0.5
SMALL_UM = {"fold": 6.0, "dust": 5.0, "bubble": 11.0}
USUAL_UM = {"fold": 30.0, "dust": 25.0, "bubble": 50.0}
"""Sizes of artifacts that fit into one window, and those of small real ones."""

RING_PX = 16
SEED = 11

SAMPLINGS = {
    "RePaint 50, once": Sampling("repaint", 50, 10, 1),
    "RePaint 25, 5x3": Sampling("repaint", 25, 5, 3),
    "DDIM 50": Sampling("ddim", 50, 10, 1),
    "DDIM 25, 5x3": Sampling("ddim", 25, 5, 3),
    "DPM++ 25": Sampling("dpm++", 25, 10, 1),
    "DPM++ 20, lower 0.7": Sampling("dpm++", 20, 10, 1, start=0.7),
    "DPM++ 20, lower half": Sampling("dpm++", 20, 10, 1, start=0.5),
    "DDIM 20, lower 0.7": Sampling("ddim", 20, 10, 1, start=0.7),
    "RePaint 50, lower 0.7": Sampling("repaint", 50, 10, 1, start=0.7),
}


@dataclass(frozen=True)
class Case:
    """Clean tissue, the same with an artifact, and where that is."""

    source: str
    kind: str
    truth: Array
    damaged: Damaged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--part", choices=("samplers", "model"), default="model")
    parser.add_argument("--per-source", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if "WSITK_TEST_DATA" not in os.environ:
        parser.exit(2, "set WSITK_TEST_DATA to the folder that holds data/\n")
    options.out.mkdir(parents=True, exist_ok=True)
    model = from_folder(options.model) if options.model else default_model()
    if options.part == "samplers":
        samplers(model, options)
    else:
        whole_model(model, options)


def samplers(model: ArtiFusion, options: argparse.Namespace) -> None:
    """Single windows: each way of sampling, one sample and the mean of a pair."""
    size = model.network.config.size
    cases = list(held_out(Path(os.environ["WSITK_TEST_DATA"]) / "data", size, options.per_source, SMALL_UM))
    ways = dict(SAMPLINGS) | ({"RePaint 250, 10x10 (published)": UPSTREAM} if options.full else {})
    rows = [row(name, 0, cases, found(cases)) for name, found in classical().items()]
    for name, sampling in ways.items():
        restorer = one_window(model, sampling)
        started = time.perf_counter()
        one = restorer.restore_many([c.damaged for c in cases], 0)
        rows.append(row(name, sampling.evaluations, cases, one, time.perf_counter() - started))
        if sampling is UPSTREAM:
            continue  # a second one would take as long as all others together
        other = restorer.restore_many([c.damaged for c in cases], 1)
        pair = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        rows.append(row(f"{name}: mean of 2", 2 * sampling.evaluations, cases, pair))
    save(options.out / "samplers.json", rows)
    plot(rows, options.out / "samplers.png")


def one_window(model: ArtiFusion, sampling: Sampling) -> Restorer:
    size = model.network.config.size
    return Restorer(model.network, sampling, SEED, size, 0, chain=model.chain, compute_batch=8)


def whole_model(model: ArtiFusion, options: argparse.Namespace) -> None:
    """Crops of several windows, the default sampling: one sample, means, and how many nuclei are found."""
    size = 4 * model.network.config.size
    cases = list(held_out(Path(os.environ["WSITK_TEST_DATA"]) / "data", size, options.per_source, USUAL_UM))
    side, how = model.network.config.size, replace(model.sampling, average=1)
    restorer = Restorer(model.network, how, SEED, side, chain=model.chain, compute_batch=8)
    started = time.perf_counter()
    each = [restorer.restore_many([c.damaged for c in cases], k) for k in range(options.samples)]
    seconds = time.perf_counter() - started
    made = {name: found(cases) for name, found in classical().items()}
    made |= {"one sample": each[0]}
    for count in (2, 4, 8, 16):
        if count <= options.samples:
            made[f"mean of {count}"] = [np.mean(some, axis=0) for some in zip(*each[:count], strict=True)]
    counts = {
        name: nuclei(cases, images) for name, images in made.items() if name not in ("mean of 4", "mean of 8")
    }
    true = nuclei(cases, [c.truth for c in cases])
    rows = []
    for name, images in made.items():
        cost = how.evaluations * int(name.rsplit(" ", 1)[-1]) if name.startswith("mean") else how.evaluations
        rows.append(row(name, 0 if name in classical() else cost, cases, images))
        if name in counts:
            rows[-1] |= {
                "cells": float(np.abs(counts[name] - true).mean()),
                "cells_sum": int(counts[name].sum()),
            }
    rows.append({"name": "truth", "cells_sum": int(true.sum()), **looks(cases, [c.truth for c in cases])})
    print(
        "\n".join(f"{r['name']:20s} cells {r.get('cells_sum')} error {r.get('cells', 0):.2f}" for r in rows),
        rows[-1],
    )
    save(options.out / "model.json", rows)
    print(f"{len(cases)} cases, {options.samples} samples: {seconds:.0f} s; {asdict(how)}")
    picture(cases, made, options.out / "cases.png")


# --- cases -----------------------------------------------------------------------------------------------


def held_out(data: Path, size: int, count: int, sizes: dict[str, float]) -> Iterator[Case]:
    """Yield `count` cases of each source, spread over it; kinds in turn."""
    number = 0
    for source, crops in sources(data, size):
        every = list(crops)
        for k in np.linspace(0, len(every) - 1, count).astype(int):
            kind = list(sizes)[number % len(sizes)]
            truth = every[k][1]
            painted = paint(truth, kind, UM, seed=number, size_um=sizes[kind])
            yield Case(source, kind, truth, Damaged(painted.pixels, painted.mask))
            number += 1


def sources(data: Path, size: int) -> Iterator[tuple[str, Iterator[tuple[Place, Array]]]]:
    """Yield clean crops that took no part in training."""
    rest = 100_000
    for name, (axis, line) in APART.items():
        corner = (line, 0) if axis == "y" else (2048, line)
        # a row here and there of what was kept apart is enough
        area, step = Region(corner, (rest, rest)), max(512, size) if axis == "x" else size
        yield name.split("-")[0].upper(), clean_crops(data / "wsi" / name, size, UM, step=step, area=area)
    consep = sorted((data / "nuclei" / "consep256" / "train").glob("*.jpg"))
    if size <= 128:
        yield "CoNSeP", first_of(p for p in consep if part_of(Place(p.name, 0, 0)) == "held_out")(size)
    monuseg = sorted((data / "nuclei" / "monuseg_train").glob("*.jpg"))
    yield "MoNuSeg", first_of(iter(monuseg))(size)


def first_of(paths: Iterator[Path]) -> Callable[[int], Iterator[tuple[Place, Array]]]:
    """Return what yields the first clean crop of each image, at 0.25 µm/px as scanned."""
    chosen = list(paths)

    def crops(size: int) -> Iterator[tuple[Place, Array]]:
        for path in chosen:
            yield from islice(clean_crops(path, size, UM, own_um=0.25), 1)

    return crops


# --- restoring without a network -------------------------------------------------------------------------


def classical() -> dict[str, Restore]:
    def telea(cases: list[Case]) -> list[Array]:
        marks = [(c.damaged.image, c.damaged.mask.astype(np.uint8)) for c in cases]
        return [np.asarray(cv2.inpaint(image, mask, 3, cv2.INPAINT_TELEA)) for image, mask in marks]

    def soap(cases: list[Case]) -> list[Array]:
        return [membrane(c.damaged.image.astype(np.float32), ~c.damaged.mask) for c in cases]

    return {"Telea (OpenCV)": telea, "membrane": soap}


# --- figures ---------------------------------------------------------------------------------------------


def row(
    name: str, evaluations: int, cases: list[Case], images: list[Array], seconds: float = 0.0
) -> dict[str, Any]:
    """Return the figures of one way of restoring, and print them."""
    psnr = np.array([region_psnr(c, image) for c, image in zip(cases, images, strict=True)])
    ssim = np.array([region_ssim(c, image) for c, image in zip(cases, images, strict=True)])
    kinds = {k: float(psnr[[c.kind == k for c in cases]].mean()) for k in {c.kind: 0 for c in cases}}
    places = {s: float(psnr[[c.source == s for c in cases]].mean()) for s in {c.source: 0 for c in cases}}
    found = {"name": name, "evaluations": evaluations, "psnr": float(psnr.mean()), "ssim": float(ssim.mean())}
    found |= {"psnr_kinds": kinds, "psnr_sources": places, "seconds": seconds, "cases": len(cases)}
    found |= looks(cases, images)
    print(
        f"{name:38s} {evaluations:5d}  PSNR {psnr.mean():6.2f} (sd of the mean {psnr.std() / len(psnr) ** 0.5:.2f})  "
        f"SSIM {ssim.mean():.3f}  colour {found['colour']:5.2f}  density {found['density']:.4f}  "
        f"texture {found['texture']:.2f}  " + "  ".join(f"{k} {v:.2f}" for k, v in (kinds | places).items()),
        flush=True,
    )
    return found


def region_psnr(case: Case, image: Array) -> float:
    mask = case.damaged.mask
    error = np.square(image[mask].astype(np.float64) - case.truth[mask]).mean()
    return float(10 * np.log10(255**2 / error))


def region_ssim(case: Case, image: Array) -> float:
    both = (case.truth.astype(np.float64), image.astype(np.float64))
    _, every = structural_similarity(*both, channel_axis=-1, data_range=255, full=True)
    return float(every[case.damaged.mask].mean())


def looks(cases: list[Case], images: list[Array]) -> dict[str, float]:
    """Return how colour, density and texture fit in; no truth is needed for the first two."""
    colour, density, texture = [], [], []
    for case, image in zip(cases, images, strict=True):
        mask = case.damaged.mask
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RING_PX + 1,) * 2)
        ring = cv2.dilate(mask.astype(np.uint8), disk).astype(bool) & ~mask
        inside, around = image[mask].astype(np.float64), case.truth[ring].astype(np.float64)
        colour.append(np.linalg.norm(inside.mean(axis=0) - around.mean(axis=0)))
        density.append(earth_mover(*(-np.log10(np.maximum(v, 1) / 255) for v in (inside, around))))
        rough = [cv2.Laplacian(v.astype(np.float32), cv2.CV_32F)[mask].std() for v in (image, case.truth)]
        texture.append(rough[0] / rough[1])
    every = {"colour": colour, "density": density, "texture": texture}
    return {name: float(np.mean(values)) for name, values in every.items()}


def earth_mover(one: Array, other: Array) -> float:
    places = np.linspace(0, 1, 201)
    return float(np.abs(np.quantile(one, places, axis=0) - np.quantile(other, places, axis=0)).mean())


def nuclei(cases: list[Case], images: list[Array]) -> NDArray[np.int64]:
    """Return how many nuclei of each image have their centre in the mask."""
    from nuclei_accuracy import at_spacing, cellvit

    from wsitk.metrics.detection import centroids

    predictor, found = cellvit(), []
    for case, image in zip(cases, images, strict=True):
        pixels = at_spacing(np.clip(np.rint(image), 0, 255).astype(np.uint8), UM, predictor.spacing_um)
        points = centroids(predictor.label(pixels)) * (predictor.spacing_um / UM)
        place = np.minimum(np.asarray(points, int), np.array(case.damaged.mask.shape) - 1).reshape(-1, 2)
        found.append(int(case.damaged.mask[place[:, 0], place[:, 1]].sum()))
    return np.array(found)


# --- results ---------------------------------------------------------------------------------------------


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw PSNR over evaluations; classical ways are lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for row, style in zip([r for r in rows if not r["evaluations"]], ("--", ":"), strict=False):
        axes.axhline(row["psnr"], color="0.4", linestyle=style, label=row["name"])
    for row in (r for r in rows if r["evaluations"]):
        mean = "mean" in row["name"]
        axes.plot(row["evaluations"], row["psnr"], "o" if mean else "x", color="C0" if mean else "C1")
        axes.annotate(
            row["name"],
            (row["evaluations"], row["psnr"]),
            fontsize=6,
            xytext=(4, 2),
            textcoords="offset points",
        )
    axes.set(xscale="log", xlabel="network evaluations per window", ylabel="PSNR of masked pixels, dB")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def picture(cases: list[Case], made: dict[str, list[Array]], path: Path) -> None:
    """Draw a row for each way, a column for each of eight cases: truth and damage on top."""
    chosen = range(0, len(cases), max(1, len(cases) // 8))
    every = [[c.truth for c in cases], [c.damaged.image for c in cases], *made.values()]
    rows = [[images[k] for k in chosen] for images in every]
    strips = [np.concatenate([np.clip(np.rint(i), 0, 255).astype(np.uint8) for i in r], axis=1) for r in rows]
    cv2.imwrite(str(path), np.concatenate(strips)[..., ::-1])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
