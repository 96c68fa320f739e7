"""Tokens of labelled cells: what a classifier learns from, kept in files that are mapped, not read.

A folder holds ``tokens.npy`` (N, C) float32, ``labels.npy`` (N,) int16, ``groups.npy`` (N,) int32 and
``tokens.json`` with the names of classes and groups. A group is what must not lie on both sides of a split: a
patient, or a slide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wsitk.errors import UsageError
from wsitk.models.cellvit.classifier import cell_tokens
from wsitk.models.cellvit.compact import LATTICE, CompactCellViT
from wsitk.models.cellvit.network import CellViT
from wsitk.writers.base import atomic_dir

__all__ = [
    "LabelledCells",
    "TokenSet",
    "extract_tokens",
    "open_tokens",
    "encoder_tokens",
    "cells_of_labels",
]

TILE, HALO = 1024, 128
"""Largest window in pixels that the encoder sees at once, and its margin, in which no cell is taken."""


@dataclass(frozen=True)
class LabelledCells:
    """An image at the network's spacing, and its cells.

    Attributes
    ----------
    image
        (H, W, 3) uint8, of any size.
    start, shape
        Bounding boxes (n, 2) in (y, x) pixels of the image.
    label
        (n,) class of each cell, from 0; -1 for cells to leave out.
    group
        The patient or slide.
    """

    image: NDArray[np.uint8]
    start: NDArray[np.integer[Any]]
    shape: NDArray[np.integer[Any]]
    label: NDArray[np.integer[Any]]
    group: str


@dataclass(frozen=True)
class TokenSet:
    """Tokens (N, C), their labels and groups (N,), mapped to their files; names of classes and groups."""

    tokens: NDArray[np.float32]
    labels: NDArray[np.int16]
    groups: NDArray[np.int32]
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def encoder_tokens(network: nn.Module, images: Tensor) -> Tensor:
    """Return the deepest tokens (N, C, h, w) of normalised images (N, 3, H, W), without running a decoder.

    They are what the network gives as ``tokens``. Raises UsageError WSI895 for a network that has none.
    """
    if isinstance(network, CompactCellViT):
        deepest: Tensor = network.encoder(images)[-1]
    elif isinstance(network, CellViT):
        network._check(images)  # its sides, as `forward` does
        deepest = network.encoder(network._to_patches(images))[0][-1]
    else:
        raise UsageError(
            "WSI895", f"{type(network).__name__} has no tokens for classifiers; wanted a CellViT"
        )
    return deepest


def cells_of_labels(
    labels: NDArray[np.integer[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (ids, start, shape) of the instances of a label map (H, W), ids ascending, boxes in (y, x)."""
    where = np.nonzero(labels)
    ids, index = np.unique(labels[where], return_inverse=True)
    low = np.full((len(ids), 2), np.iinfo(np.int64).max)
    high = np.zeros((len(ids), 2), np.int64)
    for axis, position in enumerate(where):
        np.minimum.at(low[:, axis], index, position)
        np.maximum.at(high[:, axis], index, position + 1)
    return ids.astype(np.int64), low, high - low


def extract_tokens(
    network: nn.Module,
    images: Iterable[LabelledCells],
    folder: str | Path,
    classes: Iterable[str],
    *,
    mean: Iterable[float],
    std: Iterable[float],
    device: str | torch.device = "cpu",
    facts: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> TokenSet:
    """Run the frozen encoder over `images` and write each labelled cell's token to `folder`.

    Images pass one at a time, in windows of `TILE`, so that a token does not depend on other images and nothing
    is held but the image at hand. `mean` and `std` are the network's, for RGB in 0..1; `facts` are kept as they
    are. Raises UsageError WSI896 for labels outside `classes` and boxes outside the image, WSI895 if there is no
    cell; OutputError as `atomic_dir` does.
    """
    names = tuple(classes)
    shift, scale = (torch.tensor(list(v)).view(1, 3, 1, 1).to(device) for v in (mean, std))
    align = LATTICE if isinstance(network, CompactCellViT) else 16
    network = network.eval().to(device)
    group_ids: dict[str, int] = {}
    with atomic_dir(folder, overwrite=overwrite) as partial:
        with ExitStack() as stack:
            tokens = stack.enter_context(_Rows(partial / "tokens.npy", np.float32))
            labels = stack.enter_context(_Rows(partial / "labels.npy", np.int16))
            groups = stack.enter_context(_Rows(partial / "groups.npy", np.int32))
            for cells in images:
                for window in _windows(cells, _checked(cells, len(names))):
                    padded = _padded(window.image, align)
                    pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].to(device).float().div(255)
                    with torch.inference_mode():
                        grid = encoder_tokens(network, pixels.sub(shift).div(scale))[0].float().cpu().numpy()
                    size = (padded.shape[0], padded.shape[1])
                    tokens.add(cell_tokens(grid, window.start, window.shape, size))
                    labels.add(window.label)
                    # Only groups that have a cell get a number: a split counts on it.
                    number = group_ids.setdefault(cells.group, len(group_ids))
                    groups.add(np.full(len(window.label), number))
            if not labels.count:
                raise UsageError("WSI895", "no image has a labelled cell; wanted some of every class")
        about = {"classes": list(names), "groups": list(group_ids), "facts": facts or {}}
        text = json.dumps(about, ensure_ascii=False, indent=1, sort_keys=True)
        (partial / "tokens.json").write_text(text + "\n", encoding="utf-8")
    return open_tokens(folder)


def open_tokens(folder: str | Path) -> TokenSet:
    """Return the tokens in a folder, mapped. Raises UsageError WSI897 if it is not one of `extract_tokens`."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        classes, group_names = tuple(map(str, about["classes"])), tuple(map(str, about["groups"]))
        tokens, labels, groups = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "labels", "groups")
        )
        facts = dict(about["facts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("WSI897", f"{folder} holds no cell tokens ({error}); extract them again") from error
    right = tokens.ndim == 2 and labels.shape == groups.shape == tokens.shape[:1] and len(labels) > 0
    right = right and (tokens.dtype, labels.dtype, groups.dtype) == (np.float32, np.int16, np.int32)
    if not right or not _below(labels, len(classes)) or not _below(groups, len(group_names)):
        raise UsageError("WSI897", f"{folder}: tokens, labels and groups do not match; extract them again")
    return TokenSet(tokens, labels, groups, classes, group_names, facts)


def _below(values: NDArray[np.integer[Any]], count: int) -> bool:
    return bool(values.min() >= 0 and values.max() < count)


def _checked(cells: LabelledCells, classes: int) -> NDArray[np.bool_]:
    """Return which cells have a label. Raises UsageError WSI896."""
    stop = np.asarray(cells.start) + cells.shape
    inside = (np.asarray(cells.start) >= 0) & (np.asarray(cells.shape) > 0) & (stop <= cells.image.shape[:2])
    if not inside.all():
        raise UsageError(
            "WSI896", f"a cell of {cells.group!r} lies outside its image {cells.image.shape[:2]}"
        )
    if len(cells.label) and (cells.label.max() >= classes or cells.label.min() < -1):
        span = f"{cells.label.min()} to {cells.label.max()}"
        raise UsageError(
            "WSI896", f"labels {span} in {cells.group!r}, wanted 0 to {classes - 1}, or -1 for none"
        )
    return np.asarray(cells.label) >= 0


def _windows(cells: LabelledCells, keep: NDArray[np.bool_]) -> Iterator[LabelledCells]:
    """Yield windows of an image, each with those cells to keep whose box has its middle in what it owns."""
    size, middle = cells.image.shape[:2], np.asarray(cells.start) + np.asarray(cells.shape) // 2
    # What a window owns starts at multiples of the step, whole periods of every encoder's inner windows.
    step = max(size) if max(size) <= TILE else TILE - 2 * HALO
    for top in range(0, size[0], step):
        for left in range(0, size[1], step):
            owned = keep & (middle // step == (top // step, left // step)).all(axis=1)
            if not owned.any():
                continue
            first = np.maximum(np.array([top, left]) - HALO, 0)
            last = np.minimum(np.array([top, left]) + step + HALO, size)
            start = np.maximum(cells.start[owned], first)
            stop = np.minimum(cells.start[owned] + cells.shape[owned], last)
            image = cells.image[first[0] : last[0], first[1] : last[1]]
            yield LabelledCells(image, start - first, stop - start, cells.label[owned], cells.group)


def _padded(image: NDArray[np.uint8], align: int) -> NDArray[np.uint8]:
    """Return `image` extended to the bottom right to multiples of `align`, as a mirror would."""
    height, width = image.shape[:2]
    if not (-height % align or -width % align):
        return np.ascontiguousarray(image)
    return np.pad(image, ((0, -height % align), (0, -width % align), (0, 0)), mode="symmetric")


@final
class _Rows:
    """An .npy file that grows row by row; its header is written last."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.row: tuple[int, ...] = ()
        self.count = 0

    def __enter__(self) -> Self:
        self._file = self.path.open("w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None and self.count:
                self._header()

    def add(self, rows: NDArray[Any]) -> None:
        if not self.count:
            self.row = rows.shape[1:]
            self._header()
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.count += len(rows)

    def _header(self) -> None:
        """Write the header; numpy leaves room in it for the first axis to grow, so its length is the same."""
        self._file.seek(0)
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self.row)}
        np.lib.format.write_array_header_1_0(self._file, facts)
