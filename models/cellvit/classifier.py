"""Token classifiers of CellViT++ (Hörst 2025): nucleus other classes, from the encoder's tokens.

A cell's token is the mean of the deepest tokens under its bounding box; two linear layers turn it into
classes. Published classifiers belong to one encoder each; their files load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import ModelError
from wsitk.model import ObjectClass
from wsitk.models.cellvit.checkpoint import object_classes
from wsitk.torchfile import TensorFile, checked_state, read_tensors

__all__ = ["LinearClassifier", "ClassifierInfo", "load_classifier", "cell_tokens"]

WIDEST = 65536
"""Bound on layer widths that a file may state."""


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier file says of itself. `classes` start at 0: there is no background."""

    path: Path
    sha256: str
    embed_dim: int
    hidden: int
    classes: tuple[ObjectClass, ...]
    named: bool
    dataset: str | None


class LinearClassifier(nn.Module):
    """Two linear layers: (N, embed_dim) -> logits (N, classes)."""

    def __init__(self, embed_dim: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(tokens))))
        return logits

    def classify(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the class probabilities (N, classes) of cell tokens (N, embed_dim); each row sums to 1."""
        with torch.inference_mode():
            values = torch.from_numpy(np.ascontiguousarray(tokens, np.float32))
            logits = self(values.to(self.fc1.weight.device))
            probabilities: NDArray[np.float32] = logits.float().softmax(dim=1).cpu().numpy()
        return probabilities


def load_classifier(
    path: str | Path, embed_dim: int | None = None
) -> tuple[LinearClassifier, ClassifierInfo]:
    """Return a published token classifier, in evaluation mode, and its facts.

    `embed_dim` is the width of the network whose tokens it shall read; another width is refused (WSI308).
    Two published files (nucls_main, nucls_super) name no classes: theirs are called 'class 0', 'class 1', …
    Raises ModelError as `checkpoint.load_checkpoint` does.
    """
    file = read_tensors(path)
    if file.meta.get("arch") != "LinearClassifier":
        got = str(file.meta.get("arch"))[:60]
        raise ModelError("WSI304", f"{file.path} is a {got!r}; wanted a LinearClassifier of CellViT++")
    inside, hidden, count = _widths(file)
    if embed_dim not in (None, inside):
        raise ModelError(
            "WSI308",
            f"{file.path} reads tokens of {inside} numbers, the network gives {embed_dim}; wanted a "
            "classifier that was trained on this network",
        )
    with torch.device("meta"):
        network = LinearClassifier(inside, hidden, count)
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    config = file.meta.get("config")
    settings = config if isinstance(config, Mapping) else {}
    names = _label_map(file.path, settings, count)
    info = ClassifierInfo(
        path=file.path,
        sha256=file.sha256,
        embed_dim=inside,
        hidden=hidden,
        classes=object_classes(names, count, first=0),
        named=bool(names),
        dataset=str(settings["data.dataset"]) if "data.dataset" in settings else None,
    )
    return network.eval(), info


def _widths(file: TensorFile) -> tuple[int, int, int]:
    """Return the widths of input, hidden layer and output, which only the weights state."""
    first, last = (file.tensors.get(n) for n in ("fc1.weight", "fc2.weight"))
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        raise ModelError(
            "WSI301", f"{file.path} has no matrices fc1.weight and fc2.weight; wanted a LinearClassifier"
        )
    widths = (first.shape[1], first.shape[0], last.shape[0])
    if not all(1 <= width <= WIDEST for width in widths):
        raise ModelError("WSI304", f"{file.path}: layers of {widths} numbers, wanted 1 to {WIDEST}")
    return widths


def _label_map(path: Path, settings: Mapping[str, Any], count: int) -> dict[int, str]:
    prefix, names = "data.label_map.", {}
    for key, name in settings.items():
        if not key.startswith(prefix):
            continue
        number = key.removeprefix(prefix)
        if not number.isdecimal() or int(number) >= count:
            what = f"config {key[:80]!r} for {count} classes"
            raise ModelError("WSI304", f"{path}: {what}; wanted {prefix}0 to {count - 1}")
        names[int(number)] = str(name)
    return names


def cell_tokens(
    tokens: NDArray[np.floating[Any]],
    start: NDArray[np.integer[Any]],
    shape: NDArray[np.integer[Any]],
    tile: tuple[int, int],
) -> NDArray[np.float32]:
    """Return each cell's token (N, C): the mean of the tokens that its bounding box touches.

    `tokens` (C, h, w) cover a tile of `tile` pixels; `start` and `shape` (N, 2) are the boxes in (y, x)
    pixels of the tile. A box covers the tokens from floor(start) to ceil(stop), as upstream rounds.
    """
    grid = np.array(tokens.shape[1:])
    pixels = np.array(tile)
    first = np.asarray(start, np.int64) * grid // pixels
    stop = -(-(np.asarray(start, np.int64) + shape) * grid // pixels)
    first, stop = np.clip(first, 0, grid - 1), np.clip(stop, 1, grid)
    stop = np.maximum(stop, first + 1)
    # A summed-area table makes a box four look-ups, whatever its size; in float64 the differences are exact
    # to far below a float32's last bit.
    table = np.zeros((tokens.shape[0], *(grid + 1)))
    table[:, 1:, 1:] = tokens.astype(np.float64).cumsum(axis=1).cumsum(axis=2)
    (top, left), (bottom, right) = first.T, stop.T
    total = table[:, bottom, right] - table[:, top, right] - table[:, bottom, left] + table[:, top, left]
    mean: NDArray[np.float32] = (total / (stop - first).prod(axis=1)).T.astype(np.float32)
    return mean
