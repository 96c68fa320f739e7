"""The results of a restoration: the image, what was done to it pixel by pixel and region by region, a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsitk.geometry import Region
from wsitk.journal import Journal
from wsitk.model import ModelSpec
from wsitk.objects import ObjectTable
from wsitk.plan import Plan
from wsitk.polygons import rings, to_shapely
from wsitk.repair import Repair
from wsitk.restoration.painted import Painted
from wsitk.restoration.picture import SIDE, draw_before_after
from wsitk.settings import Settings
from wsitk.sources.restored import MASK, PAINTED
from wsitk.writers.labels import LabelClass, write_ngff
from wsitk.writers.ome_tiff import write_ome_tiff
from wsitk.writers.ome_zarr import MapChannel, write_maps
from wsitk.writers.restored import KIND_COLORS, RestoredRegion, write_region_geojson, write_regions

__all__ = ["write_restoration"]

Look = Callable[..., Any]
COLORS = (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255)))
IMAGE = "restored.ome.zarr"

_ROWS = 2048  # level-0 rows of a region that are counted at once


def write_restoration(
    plan: Plan,
    spec: ModelSpec,
    journal: Journal,
    committed: Mapping[int, Mapping[str, Any]],
    folder: Path,
    look: Look,
    settings: Settings,
) -> dict[str, Any]:
    """Write everything that a restoration says of one input; return what the provenance says of it."""
    repair = plan.repair
    assert repair is not None  # every plan of a model that paints has one
    painted = Painted(repair, journal, committed)
    reasons = _reasons(committed)
    regions = [_region(plan, repair, painted, n, reasons) for n in range(len(repair.pieces))]
    done = [r for r in regions if r.status == "restored"]
    notes = {
        "model": [spec.name, spec.version, spec.weights_sha256],
        "seed": settings.seed,
        "samples": settings.restore_samples,
        "mask": repair.key(),
    }
    _write_painted(plan, painted, folder, settings, notes)
    _write_mask(plan, repair, painted, folder, done, notes)
    write_regions(folder / "restored_regions.parquet", regions, notes=notes, overwrite=True)
    corner_xy = (float(plan.bounds.start[1]), float(plan.bounds.start[0]))
    write_region_geojson(folder / "restored_regions.geojson.gz", regions, bounds_xy=corner_xy, overwrite=True)
    lost = 0
    if settings.restored_image or settings.ome_tiff:
        lost = _write_image(plan, folder, look, notes)
    if settings.ome_tiff:
        um = (plan.spacing.um[0], plan.spacing.um[1]) if plan.spacing else None
        write_ome_tiff(folder / "restored.ome.tiff", folder / IMAGE, spacing_um=um, overwrite=True)
    if settings.preview:
        _draw(plan, spec, folder, look, regions)
    return {"restoration": _facts(regions, notes, lost), "remark": _remark(regions, lost)}


def _reasons(committed: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Return for each tile why some of it was left, if any was."""
    return {tile: reason for record in committed.values() for tile, _, reason in record["tiles"] if reason}


def _region(
    plan: Plan, repair: Repair, painted: Painted, number: int, reasons: Mapping[int, str]
) -> RestoredRegion:
    """Return what is said of one piece of the mask."""
    box = repair.box_level0(number)
    pixels = 0
    for y in range(box.start[0], box.stop[0], _ROWS):
        strip = Region((y, box.start[1]), (_ROWS, box.shape[1])).intersect(box)
        pixels += int(repair.own_level0(number, strip).sum())
    area = pixels * plan.spacing.um[0] * plan.spacing.um[1] if plan.spacing else None
    change, deviation = painted.means(number) if number in painted else (None, None)
    return RestoredRegion(
        number=number,
        kinds=repair.kinds(number),
        box=box,
        outline=_outline(repair, number),
        pixels=pixels,
        area_um2=None if area is None else round(area, 3),
        status="restored" if number in painted else "left",
        reason="" if number in painted else reasons.get(repair.pieces[number].tile, ""),
        change=change,
        deviation=deviation if plan.key["restoration"]["samples"] > 1 else None,
    )


def _outline(repair: Repair, number: int) -> Any:
    """Return a piece's outline in level-0 pixels, traced on the mask's own grid."""
    start, bits = repair.shape_of(number)
    (scale_y, scale_x), (y, x) = repair.mask.scale, repair.mask.corner
    table = ObjectTable.from_labels(bits.astype(np.int32), origin=start)
    (outline,) = to_shapely(rings(table), (scale_x, scale_y), (x, y))
    return outline


def _write_painted(
    plan: Plan, painted: Painted, folder: Path, settings: Settings, notes: Mapping[str, Any]
) -> None:
    """Write the painted pixels on the model's grid, and how much samples differ."""
    spread = settings.restore_samples > 1
    channels = [MapChannel(name, color) for name, color in COLORS]
    if spread:
        channels.append(MapChannel("uncertainty", (255, 255, 255), (0.0, 64.0)))
    level0 = plan.spacing.um if plan.spacing else (1.0,) * len(plan.scale)
    centre = tuple((s - 1) / 2 * um for s, um in zip(plan.scale, level0, strict=True))
    write_maps(
        folder / PAINTED,
        plan.image.shape,
        np.uint8,
        channels,
        plan.spacing_um,
        centre,
        lambda region: painted.read(region, spread=spread),
        name="restoration",
        notes={
            **notes,
            "values": "painted colours; standard deviation over samples in grey levels; 0 elsewhere",
        },
        overwrite=True,
    )


def _write_mask(
    plan: Plan,
    repair: Repair,
    painted: Painted,
    folder: Path,
    done: list[RestoredRegion],
    notes: Mapping[str, Any],
) -> None:
    """Write which level-0 pixels were painted, by kind of artifact."""
    classes = [LabelClass(value, kind, color) for value, (kind, color) in enumerate(KIND_COLORS.items(), 1)]
    boxes = [[*r.box.start, *r.box.stop] for r in done]
    write_ngff(
        folder / MASK,
        plan.shape,
        plan.spacing.um if plan.spacing else (1.0,) * len(plan.shape),
        classes,
        painted.kinds,
        name="restored",
        notes={**notes, "scale": list(repair.scale), "boxes": boxes},
        overwrite=True,
    )


def _write_image(plan: Plan, folder: Path, look: Look, notes: Mapping[str, Any]) -> int:
    """Write the whole image with the restored pixels in it; return how many of its pixels could not be read."""
    lost = 0

    def read(region: Region) -> NDArray[Any]:
        nonlocal lost
        pixels, unread = look("wsitk.restoration.looks:restored_pixels", str(folder.absolute()), region)
        lost += unread
        return np.asarray(pixels)

    write_maps(
        folder / IMAGE,
        plan.shape,
        np.uint8,
        [MapChannel(name, color) for name, color in COLORS],
        plan.spacing.um if plan.spacing else (1.0,) * len(plan.shape),
        (0.0,) * len(plan.shape),
        read,
        name=plan.name,
        notes=notes,
        overwrite=True,
    )
    return lost


def _draw(plan: Plan, spec: ModelSpec, folder: Path, look: Look, regions: list[RestoredRegion]) -> None:
    done = [r for r in regions if r.status == "restored"]
    facts = f"regions restored: {len(done)}; left as they were: {len(regions) - len(done)}"

    def pair(region: Region) -> tuple[NDArray[Any], NDArray[Any]]:
        both: tuple[NDArray[Any], NDArray[Any]] = look(
            "wsitk.restoration.looks:before_and_after", str(folder.absolute()), region, SIDE
        )
        return both

    draw_before_after(
        folder / "before_after.png",
        regions,
        Region((0, 0), plan.shape),
        [plan.name, f"{spec.name} {spec.version}", facts],
        pair,
        spacing_um=plan.spacing.mean if plan.spacing else None,
        overwrite=True,
    )


def _facts(regions: list[RestoredRegion], notes: Mapping[str, Any], lost: int) -> dict[str, Any]:
    """Return what the provenance says: how much was painted, of what, and what was left."""
    done = [r for r in regions if r.status == "restored"]
    kinds: dict[str, int] = {}
    for region in done:
        for kind in region.kinds:
            kinds[kind] = kinds.get(kind, 0) + 1
    return {
        **notes,
        "regions": {"restored": len(done), "left": len(regions) - len(done)},
        "kinds": kinds,
        "pixels": sum(r.pixels for r in done),
        "unreadable_pixels": lost,
    }


def _remark(regions: list[RestoredRegion], lost: int) -> str:
    """Return what a person should know at once."""
    said = []
    if not regions:
        said.append("the mask is empty: nothing was restored, and every pixel is the input's own")
    left = [r for r in regions if r.status == "left"]
    if left:
        said.append(f"{len(left)} of {len(regions)} regions were left as they were ({left[0].reason})")
    if lost:
        said.append(f"WSI689 {lost:,} pixels of the input could not be read and are grey in the copy")
    return "; ".join(said)
