"""What the engine knows of a model: a spec that is data, and two steps, `predict` and `postprocess`.

The engine configures grid, loader, stitcher and writers from `ModelSpec` alone. Torch is imported only
by the models themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

import numpy as np
from numpy.typing import NDArray

from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.objects import ObjectTable
from wsitk.volumes.nnunet_rules import IntensityRule

if TYPE_CHECKING:
    import torch

__all__ = [
    "ChunkedModel",
    "FieldSpec",
    "Licences",
    "Model",
    "ModelSpec",
    "ObjectClass",
    "Patch",
    "RegionModel",
    "Scores",
    "TileModel",
    "TileResult",
]


@dataclass(frozen=True, slots=True)
class ObjectClass:
    """A class of objects: its name as QuPath shows it, and its colour (red, green, blue; 0 to 255)."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """A dense output.

    `reduction` says how overlapping tiles are joined: ``mean`` weighs predictions by `window` (``ramp``,
    ``hann``, ``flat``, ``crop`` or ``gaussian``), ``argmax`` joins as ``mean`` and keeps the winning channel
    only. `dtype` is what is stored; ``uint8`` stands for 0..1 in steps of 1/255, or for a label.

    Labels of a volume come back to the input's own grid: `restore` is how, the scores ``linear`` before the
    winner is taken, or ``nearest``. Where `regions` is not empty, channels may overlap: each writes its label of
    `regions` where its score is above `threshold`, later ones over earlier ones, 0 where there is none.
    `activation` is for a `ChunkedModel`: what turns its head's scores into what is joined.
    """

    name: str
    channels: tuple[str, ...]
    kind: Literal["field", "image", "labels"] = "field"
    reduction: Literal["mean", "argmax"] = "mean"
    window: Literal["ramp", "hann", "flat", "crop", "gaussian"] = "ramp"
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    restore: Literal["linear", "nearest"] = "linear"
    regions: tuple[int, ...] = ()
    threshold: float = 0.5
    activation: Literal["", "softmax"] = ""

    def check(self) -> None:
        """Raise ModelError (WSI337) if the labels have no room in `dtype`, or regions no channel each."""
        if self.reduction != "argmax":
            return
        top = max(self.regions, default=len(self.channels) - 1)
        if (
            self.dtype == "float32"
            or top > np.iinfo(self.dtype).max
            or len(self.regions)
            not in (
                0,
                len(self.channels),
            )
        ):
            raise ModelError(
                "WSI337",
                f"field {self.name!r} has {len(self.channels)} channels, {len(self.regions)} regions and labels up "
                f"to {top} in {self.dtype}; give it uint8 or uint16, whichever holds them, and a region for each "
                "channel or none",
            )


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
    step
        At most so many tiles apart do windows begin, spread evenly and inside the image (nnU-Net's rule); 0
        lays tiles on a lattice with `halo` between them. With a step the halo is zero.
    channels, dtype
        Number (3 = RGB) and type of the channels it reads; an empty `dtype` takes any.
    channel_names
        What these channels are called, if that matters: of a file that names all of them, the model gets these, in
        this order, unless the user says otherwise. Empty takes them as they are stored.
    interpolation
        How the input comes to `spacing`: ``area`` means (slides); ``cubic`` splines through voxel centres,
        slice by slice where voxels are much longer along one axis (nnU-Net's rule); ``linear`` between voxel
        centres; or ``pick``, one pixel for each (torch's nearest). With the last three tiles are float32.
    whole
        The whole input is brought to the shape of `tile`, whatever its own: one tile, and no halo.
    orientation
        Where the axes x, y and z of a volume must point, in NIfTI's letters ("RAS": right, front, head); tiles are
        turned for the network and its fields turned back. Empty takes any. For models of fields only.
    crop
        Whether what is zero around the input is left out before all else.
    normalise, normalise_first
        What becomes of intensities: a rule for all channels, or one for each; tiles are float32 then. Their
        moments are taken over the whole (cropped) input, of the resampled one unless `normalise_first`.
    border, fill
        How the source pads beyond the image: ``reflect``, ``constant`` (with `fill`, in normalised units) or
        ``clip``.
    fields, objects, classes
        Dense outputs, whether it finds objects, and the object classes.
    object_columns
        Names of further measurements for each object. Where a name ends in ``_um2``, `postprocess` gives pixels of
        the working grid, whose size it doesn't know exactly, and the engine writes micrometres.
    exclusive
        Each object comes from one tile only, wherever its centroid lies: nothing is compared at seams. For
        models that are told what to outline, and let the tile answer that owns the place.
    seam_um
        How near to a seam (micrometres) objects of neighbouring tiles are compared.
    restores
        Whether it paints what lies under a mask: a `RegionModel`. `tile` is then the largest region that it takes,
        `halo` how much of what surrounds an artifact it wants to see.
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
    channel_names: tuple[str, ...] = ()
    dtype: str = "uint8"
    spacing_tolerance: float = 0.05
    border: Literal["reflect", "constant", "clip"] = "reflect"
    fill: float = 255
    step: float = 0.0
    interpolation: Literal["area", "cubic", "linear", "pick"] = "area"
    whole: bool = False
    orientation: str = ""
    crop: bool = False
    normalise: tuple[IntensityRule, ...] = ()
    normalise_first: bool = False
    fields: tuple[FieldSpec, ...] = ()
    objects: bool = False
    classes: tuple[ObjectClass, ...] = ()
    object_columns: tuple[str, ...] = ()
    exclusive: bool = False
    seam_um: float = 8.0
    restores: bool = False
    compute_batch: int = 1
    weights_sha256: str = ""
    licences: Licences = field(default_factory=lambda: Licences("Apache-2.0", "none", "none", True))

    def __post_init__(self) -> None:
        if len({len(self.tile), len(self.halo), len(self.align)}) != 1:
            raise ValueError(f"tile {self.tile}, halo {self.halo} and align {self.align} differ in length")
        if self.step and (any(self.halo) or not 0 < self.step <= 1):
            raise ValueError(f"a step lies in 0 .. 1 and has no halo; got step {self.step}, halo {self.halo}")
        if self.normalise and len(self.normalise) not in (1, self.channels):
            raise ValueError(f"{len(self.normalise)} rules of intensity for {self.channels} channels")
        if self.channel_names and len(self.channel_names) != self.channels:
            raise ValueError(f"{len(self.channel_names)} names for {self.channels} channels")
        if self.whole and (any(self.halo) or self.step or self.spacing is not None):
            raise ValueError(f"{self.name} sees the whole input: no halo, no step, no spacing")
        if self.orientation and (self.objects or self.interpolation == "area"):
            raise ValueError(
                f"{self.name} wants an orientation: fields only, and an interpolation of volumes"
            )
        if self.viewed and self.spacing is not None and self.interpolation == "area":
            raise ModelError(
                "WSI339",
                f"{self.name} crops or normalises its input and wants a spacing, which area means don't give; set "
                "interpolation to 'cubic'",
            )
        for dense in self.fields:
            dense.check()
        if len(self.labels) > 1:
            names = ", ".join(f.name for f in self.labels)
            raise ModelError(
                "WSI338", f"{self.name} has {len(self.labels)} fields of labels ({names}); join them into one"
            )

    @property
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return len(self.tile)

    @property
    def viewed(self) -> bool:
        """Tell whether the whole input must be looked at before its first tile can be read."""
        return self.crop or self.whole or bool(self.normalise) or self.interpolation != "area"

    @property
    def labels(self) -> tuple[FieldSpec, ...]:
        """Return the dense outputs of a volume that become labels on the input's own grid."""
        return tuple(f for f in self.fields if f.reduction == "argmax" and self.ndim == 3)

    @property
    def tile_dtype(self) -> str:
        """Return the type of the tiles that the network gets; empty if that is the input's own."""
        return "float32" if self.normalise or self.interpolation != "area" else self.dtype


class Scores(Protocol):
    """A field of one tile that is computed a few channels at a time, so that its size never matters."""

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return channels start .. stop - 1 over the read window: (stop - start, *tile)."""


@dataclass(frozen=True)
class Patch:
    """What a `RegionModel` painted of one piece of the mask.

    Attributes
    ----------
    number
        Of the piece, among those of the input.
    start
        Where the arrays begin, in working pixels.
    pixels : uint8 (h, w, C)
        The painted region with a little of what surrounds it.
    own : bool (h, w)
        What the piece answers for.
    spread : uint8 (h, w)
        Standard deviation over samples, its mean over the channels, in grey levels; empty (0, 0) of one sample.
    change, deviation
        Means over `own`, in grey levels: of the difference from what was there, and of the standard deviation.
    """

    number: int
    start: tuple[int, ...]
    pixels: NDArray[np.uint8]
    own: NDArray[np.bool_]
    spread: NDArray[np.uint8]
    change: float
    deviation: float


@dataclass(frozen=True)
class TileResult:
    """What one tile gave: objects on the working grid, and fields of the read window (C, *tile).

    `scores` are fields of labels that are computed when they are asked for; `measures` are numbers of the whole
    input, from a model that sees it in one tile (NaN: can't be measured).
    """

    objects: ObjectTable | None = None
    fields: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: Mapping[str, Scores] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()


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

    def predict_at(self, batch: torch.Tensor, starts: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Return `predict`'s outputs for tiles whose first pixels lie at `starts` on the working grid.

        The engine calls this one. It is for models whose chance is a function of where a pixel is: what
        overlapping tiles draw for the same place must be the same. Blank tiles that fill a group up lie at 0.
        """
        return self.predict(batch)

    def wants(self, tile: Tile) -> bool:
        """Tell whether there is anything to find in a tile; one that is not wanted is neither read nor run."""
        return True

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Return one tile's result; `outputs` are `predict`'s without the batch axis, on the CPU.

        Objects are given in working-grid coordinates (``tile.read.start`` added). The engine drops what
        the tile does not answer for.
        """


class ChunkedModel(TileModel):
    """A model of labels whose many classes are computed a few at a time, from features that `predict` returns.

    For volumes: `predict` returns features, of any number of channels, and the engine asks `head` for as many
    classes as fit into a fixed amount of memory, twice where the field's activation is ``softmax``: once for its
    denominator. All of `spec.fields` must be labels (``argmax``); `postprocess` is not called.

    `views` is how many predictions of a tile are averaged: 8 under mirroring along three axes, whose features
    (turned back, where that is the same) lie on an axis before the classes. A head that is linear, and whose
    scores are averaged without activation, needs one view only: the mean of the features.
    """

    views: int = 1

    @abstractmethod
    def head(self, features: Mapping[str, torch.Tensor], name: str, start: int, stop: int) -> torch.Tensor:
        """Return scores (views, stop - start, *tile) of channels start .. stop - 1 of field `name`.

        `features` is what `predict` returned for one tile, with a batch axis of one. What a channel holds must
        not depend on which others are asked for, but for the last bits.
        """

    @final
    def postprocess(self, outputs: Mapping[str, NDArray[Any]], tile: Tile) -> TileResult:
        """Raise: fields are made by `head`."""
        raise NotImplementedError("a chunked model's fields are computed by its head")


class RegionModel(ABC):
    """A model that paints what lies under a mask, and must see more than a tile at a time for that.

    The engine gives it every artifact whole, with `spec.halo` pixels of what surrounds it; `spec.restores` is set.
    """

    spec: ModelSpec

    @property
    @abstractmethod
    def network(self) -> torch.nn.Module:
        """Return the module; each of its evaluations counts as a sign of life."""

    @abstractmethod
    def process_region(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_],
        region: Region,
        *,
        seed: int = 0,
        sample: int = 0,
    ) -> NDArray[np.float32]:
        """Return float32 (H, W, C) in 0..255: `image` (H, W, C), with what `mask` (H, W) marks painted.

        `region` is where the image lies on the working grid. Chance must be a function of (seed, sample, place on
        the grid, step), so that a pixel comes out the same whoever asks for it. What the image holds under the mask
        must not matter; the engine takes nothing but the masked pixels from what is returned.
        """


Model = TileModel | RegionModel
"""What the engine runs."""
