"""A model folder of nnU-Net 2, as training leaves it, to a model.

``Dataset…/TRAINER__PLANS__CONFIGURATION`` with plans.json, dataset.json and ``fold_*/checkpoint_final.pth``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsitk.errors import ModelError
from wsitk.model import Licences, ModelSpec
from wsitk.models.nnunet.labels import label_classes
from wsitk.models.nnunet.network import architecture, build_unet, load_into
from wsitk.models.nnunet.plans import Labels, Plan, configuration_of, labels_of, plan_of, read_json
from wsitk.models.nnunet.volume import VolumeModel, label_field, volume_spec
from wsitk.torchfile import TensorFile, read_tensors

__all__ = ["from_folder"]

CHECKPOINT = "checkpoint_final.pth"

UNKNOWN = "as the folder's author says"


def from_folder(
    path: str | Path,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = CHECKPOINT,
    mirror: bool = True,
    step: float = 0.5,
) -> VolumeModel:
    """Return the model in the folder `path`, in evaluation mode, float32, on the CPU.

    `folds` are numbers or ``"all"``; by default every numbered fold that has the checkpoint, otherwise
    ``fold_all``. Their logits are averaged. `mirror` predicts each tile under the flips it was trained for.
    Plain and residual-encoder U-Nets, and STU-Net's trainers. Raises ModelError: WSI340 (no such folder, or an
    incomplete one), WSI341 (2-D, cascades, networks or preprocessing that are not nnU-Net's own), WSI342
    (`dynamic-network-architectures` is missing), and WSI301 to WSI307 for the checkpoints.
    """
    path = Path(path)
    plans, dataset = read_json(path / "plans.json"), read_json(path / "dataset.json")
    chosen = _folds(path, folds, checkpoint)
    files = [read_tensors(path / f"fold_{fold}" / checkpoint, key="network_weights") for fold in chosen]
    trainer, name = _training(files[0], path)
    configuration = configuration_of(plans, name, path / "plans.json")
    plan = plan_of(plans, configuration, dataset, path / "plans.json")
    labels = labels_of(dataset, path / "dataset.json")
    networks = [_network(file, trainer, configuration, plan, labels) for file in files]
    spec = _spec(path, plan, labels, files, name, f"{','.join(map(str, chosen))} mirror={mirror}", step)
    return VolumeModel(networks, spec, mirror=_mirrored(files[0]) if mirror else (), axes=plan.axes)


def _folds(path: Path, wanted: Sequence[int | str] | None, checkpoint: str) -> list[int | str]:
    """Return the folds to average, in order."""
    here = {p.parent.name.removeprefix("fold_") for p in path.glob(f"fold_*/{checkpoint}")}
    found: list[int | str] = [*sorted(int(n) for n in here if n.isdecimal())] or [
        n for n in here if n == "all"
    ]
    chosen = found if wanted is None else list(dict.fromkeys(wanted))
    if not chosen or any(str(fold) not in here for fold in chosen):
        raise ModelError(
            "WSI340", f"{path} has {checkpoint} for folds {sorted(here)}, wanted {wanted or 'one or more'}; "
            "name folds that are there, or copy the folder again"
        )  # fmt: skip
    return chosen


def _training(file: TensorFile, path: Path) -> tuple[str, str]:
    """Return the trainer's name and the configuration's, which the checkpoint knows, or else the folder's name."""
    parts = path.resolve().name.split("__")
    arguments = file.meta.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    trainer = file.meta.get("trainer_name")
    if len(parts) == 3:
        trainer, name = trainer or parts[0], name or parts[2]
    if not isinstance(trainer, str) or not isinstance(name, str):
        raise ModelError(
            "WSI340", f"{file.path} doesn't say which configuration it is; "
            "call the folder TRAINER__PLANS__CONFIGURATION"
        )  # fmt: skip
    return trainer, name


def _mirrored(file: TensorFile) -> tuple[int, ...]:
    """Return the network's axes that it may be mirrored along; none where training had no mirroring."""
    axes = file.meta.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, list | tuple) or not set(axes) <= {0, 1, 2}:
        raise ModelError("WSI340", f"{file.path}: mirroring axes {axes!r}, wanted some of 0, 1, 2")
    return tuple(int(a) for a in axes)


def _network(
    file: TensorFile, trainer: str, configuration: Mapping[str, Any], plan: Plan, labels: Labels
) -> nn.Module:
    if trainer.startswith("STUNetTrainer"):
        return load_into(_stunet(file, configuration), file)
    try:
        name, arguments = architecture(configuration)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "WSI340",
            f"{file.path.parents[1]}/plans.json describes no network: {type(error).__name__} {error}",
        ) from error
    return load_into(build_unet(name, arguments, len(plan.channels), len(labels.channels)), file)


def _stunet(file: TensorFile, configuration: Mapping[str, Any]) -> nn.Module:
    """Return STU-Net as its trainers for version 2 build it: five of the plan's strides, ones where it has fewer."""
    from wsitk.models.stunet.network import STUNet, config_of

    strides = configuration.get("pool_op_kernel_sizes") or architecture(configuration)[1]["strides"]
    pools = [tuple(int(s) for s in stride) for stride in strides[1:6]]
    pools += [(1, 1, 1)] * (5 - len(pools))
    config = config_of(file.tensors, tuple(pools))
    if config is None:
        raise ModelError("WSI301", f"{file.path} holds no STU-Net, which its trainer's name promises")
    with torch.device("meta"):
        return STUNet(config)


def _spec(
    path: Path,
    plan: Plan,
    labels: Labels,
    files: Sequence[TensorFile],
    configuration: str,
    folds: str,
    step: float,
) -> ModelSpec:
    texts = [(path / name).read_bytes() for name in ("plans.json", "dataset.json")]
    identity = [*(file.sha256 for file in files), *(hashlib.sha256(text).hexdigest() for text in texts)]
    return volume_spec(
        path.resolve().parent.name or path.resolve().name,
        f"{configuration} {folds}",
        spacing_um=plan.spacing_um,
        tile=plan.patch,
        channels=len(plan.channels),
        intensities=plan.intensities,
        normalise_first=True,
        labels=label_field(labels.channels, softmax=False, regions=labels.regions),
        classes=label_classes(labels.names),
        step=step,
        weights_sha256=hashlib.sha256("".join(identity).encode()).hexdigest(),
        licences=Licences("Apache-2.0", UNKNOWN, UNKNOWN),
    )
