"""Small models, one for each kind of image; built by ``mapped_models:name``, in other processes too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.model import FieldSpec, ModelSpec, TileModel, TileResult
from wsitk.volumes.nnunet_rules import IntensityRule


class Bright(TileModel):
    """A map of the first channel, in 0..1, and its mean where the whole image is one tile."""

    def __init__(self, spec: ModelSpec, scale: float) -> None:
        self.spec = spec
        self._network = torch.nn.Identity()
        self._scale = scale

    @property
    def network(self) -> torch.nn.Module:
        return self._network

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"bright": batch[:, :1].float() / self._scale}

    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        field = np.asarray(outputs["bright"], np.float32)
        measures = {"mean_brightness": float(field.mean())} if self.spec.whole else {}
        return TileResult(None, {"bright": field}, measures=measures)


FIELDS = (FieldSpec("bright", ("Bright",)),)


def slide() -> Bright:
    """Return a model of slides at 0.5 µm."""
    spec = ModelSpec("slide-test", "1", (0.5, 0.5), (64, 64), (8, 8), (8, 8), fields=FIELDS)
    return Bright(spec, 255.0)


def x_ray(side: int = 32) -> Bright:
    """Return a model that sees a whole radiograph."""
    rules = (IntensityRule("shown"),)
    spec = ModelSpec(
        "xray-test", "1", None, (side, side), (0, 0), (side, side), channels=1, dtype="", whole=True,
        interpolation="pick", normalise=rules, normalise_first=True, fields=FIELDS,
    )  # fmt: skip
    return Bright(spec, 1.0)
