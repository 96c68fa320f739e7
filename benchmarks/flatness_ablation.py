"""Whether the flatness penalty helps a token classifier: paired runs with and without it.

    WSITK_TEST_DATA=... python benchmarks/flatness_ablation.py TOKENS [--seeds 6]

Cells are those of CoNSeP's 27 training tiles (0.25 µm/px, cut to 256 px patches) of the types inflammatory,
epithelial and spindle-shaped; miscellaneous ones lie in too few tiles to be split. Tokens are those of the shipped
encoder at 0.5 µm/px, written to the folder TOKENS once. For each seed a third of the tiles is the test, about a
fifth of the other cells (whole tiles) chooses the epoch, and the rest is learned from: all of it, or of 400 cells in
all. All arms of a seed share split, first weights and order. Differences to the arm without penalty are paired by
seed; intervals are 95 % of the mean over seeds (Student's t). Seeds share the 27 tiles, so the intervals say what
another draw of tiles would do, not what another laboratory would.

The encoder was trained to outline nuclei on 23 of these tiles; it never saw a type.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from wsitk.models.cellvit.compact import MEAN, STD
from wsitk.models.cellvit.model import default_model
from wsitk.models.cellvit.training.head_scores import score_head
from wsitk.models.cellvit.training.heads import HeadConfig, train_head
from wsitk.models.cellvit.training.tokens import (
    LabelledCells,
    TokenSet,
    cells_of_labels,
    extract_tokens,
    open_tokens,
)

CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle-shaped")
CONFIG = HeadConfig(batch=256, epochs=15, patience=5, learning_rate=1e-3)
FEW, FEW_BATCH = 400, 32
FACTOR = 10.0
"""The strong arm's multiple of the automatic strength: a tenth of the loss instead of a hundredth."""

FIGURES = ("macro F1", "macro AUROC", "cross-entropy", "kappa")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = open_tokens(options.tokens) if options.tokens.exists() else extracted(options.tokens)
    data = typed(data)
    print(f"{len(data)} cells of {len(data.group_names)} tiles")
    for few in (True, False):
        runs = np.array([arms(data, seed, few) for seed in range(options.seeds)])
        report("400 cells" if few else "all cells", runs)


def extracted(folder: Path) -> TokenSet:
    """Return the tokens of all cells, written to `folder`."""
    source = Path(os.environ["WSITK_TEST_DATA"]) / "data" / "nuclei" / "consep256" / "train"
    network = default_model().network
    return extract_tokens(network, patches(source), folder, CLASSES, mean=MEAN, std=STD)


def patches(folder: Path) -> Iterator[LabelledCells]:
    """Yield each patch at 0.5 µm/px; its group is its tile."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            inst, kind = file["inst"], file["type"]
        read = cv2.imread(str(path.with_suffix(".jpg")), cv2.IMREAD_COLOR)
        if read is None:
            raise FileNotFoundError(path.with_suffix(".jpg"))
        image = cv2.resize(read[..., ::-1], (128, 128), interpolation=cv2.INTER_AREA)
        ids, start, shape = cells_of_labels(inst)
        stop = -(-(start + shape) // 2)
        tile = path.stem.split("_")[1]
        yield LabelledCells(image.astype(np.uint8), start // 2, stop - start // 2, kind[ids - 1] - 1, tile)


def arms(data: TokenSet, seed: int, few: bool) -> list[list[float]]:
    """Return the figures of the three arms for one seed."""
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(len(data.group_names))
    third = len(order) // 3
    in_test = np.isin(data.groups, order[:third])
    learning = np.flatnonzero(~in_test)
    if few:
        learning = np.sort(rng.choice(learning, FEW, replace=False))
    learned = part(data, learning)
    config = replace(CONFIG, seed=seed, batch=FEW_BATCH if few else CONFIG.batch)
    rows, strength = [], 0.0
    for fam in (None, "auto", "strong"):
        chosen = FACTOR * strength if fam == "strong" else fam
        # A penalty of strength 0 changes nothing, and measures kappa.
        head = train_head(learned, replace(config, fam=0.0 if chosen is None else chosen))
        strength = head.fam_strength or 0.0
        scores = score_head(head.network, data, np.flatnonzero(in_test))
        rows.append([scores.macro_f1, scores.macro_auroc, scores.loss, head.history[head.epoch]["kappa"]])
    return rows


def typed(data: TokenSet) -> TokenSet:
    """Return the cells that are not miscellaneous, the first class, in memory."""
    kept = part(data, np.flatnonzero(data.labels > 0))
    return replace(kept, labels=kept.labels - np.int16(1), classes=data.classes[1:])


def part(data: TokenSet, cells: NDArray[np.int64]) -> TokenSet:
    """Return some cells of a set, in memory, with the groups that occur in them."""
    groups, number = np.unique(data.groups[cells], return_inverse=True)
    names = tuple(data.group_names[g] for g in groups)
    return TokenSet(data.tokens[cells], data.labels[cells], number.astype(np.int32), data.classes, names)


def report(title: str, runs: NDArray[np.float64]) -> None:
    """Print means over seeds, and the paired differences to the first arm with their intervals."""
    print(f"\n{title}, {len(runs)} seeds\n{'':24}" + "".join(f"{name:>26}" for name in FIGURES))
    wide = student.ppf(0.975, len(runs) - 1) / np.sqrt(len(runs))
    for index, arm in enumerate(("without", "1 % (auto)", "10 %")):
        print(f"{arm:24}" + "".join(f"{v:26.4f}" for v in runs[:, index].mean(axis=0)))
        if index:
            paired = runs[:, index] - runs[:, 0]
            cells = zip(paired.mean(axis=0), wide * paired.std(axis=0, ddof=1), strict=True)
            print(f"{'  difference':24}" + "".join(f"{f'{m:+.4f} ± {w:.4f}':>26}" for m, w in cells))


if __name__ == "__main__":
    main()
