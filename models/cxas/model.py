"""CXAS as the engine sees it: one tile, which is the whole radiograph brought to 512 x 512 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.model import FieldSpec, Licences, ModelSpec, TileModel, TileResult
from wsitk.models.cxas.anatomy import Anatomy, nearest, structure_names
from wsitk.models.cxas.network import CXAS
from wsitk.settings import home
from wsitk.sources.base import Source
from wsitk.torchfile import TensorFile, checked_state, read_tensors
from wsitk.volumes.nnunet_rules import IntensityRule, Moments

__all__ = ["CXASModel", "analyse", "cxas", "from_checkpoint", "is_ours", "unit_pixels"]

FIELD = "anatomy"

SIDE = 512

WEIGHTS = "UNet_ResNet50_default.pth"

OFFICIAL = "https://github.com/ConstantinSeibold/ChestXRayAnatomySegmentation"

Intensity = Literal["byte", "range", "auto"]

SCHEMES: dict[Intensity, Literal["byte", "unit", "shown"]] = {
    "byte": "byte",
    "range": "unit",
    "auto": "shown",
}
"""What the engine calls them."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LICENCES = Licences(
    "MIT", "not stated (official weights)", "PAX-Ray++: derived from public CT and X-ray", None
)


@final
class CXASModel(TileModel):
    """A CXAS network and its normalisation.

    `network` maps (N, 3, H, W) to ``logits`` (N, 159, H, W), as `CXAS` does.
    """

    def __init__(self, network: torch.nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        self._network = network
        self._mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        self._std = torch.tensor(STD).view(1, 3, 1, 1)

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: Tensor) -> dict[str, Tensor]:
        """Return ``probability`` (N, 159, 512, 512) for images (N, 1 or 3, 512, 512) of 0 to 1.

        Raises ModelError (WSI350) for another size: the network has only ever seen whole chests.
        """
        if tuple(batch.shape[2:]) != (SIDE, SIDE):
            raise _not_whole("a tile of " + " x ".join(map(str, batch.shape[2:])))
        pixels = batch.float().expand(-1, 3, -1, -1)
        pixels = pixels.sub(self._mean.to(batch.device)).div(self._std.to(batch.device))
        return {"probability": self._network(pixels)["logits"].float().sigmoid()}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return the masks, 0 or 1, and what is measured on them."""
        masks = outputs["probability"] > 0.5
        measures = Anatomy(masks, (SIDE, SIDE)).measurements()
        return TileResult(None, {FIELD: masks.astype(np.float32)}, measures=measures)


def _not_whole(what: str) -> ModelError:
    return ModelError(
        "WSI350",
        f"CXAS sees a whole radiograph at {SIDE} x {SIDE} pixels, got {what}; it can't work in tiles",
    )


def unit_pixels(pixels: NDArray[Any], intensity: Literal["byte", "range"]) -> NDArray[np.float32]:
    """Return an image (H, W, 1 or 3) as (1 or 3, 512, 512) of 0 to 1.

    ``byte`` divides by 255 (what upstream does to PNG and JPEG), ``range`` stretches the image's own range
    (DICOM, after its look-up tables); then the nearest pixels are taken.
    """
    if intensity == "byte":
        numbers = IntensityRule("byte").numbers()
    else:
        numbers = IntensityRule("unit").numbers(Moments.of(pixels))
    # the same values whether scaled before or after pixels are picked, and a fraction of the memory
    chosen = nearest(np.moveaxis(pixels, -1, 0), (SIDE, SIDE))
    return np.ascontiguousarray(numbers(chosen))


def analyse(model: CXASModel, source: Source) -> Anatomy:
    """Return what an open radiograph shows; a DICOM, and whatever is not 8-bit, by its own range.

    Raises SourceError if it can't be read, ModelError (WSI350) for what is no flat image of one or three channels.
    """
    if source.ndim != 2 or len(source.channel_names) not in (1, 3):
        raise _not_whole(
            f"{source.name} with axes {''.join(source.axes)} and {len(source.channel_names)} channels"
        )
    pixels = source.read(Region((0, 0), source.shape))
    as_stored = pixels.dtype == np.uint8 and source.channel_names != ("intensity",)
    batch = torch.from_numpy(unit_pixels(pixels, "byte" if as_stored else "range"))[None]
    device = next(model.network.parameters()).device
    with torch.inference_mode():
        probability = model.predict(batch.to(device))["probability"][0].cpu().numpy()
    return Anatomy(probability > 0.5, (source.shape[0], source.shape[1]))


def cxas(*, weights: str | Path | None = None, **options: Any) -> CXASModel:
    """Return CXAS with its official weights, from `weights` or the weights folder.

    `options` are those of `from_checkpoint`. Raises ModelError (WSI312) if the file is not there.
    """
    path = Path(weights) if weights else home() / "weights" / WEIGHTS
    if not path.is_file():
        raise ModelError(
            "WSI312", f"{path.name} is not in {path.parent}; {OFFICIAL} says where to get it; put it there"
        )
    return from_checkpoint(path, **options)


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are CXAS's, by their names."""
    return "head.up1.conv2.double_conv.0.weight" in file.tensors


def from_checkpoint(path: str | Path, *, intensity: Intensity = "auto", channels: int = 1) -> CXASModel:
    """Return the model in an official checkpoint: ``{"model": weights}``, with or without ``module.``.

    `intensity` is `unit_pixels`'s, or ``auto``: ``byte`` for pictures of bytes, ``range`` for the rest. `channels`
    are those of the images, 1 or 3.
    Raises ModelError as `read_tensors` and `checked_state` do, ValueError for other channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; a radiograph has 1, or 3 that are alike")
    file = read_tensors(path)
    with torch.device("meta"):
        network = CXAS()
    network.load_state_dict(checked_state(file, network.state_dict()), strict=True, assign=True)
    spec = ModelSpec(
        name="cxas",
        version=f"{file.path.name}, {intensity}",
        spacing=None,
        tile=(SIDE, SIDE),
        halo=(0, 0),
        align=(SIDE, SIDE),
        channels=channels,
        dtype="",
        border="constant",
        fill=0,
        whole=True,
        interpolation="pick",
        normalise=(IntensityRule(SCHEMES[intensity]),),
        normalise_first=True,
        fields=(FieldSpec(FIELD, structure_names(), window="flat"),),
        weights_sha256=file.sha256,
        licences=LICENCES,
    )
    return CXASModel(network.eval(), spec)
