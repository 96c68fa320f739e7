"""From committed blocks to the results of an input: merge, write, draw, and say what made the bytes.

Everything is read back from the journal and streamed, so that memory does not grow with the slide, and
may be done again from the start after a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from wsitk.density import DensityMap
from wsitk.errors import ModelError
from wsitk.geometry import Region
from wsitk.journal import Journal
from wsitk.label_results import label_merger, write_labels, write_segmentation
from wsitk.model import FieldSpec, ModelSpec
from wsitk.objects import ObjectTable
from wsitk.plan import Plan
from wsitk.polygons import rings, shapes, to_shapely
from wsitk.record import provenance
from wsitk.restoration.finish import write_restoration
from wsitk.restoration.overlap import RestoredPixels, restored_pixels
from wsitk.settings import Settings
from wsitk.stitch.fields import FieldMerger, FieldPart
from wsitk.stitch.labels import LabelPart
from wsitk.stitch.objects import each_block, merge_objects
from wsitk.writers.base import atomic_file
from wsitk.writers.geojson import write_geojson
from wsitk.writers.ids import id_namespace, object_ids
from wsitk.writers.ledger import TILE_STATUSES, write_ledger
from wsitk.writers.ome_zarr import MapChannel, write_maps
from wsitk.writers.parquet import ObjectRows, ObjectWriter
from wsitk.writers.preview import draw_preview

__all__ = ["Look", "finish"]

Look = Callable[..., Any]
"""A function ``module:name`` and its arguments after the input -> what it returns of the input."""


@dataclass
class Ledger:
    """Status and reason of every tile, one byte and one (mostly shared) string each."""

    status: NDArray[np.uint8]
    reasons: dict[int, str] = field(default_factory=dict)
    foreground: float = 0.0

    @classmethod
    def read(cls, plan: Plan, committed: Mapping[int, Mapping[str, Any]]) -> Ledger:
        """Collect what the commit records say; a tile without a record was left out as background."""
        status = np.where(plan.active, TILE_STATUSES.index("not_done"), TILE_STATUSES.index("background"))
        ledger = cls(status.astype(np.uint8))
        for record in committed.values():
            for tile, name, reason in record["tiles"]:
                ledger.status[tile] = TILE_STATUSES.index(name)
                if reason:
                    ledger.reasons[tile] = reason
        means = [r["foreground"] for r in committed.values()]
        ledger.foreground = float(np.mean(means)) if means else 0.0
        return ledger

    def counts(self) -> dict[str, int]:
        """Return the number of tiles by status."""
        each = np.bincount(self.status, minlength=len(TILE_STATUSES)).tolist()
        return dict(zip(TILE_STATUSES, each, strict=True))

    def regions(self, plan: Plan, *names: str) -> list[Region]:
        """Return the owned regions (working pixels) of the tiles with one of these statuses."""
        wanted = [TILE_STATUSES.index(n) for n in names]
        return [plan.grid[int(i)].owned for i in np.flatnonzero(np.isin(self.status, wanted))]


def finish(
    plan: Plan, spec: ModelSpec, journal: Journal, folder: Path, look: Look, settings: Settings
) -> dict[str, Any]:
    """Write the results of one input into `folder` and return its provenance.

    `look` calls a function (``module:name``) on the input, wherever that may be read.
    """
    committed = journal.committed()
    ledger = Ledger.read(plan, committed)
    lost = ledger.regions(plan, "unreadable", "model_failed")
    density = DensityMap(plan.grid.extent, plan.spacing_um)
    counts: dict[str, int] = {}
    doubtful: dict[str, int] = {}
    view: dict[str, int] = {}
    if spec.objects:
        pixels = restored_pixels(plan)
        counts, doubtful = _write_objects(
            plan, spec, journal, committed, folder, lost, density, pixels, count_all=settings.count_restored
        )
        if settings.geojson and spec.ndim == 2:
            unreadable = [plan.level0(r) for r in lost]
            view = _write_geojson(plan, spec, folder, unreadable, restored_apart=not settings.count_restored)
    volumes, unwritten = {}, ""
    if spec.labels:
        load = _loader(journal, committed, f"labels:{spec.labels[0].name}:", LabelPart.from_arrays)
        merger = label_merger(plan, spec.labels[0], load)
        volumes = write_labels(plan, spec, merger, folder)
        series = look("wsitk.writers.dicom_seg:series_of")
        unwritten = write_segmentation(plan, spec, merger, folder, series)
    restoration: dict[str, Any] = {}
    if spec.restores:
        restoration = write_restoration(plan, spec, journal, committed, folder, look, settings)
    measures = {k: v for r in committed.values() for k, v in r.get("measures", {}).items()}
    if measures:
        _write_measurements(folder / "measurements.csv", measures)
    if settings.maps and _map_fields(spec):
        _write_maps(plan, spec, journal, committed, folder, density if spec.objects else None)
    write_ledger(
        folder / "tiles.parquet",
        plan.grid,
        ledger.status,
        plan.scale,
        reasons=ledger.reasons,
        offset=plan.offset,
        overwrite=True,
    )
    if settings.preview and spec.objects and spec.ndim == 2 and spec.channels == 3:
        _draw(plan, spec, folder, look, ledger, count_restored=settings.count_restored)
    body = _body(plan, spec, ledger, counts) | {"geojson": view}
    body |= restoration
    if doubtful:
        body["restored_objects"] = doubtful
        number = sum(doubtful.values())
        if number:
            body["remark"] = f"{number:,} objects in restored pixels are not counted; --count-restored does"
    if volumes:
        body |= {"labels": volumes, "remark": body["remark"] or unwritten}
    if measures:
        body["measurements"] = measures
    record = provenance(folder, body)
    journal.complete(record)
    return record


def _body(plan: Plan, spec: ModelSpec, ledger: Ledger, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "key": plan.key,
        "input": plan.identity,
        "model": {
            "name": spec.name,
            "version": spec.version,
            "weights_sha256": spec.weights_sha256,
            "licence": spec.licences.weights,
        },
        "spacing_um": list(plan.spacing.um) if plan.spacing else None,
        "spacing_from": plan.spacing.provenance if plan.spacing else None,
        "working_spacing_um": list(plan.spacing_um),
        "tissue_mm2": round(plan.tissue_mm2, 4),
        "tiles": ledger.counts(),
        "objects": dict(counts),
        "remark": _remark(plan, spec, ledger, counts),
        "warnings": list(plan.warnings),
        **({"view": plan.view.as_json()} if plan.view else {}),
    }


def _remark(plan: Plan, spec: ModelSpec, ledger: Ledger, counts: Mapping[str, int]) -> str:
    """Say why there is nothing, where there is nothing."""
    if not spec.objects or any(counts.values()):
        return ""
    tiles = ledger.counts()
    if not plan.active.any():
        return (
            f"no tissue found in {len(plan.active)} tiles (threshold {plan.tissue.threshold}); see --tissue"
        )
    return (
        f"no objects: {plan.tissue_mm2:.2f} mm² of tissue, {tiles['ok']} of {len(plan.active)} tiles ok, "
        f"mean probability {ledger.foreground:.3f}"
    )


# --- objects -----------------------------------------------------------------------------------------

SHAPE_COLUMNS = ("equivalent_diameter_um", "circularity", "solidity", "eccentricity", "max_diameter_um")


def _write_objects(
    plan: Plan,
    spec: ModelSpec,
    journal: Journal,
    committed: Mapping[int, object],
    folder: Path,
    lost: list[Region],
    density: DensityMap,
    pixels: RestoredPixels | None,
    *,
    count_all: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Stream the merged objects into `objects.parquet`; return the number of each class.

    Those in restored `pixels` are not among them unless `count_all`; their numbers come second.
    """
    counts, doubtful = (np.zeros(len(spec.classes), np.int64) for _ in range(2))
    columns = (*SHAPE_COLUMNS, *spec.object_columns)
    identity = json.dumps(plan.identity, sort_keys=True)
    namespace = id_namespace(identity, spec.name, f"{spec.version} {spec.weights_sha256}")
    load = _loader(journal, committed, "objects:", ObjectTable.from_arrays)
    with ObjectWriter(folder / "objects.parquet", spec.classes, columns, overwrite=True) as writer:
        merged = each_block if spec.exclusive else merge_objects
        for table in merged(plan.grid, load):
            outlines = rings(table)
            shape = shapes(table, (plan.spacing_um[0], plan.spacing_um[1]), outlines)
            restored = pixels.holds(table) if pixels else np.zeros(len(table), bool)
            scale_xy = (plan.scale[1], plan.scale[0])
            anchor_xy = table.anchor[:, ::-1] * scale_xy
            rows = ObjectRows(
                id=object_ids(namespace, anchor_xy, table.class_id, table.size),
                class_id=table.class_id,
                probability=table.probability,
                centroid_xy=anchor_xy,
                area_um2=shape["area_um2"],
                perimeter_um=shape["perimeter_um"],
                geometry=to_shapely(outlines, scale_xy),
                touches_unreadable=_touches(table, lost),
                restored=restored,
                columns={n: shape[n] for n in SHAPE_COLUMNS} | _in_um2(table.columns, plan.spacing_um),
            )
            writer.write(rows)
            apart = restored & (not count_all)
            density.add(table.anchor[~apart])
            counts += np.bincount(table.class_id[~apart], minlength=len(counts))
            doubtful += np.bincount(table.class_id[apart], minlength=len(counts))
    names = [c.name for c in spec.classes]
    told = dict(zip(names, counts.tolist(), strict=True))
    return told, dict(zip(names, doubtful.tolist(), strict=True)) if pixels and not count_all else {}


def _in_um2(columns: Mapping[str, NDArray[Any]], spacing_um: tuple[float, ...]) -> dict[str, NDArray[Any]]:
    """Return a model's columns, areas in micrometres instead of pixels; see `ModelSpec.object_columns`."""
    pixel = float(np.prod(spacing_um))
    return {n: v * pixel if n.endswith("_um2") else v for n, v in columns.items()}


def _touches(table: ObjectTable, regions: list[Region]) -> NDArray[np.bool_]:
    """Tell which objects' boxes meet or border on one of `regions`."""
    hit = np.zeros(len(table), bool)
    for region in regions:
        beyond = (table.start > np.array(region.stop)) | (table.start + table.shape < np.array(region.start))
        hit |= ~beyond.any(axis=1)
    return hit


def _write_geojson(
    plan: Plan, spec: ModelSpec, folder: Path, unreadable: list[Region], *, restored_apart: bool
) -> dict[str, int]:
    """Write the QuPath view; return how many objects it holds, had to mend, and could not show."""
    counts = write_geojson(
        folder / "objects.parquet",
        folder / "objects.geojson.gz",
        classes=spec.classes,
        bounds_xy=(float(plan.bounds.start[1]), float(plan.bounds.start[0])),
        unreadable=unreadable,
        restored_apart=restored_apart,
        overwrite=True,
    )
    return asdict(counts)


def _write_measurements(path: Path, measures: Mapping[str, float | None]) -> None:
    """Write numbers of the whole input, a line for each; an empty cell is what could not be measured."""
    lines = ["measurement,value", *(f"{k},{'' if v is None else repr(v)}" for k, v in measures.items())]
    with atomic_file(path, overwrite=True) as file:
        file.write(("\n".join(lines) + "\n").encode())


# --- maps --------------------------------------------------------------------------------------------


def _loader(
    journal: Journal, committed: Mapping[int, object], prefix: str, build: Callable[[dict[str, Any]], Any]
) -> Callable[[int], Any]:
    """Return a function from block number to what the journal holds of it, None where it holds nothing."""

    def load(block: int) -> Any:
        return build(journal.load(block, prefix)) if block in committed else None

    return load


@final
class _Stack:
    """All channels of all fields over a region, in the order in which they are written."""

    def __init__(
        self, mergers: list[FieldMerger], start: tuple[int, ...], density: DensityMap | None
    ) -> None:
        self._mergers = mergers
        self._start = start
        self._density = density

    def read(self, region: Region) -> NDArray[Any]:
        """Return (C, *shape); `region` counts from the extent's corner."""
        place = Region(tuple(a + b for a, b in zip(region.start, self._start, strict=True)), region.shape)
        parts = [m.read(place) for m in self._mergers]
        if self._density is not None:
            parts.append(self._density.read(region, parts[0].dtype)[None])
        return np.concatenate(parts)


def _write_maps(
    plan: Plan,
    spec: ModelSpec,
    journal: Journal,
    committed: Mapping[int, object],
    folder: Path,
    density: DensityMap | None,
) -> None:
    """Write every field, and the density of objects, as channels of `maps.ome.zarr`."""
    fields = _map_fields(spec)
    if len({f.dtype for f in fields}) > 1:
        raise ModelError("WSI335", f"the fields of {spec.name} differ in dtype; give all of them the same")
    mergers = [
        FieldMerger(plan.grid, f, _loader(journal, committed, f"field:{f.name}:", FieldPart.from_arrays))
        for f in fields
    ]
    channels = [c for f in fields for c in _channels(f, spec)]
    notes: dict[str, Any] = {"model": spec.name, "uint8": "0 to 255 stands for 0 to 1"}
    with_density = density is not None and spec.ndim == 2 and fields[0].dtype != "float32"
    if density is not None and with_density:
        density.freeze()
        channels.append(MapChannel("Density", (255, 255, 255)))
        notes["density"] = {"full_scale_per_mm2": density.full_scale_per_mm2, "sigma_um": density.sigma_um}
    level0 = plan.spacing.um if plan.spacing else (1.0,) * spec.ndim
    corner = tuple(o * um for o, um in zip(plan.offset, level0, strict=True))
    offset = zip(plan.grid.extent.start, plan.spacing_um, corner, strict=True)
    write_maps(
        folder / "maps.ome.zarr",
        plan.grid.extent.shape,
        fields[0].dtype,
        channels,
        plan.spacing_um,
        tuple((a + 0.5) * um + c for a, um, c in offset),
        _Stack(mergers, plan.grid.extent.start, density if with_density else None).read,
        notes=notes,
        overwrite=True,
    )


def _map_fields(spec: ModelSpec) -> list[FieldSpec]:
    """Return the dense outputs that are maps; labels of volumes have files of their own."""
    return [f for f in spec.fields if f not in spec.labels]


def _channels(spec: FieldSpec, model: ModelSpec) -> list[MapChannel]:
    colors = {c.name: c.color for c in model.classes}
    top = 1.0 if spec.dtype == "float32" else float(np.iinfo(spec.dtype).max)
    names = spec.channels if spec.reduction == "mean" else (spec.name,)
    return [MapChannel(n, colors.get(n, (255, 255, 255)), (0.0, top)) for n in names]


# --- picture -----------------------------------------------------------------------------------------


def _draw(
    plan: Plan, spec: ModelSpec, folder: Path, look: Look, ledger: Ledger, *, count_restored: bool
) -> None:
    pixels, scale = look("wsitk.tissue:thumbnail_of")
    draw_preview(
        folder / "preview.png",
        pixels,
        (scale[1], scale[0]),
        plan.tissue.core,
        folder / "tiles.parquet",
        folder / "objects.parquet",
        spec.classes,
        _lines(plan, spec, ledger),
        lambda region: look("wsitk.tissue:patch_of", region),
        spacing_um=plan.spacing.mean if plan.spacing else None,
        count_restored=count_restored,
        overwrite=True,
    )


def _lines(plan: Plan, spec: ModelSpec, ledger: Ledger) -> list[str]:
    """Return what the picture says: title, model, facts."""
    tiles = ledger.counts()
    missing = tiles["unreadable"] + tiles["model_failed"]
    lost = f", {missing:,} lost" if missing else ""
    lines = [plan.name, f"{spec.name} {spec.version}"]
    if plan.spacing:
        lines.append(f"Tissue: {plan.tissue_mm2:.1f} mm²")
        lines.append(f"Pixel size: {plan.spacing.mean:.4f} µm ({plan.spacing.provenance})")
    return [*lines, f"Tiles: {tiles['ok']:,} ok, {tiles['background']:,} glass{lost}"]
