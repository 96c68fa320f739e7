"""Models without weights, whose right answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.grid import Tile
from wsitk.model import FieldSpec, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.objects import ObjectTable
from wsitk.testing.synthetic import decode_labels

if TYPE_CHECKING:
    import torch

__all__ = ["ConstantModel", "IdentityModel", "NoiseModel", "OracleModel"]

Array = NDArray[Any]
Window = Literal["ramp", "hann", "flat", "crop"]
Stored = Literal["uint8", "uint16", "float32"]


class _PlainModel(TileModel):
    """A model without weights whose outputs are functions of the pixels."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @property
    def network(self) -> torch.nn.Module:
        """Return the identity: there is nothing to learn here."""
        import torch

        return torch.nn.Identity()

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the pixels as they came, as float32 (N, C, *tile)."""
        return {"pixels": batch.float()}


@final
class ConstantModel(_PlainModel):
    """A field that is `value` everywhere, in each of `channels`: what no stitcher may change."""

    def __init__(
        self,
        value: float = 0.3,
        *,
        tile: tuple[int, ...] = (64, 64),
        halo: tuple[int, ...] = (8, 8),
        window: Window = "ramp",
        dtype: Stored = "float32",
        channels: Sequence[str] = ("constant",),
    ) -> None:
        spec = FieldSpec("constant", tuple(channels), window=window, dtype=dtype)
        super().__init__(_spec("constant", tile, halo, fields=(spec,)))
        self.value = value

    def postprocess(self, outputs: Mapping[str, Array], tile: Tile) -> TileResult:
        """Return the constant over the read window."""
        shape = (len(self.spec.fields[0].channels), *tile.read.shape)
        return TileResult(None, {"constant": np.full(shape, self.value, np.float32)})


@final
class IdentityModel(_PlainModel):
    """An image that is the input itself, scaled to 0..1: comes back exactly once quantised to 8 bits."""

    def __init__(
        self,
        *,
        tile: tuple[int, ...] = (64, 64),
        halo: tuple[int, ...] = (8, 8),
        window: Window = "ramp",
        dtype: Stored = "uint8",
    ) -> None:
        spec = FieldSpec("image", ("red", "green", "blue"), kind="image", window=window, dtype=dtype)
        super().__init__(_spec("identity", tile, halo, fields=(spec,)))

    def postprocess(self, outputs: Mapping[str, Array], tile: Tile) -> TileResult:
        """Return the pixels divided by 255."""
        return TileResult(None, {"image": np.asarray(outputs["pixels"], np.float32) / np.float32(255)})


@final
class NoiseModel(_PlainModel):
    """A field that is another one in each tile: noise in 0..1, a function of (seed, tile) alone.

    No order, batch or block may change what is joined of it.
    """

    def __init__(
        self, spec: FieldSpec, *, tile: tuple[int, ...], halo: tuple[int, ...], seed: int = 0
    ) -> None:
        super().__init__(_spec("noise", tile, halo, fields=(spec,)))
        self.seed = seed

    def postprocess(self, outputs: Mapping[str, Array], tile: Tile) -> TileResult:
        """Return the tile's noise; the pixels don't matter."""
        spec = self.spec.fields[0]
        rng = np.random.default_rng((self.seed, tile.index))
        return TileResult(None, {spec.name: rng.random((len(spec.channels), *tile.read.shape), np.float32)})


@final
class OracleModel(_PlainModel):
    """Reads the nuclei of a `SyntheticSlide` from their colours; class 0 and 1 by odd and even number.

    With `jitter`, each tile sees each nucleus shifted by up to so many pixels along each axis: a function
    of (seed, tile, nucleus), as two runs of a network over shifted windows would disagree.
    """

    def __init__(
        self,
        *,
        tile: tuple[int, ...] = (64, 64),
        halo: tuple[int, ...] = (16, 16),
        jitter: int = 0,
        seed: int = 0,
        border: Literal["reflect", "constant", "clip"] = "reflect",
    ) -> None:
        classes = (ObjectClass("even", (90, 160, 230)), ObjectClass("odd", (230, 120, 60)))
        super().__init__(
            _spec("oracle", tile, halo, objects=True, classes=classes, border=border, columns=("number",))
        )
        self.jitter = jitter
        self.seed = seed

    def postprocess(self, outputs: Mapping[str, Array], tile: Tile) -> TileResult:
        """Return the nuclei that the tile's pixels show, with their numbers in the column ``number``."""
        labels = decode_labels(np.moveaxis(np.rint(outputs["pixels"]), 0, -1).astype(np.uint8))
        if self.jitter:
            labels = self._shifted(labels, tile)
        found = _present(labels)
        compact = np.zeros(int(labels.max()) + 1, np.int32)
        compact[found] = np.arange(1, len(found) + 1)
        table = ObjectTable.from_labels(
            compact[labels],
            origin=tile.read.start,
            class_id=found % 2,
            probability=0.5 + 0.5 * (found % 7) / 7,
            columns={"number": found.astype(np.float32)},
            tile=tile.index,
        )
        return TileResult(table, {})

    def _shifted(self, labels: Array, tile: Tile) -> Array:
        seen = ObjectTable.from_labels(labels)
        frame = Region((0,) * labels.ndim, labels.shape)
        out = np.zeros_like(labels)
        for row, number in enumerate(_present(labels).tolist()):
            rng = np.random.default_rng((self.seed, tile.index, number))
            shift = rng.integers(-self.jitter, self.jitter + 1, labels.ndim).tolist()
            box = seen.region(row)
            moved = Region(tuple(a + s for a, s in zip(box.start, shift, strict=True)), box.shape)
            inside = moved.intersect(frame)
            out[inside.slices()][seen.mask(row)[inside.slices(moved.start)]] = number
        return out


def _present(labels: Array) -> Array:
    """Return the instance numbers that occur, ascending."""
    return np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1


def _spec(
    name: str,
    tile: tuple[int, ...],
    halo: tuple[int, ...],
    *,
    fields: tuple[FieldSpec, ...] = (),
    objects: bool = False,
    classes: tuple[ObjectClass, ...] = (),
    border: Literal["reflect", "constant", "clip"] = "reflect",
    columns: tuple[str, ...] = (),
) -> ModelSpec:
    return ModelSpec(
        name=f"testing-{name}",
        version="1",
        spacing=None,
        tile=tile,
        halo=halo,
        align=(1,) * len(tile),
        border=border,
        fields=fields,
        objects=objects,
        classes=classes,
        object_columns=columns,
    )
