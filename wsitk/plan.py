"""What will be done with one input, before anything is done: grid, tissue, blocks, run key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

import wsitk
from wsitk.blocks import BlockTask
from wsitk.errors import ModelError, SourceError, UsageError
from wsitk.frame import Frame
from wsitk.geometry import Region, Spacing
from wsitk.grid import TileGrid
from wsitk.model import ModelSpec
from wsitk.reading.server import TileImage
from wsitk.repair import Repair, plan_repair
from wsitk.settings import Settings
from wsitk.sources import Origin, borrowed, open_source
from wsitk.sources.array import default_channels
from wsitk.sources.base import Source, SourceRef
from wsitk.sources.spacing import require_spacing
from wsitk.sources.view import View, ViewRules
from wsitk.sources.volume_grid import VolumeGrid, view_of
from wsitk.sources.working import WorkingImage
from wsitk.stitch.layers import Canvas
from wsitk.tissue import TissueMask, everywhere, find_tissue, from_geojson, thumbnail

__all__ = ["Plan", "make_plan", "plan_input", "resolve_spec", "stamp_of", "tile_image", "working_image"]


@dataclass(frozen=True)
class Plan:
    """One input, ready to run.

    `spacing` is that of level 0 (None where the model takes any and the file says nothing), `scale` the
    number of level-0 pixels per working pixel. `active` holds, for each tile of the grid, whether it is
    worth reading; `stamp` size and times of the input's files, None for what is no file. `view` is how the model
    sees the input, where the whole of it had to be looked at for that; `canvas` where labels are painted, if
    there are any; `shape` the input's at level 0, `frame` where a volume lies in the patient, if that is known;
    `repair` what a model that paints has to paint.
    """

    name: str
    ref: SourceRef
    identity: dict[str, Any]
    spacing: Spacing | None
    scale: tuple[float, ...]
    bounds: Region
    image: Region
    grid: TileGrid
    tissue: TissueMask
    active: NDArray[np.bool_]
    band: int
    key: dict[str, Any]
    warnings: tuple[str, ...]
    stamp: dict[str, Any] | None = None
    view: View | None = None
    canvas: Canvas | None = None
    shape: tuple[int, ...] = ()
    frame: Frame | None = None
    repair: Repair | None = None

    @property
    def offset(self) -> tuple[float, ...]:
        """Return where working pixel 0 begins, in level-0 pixels."""
        return self.view.offset if self.view else (0.0,) * len(self.scale)

    @cached_property
    def spacing_um(self) -> tuple[float, ...]:
        """Return the working grid's pixel size; ones where nothing is known of the input's."""
        level0 = self.spacing.um if self.spacing else (1.0,) * len(self.scale)
        return tuple(um * s for um, s in zip(level0, self.scale, strict=True))

    @property
    def tissue_mm2(self) -> float:
        """Return the area of tissue in the extent, in mm²; 0 where the spacing is unknown, and for volumes."""
        if self.spacing is None or len(self.scale) != 2:
            return 0.0
        return self.tissue.area_um2(self.spacing.um, self.level0(self.grid.extent)) / 1e6

    def level0(self, region: Region) -> Region:
        """Return a working region in level-0 pixels, rounded outwards."""
        return Region.between(
            (int(np.floor(a * s + o)) for a, s, o in zip(region.start, self.scale, self.offset, strict=True)),
            (int(np.ceil(b * s + o)) for b, s, o in zip(region.stop, self.scale, self.offset, strict=True)),
        )

    def tasks(self) -> Iterator[BlockTask]:
        """Yield a task for each block that has a tile to run."""
        for block in self.grid.blocks():
            tiles = tuple(i for i in block.tiles if self.active[i])
            if tiles:
                yield BlockTask(
                    self.name,
                    self.ref,
                    self.grid,
                    block.index,
                    tiles,
                    self.band,
                    self.image,
                    self.view,
                    self.canvas,
                    repair=self.repair.at(tiles[0]) if self.repair else None,
                )


def resolve_spec(spec: ModelSpec, settings: Settings) -> ModelSpec:
    """Return the spec with the user's tile and halo.

    Raises UsageError (WSI010) if they don't fit the model.
    """
    tile = (settings.tile,) * spec.ndim if settings.tile else spec.tile
    halo = (settings.halo,) * spec.ndim if settings.halo is not None else spec.halo
    if spec.step and any(halo):
        text = f"{spec.name} slides windows over each other ({spec.step} of a tile apart) and has no halo"
        raise UsageError("WSI010", f"{text}; leave --halo out")
    cell = tuple(t - 2 * h for t, h in zip(tile, halo, strict=True))
    if any(c < a or c % a or t % a for c, a, t in zip(cell, spec.align, tile, strict=True)):
        raise UsageError(
            "WSI010",
            f"tile {tile} with halo {halo} leaves {cell} pixels; {spec.name} wants tile and tile - 2 * halo "
            f"to be multiples of {spec.align}: for example --tile {spec.tile[0]} --halo {spec.halo[0]}",
        )
    return replace(spec, tile=tile, halo=halo)


def working_image(source: Source, spec: ModelSpec, view: View | None = None) -> WorkingImage | VolumeGrid:
    """Return `source` as the model wants to see it; `view` is `view_of` it, for a model that needs one."""
    if spec.border == "clip" and spec.compute_batch > 1:
        raise ModelError(
            "WSI334", f"{spec.name} takes tiles cut at the border, which differ in shape, in batches; take 1"
        )
    if view is not None:
        return VolumeGrid(source, view, border=spec.border, fill=spec.fill)
    return WorkingImage(
        source, spec.spacing, tolerance=spec.spacing_tolerance, border=spec.border, fill=spec.fill
    )


@final
class _OpenTiles:
    """An open input on the grid that a model works on, closed with the source if that was opened for it."""

    def __init__(self, source: Source, image: WorkingImage | VolumeGrid, *, owned: bool) -> None:
        self._source = source
        self._owned = owned
        self.read = image.read

    def close(self) -> None:
        """Let go of the source."""
        if self._owned:
            self._source.close()


def tile_image(origin: Origin, spec: ModelSpec, view: View | None = None) -> TileImage:
    """Return an input on the model's grid: a source given as such stays open when the image is closed."""
    source = origin if isinstance(origin, Source) else open_source(origin)
    return _OpenTiles(source, working_image(source, spec, view), owned=source is not origin)


def plan_input(origin: Origin, name: str, spec: ModelSpec, settings: Settings) -> Plan:
    """Return the plan of an input, which is opened for that; see `make_plan`."""
    with borrowed(origin) as source:
        ref = source.ref or SourceRef(f"memory:{name}")
        return make_plan(name, ref, source, spec, settings)


def stamp_of(origin: Origin) -> dict[str, Any] | None:
    """Return size and times of an input's files, by which a change under way is noticed."""
    with borrowed(origin) as source:
        return source.stamp()


def make_plan(name: str, ref: SourceRef, source: Source, spec: ModelSpec, settings: Settings) -> Plan:
    """Return the plan for an open source; `spec` has been resolved.

    Raises SpacingError without a usable pixel size, SourceError (WSI114) if the image is too small or has
    the wrong channels, UsageError for a region of interest outside the image.
    """
    if spec.spacing is not None:
        require_spacing(source)
    if spec.whole and settings.roi is not None:
        raise UsageError("WSI011", f"{spec.name} sees the whole image, and no --roi of it; leave that out")
    _check_shape(source, spec)
    view = view_of(source, _view_rules(spec)) if spec.viewed else None
    image = working_image(source, spec, view)
    extent = _extent(image, source.bounds, settings)
    whole = spec.step or spec.restores or spec.border == "clip"  # nothing is mirrored at the border then
    if not whole and any(n < h for n, h in zip(extent.shape, spec.halo, strict=True)):
        raise SourceError(
            "WSI114",
            f"{name}: {_times(extent.shape)} pixels at {_times(image.spacing or ())} µm is less than the margin "
            f"of {_times(spec.halo)} that {spec.name} needs; nothing to find in it",
        )
    grid = _grid(extent, spec, settings)
    tissue = _tissue(source, spec, settings)
    plan = Plan(
        name=name,
        ref=ref,
        identity=source.identity(),
        spacing=source.spacing,
        scale=image.scale,
        bounds=source.bounds,
        image=Region((0,) * source.ndim, image.shape),
        grid=grid,
        tissue=tissue,
        active=np.zeros(len(grid), bool),
        band=1,
        key={},
        warnings=(*source.warnings, *image.warnings),
        stamp=source.stamp(),
        view=view,
        canvas=_canvas(source, spec, image, view),
        shape=source.shape,
        frame=source.frame,
    )
    if spec.restores:
        plan = _with_repair(plan, source, settings)
    else:
        active = np.fromiter((tissue.touches(plan.level0(t.owned)) for t in grid), bool, len(grid))
        plan = replace(plan, active=active)
    band = max(1, round(spec.seam_um / min(plan.spacing_um)))
    return replace(plan, band=band, key=_key(plan, spec, settings))


def _with_repair(plan: Plan, source: Source, settings: Settings) -> Plan:
    """Return the plan of a model that paints: only tiles with a piece of the mask are worked on."""
    from wsitk.artifacts import artifacts_from_geojson, find_artifacts

    if isinstance(settings.roi, str):
        raise UsageError(
            "WSI683",
            "--roi with a GeoJSON is not for restoring; give x,y,width,height, or draw the --mask itself",
        )
    mask = (
        find_artifacts(source) if settings.mask == "auto" else artifacts_from_geojson(settings.mask, source)
    )
    repair = plan_repair(plan.name, mask, source.shape, plan.scale, plan.image, plan.grid)
    active = np.zeros(len(plan.grid), bool)
    active[[piece.tile for piece in repair.pieces]] = True
    return replace(plan, repair=repair, active=active, warnings=(*plan.warnings, *mask.warnings))


def _view_rules(spec: ModelSpec) -> ViewRules:
    return ViewRules(
        spec.spacing if spec.interpolation != "area" else None,
        spec.crop,
        spec.normalise,
        spec.normalise_first,
        "cubic" if spec.interpolation == "area" else spec.interpolation,
        spec.tile if spec.whole else (),
        spec.orientation,
    )


def _grid(extent: Region, spec: ModelSpec, settings: Settings) -> TileGrid:
    """Return the tiles over the extent; labels of a volume are joined layer by layer, which are its blocks."""
    block = (settings.block,) * spec.ndim
    if spec.step:
        grid = TileGrid.sliding(extent, spec.tile, spec.step, block=block)
    else:
        grid = TileGrid.fit(extent, spec.tile, spec.halo, align=spec.align, block=block)
    if spec.restores:
        return replace(grid, block=(1,) * spec.ndim)
    return replace(grid, block=(1, *grid.counts[1:])) if spec.labels else grid


def _canvas(
    source: Source, spec: ModelSpec, image: WorkingImage | VolumeGrid, view: View | None
) -> Canvas | None:
    """Return where labels are painted: the input's own voxels, those in the view's box."""
    if not spec.labels:
        return None
    return Canvas(view.crop.shape if view else source.shape, image.scale, view.apart if view else None)


def _check_shape(source: Source, spec: ModelSpec) -> None:
    if source.ndim != spec.ndim:
        raise SourceError(
            "WSI113", f"{source.name} has {source.ndim} spatial axes, {spec.name} works on {spec.ndim}"
        )
    channels = len(source.channel_names) if "c" in source.axes else 1
    dtype = source.dtype.name
    if channels != spec.channels or spec.dtype not in ("", dtype):
        names = ", ".join(source.channel_names)
        choose = f"choose some of {names} with --channels" if channels > spec.channels else "convert it"
        raise SourceError(
            "WSI130",
            f"{source.name} has {channels} channels of {dtype}, {spec.name} reads {spec.channels} of "
            f"{spec.dtype or 'any type'}; {choose}, or use a model for such images",
        )


def _extent(image: WorkingImage | VolumeGrid, bounds: Region, settings: Settings) -> Region:
    """Return the region to work on, in working pixels: scanner bounds, cut to a region of interest."""
    level0 = bounds
    if isinstance(settings.roi, tuple):
        if bounds.ndim != 2:
            raise UsageError(
                "WSI011", f"--roi {settings.roi} is for flat images; this one has {bounds.ndim} axes"
            )
        x, y, width, height = settings.roi
        level0 = bounds.intersect(Region((y, x), (height, width)))
        if not level0.size:
            raise UsageError("WSI011", f"--roi {settings.roi} lies outside the image, which covers {bounds}")
    start = (int(np.floor(a / s)) for a, s in zip(level0.start, image.scale, strict=True))
    stop = (int(np.ceil(b / s)) for b, s in zip(level0.stop, image.scale, strict=True))
    return Region.between(start, stop).intersect(Region((0,) * len(image.shape), image.shape))


def _tissue(source: Source, spec: ModelSpec, settings: Settings) -> TissueMask:
    """Return the mask that decides which tiles to run."""
    brightfield = source.ndim == 2 and source.channel_names == default_channels(3)  # not any three channels
    if source.ndim == 2 and not brightfield and not spec.whole:
        return _drawn(source, settings)
    if not brightfield or spec.whole:
        return everywhere((1,) * source.ndim, tuple(float(n) for n in source.shape))
    pixels, scale = thumbnail(source)
    shape = pixels.shape[:2]
    corner_xy = (float(source.bounds.start[1]), float(source.bounds.start[0]))
    um = source.spacing.mean * float(np.mean(scale)) if source.spacing else None
    if settings.tissue == "auto":
        mask = find_tissue(pixels, scale, um)
    elif settings.tissue == "none":
        mask = everywhere(shape, scale)
    else:
        mask = from_geojson(settings.tissue, shape, scale, corner_xy)
    if isinstance(settings.roi, str):
        return mask.both(from_geojson(settings.roi, shape, scale, corner_xy))
    return mask


def _drawn(source: Source, settings: Settings) -> TissueMask:
    """Return the regions drawn on an image that has no glass to tell tissue from; all of it without any."""
    drawn = [p for p in (settings.tissue, settings.roi) if isinstance(p, str) and p not in ("auto", "none")]
    if not drawn:
        return everywhere((1,) * source.ndim, tuple(float(n) for n in source.shape))
    step = float(max(1, max(source.shape) // 2000))
    shape = tuple(-(-n // int(step)) for n in source.shape)
    corner_xy = (float(source.bounds.start[1]), float(source.bounds.start[0]))
    masks = [from_geojson(path, shape, (step, step), corner_xy) for path in drawn]
    return masks[0].both(masks[-1])


def _key(plan: Plan, spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    """Return everything that may change a byte of this input's results."""
    return {
        "wsitk": wsitk.__version__,
        "input": plan.identity,
        "spacing": list(plan.spacing.um) if plan.spacing else None,
        "model": [spec.name, spec.version, spec.weights_sha256],
        "grid": [list(spec.tile), list(spec.halo), list(spec.align), spec.compute_batch, *_sliding(spec)],
        "settings": {k: _content(v) for k, v in settings.result_key().items()},
        **({"view": plan.view.as_json()} if plan.view else {}),
        **({"restoration": _restoration_key(plan.repair, settings)} if plan.repair else {}),
        **({"count_restored": True} if settings.count_restored else {}),
    }


def _restoration_key(repair: Repair, settings: Settings) -> dict[str, Any]:
    return {
        "mask": repair.key(),
        "samples": settings.restore_samples,
        "seed": settings.seed,
        "files": [settings.restored_image, settings.ome_tiff],
    }


def _sliding(spec: ModelSpec) -> list[float]:
    return [spec.step] if spec.step else []


def _content(value: Any) -> Any:
    """Return a file's hash in place of its name: what it says matters, not where it lies."""
    if isinstance(value, str) and Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _times(numbers: tuple[float, ...]) -> str:
    return " × ".join(f"{n:g}" for n in numbers)
