"""STU-Net's official checkpoints, ``small_ep4k.model`` to ``huge_ep4k.model``, as the engine sees them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from wsitk.errors import ModelError
from wsitk.model import Licences, ModelSpec
from wsitk.models.nnunet.labels import label_classes
from wsitk.models.nnunet.network import load_into
from wsitk.models.nnunet.volume import VolumeModel, label_field, volume_spec
from wsitk.models.stunet.network import SIZES, STUNet, config_of
from wsitk.models.stunet.plans import PlanV1, read_plan
from wsitk.settings import home
from wsitk.torchfile import TensorFile, read_tensors

__all__ = [
    "from_checkpoint",
    "is_ours",
    "stunet_base",
    "stunet_huge",
    "stunet_large",
    "stunet_small",
    "structures",
]

OFFICIAL = "https://github.com/uni-medical/STU-Net"

LICENCE = "not stated by the authors (code: Apache-2.0)"

Restore = Literal["linear", "nearest"]


def structures() -> tuple[str, ...]:
    """Return the names of the published networks' labels 1 to 104, in upstream's order (the alphabet's).

    It is not the order of TotalSegmentator's own label maps.
    """
    text = (files("wsitk.models.stunet") / "structures.txt").read_text("utf-8")
    return tuple(text.split())


def is_ours(file: TensorFile) -> bool:
    """Return whether a file's weights are of nnU-Net 1's making, of which STU-Net is what runs here."""
    return any(n.startswith("conv_blocks_context.") for n in file.tensors)


def from_checkpoint(
    path: Path, *, mirror: bool = False, step: float = 0.5, restore: Restore = "linear"
) -> VolumeModel:
    """Return the model in a checkpoint of nnU-Net 1 (``NAME.model``), with its plans ``NAME.model.pkl`` beside it.

    `mirror` averages eight flips of each tile, which takes eight times as long; upstream recommends to leave it
    out. `restore` ``nearest`` is upstream's fast mode: labels, and not probabilities, go back to the input's
    grid. Raises ModelError: WSI301 (no STU-Net, or not the one of its plans), WSI302 to WSI307 (the files),
    WSI340, WSI341 (the plans).
    """
    path = Path(path)
    file = read_tensors(path, key="state_dict")
    plan = read_plan(path.with_name(path.name + ".pkl"))
    config = config_of(file.tensors, plan.pools)
    if config is None:
        raise ModelError("WSI301", f"{path} holds no STU-Net; of nnU-Net 1 wsitk runs STU-Net only")
    if (config.channels, config.classes) != (len(plan.intensities), len(plan.labels) + 1):
        raise ModelError(
            "WSI301", f"{path} has {config.channels} inputs and {config.classes} outputs, its plans say "
            f"{len(plan.intensities)} and {len(plan.labels) + 1}; take the .pkl that belongs to it"
        )  # fmt: skip
    if any(p % d for p, d in zip(_in_network(plan), config.divisor, strict=True)):
        raise ModelError("WSI340", f"{path}.pkl: patch {plan.patch} is no multiple of {config.divisor}")
    with torch.device("meta"):
        network = STUNet(config)
    load_into(network, file)
    spec = _spec(file, plan, f"{path.name} mirror={mirror}", step, restore)
    return VolumeModel([network], spec, mirror=(0, 1, 2) if mirror else (), axes=plan.axes)


def _in_network(plan: PlanV1) -> tuple[int, ...]:
    return tuple(plan.patch[a] for a in plan.axes)


def _spec(file: TensorFile, plan: PlanV1, version: str, step: float, restore: Restore) -> ModelSpec:
    if plan.labels == tuple(range(1, 105)):
        names = structures()
    else:
        names = tuple(f"label {k}" for k in range(1, len(plan.labels) + 1))
    first = int(file.tensors["conv_blocks_context.0.0.conv1.weight"].shape[0])
    size = next((name for name, known in SIZES.items() if known.base == first), "custom")
    return volume_spec(
        f"stunet-{size}",
        version,
        spacing_um=plan.spacing_um,
        tile=plan.patch,
        channels=len(plan.intensities),
        intensities=plan.intensities,
        labels=label_field(("background", *names), softmax=True, nearest=restore == "nearest"),
        classes=label_classes(names),
        step=step,
        weights_sha256=file.sha256,
        licences=Licences("Apache-2.0", LICENCE, "TotalSegmentator 1.0: CC BY 4.0"),
    )


def stunet_small(**options: Any) -> VolumeModel:
    """Return STU-Net S, 14.6 million parameters, from its official files in the weights folder."""
    return _official("small", options)


def stunet_base(**options: Any) -> VolumeModel:
    """Return STU-Net B, 58.3 million parameters, from its official files in the weights folder."""
    return _official("base", options)


def stunet_large(**options: Any) -> VolumeModel:
    """Return STU-Net L, 440 million parameters, from its official files in the weights folder."""
    return _official("large", options)


def stunet_huge(**options: Any) -> VolumeModel:
    """Return STU-Net H, 1457 million parameters, from its official files in the weights folder."""
    return _official("huge", options)


def _official(size: str, options: dict[str, Any]) -> VolumeModel:
    path = home() / "weights" / f"{size}_ep4k.model"
    for each in (path, path.with_name(path.name + ".pkl")):
        if not each.is_file():
            raise ModelError(
                "WSI312", f"{each.name} is not in {path.parent}; download it from the links at {OFFICIAL} and put it "
                f"there (licence of the weights: {LICENCE})"
            )  # fmt: skip
    return from_checkpoint(path, **options)
