"""UniverSeg as the engine sees it: examples in a folder, and a map of what they show.

Butoi et al. 2023, "UniverSeg: Universal medical image segmentation", ICCV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, TileModel, TileResult
from wsitk.models.universeg.incontext import (
    Task,
    TaskOptions,
    load_network,
    make_task,
    official_weights,
    task_spec,
)
from wsitk.models.universeg.network import UniverSeg
from wsitk.models.universeg.support import Support
from wsitk.torchfile import TensorFile

__all__ = ["UniverSegModel", "from_checkpoint", "is_ours", "universeg"]

FIELD = "probability"

OFFICIAL = "https://github.com/JJGO/UniverSeg/releases"

WEIGHTS = "universeg_v1_nf64_ss64_STA.pt"

LICENCES = Licences(
    "Apache-2.0",
    "OpenRAIL++-M, research only (official weights)",
    "MegaMedical: many, mostly for research",
    False,
)


@final
class UniverSegModel(TileModel):
    """A UniverSeg network and the task that its examples tell."""

    def __init__(self, network: UniverSeg, spec: ModelSpec, task: Task) -> None:
        self.spec = spec
        self._network = network
        self._task = task

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``probability`` (N, 1, *tile) for grey or RGB tiles (N, C, *tile) in any units."""
        target = self._task.pixels(batch)
        images, masks = self._task.examples(target.shape[2:], target.device)
        every = (len(target), -1, -1, -1, -1)
        logits = self._network(target, images.expand(every), masks.expand(every))["logits"]
        return {FIELD: logits.float().sigmoid().reshape(len(batch), 1, *batch.shape[2:])}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the map."""
        return TileResult(None, {FIELD: outputs[FIELD].astype(np.float32, copy=False)})


def universeg(*, weights: str | Path | None = None, **options: Any) -> UniverSegModel:
    """Return UniverSeg with its official weights, from `weights` or the weights folder.

    `options` are those of `from_checkpoint`. Raises ModelError (WSI312) if the file is not there.
    """
    return from_checkpoint(official_weights(weights, WEIGHTS, OFFICIAL), **options)


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are a UniverSeg's, by their names."""
    return "enc_blocks.0.cross.cross_conv.weight" in file.tensors and not any(
        ".meanconv." in n for n in file.tensors
    )


def from_checkpoint(
    path: str | Path,
    *,
    support: str | Path | Support | None = None,
    size: int = 128,
    label: int | None = None,
    target: str = "Target",
    spacing_um: float | Sequence[float] | None = None,
    slices: bool = False,
    intensity: Sequence[float] | None = None,
) -> UniverSegModel:
    """Return the model in an official checkpoint, for the task that the folder `support` shows.

    The other options are those of `TaskOptions`. Inputs have the channels that the examples have: grey, or
    RGB, of which the luminance is taken.

    Raises ModelError as `read_tensors` and `checked_state` do, UsageError: WSI070 to WSI074.
    """
    options = TaskOptions(size, label, target, spacing_um, slices, intensity)
    network, file = load_network(UniverSeg, path)
    task = make_task("universeg", support, options)
    spec = task_spec("universeg", "", task, options, file, (FieldSpec(FIELD, (target,)),), LICENCES)
    return UniverSegModel(network, spec, task)
