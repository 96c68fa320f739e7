"""What proves a pipeline: synthetic images with known truth, models that are oracles, naive references.

Shipped for those who write models and sources. Everything is a function of its arguments and seed, in two
and in three dimensions. Torch is imported when a model is first asked for something.
"""

from __future__ import annotations

from wsitk.testing.oracles import ConstantModel, IdentityModel, NoiseModel, OracleModel
from wsitk.testing.reference import Joined, naive_fields, naive_merge, naive_objects, read_tile, run_tiles
from wsitk.testing.synthetic import SyntheticSlide, decode_labels, seam_points

__all__ = [
    "SyntheticSlide",
    "decode_labels",
    "seam_points",
    "ConstantModel",
    "IdentityModel",
    "NoiseModel",
    "OracleModel",
    "Joined",
    "run_tiles",
    "read_tile",
    "naive_fields",
    "naive_objects",
    "naive_merge",
]
