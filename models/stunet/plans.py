"""The plans that nnU-Net 1 leaves beside a checkpoint, ``NAME.model.pkl``: a pickle of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsitk.errors import ModelError
from wsitk.torchfile import read_plain
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["PlanV1", "read_plan"]

SCHEMES: Mapping[str, str] = {"nonCT": "zscore", "CT": "ct", "noNorm": "none"}


@dataclass(frozen=True)
class PlanV1:
    """What prediction needs of nnU-Net 1's plans, spacing and patch in the source's axes (z, y, x).

    `labels` are the values of the outputs behind background; `axes` and `pools` are as in the network.
    """

    trainer: str
    spacing_um: tuple[float, ...]
    patch: tuple[int, ...]
    axes: tuple[int, int, int]
    pools: tuple[tuple[int, ...], ...]
    intensities: tuple[IntensityRule, ...]
    labels: tuple[int, ...]


def read_plan(path: str | Path) -> PlanV1:
    """Return the plan in a ``.model.pkl``, of its finest stage, without unpickling it.

    Raises ModelError: WSI302, WSI303 and WSI306 as `read_plain` does, WSI340 if it holds no plans of nnU-Net 1,
    WSI341 for plans that wsitk doesn't run.
    """
    path = Path(path)
    content = read_plain(path)
    try:
        plans = content["plans"]
        stage = plans["plans_per_stage"][max(plans["plans_per_stage"])]
        axes = tuple(int(a) for a in plans["transpose_forward"])
        patch, spacing = _whole(stage["patch_size"]), [float(s) for s in stage["current_spacing"]]
        pools = tuple(_whole(pool) for pool in stage["pool_op_kernel_sizes"])
        kernels = {_whole(kernel) for kernel in stage["conv_kernel_sizes"]}
        if sorted(axes) != [0, 1, 2] or len(patch) != 3 or len(spacing) != 3 or kernels != {(3, 3, 3)}:
            raise ModelError(
                "WSI341", f"{path}: patch {patch}, spacing {spacing}, kernels {kernels}; "
                "wsitk runs STU-Net in 3-D with kernels of 3; use nnU-Net itself"
            )  # fmt: skip
        if not all(s > 0 and np.isfinite(s) for s in spacing) or not all(0 < p <= 4096 for p in patch):
            raise ValueError(f"patch {patch}, spacing {spacing}")
        return PlanV1(
            str(content["name"]),
            tuple(spacing[axes.index(a)] * 1000 for a in range(3)),
            tuple(patch[axes.index(a)] for a in range(3)),
            (axes[0], axes[1], axes[2]),
            pools,
            tuple(_intensity(plans, k, path) for k in range(int(plans["num_modalities"]))),
            _whole(plans["all_classes"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            "WSI340", f"{path} holds no plans of nnU-Net 1: {type(error).__name__} {error}; "
            "take the .model.pkl that belongs to the checkpoint"
        ) from error  # fmt: skip


def _whole(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _intensity(plans: Mapping[str, Any], channel: int, path: Path) -> IntensityRule:
    named = plans["normalization_schemes"][channel]
    if named not in SCHEMES:
        raise ModelError(
            "WSI341", f"{path}: normalisation {named!r}, wanted {', '.join(SCHEMES)}; use nnU-Net"
        )
    scheme: Any = SCHEMES[named]
    masked = scheme != "none" and bool(plans["use_mask_for_norm"][channel])
    if scheme == "ct":
        known = plans["dataset_properties"]["intensityproperties"][channel]
        low, high = float(known["percentile_00_5"]), float(known["percentile_99_5"])
        return IntensityRule(scheme, masked, float(known["mean"]), float(known["sd"]), low, high)
    return IntensityRule(scheme, masked, added=scheme == "zscore")
