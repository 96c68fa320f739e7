"""From labelled images to a token classifier: what `wsitk train cellvit-classifier` does."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wsitk.errors import OutputError, UsageError
from wsitk.journal import write_durably
from wsitk.models.cellvit.model import CellViTModel
from wsitk.models.cellvit.training.config import DataConfig
from wsitk.models.cellvit.training.data import IGNORE, Dataset, Example, Joined
from wsitk.models.cellvit.training.datasets import open_dataset
from wsitk.models.cellvit.training.heads import HeadConfig, TrainedHead, save_head, train_head
from wsitk.models.cellvit.training.tokens import (
    LabelledCells,
    TokenSet,
    cells_of_labels,
    extract_tokens,
    open_tokens,
)
from wsitk.models.cellvit.training.validate import at_spacing
from wsitk.registry import load_model
from wsitk.training.config import from_table, override, read_toml, to_toml

__all__ = ["ClassifyConfig", "read_head_config", "train_classifier"]

FILE = "classifier.pth"


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings of a token classifier. Of `data`, ``classes``, ``rename``, ``crop``, ``mpp`` and ``held_out_groups``
    count; the spacing is the model's."""

    data: DataConfig = field(default_factory=DataConfig)
    head: HeadConfig = field(default_factory=HeadConfig)


def read_head_config(path: Path | None, settings: Sequence[str] = ()) -> ClassifyConfig:
    """Return the settings of `path` with ``section.key=value`` on top. Raises UsageError WSI860 to WSI863."""
    return from_table(ClassifyConfig, override(read_toml(path) if path is not None else {}, settings))


def train_classifier(
    paths: Sequence[Path],
    out: Path,
    model: str,
    config: ClassifyConfig,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``classifier.pth``, ``log.csv``, ``config.toml`` and the tokens into `out`; return the scores.

    Tokens of the same model and images are read again instead of made again. Raises UsageError WSI876 for a
    model or data that no classifier can be trained on, OutputError WSI510 if `out` has a classifier already.
    """
    if (out / FILE).exists() and not overwrite:
        raise OutputError(
            "WSI510", f"{out / FILE} exists; pass --overwrite to replace it, or choose another output"
        )
    reader = load_model(model)
    if not isinstance(reader, CellViTModel) or reader.spec.spacing is None:
        raise UsageError("WSI876", f"{model} is no CellViT model; only these have tokens of cells")
    spacing_um, data = reader.spec.spacing[0], config.data
    sets = [open_dataset(path, spacing_um=spacing_um, side=data.crop, mpp=data.mpp) for path in paths]
    whole = Joined(sets, classes=data.classes or None, rename=data.rename)
    if len(whole.classes) < 2:
        raise UsageError(
            "WSI876", f"the data name {len(whole.classes)} classes; a classifier needs two or more"
        )
    out.mkdir(parents=True, exist_ok=True)
    tokens = _tokens(whole, out / "tokens", reader, spacing_um, device)
    head = train_head(tokens, config.head, data.held_out_groups or None)
    _write_log(out / "log.csv", head)
    write_durably(out / "config.toml", to_toml(config).encode())
    save_head(head, out / FILE, dataset=whole.name, overwrite=True)
    return _facts(head, tokens, out)


def _tokens(data: Dataset, folder: Path, model: CellViTModel, spacing_um: float, device: str) -> TokenSet:
    """Return the tokens of all typed cells: those in `folder` if they are of the same model and images."""
    identity = json.dumps([data.identity(), list(data.classes)], sort_keys=True)
    facts = {
        "model": model.spec.weights_sha256,
        "spacing_um": spacing_um,
        "images": hashlib.sha256(identity.encode()).hexdigest(),
    }
    if folder.is_dir() and (found := open_tokens(folder)).facts == facts:
        return found
    return extract_tokens(
        model.network,
        _cells(data, spacing_um),
        folder,
        data.classes,
        mean=model._mean.flatten().tolist(),  # of this package, if not of this module
        std=model._std.flatten().tolist(),
        device=device,
        facts=facts,
        overwrite=True,
    )


def _cells(data: Dataset, spacing_um: float) -> Iterator[LabelledCells]:
    for index in range(len(data)):
        yield _labelled(at_spacing(data.read(index), spacing_um))


def _labelled(example: Example) -> LabelledCells:
    """Return an image's cells, each with the type of most of its pixels."""
    inst = np.maximum(example.inst, 0)
    ids, start, shape = cells_of_labels(inst)
    label = np.full(len(ids), -1, np.int64)
    if example.types is not None and len(ids):
        inside = inst > 0
        votes = np.zeros((len(ids), IGNORE + 1), np.int64)
        np.add.at(votes, (np.searchsorted(ids, inst[inside]), example.types[inside]), 1)
        most = votes.argmax(axis=1)
        label = np.where((most == 0) | (most == IGNORE), -1, most - 1)
    return LabelledCells(example.image, start, shape, label, example.group)


def _write_log(path: Path, head: TrainedHead) -> None:
    names = list(dict.fromkeys(name for row in head.history for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in head.history)
    write_durably(path, text.getvalue().encode())


def _facts(head: TrainedHead, tokens: TokenSet, out: Path) -> dict[str, Any]:
    scores = head.scores
    return {
        "cells": len(tokens),
        "held_out_groups": list(head.held_out),
        "epoch": head.epoch,
        "accuracy": round(scores.accuracy, 4),
        "macro_f1": round(scores.macro_f1, 4),
        "macro_auroc": round(scores.macro_auroc, 4),
        "f1": {name: round(value, 4) for name, value in zip(head.classes, scores.f1, strict=True)},
        "classifier": str(out / FILE),
    }
