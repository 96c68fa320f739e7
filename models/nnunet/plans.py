"""What plans.json and dataset.json of nnU-Net 2 say, as far as prediction needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from wsitk.errors import ModelError
from wsitk.volumes.nnunet_rules import IntensityRule

__all__ = ["Labels", "Plan", "configuration_of", "labels_of", "plan_of", "read_json"]

LARGEST = 64 * 2**20
"""Bytes of a JSON file; plans have some kilobytes."""

SCHEMES: Mapping[str, str] = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "RescaleTo01Normalization": "unit",
    "RGBTo01Normalization": "byte",
    "NoNormalization": "none",
}

RESAMPLED = {"resampling_fn_data": 3, "resampling_fn_probabilities": 1}
"""The spline order of each step that the engine does."""


@dataclass(frozen=True)
class Plan:
    """A configuration of the plans, in the source's axes (z, y, x).

    Attributes
    ----------
    spacing_um, patch
        The working grid's spacing, and the tile.
    axes
        The network's axes as axes of the source (``transpose_forward``).
    intensities
        A rule for each channel.
    channels
        Names of the inputs, in order.
    """

    spacing_um: tuple[float, ...]
    patch: tuple[int, ...]
    axes: tuple[int, int, int]
    intensities: tuple[IntensityRule, ...]
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """A network's outputs.

    `channels` are their names, background first; with `regions`, which may overlap, there is no background and
    each output writes its label. `names` are those of the labels 1, 2, ….
    """

    channels: tuple[str, ...]
    names: tuple[str, ...]
    regions: tuple[int, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError (WSI340) if there is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("WSI340", f"{path}: {error}; wanted a model folder of nnU-Net 2, whole") from error
    if not isinstance(content, dict):
        raise ModelError(
            "WSI340", f"{path} holds a {type(content).__name__}, wanted an object; copy it again"
        )
    return content


def configuration_of(plans: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the configuration called `name`, with what it inherits.

    Raises ModelError: WSI340 if it is not there or inherits in a circle, WSI341 for a stage of a cascade.
    """
    known = plans.get("configurations")
    line: list[dict[str, Any]] = []
    wanted: Any = name
    while wanted is not None:
        here = known.get(wanted) if isinstance(known, dict) and isinstance(wanted, str) else None
        if not isinstance(here, dict) or len(line) > len(known or ()):
            raise ModelError(
                "WSI340", f"{path} has no configuration {wanted!r}, or one that inherits in a circle"
            )
        line.insert(0, here)
        wanted = here.get("inherits_from")
    whole = {key: value for each in line for key, value in each.items()}
    if whole.get("previous_stage") is not None:
        raise _unsupported(
            path, f"{name!r} needs the labels of {whole['previous_stage']!r}", "take 3d_fullres"
        )
    return whole


def plan_of(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset: Mapping[str, Any], path: Path
) -> Plan:
    """Return what the engine has to do before the network sees anything.

    Raises ModelError: WSI340 for what is missing or makes no sense, WSI341 for 2-D, and for resampling or
    normalisation that is not nnU-Net's own.
    """
    try:
        patch, spacing = configuration["patch_size"], configuration["spacing"]
        if len(patch) == 2:
            raise _unsupported(path, "a 2d configuration", "take 3d_fullres")
        axes = tuple(int(a) for a in plans.get("transpose_forward", (0, 1, 2)))
        if sorted(axes) != [0, 1, 2] or len(patch) != 3 or len(spacing) != 3:
            raise ValueError(f"transpose_forward {axes}, patch_size {patch}, spacing {spacing}")
        if not all(1 <= int(p) <= 4096 for p in patch) or not all(s > 0 and isfinite(s) for s in spacing):
            raise ValueError(f"patch_size {patch}, spacing {spacing}")
        for step, order in RESAMPLED.items():
            _check_resampling(configuration, step, order, path)
        names = dataset.get("channel_names", dataset.get("modality"))
        channels = tuple(str(names[key]) for key in sorted(names, key=int))
        return Plan(
            tuple(float(spacing[axes.index(a)]) * 1000 for a in range(3)),
            tuple(int(patch[axes.index(a)]) for a in range(3)),
            (axes[0], axes[1], axes[2]),
            tuple(_intensity(plans, configuration, k, path) for k in range(len(channels))),
            channels,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            "WSI340", f"{path}: {type(error).__name__} {error}; wanted what nnU-Net 2 plans; copy it again"
        ) from error


def _check_resampling(configuration: Mapping[str, Any], step: str, order: int, path: Path) -> None:
    """Refuse what the engine would do differently; plans from before 2.1 leave it out."""
    function = configuration.get(step, "resample_data_or_seg_to_shape")
    how = {"order": order, "order_z": 0, "force_separate_z": None, **configuration.get(f"{step}_kwargs", {})}
    got = (function, how["order"], how["order_z"], how["force_separate_z"])
    if got != ("resample_data_or_seg_to_shape", order, 0, None):
        raise _unsupported(path, f"{step} {function} {how}", f"wanted order {order}, order_z 0 and no force")


def _intensity(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], channel: int, path: Path
) -> IntensityRule:
    named = configuration["normalization_schemes"][channel]
    if named not in SCHEMES:
        raise _unsupported(path, f"normalisation {named!r}", f"wanted {', '.join(SCHEMES)}")
    scheme: Any = SCHEMES[named]
    if scheme == "ct":
        every = plans.get("foreground_intensity_properties_per_channel")
        every = every or plans["foreground_intensity_properties_by_modality"]
        known = {key: float(value) for key, value in every[str(channel)].items()}
        low, high = known["percentile_00_5"], known["percentile_99_5"]
        return IntensityRule(scheme, shift=known["mean"], scale=known["std"], low=low, high=high)
    masked = scheme == "zscore" and bool(configuration["use_mask_for_norm"][channel])
    return IntensityRule(scheme, masked=masked)


def labels_of(dataset: Mapping[str, Any], path: Path) -> Labels:
    """Return the outputs that dataset.json names. Raises ModelError (WSI340) if they make no sense."""
    labels = dataset.get("labels")
    try:
        if not isinstance(labels, dict):
            raise ValueError("no 'labels'")
        values = {str(name): value for name, value in labels.items() if name != "ignore"}
        if any(isinstance(value, list) and len(value) > 1 for value in values.values()):
            return _regions(values, dataset["regions_class_order"])
        by_label = {_label(value): name for name, value in values.items()}
        if len(by_label) < 2 or sorted(by_label) != list(range(len(values))):
            raise ValueError(f"labels are {sorted(by_label)}, wanted 0, 1, 2 … without a gap")
        names = tuple(by_label[k] for k in range(len(values)))
        return Labels(names, names[1:])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "WSI340", f"{path}: {type(error).__name__} {error}; wanted the labels of nnU-Net 2"
        ) from error


def _label(value: Any) -> int:
    if isinstance(value, list):
        (value,) = value
    return int(value)


def _regions(values: Mapping[str, Any], order: Any) -> Labels:
    """Return regions in the order of dataset.json, which is that of the outputs; background is none of them."""
    names = [n for n, v in values.items() if set(v if isinstance(v, list) else [v]) != {0}]
    written = tuple(int(label) for label in order)
    if len(names) != len(written) or not all(0 < label < 65536 for label in written):
        raise ValueError(f"{len(names)} regions, and regions_class_order {order}")
    last = dict(zip(written, names, strict=True))
    labels = tuple(last.get(k, f"label {k}") for k in range(1, max(written) + 1))
    return Labels(tuple(names), labels, written)


def _unsupported(path: Path, got: str, wanted: str) -> ModelError:
    return ModelError("WSI341", f"{path}: {got}, which wsitk doesn't run; {wanted}, or use nnU-Net itself")
