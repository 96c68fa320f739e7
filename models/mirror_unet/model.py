"""Mirror U-Net as the engine sees it: CT and PET of one examination, lesions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.errors import ModelError
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.models.mirror_unet.network import CHANNELS, CLASSIFIED_SIDE, MirrorConfig, MirrorUNet, config_of
from wsitk.torchfile import TensorFile, checked_state, read_tensors
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["ORIENTATION", "MirrorUNetModel", "from_checkpoint", "is_ours"]

FIELD = "lesions"

ORIENTATION = "LAS"
"""Where x, y and z of the volumes point that upstream trains on (NIfTI's letters)."""

INTENSITIES = (IntensityRule("ct", shift=-100.0, scale=350.0), IntensityRule("ct", shift=0.0, scale=15.0))
"""CT from -100 to 250 HU, and PET from 0 to 15 SUV, to 0..1; nothing is clipped."""

LICENCES = Licences(
    "Apache-2.0", "none published; your own", "of the data that it was trained on (upstream: AutoPET)", None
)


@final
class MirrorUNetModel(TileModel):
    """A Mirror U-Net. The engine normalises; the network wants its axes in the order x, y, z."""

    def __init__(self, network: MirrorUNet, spec: ModelSpec) -> None:
        self.spec = spec
        self._network = network

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the parts of the network's answer for tiles (N, 2, Z, Y, X), normalised.

        ``segmentation`` (N, classes, Z, Y, X) are logits; by task ``ct``, ``pet`` and ``lesion`` are there, too.
        Raises ModelError (WSI354) for sides that the network can't halve four times.
        """
        sides, unit = tuple(batch.shape[2:]), self.spec.align[0]
        if any(n % unit for n in sides):
            raise ModelError(
                "WSI354",
                f"{self.spec.name} takes tiles whose sides are multiples of {unit}, got {sides}; leave --tile at "
                f"{CLASSIFIED_SIDE}",
            )
        found = self._network(batch.float().permute(0, 1, 4, 3, 2))
        found.pop("output")
        return {
            name: value.float().permute(0, 1, 4, 3, 2) if value.ndim == 5 else value.float()
            for name, value in found.items()
        }

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the logits: as upstream does, they are averaged where tiles overlap, then the largest wins."""
        return TileResult(None, {FIELD: outputs["segmentation"].astype(np.float32, copy=False)})


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are a Mirror U-Net's, by their names."""
    return "learnable_th" in file.tensors and "down_1.0.residual.weight" in file.tensors


def from_checkpoint(
    path: str | Path, *, ct_share: float | None = 0.1, overlap: float = 0.25
) -> MirrorUNetModel:
    """Return the model in a checkpoint of upstream's training: a state dict, or one under ``net``.

    Task, depth and level are read off the weights. `ct_share` is the CT half's weight for the task
    ``segmentation`` (upstream's ``mirror_th``; None takes the trained one), `overlap` that of neighbouring tiles.
    Raises ModelError as `read_tensors` and `checked_state` do; WSI352 for a share outside 0..1, WSI353 if the
    weights are no Mirror U-Net's.
    """
    file = read_tensors(path)
    config = config_of(file.tensors)
    if config is None:
        raise ModelError(
            "WSI353",
            f"{path} holds no Mirror U-Net of any task, depth and level ({len(file.tensors)} tensors); wanted "
            f"{'-'.join(map(str, CHANNELS))} channels with the names of upstream's training",
        )
    config = replace(config, ct_share=ct_share)
    with torch.device("meta"):
        network = MirrorUNet(config)
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    return MirrorUNetModel(network.eval(), _spec(file, config, overlap))


def _spec(file: TensorFile, config: MirrorConfig, overlap: float) -> ModelSpec:
    names = ("lesion",) if config.classes == 2 else tuple(f"label {k}" for k in range(1, config.classes))
    unit = CLASSIFIED_SIDE if config.task == "fission_classification" else 2 ** (len(CHANNELS) - 1)
    share = "trained" if config.ct_share is None else f"{config.ct_share:g}"
    return ModelSpec(
        name="mirror-unet",
        version=f"{file.path.name}, {config.task}, CT share {share}",
        # z, y, x; AutoPET's own PET grid, so that its volumes are taken as they are
        spacing=(3000.0, 2036.0, 2036.0),
        spacing_tolerance=0.001,
        tile=(CLASSIFIED_SIDE,) * 3,
        halo=(0, 0, 0),
        align=(unit,) * 3,
        channels=2,
        dtype="",
        border="constant",
        fill=0.0,
        step=1.0 - overlap,
        interpolation="linear",
        orientation=ORIENTATION,
        normalise=INTENSITIES,
        fields=(FieldSpec(FIELD, ("background", *names), "labels", "argmax", window="flat"),),
        classes=tuple(ObjectClass(n, _color(k)) for k, n in enumerate(names)),
        weights_sha256=file.sha256,
        licences=LICENCES,
    )


def _color(k: int) -> tuple[int, int, int]:
    """Return red for lesions, and well-separated colours for further labels."""
    return ((230, 60, 60), (60, 160, 230), (240, 200, 60), (90, 190, 110), (170, 110, 220))[k % 5]
