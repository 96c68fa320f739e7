"""Tyche-TS as the engine sees it: a map of what examples show, and of where they leave it open.

Rakic et al. 2024, "Tyche: Stochastic in-context learning for medical image segmentation", CVPR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.errors import UsageError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, TileModel, TileResult
from wsitk.models.tyche.network import Tyche
from wsitk.models.tyche.noise import normal_noise
from wsitk.models.universeg.incontext import (
    Task,
    TaskOptions,
    load_network,
    make_task,
    official_weights,
    task_spec,
)
from wsitk.models.universeg.support import Support
from wsitk.torchfile import TensorFile

__all__ = ["TycheModel", "from_checkpoint", "is_ours", "tyche", "uncertainty"]

FIELD = "probability"

UNCERTAINTY = "uncertainty"

KINDS = ("Variance", "Entropy", "Mutual information")
"""Of the candidates' probabilities; the latter two in bits. All lie in 0..1."""

OFFICIAL = "https://github.com/mariannerakic/tyche/releases"

WEIGHTS = "tyche_v1_model_weights_CVPR.pt"

LICENCES = Licences(
    "Apache-2.0", "not stated (official weights)", "MegaMedical: many, mostly for research", None
)


@final
class TycheModel(TileModel):
    """A Tyche network, the task that its examples tell, and the noise of its candidates."""

    def __init__(self, network: Tyche, spec: ModelSpec, task: Task, *, candidates: int, seed: int) -> None:
        self.spec = spec
        self.candidates = candidates
        self.seed = seed
        self._network = network
        self._task = task

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return what `predict_at` does for tiles that all lie at the image's corner: the same noise for each."""
        return self.predict_at(batch, [(0,) * (batch.ndim - 2)] * len(batch))

    def predict_at(self, batch: Tensor, starts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the maps of tiles (N, C, *tile) whose first pixels lie at `starts` on the working grid.

        ``probability`` (N, 1, *tile) is the candidates' mean, ``uncertainty`` (N, 3, *tile) is of `KINDS`.
        """
        each = self.each(batch, starts)
        mean, spread = uncertainty(each)
        shape = batch.shape[2:]
        return {
            FIELD: mean.reshape(len(batch), 1, *shape),
            UNCERTAINTY: spread.reshape(len(batch), len(KINDS), *shape),
        }

    def each(self, batch: Tensor, starts: Sequence[Sequence[int]]) -> Tensor:
        """Return the probabilities of every candidate, (N, K, H, W)."""
        target = self._task.pixels(batch)
        images, masks = self._task.examples(target.shape[2:], target.device)
        noise = np.stack([self._noise(start, batch.shape[2:]) for start in starts])
        every = (len(target), -1, -1, -1, -1)
        out = self._network(
            target, torch.from_numpy(noise).to(target), images.expand(every), masks.expand(every)
        )
        logits: Tensor = out["logits"]
        return logits.float().sigmoid()

    def _noise(self, start: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
        """Return (K, H, W); of a volume, that of the slice."""
        each = [normal_noise(self.seed, k, start, shape) for k in range(self.candidates)]
        return np.stack(each).reshape(self.candidates, *shape[-2:])

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the maps."""
        return TileResult(
            None, {name: outputs[name].astype(np.float32, copy=False) for name in (FIELD, UNCERTAINTY)}
        )


def uncertainty(each: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (N, 1, …) and `KINDS` (N, 3, …) of candidates' probabilities (N, K, …).

    The entropy of the mean is all uncertainty; what is left of it after subtracting the mean of the candidates'
    entropies is their disagreement, the mutual information of candidate and answer (Depeweg et al. 2018, eq. 4).
    """
    mean = each.mean(dim=1, keepdim=True)
    variance = each.var(dim=1, keepdim=True, correction=0)
    total = _bits(mean)
    shared = _bits(each).mean(dim=1, keepdim=True)
    return mean, torch.cat([variance, total, (total - shared).clamp(min=0)], dim=1)


def _bits(p: Tensor) -> Tensor:
    """Return the entropy of yes and no, in bits; nothing where one of them is certain."""
    nats = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    return nats / math.log(2)


def tyche(*, weights: str | Path | None = None, **options: Any) -> TycheModel:
    """Return Tyche-TS with its official weights, from `weights` or the weights folder.

    `options` are those of `from_checkpoint`. Raises ModelError (WSI312) if the file is not there.
    """
    return from_checkpoint(official_weights(weights, WEIGHTS, OFFICIAL), **options)


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are a Tyche's, by their names."""
    return "enc_blocks.0.meanconv.vmapped.conv.weight" in file.tensors


def from_checkpoint(
    path: str | Path,
    *,
    support: str | Path | Support | None = None,
    candidates: int = 5,
    seed: int = 0,
    size: int = 128,
    label: int | None = None,
    target: str = "Target",
    spacing_um: float | Sequence[float] | None = None,
    slices: bool = False,
    intensity: Sequence[float] | None = None,
) -> TycheModel:
    """Return the model in an official checkpoint, for the task that the folder `support` shows.

    `candidates` answers are given, whose noise comes from `seed`; the other options are those of `TaskOptions`.

    Raises ModelError as `read_tensors` and `checked_state` do, UsageError: WSI070 to WSI074.
    """
    if candidates < 2:
        raise UsageError("WSI074", f"candidates is {candidates}; it takes 2 or more to differ")
    options = TaskOptions(size, label, target, spacing_um, slices, intensity)
    network, file = load_network(Tyche, path)
    task = make_task("tyche", support, options)
    # A variance is a quarter at most, and small ones matter: 256 steps would lose them.
    fields = (FieldSpec(FIELD, (target,), dtype="uint16"), FieldSpec(UNCERTAINTY, KINDS, dtype="uint16"))
    version = f", {candidates} candidates, seed {seed}"
    spec = task_spec("tyche", version, task, options, file, fields, LICENCES)
    return TycheModel(network, spec, task, candidates=candidates, seed=seed)
