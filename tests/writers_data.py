"""Synthetic objects for the tests of the writers."""

from __future__ import annotations

import numpy as np
import shapely

from wsitk.model import ObjectClass
from wsitk.writers.ids import id_namespace, object_ids
from wsitk.writers.parquet import ObjectRows

CLASSES = (
    ObjectClass("Neoplastic", (255, 0, 0)),
    ObjectClass("Inflammatory", (34, 221, 77)),
    ObjectClass("Tumor: Positive", (35, 92, 236)),
)
COLUMNS = ("circularity", "max_diameter_um")
NAMESPACE = id_namespace("ab" * 32, "model", "1")


def rows_of(geometry, seed=0, **changes):
    """Return rows for the given polygons, everything else from a seeded generator."""
    rng = np.random.default_rng(seed)
    shapes = np.asarray(geometry, dtype=object)
    count = len(shapes)
    kinds = rng.integers(0, len(CLASSES), count).astype(np.int16)
    area = shapely.area(shapes)
    centre = shapely.get_coordinates(shapely.centroid(shapes)) if count else np.zeros((0, 2))
    values = {
        "id": object_ids(NAMESPACE, centre, kinds, np.rint(area).astype(np.int64)),
        "class_id": kinds,
        "probability": rng.uniform(0.3, 1, count).astype(np.float32),
        "centroid_xy": centre,
        "area_um2": (area / 16).astype(np.float32),
        "perimeter_um": (shapely.length(shapes) / 4).astype(np.float32),
        "geometry": shapes,
        "touches_unreadable": rng.random(count) < 0.1,
        "restored": rng.random(count) < 0.1,
        "columns": {name: rng.uniform(0, 20, count).astype(np.float32) for name in COLUMNS},
    }
    return ObjectRows(**(values | changes))


def blobs(count, seed=0, extent=20_000.0, vertices=20):
    """Return star-shaped polygons of nuclear size, valid, with vertices on no grid."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    radius = rng.uniform(6, 18, (count, vertices, 1))
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    xy = rng.uniform(50, extent, (count, 1, 2)) + ring
    return shapely.polygons(np.concatenate([xy, xy[:, :1]], axis=1))
