"""`maps.ome.zarr` and `labels.ome.zarr`: NGFF 0.5 pyramids, sharded, with a checksum on every chunk.

Everything is pulled shard by shard, each shard is written once and whole, by one writer; a further level
is computed from the finer one, one source shard at a time. So memory is two shards, whatever the extent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsitk.discard import zarr_file
from wsitk.errors import OutputError
from wsitk.geometry import Region
from wsitk.writers.base import atomic_dir

if TYPE_CHECKING:
    import zarr

__all__ = ["MapChannel", "MapLevel", "plan_levels", "shrink", "write_maps"]

Array = NDArray[Any]
Kind = Literal["image", "labels"]

_CHUNK = {2: 512, 3: 64}  # by number of spatial axes
_SHARD = {2: 2048, 3: 256}
_SMALLEST = 512  # pixels: the last level fits in this along every axis


@dataclass(frozen=True, slots=True)
class MapChannel:
    """A channel as viewers show it: its name, colour (red, green, blue), and the values of black and full."""

    name: str
    color: tuple[int, int, int]
    window: tuple[float, float] = (0.0, 255.0)


@dataclass(frozen=True, slots=True)
class MapLevel:
    """One resolution: spatial shape, micrometres per pixel, and the centre of the first pixel."""

    shape: tuple[int, ...]
    spacing_um: tuple[float, ...]
    translation_um: tuple[float, ...]


def plan_levels(
    shape: tuple[int, ...], spacing_um: tuple[float, ...], translation_um: tuple[float, ...]
) -> tuple[MapLevel, ...]:
    """Return the levels of a pyramid: halved until no axis is longer than 512 pixels.

    Of anisotropic volumes only the finer axes are halved, until they meet the coarser ones. The edges of
    all levels coincide, so that the first pixel's centre moves by half a pixel of the finer level.
    """
    levels = [MapLevel(shape, spacing_um, translation_um)]
    while max(levels[-1].shape) > _SMALLEST:
        last = levels[-1]
        steps = _steps(last)
        levels.append(
            MapLevel(
                tuple(-(-n // f) for n, f in zip(last.shape, steps, strict=True)),
                tuple(s * f for s, f in zip(last.spacing_um, steps, strict=True)),
                tuple(
                    t + s * (f - 1) / 2
                    for t, s, f in zip(last.translation_um, last.spacing_um, steps, strict=True)
                ),
            )
        )
    return tuple(levels)


def _steps(level: MapLevel) -> tuple[int, ...]:
    """Return by how much each axis shrinks next: an axis twice as coarse as the finest long one waits."""
    long = [s for s, n in zip(level.spacing_um, level.shape, strict=True) if n > _SMALLEST]
    return tuple(
        2 if n > 1 and s < 2 * min(long) else 1 for s, n in zip(level.spacing_um, level.shape, strict=True)
    )


def write_maps(
    path: str | Path,
    shape: tuple[int, ...],
    dtype: Any,
    channels: Sequence[MapChannel],
    spacing_um: tuple[float, ...],
    translation_um: tuple[float, ...],
    read_region: Callable[[Region], Array],
    *,
    kind: Kind = "image",
    name: str = "maps",
    notes: Mapping[str, Any] | None = None,
    image_label: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> tuple[MapLevel, ...]:
    """Write a multiscale NGFF 0.5 image and return its levels.

    Parameters
    ----------
    shape, spacing_um, translation_um
        Along the spatial axes ``(y, x)`` or ``(z, y, x)``; the translation is the centre of the first
        pixel. Pixels per axis, micrometres, micrometres.
    channels
        One for each channel; with ``kind="labels"`` none, and the array has no channel axis.
    read_region
        Returns (C, *region.shape), or region.shape for labels, of `dtype`; called once for each shard, in
        C order, with regions inside the image.
    kind
        ``image`` is averaged in coarser levels (exactly, rounded half up), ``labels`` take the most
        frequent value.
    notes
        Stored as the group's attribute ``wsitk``: what the values mean, which model made them.
    image_label
        For labels: NGFF's ``image-label``, with colours and names of the values.

    Raises OutputError: WSI510 to WSI512 as `atomic_dir`, WSI513 if `read_region` gives another shape or
    dtype, WSI514 if the arguments contradict each other.
    """
    import zarr

    _check_arguments(shape, channels, spacing_um, translation_um, kind)
    levels = plan_levels(tuple(shape), tuple(spacing_um), tuple(translation_um))
    axes = len(shape)
    with atomic_dir(path, overwrite=overwrite, ours=zarr_file) as folder:
        group = zarr.open_group(str(folder), mode="w", zarr_format=3)
        finer = _create(group, "0", levels[0], len(channels), np.dtype(dtype), kind)
        for region in _shards(finer, axes):
            finer[_at(region)] = _checked(read_region(region), region, finer)
        for index, level in enumerate(levels[1:], 1):
            coarser = _create(group, str(index), level, len(channels), np.dtype(dtype), kind)
            steps = tuple(-(-a // b) for a, b in zip(levels[index - 1].shape, level.shape, strict=True))
            for region in _shards(coarser, axes):
                coarser[_at(region)] = _shrunk_shard(finer, coarser, region, steps, kind)
            finer = coarser
        # last, so that even a partial folder that someone renames by hand is no image without all levels
        group.attrs.put(_attributes(levels, channels, kind, name, notes or {}, image_label or {}))
    return levels


def _check_arguments(
    shape: tuple[int, ...],
    channels: Sequence[MapChannel],
    spacing_um: tuple[float, ...],
    translation_um: tuple[float, ...],
    kind: Kind,
) -> None:
    if len(shape) not in _CHUNK or not len(shape) == len(spacing_um) == len(translation_um):
        raise OutputError(
            "WSI514",
            f"a map has 2 or 3 spatial axes, each with spacing and translation; got shape {shape},"
            f" spacing {spacing_um}, translation {translation_um}",
        )
    if min(shape) < 1 or min(spacing_um) <= 0:
        raise OutputError(
            "WSI514", f"a map needs pixels and a positive spacing; got shape {shape}, {spacing_um} µm"
        )
    if (kind == "labels") != (not channels):
        raise OutputError(
            "WSI514", f"kind {kind!r} with {len(channels)} channels; images have some, labels none"
        )


def _create(
    group: zarr.Group, path: str, level: MapLevel, channels: int, dtype: np.dtype[Any], kind: Kind
) -> zarr.Array[Any]:
    """Create one level: a shard spans all channels, its chunks one each."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    axes = len(level.shape)
    shard = tuple(min(_SHARD[axes], _power_of_two(n)) for n in level.shape)
    chunk = tuple(min(_CHUNK[axes], s) for s in shard)
    head = kind == "image"
    return group.create_array(
        path,
        shape=(channels, *level.shape) if head else level.shape,
        chunks=(1, *chunk) if head else chunk,
        shards=(channels, *shard) if head else shard,
        dtype=dtype,
        fill_value=0,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        filters=None,
        dimension_names=_axis_names(axes, kind),
    )


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def _axis_names(axes: int, kind: Kind) -> list[str]:
    return (["c"] if kind == "image" else []) + ["z", "y", "x"][-axes:]


def _shards(array: zarr.Array[Any], axes: int) -> Iterator[Region]:
    """Yield the spatial boxes of an array's shards, clipped to the image, in C order."""
    shards = array.shards or array.chunks  # _create always gives shards; the type checker cannot know
    shape, shard = array.shape[-axes:], shards[-axes:]
    frame = Region((0,) * axes, shape)
    for place in product(*(range(-(-n // s)) for n, s in zip(shape, shard, strict=True))):
        yield Region(tuple(k * s for k, s in zip(place, shard, strict=True)), shard).intersect(frame)


def _at(region: Region, origin: tuple[int, ...] | None = None) -> Any:
    """Return the index of `region` in the last axes of an array."""
    return (Ellipsis, *region.slices(origin))


def _checked(values: Array, region: Region, array: zarr.Array[Any]) -> Array:
    """Return `values`, or refuse what would be broadcast or cast in silence."""
    wanted = (*array.shape[: array.ndim - region.ndim], *region.shape)
    if values.shape != wanted or values.dtype != array.dtype:
        raise OutputError(
            "WSI513",
            f"map region {region.start}: got {values.shape} {values.dtype}, wanted {wanted} {array.dtype};"
            " this is a defect of the model's fields: report it",
        )
    return values


def _shrunk_shard(
    finer: zarr.Array[Any], coarser: zarr.Array[Any], region: Region, steps: tuple[int, ...], kind: Kind
) -> Array:
    """Return `region` of the coarser level, made from the finer one, one finer shard at a time."""
    head = coarser.shape[: coarser.ndim - region.ndim]
    out = np.empty((*head, *region.shape), coarser.dtype)
    source = Region(
        tuple(a * f for a, f in zip(region.start, steps, strict=True)),
        tuple(n * f for n, f in zip(region.shape, steps, strict=True)),
    )
    for part in _shards(finer, region.ndim):
        common = part.intersect(source)
        if not common.size:
            continue
        small = shrink(np.asarray(finer[_at(common)]), steps, kind)
        start = tuple(a // f for a, f in zip(common.start, steps, strict=True))
        out[_at(Region(start, small.shape[-region.ndim :]), region.start)] = small
    return out


def shrink(values: Array, steps: tuple[int, ...], kind: Kind = "image") -> Array:
    """Return the last axes of `values` shrunk by `steps` (1 or 2 each), in the same dtype.

    An image takes the mean of the pixels that exist, integers rounded half up, floats summed in float64;
    labels take the most frequent value, of equals the first in C order.
    """
    axes = len(steps)
    lead = values.ndim - axes
    # repeating the last line gives the mean (and the mode) of what exists
    odd = [(0, -n % f) for n, f in zip(values.shape[lead:], steps, strict=True)]
    if any(extra for _, extra in odd):
        values = np.pad(values, [(0, 0)] * lead + odd, mode="edge")
    corners = []
    for corner in product(*(range(f) for f in steps)):
        every: Any = (Ellipsis, *(slice(k, None, f) for k, f in zip(corner, steps, strict=True)))
        corners.append(values[every])
    return _mode(corners) if kind == "labels" else _mean(corners)


def _mean(corners: list[Array]) -> Array:
    kind = corners[0].dtype
    whole = np.issubdtype(kind, np.integer)
    total = np.zeros(
        corners[0].shape, np.int64 if whole and kind.itemsize > 2 else np.int32 if whole else np.float64
    )
    for corner in corners:
        total += corner
    if not whole:
        return (total / len(corners)).astype(kind)
    return ((2 * total + len(corners)) // (2 * len(corners))).astype(kind)


def _mode(corners: list[Array]) -> Array:
    best, votes = corners[0], np.zeros(corners[0].shape, np.int8)
    for candidate in corners:
        count = sum((candidate == other).astype(np.int8) for other in corners)
        better = count > votes
        best, votes = np.where(better, candidate, best), np.where(better, count, votes)
    return best


def _attributes(
    levels: Sequence[MapLevel],
    channels: Sequence[MapChannel],
    kind: Kind,
    name: str,
    notes: Mapping[str, Any],
    image_label: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the group's attributes: `ome` as NGFF 0.5 has it, and our own."""
    head = [1.0] if kind == "image" else []
    axes = [
        {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", "unit": "micrometer"}
        for a in _axis_names(len(levels[0].shape), kind)
    ]
    datasets = [
        {
            "path": str(index),
            "coordinateTransformations": [
                {"type": "scale", "scale": head + list(map(float, level.spacing_um))},
                {
                    "type": "translation",
                    "translation": [0.0] * len(head) + list(map(float, level.translation_um)),
                },
            ],
        }
        for index, level in enumerate(levels)
    ]
    method = "mean" if kind == "image" else "mode"
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": method}],
    }
    if kind == "image":
        ome["omero"] = {"channels": [_omero(c) for c in channels]}
    else:
        ome["image-label"] = dict(image_label)
    return {"ome": ome, "wsitk": dict(notes)}


def _omero(channel: MapChannel) -> dict[str, Any]:
    low, high = map(float, channel.window)
    return {
        "label": channel.name,
        "color": "{:02X}{:02X}{:02X}".format(*channel.color),
        "active": True,
        "window": {"min": low, "max": high, "start": low, "end": high},
    }
