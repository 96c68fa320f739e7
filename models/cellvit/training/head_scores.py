"""How a token classifier does: losses, F1 and the area under the ROC curve, class by class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from wsitk.models.cellvit.classifier import LinearClassifier
from wsitk.models.cellvit.training.tokens import TokenSet

__all__ = ["HeadScores", "score_head", "chunks"]

Indices = NDArray[np.int64]
CHUNK = 65536
"""Tokens in memory at a time where all are read in turn."""


@dataclass(frozen=True)
class HeadScores:
    """How a classifier does on some cells; NaN where a class has no cell, or nothing else has one."""

    loss: float
    accuracy: float
    f1: tuple[float, ...]
    auroc: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def macro_f1(self) -> float:
        """Return the mean over classes that have a cell."""
        return _mean(self.f1)

    @property
    def macro_auroc(self) -> float:
        """Return the mean over classes, one against the rest."""
        return _mean(self.auroc)


def score_head(network: LinearClassifier, data: TokenSet, cells: Indices) -> HeadScores:
    """Return the scores of a classifier on the cells of the given numbers."""
    logits = np.concatenate([_logits(network, tokens) for tokens in chunks(data, cells)])
    labels = np.asarray(data.labels[cells], np.int64)
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    table = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    support, hits = table.sum(axis=1), np.diag(table)
    with np.errstate(invalid="ignore"):
        f1 = np.where(support, 2 * hits / (support + table.sum(axis=0)), np.nan)
    logits64 = torch.from_numpy(logits.astype(np.float64))
    probability = logits64.softmax(dim=1).numpy()
    auroc = [_auroc(probability[:, k], labels == k) for k in range(classes)]
    loss = F.cross_entropy(logits64, torch.from_numpy(labels)).item()
    return HeadScores(
        loss, float(hits.sum() / len(labels)), tuple(f1), tuple(auroc), tuple(map(int, support))
    )


def chunks(data: TokenSet, cells: Indices) -> Iterator[NDArray[np.float32]]:
    """Yield the tokens of the given cells in order, a bounded number at a time."""
    for at in range(0, len(cells), CHUNK):
        yield data.tokens[cells[at : at + CHUNK]]


def _logits(network: LinearClassifier, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = network.eval()(torch.from_numpy(tokens)).numpy()
    return logits


def _auroc(score: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve by ranks (Mann and Whitney), ties shared."""
    from scipy.stats import rankdata

    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        return float("nan")
    ranks = rankdata(score)[positive].sum()
    return float((ranks - hits * (hits + 1) / 2) / (hits * misses))


def _mean(values: tuple[float, ...]) -> float:
    known = [v for v in values if v == v]
    return float(np.mean(known)) if known else float("nan")
