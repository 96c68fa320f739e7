"""Training a token classifier on frozen tokens, the CellViT++ way (Hörst 2025): minutes on a CPU.

The result depends on the tokens and the config alone, and its file is what `load_classifier` reads; upstream's
tools read it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.models.cellvit.classifier import LinearClassifier
from wsitk.models.cellvit.training.head_scores import HeadScores, Indices, chunks, score_head
from wsitk.models.cellvit.training.tokens import TokenSet
from wsitk.training.flatness import FlatnessPenalty, RelativeFlatness
from wsitk.writers.base import atomic_file

__all__ = ["HeadConfig", "TrainedHead", "train_head", "save_head", "split_groups"]


@dataclass(frozen=True)
class HeadConfig:
    """How to train a token classifier; the defaults are CellViT++'s.

    Attributes
    ----------
    hidden, dropout
        Width of the hidden layer (published ones: 100 to 512), and dropout behind it.
    batch, epochs, patience
        Cells of a step, largest number of epochs, and epochs without improvement after which to stop.
    learning_rate, betas, weight_decay
        AdamW's.
    class_weights
        Of the cross-entropy: ``none``, or by the inverse of a class' frequency or of its root, mean 1 over
        cells.
    label_smoothing
        Share of the target that is spread over all classes.
    standardise
        Whether tokens are brought to mean 0 and variance 1, channel by channel, while training; the saved first
        layer takes tokens as they are. Encoders' tokens differ in scale by orders of magnitude.
    monitor
        What is best: macro ``auroc`` or macro ``f1`` on the held-out groups.
    validation_share
        Share of cells to hold out, whole groups at a time, where none are named.
    fam
        Strength of the flatness penalty on the last layer, ``"auto"``, or None for none.
    seed
        Of weights, order, dropout and the held-out groups.
    """

    hidden: int = 128
    dropout: float = 0.0
    batch: int = 64
    epochs: int = 50
    patience: int = 20
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.85, 0.95)
    weight_decay: float = 1e-4
    class_weights: Literal["none", "inverse", "root"] = "none"
    label_smoothing: float = 0.0
    standardise: bool = True
    monitor: Literal["auroc", "f1"] = "auroc"
    validation_share: float = 0.2
    fam: float | Literal["auto"] | None = None
    seed: int = 19

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "epochs", "patience", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted more than 0")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted from 0 to below 1")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}, wanted between 0 and 1")


@dataclass(frozen=True)
class TrainedHead:
    """The best classifier of a run: in evaluation mode, on the CPU, and how it came about.

    `history` has a row per epoch; `scores` are those of `epoch` (from 0) on the held-out groups; `fam_strength` is
    what the flatness penalty was multiplied with, None without one.
    """

    network: LinearClassifier
    classes: tuple[str, ...]
    config: HeadConfig
    epoch: int
    scores: HeadScores
    history: tuple[dict[str, float], ...]
    held_out: tuple[str, ...]
    fam_strength: float | None


def train_head(
    data: TokenSet,
    config: HeadConfig | None = None,
    held_out: Collection[str] | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> TrainedHead:
    """Return the classifier of the epoch that does best on the groups `held_out`.

    Without `held_out`, groups are drawn as `split_groups` does. `log` sees each row of the history. The global
    random state is left as it was. Raises UsageError WSI895 if either side of the split has no cell, or the
    training side lacks a class.
    """
    config = config or HeadConfig()
    named = split_groups(data, config.validation_share, config.seed) if held_out is None else tuple(held_out)
    train, valid = _sides(data, named)
    counts = np.bincount(data.labels[train], minlength=len(data.classes))
    if not counts.all():
        lacking = data.classes[int(counts.argmin())]
        raise UsageError(
            "WSI895", f"no training cell is a {lacking!r}; hold out other groups, or drop the class"
        )
    mean, scale = _moments(data, train) if config.standardise else (None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _train(data, config, train, valid, (mean, scale), counts, named, log)


def split_groups(data: TokenSet, share: float, seed: int) -> tuple[str, ...]:
    """Return the names of groups to hold out, about `share` of the cells, drawn by `seed`.

    Raises UsageError WSI895 if there is one group only.
    """
    sizes = np.bincount(data.groups, minlength=len(data.group_names))
    if len(sizes) < 2:
        raise UsageError(
            "WSI895", f"all cells are of {data.group_names[0]!r}; a split wants two groups or more"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    # At least one, never all; of the others, while a group brings the total nearer to the share.
    total = np.cumsum(sizes[order][:-1])
    count = int(np.abs(total - share * sizes.sum()).argmin()) + 1
    return tuple(sorted(data.group_names[i] for i in order[:count]))


def save_head(
    head: TrainedHead, path: str | Path, *, dataset: str | None = None, overwrite: bool = False
) -> None:
    """Write a classifier file that `load_classifier` reads: plain tensors and plain values, upstream's keys.

    The same head gives the same bytes. Raises OutputError as `atomic_file` does.
    """
    config: dict[str, Any] = {f"data.label_map.{i}": name for i, name in enumerate(head.classes)}
    config |= {"data.num_classes": len(head.classes), "model.hidden_dim": head.config.hidden}
    config |= {"data.dataset": dataset} if dataset else {}
    settings = asdict(head.config) | {"betas": list(head.config.betas)}
    config |= {f"training.{name}": value for name, value in settings.items() if value is not None}
    if head.fam_strength is not None:
        config["training.fam_strength"] = head.fam_strength
    config |= {"validation.macro_f1": head.scores.macro_f1, "validation.macro_auroc": head.scores.macro_auroc}
    content = {
        "arch": "LinearClassifier",
        "epoch": head.epoch,
        "model_state_dict": head.network.state_dict(),
        "config": config,
    }
    with atomic_file(path, overwrite=overwrite) as file:
        torch.save(content, file)


def _train(
    data: TokenSet,
    config: HeadConfig,
    train: Indices,
    valid: Indices,
    moments: tuple[Tensor | None, Tensor | None],
    counts: NDArray[np.int64],
    named: tuple[str, ...],
    log: Callable[[dict[str, float]], None] | None,
) -> TrainedHead:
    network = LinearClassifier(data.tokens.shape[1], config.hidden, len(data.classes), config.dropout)
    optimiser = torch.optim.AdamW(
        network.parameters(), config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    weights = _class_weights(counts, config.class_weights)
    flatness = RelativeFlatness(network.fc2) if config.fam is not None else None
    penalty = FlatnessPenalty(flatness, config.fam) if flatness and config.fam is not None else None
    history: list[dict[str, float]] = []
    best: tuple[float, int, LinearClassifier, HeadScores] | None = None
    for epoch in range(config.epochs):
        row = _epoch(
            network, optimiser, data, _order(config, train, epoch), moments, config, weights, penalty
        )
        plain = _folded(network, moments)
        scores = score_head(plain, data, valid)
        value = scores.macro_auroc if config.monitor == "auroc" else scores.macro_f1
        row |= {"epoch": epoch, "loss": scores.loss, "accuracy": scores.accuracy}
        row |= {"macro_f1": scores.macro_f1, "macro_auroc": scores.macro_auroc}
        history.append(row)
        if log is not None:
            log(row)
        # NaN is never better; the first epoch stands for want of another.
        if best is None or value > best[0]:
            best = (value, epoch, plain, scores)
        elif epoch - best[1] >= config.patience:
            break
    assert best is not None  # there is at least one epoch
    _, at, plain, scores = best
    strength = penalty.strength if penalty is not None else None
    return TrainedHead(
        plain, data.classes, config, at, scores, tuple(history), tuple(sorted(named)), strength
    )


def _epoch(
    network: LinearClassifier,
    optimiser: torch.optim.Optimizer,
    data: TokenSet,
    order: Indices,
    moments: tuple[Tensor | None, Tensor | None],
    config: HeadConfig,
    weights: Tensor | None,
    penalty: FlatnessPenalty | None,
) -> dict[str, float]:
    """Take each cell once; return the mean training loss and, with a penalty, the mean kappa."""
    network.train()
    losses, kappas = [], []
    for at in range(0, len(order), config.batch):
        cells = order[at : at + config.batch]
        tokens = _standardised(torch.from_numpy(data.tokens[cells]), moments)
        labels = torch.from_numpy(data.labels[cells].astype(np.int64))
        loss = F.cross_entropy(network(tokens), labels, weights, label_smoothing=config.label_smoothing)
        losses.append(loss.item())
        if penalty is not None:
            term, kappa = penalty(loss)
            loss = loss + term
            kappas.append(kappa.item())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    row = {"training_loss": float(np.mean(losses))}
    return row | {"kappa": float(np.mean(kappas))} if kappas else row


def _order(config: HeadConfig, train: Indices, epoch: int) -> Indices:
    """Return the training cells in the order of an epoch: a function of seed and epoch alone."""
    return np.random.default_rng([config.seed, epoch]).permutation(train)


def _sides(data: TokenSet, held_out: Collection[str]) -> tuple[Indices, Indices]:
    """Return the numbers of the training cells and of the held-out ones. Raises UsageError WSI895."""
    unknown = sorted(set(held_out) - set(data.group_names))
    if unknown:
        raise UsageError("WSI895", f"there is no group {unknown[0]!r} to hold out; `tokens.json` lists them")
    out = np.isin(data.groups, [i for i, name in enumerate(data.group_names) if name in set(held_out)])
    if out.all() or not out.any():
        side = "training" if out.all() else "held-out"
        raise UsageError("WSI895", f"the split leaves no {side} cell; hold out some groups, and not all")
    return np.flatnonzero(~out), np.flatnonzero(out)


def _class_weights(counts: NDArray[np.int64], kind: str) -> Tensor | None:
    if kind == "none":
        return None
    weight = (counts.sum() / counts) ** (1.0 if kind == "inverse" else 0.5)
    return torch.from_numpy(weight * counts.sum() / (weight * counts).sum()).float()


def _moments(data: TokenSet, cells: Indices) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of the tokens; 1 for channels that never change."""
    total = np.zeros((2, data.tokens.shape[1]))
    for tokens in chunks(data, cells):
        wide = tokens.astype(np.float64)
        total += wide.sum(axis=0), (wide**2).sum(axis=0)
    mean, square = total / len(cells)
    # What rounding leaves of a constant channel's variance must not become a divisor.
    variance = np.maximum(square - mean**2, 0)
    scale = np.where(variance > 1e-12 * square, np.sqrt(variance), 1.0)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(scale > 0, scale, 1.0)).float()


def _standardised(tokens: Tensor, moments: tuple[Tensor | None, Tensor | None]) -> Tensor:
    mean, scale = moments
    return tokens if mean is None or scale is None else (tokens - mean) / scale


def _folded(network: LinearClassifier, moments: tuple[Tensor | None, Tensor | None]) -> LinearClassifier:
    """Return a copy that takes tokens as they are: its first layer does what `_standardised` did."""
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    mean, scale = moments
    if mean is not None and scale is not None:
        weight = state["fc1.weight"].double() / scale.double()
        state["fc1.bias"] = (state["fc1.bias"].double() - weight @ mean.double()).float()
        state["fc1.weight"] = weight.float()
    hidden, width = state["fc1.weight"].shape
    # Without drawing weights: the copy must not move the random numbers of the training.
    with torch.device("meta"):
        plain = LinearClassifier(width, hidden, len(state["fc2.bias"]))
    plain.load_state_dict(state, assign=True)
    return plain.eval()
