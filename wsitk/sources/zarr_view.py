"""Any source as a read-only zarr v3 group with NGFF 0.5 metadata; chunks are decoded when asked for.

NGFF wants channels before space, so arrays are (c, y, x) or (c, z, y, x) here; a chunk holds all channels of
a few native tiles.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from wsitk.geometry import Region
from wsitk.sources.base import Level, Source

if TYPE_CHECKING:
    import zarr
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["SourceStore", "as_zarr"]

_WHITE = 255


def as_zarr(source: Source) -> zarr.Group:
    """Return the whole pyramid as a read-only group of arrays ``0``, ``1``, … with NGFF multiscales."""
    import zarr

    return zarr.open_group(SourceStore(source), mode="r", zarr_format=3)


@final
class SourceStore(Store):
    """A zarr store whose values are computed from a source; writing is refused."""

    def __init__(self, source: Source) -> None:
        super().__init__(read_only=True)
        self._source = source
        self._documents = {"zarr.json": _group_document(source)}
        for number, level in enumerate(source.levels):
            self._documents[f"{number}/zarr.json"] = _array_document(source, level)
        self._is_open = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SourceStore) and other._source is self._source

    def __hash__(self) -> int:
        return hash((SourceStore, id(self._source)))

    def __repr__(self) -> str:
        return f"SourceStore({self._source.name!r})"

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True

    @property
    def supports_partial_writes(self) -> Literal[False]:
        return False

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a document or a chunk, decoded in a thread so that several can be under way."""
        if key in self._documents:
            data: bytes | np.ndarray[Any, Any] | None = self._documents[key]
        else:
            place = self._chunk_place(key)
            data = await asyncio.to_thread(self._chunk, *place) if place is not None else None
        if data is None:
            return None
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        return prototype.buffer.from_array_like(raw[_window(byte_range, len(raw))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(k, prototype, r) for k, r in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self._documents or self._chunk_place(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """Yield every key; a large slide has millions of chunks."""
        for key in self._documents:
            yield key
        for number, level in enumerate(self._source.levels):
            grid = [-(-n // c) for n, c in zip(level.shape, _chunk_shape(level), strict=True)]
            for place in np.ndindex(*grid):
                yield "/".join([str(number), "c", "0", *map(str, place)])

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies directly below `prefix`, without walking over chunks."""
        parts = [p for p in prefix.split("/") if p]
        if not parts:
            for name in ["zarr.json", *map(str, range(len(self._source.levels)))]:
                yield name
        elif len(parts) == 1 and f"{parts[0]}/zarr.json" in self._documents:
            yield "zarr.json"
            yield "c"
        else:
            seen = set()
            async for key in self.list_prefix("/".join(parts) + "/"):
                name = key.split("/")[len(parts)]
                if name not in seen:
                    seen.add(name)
                    yield name

    def _chunk_place(self, key: str) -> tuple[int, tuple[int, ...]] | None:
        """Return level and chunk position of a key such as ``0/c/0/3/4``; None if there is no such chunk."""
        parts = key.split("/")
        if len(parts) != 3 + self._source.ndim or parts[1:3] != ["c", "0"]:
            return None
        if not all(p.isdecimal() for p in (parts[0], *parts[3:])):
            return None
        number, place = int(parts[0]), tuple(int(p) for p in parts[3:])
        if number >= len(self._source.levels):
            return None
        level = self._source.levels[number]
        spans = zip(place, level.shape, _chunk_shape(level), strict=True)
        return (number, place) if all(p * c < n for p, n, c in spans) else None

    def _chunk(self, number: int, place: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Return the bytes of one chunk, channels first; beyond the image it is white."""
        level = self._source.levels[number]
        shape = _chunk_shape(level)
        region = Region(tuple(p * c for p, c in zip(place, shape, strict=True)), shape)
        pixels = self._source.read(region, number, fill=_WHITE)
        if "c" in self._source.axes:
            pixels = np.moveaxis(pixels, -1, 0)
        ordered = np.ascontiguousarray(pixels, self._source.dtype.newbyteorder("<"))
        return ordered.reshape(-1).view(np.uint8)


def _window(request: ByteRequest | None, size: int) -> slice:
    """Return a zarr byte request as a slice."""
    if request is None:
        return slice(None)
    if isinstance(request, RangeByteRequest):
        return slice(request.start, request.end)
    if isinstance(request, OffsetByteRequest):
        return slice(request.offset, None)
    if isinstance(request, SuffixByteRequest):
        return slice(max(0, size - request.suffix), None)
    raise TypeError(f"unknown byte request {request!r}")


def _chunk_shape(level: Level) -> tuple[int, ...]:
    """Return the spatial chunk shape: the native tile."""
    return tuple(max(1, min(c, n)) for c, n in zip(level.chunk, level.shape, strict=True))


def _channels(source: Source) -> int:
    """Return the length of the first axis."""
    return len(source.channel_names) if "c" in source.axes else 1


def _array_document(source: Source, level: Level) -> bytes:
    """Return the zarr.json of one level."""
    count = _channels(source)
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count, *level.shape],
        "data_type": source.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [count, *_chunk_shape(level)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        "dimension_names": ["c", *(a for a in source.axes if a != "c")],
    }
    if source.dtype.itemsize == 1:
        document["codecs"] = [{"name": "bytes"}]
    return json.dumps(document).encode()


def _group_document(source: Source) -> bytes:
    """Return the zarr.json of the group: NGFF 0.5 multiscales, in micrometres where they are known."""
    known = source.spacing
    base = known.um if known else (1.0,) * source.ndim
    space: list[dict[str, str]] = [{"name": a, "type": "space"} for a in source.axes if a != "c"]
    if known:
        space = [{**axis, "unit": "micrometer"} for axis in space]
    datasets = []
    for number, level in enumerate(source.levels):
        scale = [u * d for u, d in zip(base, level.downsample, strict=True)]
        # NGFF places the centre of the first pixel: half a pixel of this level less half one of level 0.
        shift = [(s - u) / 2 for s, u in zip(scale, base, strict=True)]
        transforms = [{"type": "scale", "scale": [1.0, *scale]}]
        if any(shift):
            transforms.append({"type": "translation", "translation": [0.0, *shift]})
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    image = {
        "name": source.name,
        "axes": [{"name": "c", "type": "channel"}, *space],
        "datasets": datasets,
    }
    attributes: dict[str, Any] = {"ome": {"version": "0.5", "multiscales": [image]}}
    if source.channel_names == ("red", "green", "blue") and source.dtype == np.uint8:
        attributes["ome"]["omero"] = {"channels": [_channel(n) for n in source.channel_names]}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document).encode()


def _channel(name: str) -> dict[str, Any]:
    """Return how a viewer shows one of the three colours."""
    color = {"red": "FF0000", "green": "00FF00", "blue": "0000FF"}[name]
    window = {"start": 0, "end": 255, "min": 0, "max": 255}
    return {"label": name, "color": color, "active": True, "window": window}
