"""Where a slide is spoiled: folds, bubbles, blur, pen, dust, the coverslip's edge; found, or drawn by a person."""

from wsitk.artifacts.detector import ArtifactDetector, find_artifacts
from wsitk.artifacts.drawn import artifacts_from_geojson
from wsitk.artifacts.mask import KINDS, OTHER, ArtifactMask

__all__ = ["KINDS", "OTHER", "ArtifactDetector", "ArtifactMask", "artifacts_from_geojson", "find_artifacts"]
