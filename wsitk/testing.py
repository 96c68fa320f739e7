"""What proves a pipeline: synthetic images with known truth, models that are oracles, naive references.

Shipped for those who write models and sources. Everything is a function of its arguments and seed, in two
and in three dimensions. Torch is imported when a model is first asked for something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.grid import Tile, TileGrid
from wsitk.model import FieldSpec, ModelSpec, ObjectClass, TileModel, TileResult
from wsitk.objects import ObjectTable
from wsitk.stitch.fields import FILL, FieldMerger, FieldPart, FieldStitcher, finish
from wsitk.stitch.objects import merge_objects, select
from wsitk.stitch.windows import product as outer_product
from wsitk.stitch.windows import window

if TYPE_CHECKING:
    import torch

__all__ = [
    "SyntheticSlide",
    "ConstantModel",
    "IdentityModel",
    "OracleModel",
    "Joined",
    "decode_labels",
    "naive_fields",
    "naive_objects",
    "read_tile",
    "run_tiles",
    "seam_points",
]

Array = NDArray[Any]

_NUCLEUS = (64, 32, 128)
"""Colour of nucleus 0; the number of a nucleus is spread over the low bits of the three channels."""

_BITS = (6, 5, 6)


def _encode(labels: Array) -> NDArray[np.uint8]:
    """Return the colours (*shape, 3) of instances: purples that differ in their low bits."""
    out = np.empty((*labels.shape, 3), np.uint8)
    rest = labels
    for channel, (base, bits) in enumerate(zip(_NUCLEUS, _BITS, strict=True)):
        out[..., channel] = base + (rest & (2**bits - 1))
        rest = rest >> bits
    return out


def decode_labels(pixels: Array) -> NDArray[np.int32]:
    """Return the instance numbers (*shape) that a synthetic image's pixels (*shape, 3) stand for."""
    labels, shift = np.zeros(pixels.shape[:-1], np.int32), 0
    for channel, (base, bits) in enumerate(zip(_NUCLEUS, _BITS, strict=True)):
        labels |= (pixels[..., channel].astype(np.int32) - base) % 2**bits << shift
        shift += bits
    # Tissue and glass are brighter in red than any nucleus.
    return np.where(pixels[..., 0] < _NUCLEUS[0] + 2 ** _BITS[0], labels, 0).astype(np.int32)


def seam_points(grid: TileGrid) -> Iterator[tuple[int, ...]]:
    """Yield the corner, the middle of each edge and face, and the centre of each tile's owned region."""
    for tile in grid:
        middle = tuple((a + b) // 2 for a, b in zip(tile.owned.start, tile.owned.stop, strict=True))
        yield from product(*zip(tile.owned.start, middle, strict=True))


@final
@dataclass(frozen=True)
class SyntheticSlide:
    """An image in the colours of H&E with known nuclei.

    Attributes
    ----------
    pixels : uint8 (*shape, 3)
        Each nucleus has one colour, which encodes its number; tissue is pink, with noise and fibres.
    labels : int32 (*shape)
        Instance numbers, 1 to N; 0 is background.
    truth : ObjectTable
        The instances, in label order; `truth.anchor` are their centroids.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]
    truth: ObjectTable

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        *,
        grids: Iterable[TileGrid] = (),
        count: int = 0,
        radius: tuple[float, float] = (3.0, 8.0),
        seed: int = 0,
    ) -> SyntheticSlide:
        """Return an image with nuclei on every seam and corner of `grids`, and up to `count` elsewhere.

        Nuclei are ellipses (ellipsoids) with half-axes within `radius` pixels, turned at random; they may
        touch but don't overlap, and the image's border may cut them. A place already taken stays as it is.
        """
        rng = np.random.default_rng(seed)
        labels, number = np.zeros(shape, np.int32), 0
        seams = [p for grid in grids for p in seam_points(grid)]
        places = [np.add(p, rng.uniform(-2, 2, len(shape))) for p in seams]
        places += [rng.uniform(0, shape) for _ in range(count)]
        for place in places:
            number += _draw(labels, place, number + 1, radius, rng)
        if number >= 2 ** sum(_BITS):
            raise ValueError(f"{number} nuclei; the colours encode fewer than {2 ** sum(_BITS)}")
        pixels = _tissue(shape, rng)
        inside = labels > 0
        pixels[inside] = _encode(labels[inside])
        return cls(pixels, labels, ObjectTable.from_labels(labels))


def _draw(
    labels: Array, place: Array, number: int, radius: tuple[float, float], rng: np.random.Generator
) -> bool:
    """Draw one ellipsoid around `place` if nothing is there; tell whether it was drawn."""
    ndim = labels.ndim
    turn, _ = np.linalg.qr(rng.normal(size=(ndim, ndim)))
    stretch = turn / rng.uniform(*radius, ndim)
    reach = int(np.ceil(radius[1])) + 1
    centre = np.floor(place).astype(int)
    box = Region.between(centre - reach, centre + reach + 1).intersect(Region((0,) * ndim, labels.shape))
    if not box.size:
        return False
    grid = np.stack(np.meshgrid(*map(np.arange, box.start, box.stop), indexing="ij"), axis=-1)
    mask = (((grid + 0.5 - place) @ stretch) ** 2).sum(axis=-1) <= 1
    there = labels[box.slices()]
    if not mask.any() or there[mask].any():
        return False
    there[mask] = number
    return True


def _tissue(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return eosin pink with fibres and noise (*shape, 3); red never below 192."""
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij")
    phase = sum((a / (17.0 + 6 * k) for k, a in enumerate(axes)), np.zeros(shape, np.float32))
    fibres = 12 * np.sin(phase)[..., None] * np.array([0.3, 1.0, 0.6], np.float32)
    noise = rng.integers(-10, 11, (*shape, 3))
    colour = np.array([225, 170, 205]) + fibres + noise
    return np.asarray(np.clip(colour, (192, 0, 0), 255), np.uint8)


# --- Models that are oracles ---


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
        window: Literal["ramp", "hann", "flat", "crop"] = "ramp",
        dtype: Literal["uint8", "uint16", "float32"] = "float32",
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
        window: Literal["ramp", "hann", "flat", "crop"] = "ramp",
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
    ) -> None:
        spec = FieldSpec("image", ("red", "green", "blue"), kind="image", window=window, dtype=dtype)
        super().__init__(_spec("identity", tile, halo, fields=(spec,)))

    def postprocess(self, outputs: Mapping[str, Array], tile: Tile) -> TileResult:
        """Return the pixels divided by 255."""
        return TileResult(None, {"image": np.asarray(outputs["pixels"], np.float32) / np.float32(255)})


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
        numbers, compact = np.unique(labels, return_inverse=True)
        if numbers[0] != 0:
            numbers, compact = np.concatenate([[0], numbers]), compact + 1
        found = numbers[1:]
        table = ObjectTable.from_labels(
            compact.reshape(labels.shape),
            origin=tile.read.start,
            class_id=found % 2,
            probability=0.5 + 0.5 * (found % 7) / 7,
            columns={"number": found.astype(np.float32)},
            tile=tile.index,
        )
        return TileResult(table, {})

    def _shifted(self, labels: Array, tile: Tile) -> Array:
        out = np.zeros_like(labels)
        for number in np.unique(labels[labels > 0]).tolist():
            rng = np.random.default_rng((self.seed, tile.index, number))
            shift = rng.integers(-self.jitter, self.jitter + 1, labels.ndim)
            where = np.stack(np.nonzero(labels == number)) + shift[:, None]
            inside = ((where >= 0) & (where < np.array(labels.shape)[:, None])).all(axis=0)
            out[tuple(where[:, inside])] = number
        return out


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


# --- A small driver, and slow references that are easy to believe ---


@dataclass(frozen=True)
class Joined:
    """Final objects (None if the model finds none) and finished fields (C, *extent.shape)."""

    objects: ObjectTable | None
    fields: Mapping[str, Array] = field(default_factory=dict)


def read_tile(pixels: Array, region: Region, spec: ModelSpec) -> Array:
    """Return `region` of an image (*shape, C), padded beyond it as the spec's border says."""
    index = []
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True)):
        place, n = np.arange(a, b), pixels.shape[axis]
        if spec.border == "reflect" and n > 1:
            place = (n - 1) - np.abs((place % (2 * n - 2)) - (n - 1))
        index.append(place)
    known = reduce(
        np.logical_and.outer, [(i >= 0) & (i < n) for i, n in zip(index, pixels.shape, strict=False)]
    )
    there = np.ix_(*[np.clip(i, 0, n - 1) for i, n in zip(index, pixels.shape, strict=False)])
    return np.where(known[..., None], pixels[there], np.array(spec.fill, pixels.dtype))


def _apply(model: TileModel, pixels: Array, tile: Tile) -> TileResult:
    """Return the result of one tile, read from the image (*shape, C)."""
    import torch

    batch = torch.from_numpy(np.moveaxis(read_tile(pixels, tile.read, model.spec), -1, 0)[None].copy())
    outputs = {name: value[0].numpy() for name, value in model.predict(batch).items()}
    return model.postprocess(outputs, tile)


def run_tiles(
    pixels: Array,
    model: TileModel,
    grid: TileGrid,
    *,
    band: float = 8.0,
    skip: Iterable[int] = (),
    order: Sequence[int] | None = None,
) -> Joined:
    """Run `model` over an image (*shape, C) in memory, tile by tile, through the real stitchers.

    `skip` are tiles that give nothing (as if unreadable), `order` the order in which tiles are computed.
    """
    left_out = set(skip)
    stitchers = {
        (b.index, f.name): FieldStitcher(grid, b, f) for b in grid.blocks() for f in model.spec.fields
    }
    tables: dict[int, list[ObjectTable]] = {}
    image = Region((0,) * grid.extent.ndim, pixels.shape[:-1])
    for index in range(len(grid)) if order is None else order:
        tile, block = grid[index], grid.block_of(index)
        result = None if index in left_out else _apply(model, pixels, tile)
        for spec in model.spec.fields:
            stitcher = stitchers[block, spec.name]
            stitcher.skip(tile) if result is None else stitcher.add(tile, result.fields[spec.name])
        if result is not None and result.objects is not None:
            tables.setdefault(block, []).append(select(result.objects, tile, grid, band, image=image))
    parts = {key: stitcher.finalize() for key, stitcher in stitchers.items()}
    fields = {
        s.name: FieldMerger(grid, s, _loader(parts, s.name)).read(grid.extent) for s in model.spec.fields
    }
    if not model.spec.objects:
        return Joined(None, fields)
    stored = {block: ObjectTable.concat(rows) for block, rows in tables.items()}
    empty = ObjectTable.empty(grid.extent.ndim, model.spec.object_columns)
    return Joined(ObjectTable.concat([empty, *merge_objects(grid, stored.get)]), fields)


def _loader(parts: Mapping[tuple[int, str], FieldPart], name: str) -> Any:
    return lambda block: parts[block, name]


def naive_fields(
    pixels: Array, model: TileModel, grid: TileGrid, *, skip: Iterable[int] = ()
) -> dict[str, Array]:
    """Return all fields by the textbook: one canvas of the whole image, ``sum(w p) / sum(w)`` in float64."""
    left_out = set(skip)
    out = {}
    for spec in model.spec.fields:
        weights = outer_product(window(spec.window, grid.tile, grid.halo)).astype(np.float64)
        total = np.zeros(grid.extent.shape)
        value = np.zeros((len(spec.channels), *grid.extent.shape))
        answered = np.zeros(grid.extent.shape, bool)
        for tile in grid:
            if tile.index in left_out:
                continue
            seen = tile.read.intersect(grid.extent)
            here, there = seen.slices(grid.extent.start), seen.slices(tile.read.start)
            prediction = _apply(model, pixels, tile).fields[spec.name]
            value[(slice(None), *here)] += weights[there] * prediction[(slice(None), *there)]
            total[here] += weights[there]
            answered[tile.owned.slices(grid.extent.start)] = True
        mean = np.divide(value, total, out=np.zeros_like(value), where=total > 0).astype(np.float32)
        finished = finish(mean, spec)
        out[spec.name] = np.where(answered, finished, np.array(FILL, finished.dtype))
    return out


def naive_objects(pixels: Array, model: TileModel) -> ObjectTable:
    """Return the objects of the whole image read in one piece, ordered by anchor."""
    whole = Region((0,) * (pixels.ndim - 1), pixels.shape[:-1])
    table = _apply(model, pixels, Tile(0, whole, whole)).objects
    if table is None:
        raise ValueError(f"{model.spec.name} finds no objects")
    return table.take(np.lexsort(table.anchor.T[::-1]))
