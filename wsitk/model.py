"""What the engine knows of a model: a spec that is data, and two steps, `predict` and `postprocess`.

The engine configures grid, loader, stitcher and writers from `ModelSpec` alone. Torch is imported only
by the models themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.grid import Tile
from wsitk.objects import ObjectTable

if TYPE_CHECKING:
    import torch

__all__ = ["ObjectClass", "FieldSpec", "Licences", "ModelSpec", "TileResult", "TileModel"]


@dataclass(frozen=True, slots=True)
class ObjectClass:
    """A class of objects: its name as QuPath shows it, and its colour (red, green, blue; 0 to 255)."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """A dense output.

    `reduction` says how overlapping tiles are joined: ``mean`` weighs predictions by `window`
    (``ramp``, ``hann``, ``flat``, ``crop`` or ``gaussian``), ``argmax`` joins as ``mean`` and keeps the winning channel
    only. `dtype` is what is stored; ``uint8`` stands for 0..1 in steps of 1/255.
    """

    name: str
    channels: tuple[str, ...]
    kind: Literal["field", "image", "labels"] = "field"
    reduction: Literal["mean", "argmax"] = "mean"
    window: Literal["ramp", "hann", "flat", "crop", "gaussian"] = "ramp"
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"


@dataclass(frozen=True, slots=True)
class Licences:
    """Licences of code, weights and training data, as SPDX identifiers or a plain phrase."""

    code: str
    weights: str
    data: str
    commercial_use: bool | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Everything the engine needs to run a model; no code.

    Attributes
    ----------
    name, version
        How the model is called and cited; both enter the run key.
    spacing
        Pixel size in micrometres along each axis at which the network works; None takes any.
    spacing_tolerance
        Relative difference from `spacing` that is taken as it is, without resampling.
    tile, halo, align
        Default read window and margin in working pixels, and the period of the network's inner windows
        (tiles start at multiples of it, so that every grid sees the same partition).
    channels, dtype
        Number (3 = RGB) and type of the channels it reads; an empty `dtype` takes any.
    border, fill
        How the source pads beyond the image: ``reflect``, ``constant`` (with `fill`) or ``clip``.
    fields, objects, classes
        Dense outputs, whether it finds objects, and the object classes.
    object_columns
        Names of further measurements for each object.
    seam_um
        How near to a seam (micrometres) objects of neighbouring tiles are compared.
    compute_batch
        Number of tiles the network sees at once; part of the run key, since it changes last bits.
    weights_sha256
        Identity of the weights; empty for models without any.
    """

    name: str
    version: str
    spacing: tuple[float, ...] | None
    tile: tuple[int, ...]
    halo: tuple[int, ...]
    align: tuple[int, ...]
    channels: int = 3
    dtype: str = "uint8"
    spacing_tolerance: float = 0.05
    border: Literal["reflect", "constant", "clip"] = "reflect"
    fill: int = 255
    fields: tuple[FieldSpec, ...] = ()
    objects: bool = False
    classes: tuple[ObjectClass, ...] = ()
    object_columns: tuple[str, ...] = ()
    seam_um: float = 8.0
    compute_batch: int = 1
    weights_sha256: str = ""
    licences: Licences = field(default_factory=lambda: Licences("Apache-2.0", "none", "none", True))

    def __post_init__(self) -> None:
        if len({len(self.tile), len(self.halo), len(self.align)}) != 1:
            raise ValueError(f"tile {self.tile}, halo {self.halo} and align {self.align} differ in length")

    @property
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return len(self.tile)


@dataclass(frozen=True)
class TileResult:
    """What one tile gave: objects on the working grid, and fields of the read window (C, *tile)."""

    objects: ObjectTable | None = None
    fields: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class TileModel(ABC):
    """A model that sees one tile at a time.

    `predict` runs on the device, in the thread that owns it; `postprocess` runs on the CPU in a pool and
    must not touch shared state. Neither may look at a tile's neighbours in the batch.
    """

    spec: ModelSpec

    @property
    @abstractmethod
    def network(self) -> torch.nn.Module:
        """Return the module; its forward takes normalised (N, C, *tile) and returns a dict of tensors."""

    @abstractmethod
    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs (N, C, *tile) for pixels (N, C, *tile) as the source gave them (no scaling)."""

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return one tile's result; `outputs` are `predict`'s without the batch axis, on the CPU.

        Objects are given in working-grid coordinates (``tile.read.start`` added). The engine drops what
        the tile does not answer for.
        """
