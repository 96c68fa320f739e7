"""Uncertainty, for any model that can be asked several times: by dropout, by turned images, by an ensemble.

batch ──> prefix ──┬─> suffix, masks of sample 0 ─┐
          (once)   ├─> suffix, masks of sample 1 ─┼─> running means ──> mean answer, measures, object columns
                   └─> ...                        ┘   (one sample's memory)
"""

from __future__ import annotations

from wsitk.uncertainty.ensemble import Ensemble
from wsitk.uncertainty.interface import SampledModel
from wsitk.uncertainty.measures import MEASURES
from wsitk.uncertainty.objects import OBJECT_COLUMNS
from wsitk.uncertainty.sampling import MonteCarlo, Sampling
from wsitk.uncertainty.views import Views

__all__ = ["MEASURES", "OBJECT_COLUMNS", "Ensemble", "MonteCarlo", "SampledModel", "Sampling", "Views"]
